"""Every setting of the service, typed, read from `CONVMIXER_*` environment variables.

A value of the wrong type, out of range, or a `CONVMIXER_*` variable that does not exist stops the start: a misspelt
limit must not silently be the default. The table in docs/settings.md is checked against this file by a test.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from app.cores import available_cores
from app.errors import StartupError

ENV_PREFIX = "CONVMIXER_"

MOST_DEADLINE_MS = 3_600_000
"""Of requests, and of the settings about them."""

_DAY_S = 86_400

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s,A-Z]+")
"""As browsers send it (RFC 6454, 6.2): no path, not even a slash, and the host in lower case."""


class Settings(BaseModel):
    """The service's settings; each field is the environment variable `CONVMIXER_` + its name in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "fast",
        description="A model that ships here (`fast`, `fast-int8`, `accurate`), or the path of an .onnx file with its .sha256 "
        "beside it.",
    )
    model_sha256: str | None = Field(
        None,
        pattern="^[0-9a-fA-F]{64}$",
        description="Expected SHA-256 of the artifact. Unset: the one in the .sha256 file beside it.",
    )
    provider: Literal["auto", "cpu", "cuda", "openvino"] = Field(
        "auto", description="Where to compute. `auto`: CUDA if it works, else the CPU; a named one refuses to start without."
    )
    precision: Literal["f32", "bf16"] = Field(
        "f32", description="What `openvino` computes in; `bf16` refuses to start on a CPU without it."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    processes: int = Field(
        1,
        ge=1,
        le=1024,
        description="Processes behind the port, each with its part of the cores; one that dies is replaced.",
    )
    cores: int = Field(
        0, ge=0, le=4096, description="Cores the engine may use. 0: the CPU quota of the container, or the machine's."
    )
    workers: int = Field(
        0, ge=0, le=256, description="Inference threads. 0: measured at start, at most one per core of the CPU quota."
    )
    max_batch: int = Field(0, ge=0, le=4096, description="Largest batch of images. 0: measured at start.")
    coalesce: bool = Field(True, description="Compute identical images (up to 64 KiB) that are in flight together once.")
    max_queue: int = Field(1024, ge=1, description="Images waiting at most; more are refused with 503.")
    deadline_ms: int = Field(
        5000, ge=1, le=MOST_DEADLINE_MS, description="Time for a request that sends no `X-Deadline-Ms`, in milliseconds."
    )
    max_deadline_ms: int = Field(
        60_000,
        ge=1,
        le=MOST_DEADLINE_MS,
        description="Most that `X-Deadline-Ms` may ask for; more is taken as this: else one could fill the queue for an hour.",
    )
    max_connections: int = Field(
        1024, ge=1, description="Open connections at most; a new one then takes the place of the one that waits longest."
    )
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1, description="Largest request body, in bytes.")
    max_held_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1,
        description="Bytes of all bodies, and of answers over 64 KiB, in memory at once; more are refused with 503.",
    )
    max_images: int = Field(128, ge=1, description="Most images in one request.")
    max_pixels: int = Field(50_000_000, ge=1, description="Most pixels of one image, checked before decoding.")
    max_side: int = Field(20_000, ge=1, description="Longest side of one image in pixels, checked before decoding.")
    receive_timeout_s: float = Field(
        30.0, gt=0, le=_DAY_S, description="Time for a request, headers and body, to arrive, in seconds."
    )
    drain_timeout_s: int = Field(20, ge=0, le=_DAY_S, description="Time for open requests to finish after SIGTERM, in seconds.")
    shutdown_delay_s: float = Field(
        0.0,
        ge=0,
        le=_DAY_S,
        description="Time to go on as before after SIGTERM, but not ready, so that a load balancer leaves first, in seconds.",
    )
    api_keys: SecretStr | None = Field(
        None,
        description="Keys, separated by commas, one of which /classify and /v2/models ask for (`Authorization: Bearer KEY`).",
    )
    api_keys_file: Path | None = Field(None, description="A file of such keys, one a line.")
    metrics_port: int | None = Field(None, ge=1, le=65535, description="Serve /metrics on this port instead of the main one.")
    cors_origins: str | None = Field(
        None, description="Origins, separated by commas, whose pages may call this service; unset: none."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe messages logged; access lines have a setting of their own."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="Log lines as JSON objects or as text; `auto`: text if standard error is a terminal."
    )
    access_log: Literal["off", "errors", "all"] = Field(
        "errors",
        description="Which requests get a log line. `errors`: those that failed, but for refusals (503), or took over 1 s.",
    )

    @classmethod
    def load(cls, **overrides: object) -> Settings:
        """Reads the environment; keyword arguments win over it.

        Raises:
            StartupError: a variable is unknown or a value does not fit; the message names each.
        """
        # pydantic-settings does this too, for a tenth of a second of every start
        variables = {ENV_PREFIX + name.upper(): name for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in variables)
        if unknown:
            raise StartupError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(variables))}")
        values = {name: os.environ[variable] for variable, name in variables.items() if variable in os.environ}
        try:
            settings = cls(**(values | overrides))
        except ValidationError as error:
            problems = (f"{ENV_PREFIX}{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}" for e in error.errors())
            raise StartupError("; ".join(problems)) from error
        if settings.metrics_port == settings.port:
            raise StartupError(f"CONVMIXER_METRICS_PORT={settings.port} is CONVMIXER_PORT, too; leave it out, or give another")
        return settings

    def contradictions(self) -> list[str]:
        """Where one of these settings undoes what another says, or asks for cores that are not there; one sentence each."""
        found = []
        if self.max_images > self.max_queue:
            found.append(
                f"CONVMIXER_MAX_IMAGES={self.max_images} is more than CONVMIXER_MAX_QUEUE={self.max_queue}: "
                "a request of more images than may wait is refused"
            )
        if self.max_body_bytes > self.max_held_bytes:
            found.append(
                f"CONVMIXER_MAX_BODY_BYTES={self.max_body_bytes} is more than CONVMIXER_MAX_HELD_BYTES={self.max_held_bytes}: "
                "a body between the two is always refused; lower the first or raise the second"
            )
        if self.deadline_ms > self.max_deadline_ms:
            found.append(
                f"CONVMIXER_DEADLINE_MS={self.deadline_ms} is more than CONVMIXER_MAX_DEADLINE_MS={self.max_deadline_ms}: "
                "a request that sends no deadline may take longer than one that asks for the most"
            )
        if self.cores > (usable := available_cores()):
            found.append(
                f"CONVMIXER_CORES={self.cores}, but this process may use {usable}: workers wait for one another; leave it out"
            )
        return found

    def keys(self) -> list[str]:
        """The API keys; none: everybody may ask.

        Raises:
            StartupError: the file cannot be read, or keys were asked for and there is none.
        """
        if self.api_keys is None and self.api_keys_file is None:
            return []
        texts = self.api_keys.get_secret_value().split(",") if self.api_keys else []
        if self.api_keys_file:
            try:
                texts += self.api_keys_file.read_text(encoding="utf-8-sig").splitlines()  # some editors write a mark first
            except (OSError, UnicodeDecodeError) as error:
                raise StartupError(f"CONVMIXER_API_KEYS_FILE={self.api_keys_file} cannot be read: {error}") from error
        keys = [key for text in texts if (key := text.strip())]
        if not keys:  # an empty file must not open the service
            raise StartupError("CONVMIXER_API_KEYS or CONVMIXER_API_KEYS_FILE is set but holds no key")
        if any("\udc80" <= letter <= "\udcff" for key in keys for letter in key):  # what os.environ makes of other bytes
            raise StartupError("CONVMIXER_API_KEYS is not UTF-8")
        return keys

    def origins(self) -> list[str]:
        """Origins whose pages may call the service.

        Raises:
            StartupError: one is none that a browser would send.
        """
        origins = [origin for text in (self.cors_origins or "").split(",") if (origin := text.strip())]
        if wrong := [origin for origin in origins if not _ORIGIN.fullmatch(origin)]:
            raise StartupError(
                f"CONVMIXER_CORS_ORIGINS: {wrong[0]!r} is no origin; write it as browsers send it, e.g. https://app.example or "
                "http://localhost:3000, without a path or a slash at the end, in lower case; * is any"
            )
        return origins

    def artifact_path(self) -> Path:
        """The .onnx file that `model` names.

        Raises:
            StartupError: it is no path of one, and no model of that name ships here.
        """
        if self.model.endswith(".onnx"):
            return Path(self.model)
        shipped = {path.stem: path for path in (Path(__file__).parent / "artifacts").glob("*.onnx")}
        if self.model not in shipped:
            raise StartupError(
                f"CONVMIXER_MODEL={self.model!r} (--model) is neither a model that ships here ({', '.join(sorted(shipped))}) nor "
                "the path of an .onnx file"
            )
        return shipped[self.model]
