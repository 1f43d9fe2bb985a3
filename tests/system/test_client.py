"""The Python client against the real service."""

from __future__ import annotations

import asyncio
import csv
import gc
import io
import itertools
import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path
from types import FrameType

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from app.cli import main
from app.client import AsyncClient, ClassificationError, Client, ImageRejected, Prediction, Unauthorized
from app.engine.artifact import read_verified
from app.engine.session import Session
from app.images import DecodeLimits, decode_image
from benchmarks.server import ServerProcess

GIVE_UP_S = 30


@pytest.fixture(scope="module")
def service(base_url):
    with Client(base_url) as client:
        yield client


@pytest.fixture(scope="module")
def narrow():
    """A server that asks for a key and has room for four images."""
    with ServerProcess(api_keys="secret", max_queue=4, workers=1) as server:
        yield server.wait_until_ready()


@pytest.fixture(scope="module")
def labels(samples, artifact_path) -> list[str]:
    """Given in process."""
    session = Session(read_verified(artifact_path), "cpu")
    rule, limits = session.metadata.resize, DecodeLimits(10**6, 10**4)
    pixels = np.stack([decode_image(sample.data, rule, limits).pixels for sample in samples])
    return [session.metadata.classes[winner] for winner in session.infer(pixels).logits.argmax(1)]


def test_many_keep_their_order_and_a_bad_one_harms_nobody(service, samples, labels, repository, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((repository / "docs" / "images" / "cat.png").read_bytes()[:1000])
    images = [sample.path for sample in samples]
    images[17:17] = [broken]
    images[100:100] = [tmp_path / "nowhere.png"]
    images.append(np.zeros((4, 4), np.float32))
    done: list[int] = []
    results = list(service.classify_many(images, top_k=3, on_progress=done.append))
    assert [result.index for result in results] == list(range(203))
    assert [result.filename for result in results[:-1]] == [str(path) for path in images[:-1]]
    errors = {result.index: result for result in results if isinstance(result, ClassificationError)}
    assert {index: error.code for index, error in errors.items()} == {
        17: "undecodable_image",
        100: "unreadable",
        202: "unreadable",
    }
    assert errors[17].request_id
    predictions = [result for result in results if isinstance(result, Prediction)]
    assert [prediction.label for prediction in predictions] == labels
    assert all(len(prediction.top_k) == 3 and prediction.top_k[0].label == prediction.label for prediction in predictions)
    assert done == sorted(done)
    assert done[-1] == 203


def test_a_batch_of_nothing_but_bad_images(service):
    results = list(service.classify_many([b"nothing", b"less", "/nowhere", b""]))
    assert [result.code for result in results] == ["unsupported_image", "unsupported_image", "unreadable", "undecodable_image"]
    assert [result.code for result in service.classify_many([b""])] == ["undecodable_image"]
    assert list(service.classify_many([])) == []


@pytest.mark.parametrize("kind", [lambda s: s.path, lambda s: str(s.path), lambda s: s.data, lambda s: Image.open(s.path)])
def test_one_image_of_any_kind(service, samples, labels, kind):
    prediction = service.classify(kind(samples[3]))
    assert prediction.label == labels[3]
    assert prediction.model.name == service.model().name
    assert prediction.heat_map is None


def test_threads_may_share_a_client(service, samples, labels):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda sample: service.classify(sample.data).label, samples))
    assert found == labels


def test_arrays_colour_and_grey_and_a_heat_map(service, samples):
    with Image.open(samples[3].path) as image:
        colour, grey = np.asarray(image.convert("RGB")), np.asarray(image.convert("L"))
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    explained = service.classify(colour, top_k=1, explain=True)
    assert explained.confidence == pytest.approx(service.classify(samples[3].data).confidence, abs=1e-4)
    assert explained.heat_map.label == explained.label
    assert len(explained.heat_map.values) == len(explained.heat_map.values[0])
    alike = service.classify_many(np.stack([grey, grey]))
    assert [result.label for result in alike] == [service.classify(file.getvalue()).label] * 2


