"""Several processes behind one port: all answer, all are counted, and one that dies is replaced while the others go on."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import takewhile
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import onnx
import pytest
from onnx import TensorProto

from benchmarks.server import ServerProcess, free_port
from tests.png import png
from tests.waiting import wait_until
from tests.wire import classify_request, connect

GIVE_UP_S = 120


@pytest.fixture(scope="module")
def pair():
    with ServerProcess(processes=2, workers=1) as server:
        server.wait_until_ready()
        yield server


def processes(url: str) -> dict[int, float]:
    """Images inferred by process."""
    text = httpx.get(f"{url}/metrics").text
    return {int(pid): float(count) for pid, count in re.findall(r'^convmixer_images_total\{process="(\d+)"\} (\S+)', text, re.M)}


def parents(metrics: str) -> dict[str, float]:
    """Its parent's metrics, which have no label."""
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", metrics, re.M)}


def both(url: str) -> dict[int, float]:
    return wait_until(lambda: found if len(found := processes(url)) == 2 else None)


def classify(url: str, data: bytes) -> str:
    """The label, over a connection of its own; a connection that breaks is tried once more, as clients do."""
    for attempt in (1, 2):
        try:
            response = httpx.post(f"{url}/classify", content=data, headers={"Content-Type": "image/webp"}, timeout=GIVE_UP_S)
            return response.json()["predictions"][0]["label"]
        except httpx.TransportError:
            if attempt == 2:
                raise
    raise AssertionError


def test_every_process_answers_and_is_counted(pair, samples):
    url = pair.wait_until_ready()
    before = both(url)
    with ThreadPoolExecutor(16) as pool:
        labels = list(pool.map(lambda sample: classify(url, sample.data), samples[:100]))
    assert sum(label == sample.label for label, sample in zip(labels, samples, strict=False)) > 80
    # what is gathered holds for a second
    wait_until(lambda: sum(both(url).values()) - sum(before.values()) == 100, lambda: (before, both(url)))
    assert both(url).keys() == before.keys()


def test_a_killed_process_is_replaced_and_the_other_goes_on(pair, samples):
    url = pair.wait_until_ready()
    expected = classify(url, samples[0].data)
    victim = next(iter(both(url)))
    before = parents(httpx.get(f"{url}/metrics").text)
    assert before.keys() == {"convmixer_processes", "convmixer_process_replacements_total", "process_start_time_seconds"}
    assert before["convmixer_processes"] == 2
    assert before["process_start_time_seconds"] <= time.time()
    os.kill(victim, signal.SIGKILL)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: classify(url, samples[0].data), range(40))) == {expected}
    wait_until(lambda: victim not in both(url))
    assert f"process {victim} ended with -9; it is replaced" in pair.log

    def told() -> dict[str, float]:
        return parents(httpx.get(f"{url}/metrics").text)

    name = "convmixer_process_replacements_total"
    # each process gathers once a second, so one that answers may not have heard of it yet
    expected_count = before | {name: before[name] + 1}
    wait_until(lambda: told() == expected_count, told)


def test_what_cannot_start_is_not_started_again_and_again(start, tmp_path):
    server = start(processes=2, model=tmp_path / "none.onnx")
    assert server.wait() == 3
    assert "cannot be read" in server.log
    assert "it is replaced" not in server.log


def test_a_process_whose_port_another_service_has_taken_meanwhile_does_not_start():
    with socket.socket() as ours, socket.socket() as theirs:
        for opened in (ours, theirs):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # with which two may have one port until one listens
        ours.bind(("127.0.0.1", 0))
        theirs.bind(ours.getsockname())
        theirs.listen()
        command = [sys.executable, "-m", "app.cli", "serve", "--fd", str(ours.fileno())]
        ended = subprocess.run(command, pass_fds=[ours.fileno()], capture_output=True, text=True, timeout=GIVE_UP_S, check=False)
    assert ended.returncode == 3
    assert "the service does not start: cannot listen on" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_folder_whose_name_is_too_long_for_sockets_is_named(tmp_path):
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    with ServerProcess(under=["env", f"TMPDIR={folder}"], processes=2) as server:
        assert server.wait() == 3
    assert "the service does not start:" in server.log
    assert "too long a name for sockets in it; set TMPDIR to a shorter one" in server.log
    assert "Traceback" not in server.log
    assert not list(folder.iterdir())


