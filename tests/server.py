"""A socket with prepared answers, in a server's place."""

from __future__ import annotations

import json
import socket
import threading


class ScriptedServer:
    """Answers each connection's one request with the next of the given answers; `None` closes without one.

    Attributes:
        received: head of each request, in lower case.
    """

    def __init__(self, *answers: tuple[int, dict[str, str], object] | None) -> None:
        self.received: list[str] = []
        self._answers = answers
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _ = self._socket.accept()
            with connection, connection.makefile("rb") as stream:
                head = "".join(iter(lambda: stream.readline().decode(), "\r\n")).lower()
                stream.read(int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0))
                self.received.append(head)
                if answer:
                    status, headers, body = answer
                    content = json.dumps(body).encode() if not isinstance(body, bytes) else body
                    headers = headers | {"Content-Length": str(len(content)), "Connection": "close"}
                    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                    connection.sendall(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + content)
        self._socket.close()

    def finish(self) -> list[str]:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.received