def test_a_bad_image_alone_is_an_exception_with_all_that_the_server_said(service):
    with pytest.raises(ImageRejected, match="not an image") as caught:
        service.classify(b"nothing")
    assert (caught.value.status, caught.value.code) == (415, "unsupported_image")
    assert re.fullmatch("[0-9a-f]{32}", caught.value.request_id)
    with pytest.raises(FileNotFoundError):
        service.classify("/nowhere.png")


def test_a_generator_without_end_is_read_as_answers_are(base_url, samples):
    taken = itertools.count()
    with Client(base_url, batch_size=4, concurrency=2) as client:
        stream = client.classify_many(samples[next(taken) % 200].data for _ in itertools.repeat(None))
        with closing(stream):
            assert [result.index for result in itertools.islice(stream, 10)] == list(range(10))
        assert next(taken) <= 10 + 4 * 2 * 2


def test_ctrl_c_at_any_call_leaves_a_client_that_can_be_closed(base_url, samples):
    """At every call of a Python function, and every return from one, in turn: there Python calls a signal's handler, too."""
    images = [sample.data for sample in samples[:2]]

    def interrupted_at(moment: int) -> bool:
        events = itertools.count()

        def trace(frame: FrameType, event: str, _: object):
            if event in {"call", "return"} and next(events) == moment:
                raise KeyboardInterrupt
            return trace

        client = Client(base_url, batch_size=1, concurrency=1)
        client.model()  # connected: asyncio warns of sockets whose opening is cancelled
        before = sys.gettrace()
        gc.disable()  # Python drops what is raised in the finalizers that a collection calls
        try:
            sys.settrace(trace)
            interrupted = len(list(client.classify_many(images))) != len(images)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
            gc.enable()
        closing = threading.Thread(target=client.close, daemon=True)
        closing.start()
        closing.join(GIVE_UP_S)
        assert not closing.is_alive(), moment
        return interrupted

    moments = next(moment for moment in itertools.count() if not interrupted_at(moment))
    assert moments > 50


def test_health_and_model(service):
    assert service.health().live
    assert service.health().ready
    model = service.model()
    assert "cat" in model.classes
    assert model.metadata["contract"]


def test_without_the_key_nothing_is_classified(narrow, samples):
    for key in (None, "wrong"):
        with Client(narrow, api_key=key) as client:
            with pytest.raises(Unauthorized) as caught:
                client.classify(samples[0].data)
            assert (caught.value.status, caught.value.code) == (401, "unauthorized")
            with pytest.raises(Unauthorized):
                list(client.classify_many(sample.data for sample in samples[:3]))