def test_a_process_that_cannot_be_replaced_yet_takes_no_other_with_it(start, samples, artifact_path, tmp_path):
    model = tmp_path / "fast.onnx"
    shutil.copy(artifact_path.with_name("fast.onnx.sha256"), tmp_path)
    shutil.copy(artifact_path, model)
    server = start(processes=2, workers=1, model=model)
    url = server.wait_until_ready()
    first, second = both(url)
    model.unlink()
    os.kill(first, signal.SIGKILL)

    def has_tried() -> bool:
        assert classify(url, samples[0].data) == samples[0].label
        return bool(re.search(r"process \d+ ended with 3; it is replaced", server.log))

    def told() -> dict[str, float]:
        return parents(httpx.get(f"{url}/metrics").text)

    wait_until(has_tried, lambda: server.log)
    # nobody ever scrapes what does not start: its parent counts it
    wait_until(lambda: told()["convmixer_process_replacements_total"] >= 2, lambda: server.log)
    assert told()["convmixer_processes"] == 2 > len(processes(url))
    shutil.copy(artifact_path, model)
    wait_until(lambda: first not in both(url), lambda: server.log)
    assert second in both(url)
    assert server.stop() == 0


def hanging_model(folder: Path, artifact: Path) -> Path:
    """The artifact, but an image that is all white keeps the model busy for hours, outside the interpreter."""
    model = onnx.load(artifact)
    graph = model.graph
    names = [f"hang_{i}" for i in range(9)]
    integer, fraction, darkest, white, count, turns, always, zero, nothing = names
    value = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["go"], ["go_on"]), onnx.helper.make_node("Add", ["sum", "sum"], ["next"])],
        "turn",
        [value("turn", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("sum", TensorProto.FLOAT, [])],
        [value("go_on", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, [])],
    )
    (logits,) = [node for node in graph.node if "logits" in node.output]
    logits.output[list(logits.output).index("logits")] = "hang_logits"
    constants = ((fraction, 255, TensorProto.INT64), (count, 10**15, TensorProto.INT64), (always, True, TensorProto.BOOL))
    graph.initializer.extend(onnx.helper.make_tensor(name, kind, [], [number]) for name, number, kind in constants)
    graph.initializer.append(onnx.helper.make_tensor(zero, TensorProto.FLOAT, [], [0.0]))
    graph.node.extend(
        [
            onnx.helper.make_node("Cast", ["images"], [integer], to=TensorProto.INT64),
            onnx.helper.make_node("ReduceMin", [integer], [darkest], keepdims=0),
            onnx.helper.make_node("Div", [darkest, fraction], [white]),
            onnx.helper.make_node("Mul", [white, count], [turns]),
            onnx.helper.make_node("Loop", [turns, always, zero], [nothing], body=body),
            onnx.helper.make_node("Add", ["hang_logits", nothing], ["logits"]),
        ]
    )
    path = folder / "hangs.onnx"
    onnx.save(model, path)
    path.with_name("hangs.onnx.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize("way", ["alone, in the event loop", "in a worker"])
def test_a_process_whose_model_hangs_is_replaced_and_the_other_goes_on(start, samples, artifact_path, tmp_path, way):
    picture = png("white", (32, 32))
    # one image a batch: beside another, which is not white, it would be no reason to hang
    server = start(processes=2, workers=1, max_batch=1, model=hanging_model(tmp_path, artifact_path))
    url = server.wait_until_ready()
    expected = classify(url, samples[0].data)
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=url, timeout=GIVE_UP_S) as client:
        if way == "in a worker":
            hung = pool.submit(client.post, "/classify", files={"images": picture})
        else:
            hung = pool.submit(client.post, "/classify", content=picture, headers={"Content-Type": "image/png"})

        def is_seen() -> bool:
            if way != "in a worker":  # then it takes no more connections, either
                assert classify(url, samples[0].data) == expected
            return "a worker has been busy with one image or batch" in server.log

        wait_until(is_seen, lambda: server.log)
        assert isinstance(hung.exception(GIVE_UP_S), httpx.TransportError)
    wait_until(lambda: "ended with 70; it is replaced" in server.log, lambda: server.log)
    assert classify(url, samples[0].data) == expected
    assert server.stop() == 0


def test_a_lone_process_whose_model_hangs_ends_itself(start, artifact_path, tmp_path):
    """Docker restarts what ends, and nothing else."""
    picture = png("white", (32, 32))
    server = start(workers=1, model=hanging_model(tmp_path, artifact_path))
    url = server.wait_until_ready()
    with pytest.raises(httpx.TransportError):
        httpx.post(f"{url}/classify", files={"images": picture}, timeout=GIVE_UP_S)
    assert server.wait() == 70
    assert "busy with one image or batch" in server.log
    assert "ends with exit code 70" in server.log


def test_new_clients_do_not_wait_while_an_upload_is_finished(start, samples):
    server = start(processes=2, workers=1)
    url = server.wait_until_ready()
    address = urlsplit(url)
    wire = classify_request(samples[0].data)
    with connect(url) as connection:
        connection.sendall(wire[:-1])
        httpx.get(f"{url}/livez")
        server.process.send_signal(signal.SIGTERM)
        give_up = time.monotonic() + 10  # less than the time to drain
        while can_connect(address.hostname, address.port):
            assert time.monotonic() < give_up
        connection.sendall(wire[-1:])
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert server.wait() == 0


def can_connect(host: str, port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((host, port)) == 0


def test_processes_are_those_of_this_installation_wherever_it_is_started(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text("raise SystemExit('another app')")
    command = [Path(sys.executable).with_name("convmixer"), "serve"]
    environment = os.environ | {"CONVMIXER_PORT": "0", "CONVMIXER_PROCESSES": "2"}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        log = list(takewhile(lambda line: "Uvicorn running" not in line, process.stderr))
        process.terminate()
        log += process.stderr
    assert process.returncode == 0, log


def test_the_metrics_port_takes_a_few_connections_and_waits_for_none(start):
    server = start(processes=2, metrics_port=(port := free_port()))
    server.wait_until_ready()
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(20)]
        assert [connection.recv(1) for connection in silent[4:]] == [b""] * 16
        silent[0].sendall(b"G")  # whoever goes on gains no time by it
        assert [connection.recv(1) for connection in silent[:4]] == [b""] * 4
    assert httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).status_code == 200
    assert server.stop() == 0
    assert "Traceback" not in server.log


def test_the_metrics_port_tells_of_all(start):
    with httpx.Client() as client:
        server = start(processes=2, metrics_port=(port := free_port()))
        url = server.wait_until_ready()
        assert client.get(f"{url}/metrics").status_code == 404

        def told() -> str:
            return client.get(f"http://127.0.0.1:{port}/metrics").text

        wait_until(lambda: len(set(re.findall(r'process="(\d+)"', told()))) == 2, told)
        assert parents(told())["convmixer_processes"] == 2
        assert server.stop() == 0


def test_processes_whose_parent_was_killed_leave(start):
    server = start(processes=2, workers=1)
    pids = both(server.wait_until_ready())
    server.process.kill()
    server.process.wait(GIVE_UP_S)
    all_left = server.log_has_ended(GIVE_UP_S)
    for pid in () if all_left else pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    assert all_left


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_is_a_graceful_end(processes):
    with ServerProcess(under=("setsid",), processes=processes, workers=1) as server:
        try:
            server.wait_until_ready()
            os.killpg(server.process.pid, signal.SIGINT)
            assert server.wait() == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
    assert "Traceback" not in server.log
    assert "it is replaced" not in server.log