def refusals(url: str) -> float:
    found = re.search(r'^convmixer_requests_total\{status="503"\} (\S+)', httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_what_an_overloaded_server_refuses_is_sent_again_in_halves(narrow, samples, labels):
    before = refusals(narrow)
    with Client(narrow, api_key="secret", batch_size=8, concurrency=1) as client:
        results = list(client.classify_many(sample.data for sample in samples[:8]))
    assert [result.label for result in results] == labels[:8]
    assert refusals(narrow) == before + 1


def test_overload_until_the_deadline_is_reported_in_place(narrow, samples):
    with Client(narrow, api_key="secret", batch_size=5, concurrency=1) as client:
        images = [sample.data for sample in samples[:6]]
        *refused, answered = client.classify_many(images, deadline_s=0.9)
    assert {result.code for result in refused} == {"overloaded"}
    assert isinstance(answered, Prediction)


def test_the_asyncio_client_does_the_same(base_url, samples, labels):
    async def frames():
        for sample in samples[:40]:
            yield sample.data

    async def use() -> None:
        done: list[int] = []
        async with AsyncClient(base_url, batch_size=8) as client:
            assert (await client.health()).ready
            assert (await client.model()).classes
            one, another = await asyncio.gather(client.classify(samples[0].path), client.classify(samples[1].data))
            assert [one.label, another.label] == labels[:2]
            streamed = [result async for result in client.classify_many(frames(), on_progress=done.append)]
            assert [result.label for result in streamed] == labels[:40]
            assert done[-1] == 40
            paths = [*(sample.path for sample in samples[:9]), "/nowhere"]
            *good, bad = [result async for result in client.classify_many(paths)]
            assert [result.label for result in good] == labels[:9]
            assert (bad.index, bad.code) == (9, "unreadable")
            endless = client.classify_many(samples[i % 200].data for i in itertools.count())
            async with aclosing(endless):
                assert (await anext(endless)).label == labels[0]
            with pytest.raises(ImageRejected):
                await client.classify(b"nothing")

    asyncio.run(use())


def test_the_asyncio_client_tries_again(narrow, samples, labels):
    async def use() -> None:
        async with AsyncClient(narrow, api_key="secret", batch_size=5, concurrency=1) as client:
            results = [result async for result in client.classify_many(sample.data for sample in samples[:5])]
            assert [result.label for result in results] == labels[:5]
        async with AsyncClient("http://127.0.0.1:1") as client:
            with pytest.raises(Exception, match="no answer from"):
                await client.health()

    asyncio.run(use())


@pytest.fixture
def blocks(repository, base_url):
    """The code blocks of docs/client.md by language, with the running server's address."""
    text = (repository / "docs" / "client.md").read_text().replace("http://127.0.0.1:8000", base_url)
    return lambda language: re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_examples_in_python_run(blocks, repository):
    assert len(blocks("python")) >= 4
    for code in blocks("python"):
        result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{code}\n{result.stderr}"


def test_the_examples_in_the_shell_run_and_give_the_same_labels(blocks, repository, convmixer_on_path, samples, labels, tmp_path):
    """Files, folders, globs, standard input, lists, CSV, JSON lines, Parquet, a server, and the load test."""
    script = "\n".join(["set -euo pipefail", *blocks("sh")])
    for name in ("docs", "tests"):  # what the examples write stays out of the repository
        (tmp_path / name).symlink_to(repository / name)
    quick = {"CONVMIXER_WORKERS": "2", "CONVMIXER_MAX_BATCH": "4"}
    environment = {name: value for name, value in (convmixer_on_path | quick).items() if name != "TMP"}
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert not result.stderr

    expected = {str(sample.path.relative_to(repository)): label for sample, label in zip(samples, labels, strict=True)}
    with (tmp_path / "labels.csv").open() as file:
        assert {row["file"]: row["label"] for row in csv.DictReader(file)} == expected
    with (tmp_path / "birds.csv").open() as file:
        birds = {row["file"]: row["label"] for row in csv.DictReader(file)}
    assert birds == {path: label for path, label in expected.items() if "/bird/" in path}
    cats = pq.read_table(tmp_path / "cats.parquet").to_pylist()
    assert {row["file"]: row["label"] for row in cats} == {path: label for path, label in expected.items() if "/cat/" in path}
    assert all(row["error"] is None and row["top_k"][0]["label"] == row["label"] for row in cats)

    lines = result.stdout.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith('{"index"')]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    frogs = [path for path in expected if "/frog/" in path]
    initial_a = [path for path in expected if Path(path).name.startswith("a")]
    assert [row["filename"] for row in rows] == frogs + initial_a
    assert all(row["label"] == expected[row["filename"]] and len(row["top_k"]) == 2 for row in rows)
    assert sum(re.fullmatch(r"(docs/images/cat.png|-),cat,0.\d+,True,", line) is not None for line in lines) == 2

    assert sum(re.fullmatch(r" +\d+ clients? .* none", line) is not None for line in lines) == 3
    measured = json.loads("\n".join(lines[lines.index("{") :]))
    (run,) = measured["runs"]
    assert run["errors"] == {}
    assert run["requests_s"] > 0
    assert run["latency_ms"]["p50"] <= run["latency_ms"]["p90"] <= run["latency_ms"]["p99"]
    assert measured["model"]["provider"] == "cpu"


def test_the_load_test_counts_what_is_refused(narrow, repository, tmp_path, capfd, monkeypatch):
    key = tmp_path / "key"
    key.write_text("secret\n")
    options = ["--api-key-file", str(key), "--clients", "16", "--seconds", "0.3"]
    monkeypatch.setattr(sys, "argv", ["convmixer", "bench", narrow, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert re.search(r"16 clients +\d.* \d+ x 503 Service Unavailable", capfd.readouterr().out)
