"""The job and the service on a real Ray cluster of two nodes on this machine, reached over loopback with a token.

What needs no cluster (shards, records, resuming after storage failed) is tested in this process first.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from app.errors import StartupError
from app.ray import classify_dataset
from app.ray.place import Place
from app.ray.records import classify_shard, compute_shards, engine
from app.ray.shards import JobDescription, Shards
from app.service import Service
from app.settings import Settings
from app.verdict import judge
from benchmarks.server import free_port

GIVE_UP_S = 240
REPEATS = 5
MAX_QUEUE = 20
BROKEN = {b"": "undecodable_image", b"not an image": "unsupported_image", None: "undecodable_image"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service(Settings.load(cores=1))
    yield service
    service.close()


@pytest.fixture(scope="module")
def expected(service, samples) -> dict[bytes, tuple[str, float]]:
    """Label and confidence of every sample's bytes, one by one in this process."""
    answers = {}
    for sample in samples:
        outcome = service.scheduler.submit([sample.data])[0].result()
        prediction = judge(outcome, service.metadata, index=0, filename=None, top_k=1)
        answers[sample.data] = (prediction["label"], prediction["confidence"])
    return answers


def read(output: Path, kind: str) -> list[dict[str, object]]:
    return parquet.read_table(output / kind).to_pylist()


def compute(output: Path, job: JobDescription, service: Service) -> dict[int, object]:
    shards = Shards.open(Place(str(output)), job)
    numbers = np.arange(len(shards.rows))
    rows = compute_shards({"shard": numbers}, output=str(output), job=job, settings=service.settings)["rows"]
    results = shards.results()
    assert rows.tolist() == [results[shard].rows for shard in numbers]
    return results


def write_images(folder: Path, samples) -> None:
    folder.mkdir()
    for i, sample in enumerate(samples):
        (folder / f"{i:02}.webp").write_bytes(sample.data)


def folder_job(folder: Path, service: Service, **changes: object) -> JobDescription:
    values = {"format": "images", "image_column": "image", "id_column": None, "shard_size": 4, "model_sha256": service.sha256}
    return JobDescription(input=str(folder), **(values | changes))


def test_every_file_of_a_folder_is_classified_or_rejected_with_its_reason(service, samples, expected, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    good = {f"deep/{i}.webp": sample.data for i, sample in enumerate(samples[:7])}
    bad = {
        "a.txt": b"text",
        "cut.webp": samples[0].data[:300],
        "large.png": bytes(service.settings.max_body_bytes + 1),
        "gone.png": b"",
    }
    for name, data in (good | bad).items():
        (folder / name).write_bytes(data)
    job = folder_job(folder, service)
    shards = Shards.open(Place(str(output)), job)
    (folder / "gone.png").unlink()
    results = compute(output, job, service)
    assert [len(shards.pieces(shard)) for shard in range(len(shards.rows))] == [4, 4, 3]
    assert sum(result.rows for result in results.values()) == 11
    assert {row["id"]: (row["label"], pytest.approx(row["confidence"])) for row in read(output, "classified")} == {
        name: (expected[data][0], pytest.approx(expected[data][1], abs=1e-4)) for name, data in good.items()
    }
    assert {row["id"]: row["code"] for row in read(output, "rejected")} == {
        "a.txt": "unsupported_image", "cut.webp": "undecodable_image", "large.png": "body_too_large", "gone.png": "unreadable"
    }  # fmt: skip


def test_a_second_run_computes_only_what_is_missing_damaged_or_could_not_be_read(service, samples, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    write_images(folder, samples[:16])
    job = folder_job(folder, service)
    compute(output, job, service)
    (output / "classified" / "shard-000001.parquet").write_bytes(b"PAR1")
    (output / "rejected" / "shard-000002.parquet").unlink()
    (output / "classified" / "shard-000003.parquet").write_bytes(
        (output / "classified" / "shard-000000.parquet").read_bytes()[:-9]
    )
    assert set(Shards(Place(str(output))).results()) == {0}


def test_results_of_another_listing_of_the_input_do_not_count(service, samples, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    write_images(folder, samples[:8])
    job = folder_job(folder, service)
    assert set(compute(output, job, service)) == {0, 1}
    (folder / "00a.webp").write_bytes(samples[8].data)
    (output / "manifest.parquet").unlink()  # as if a second driver had listed the input in the meantime
    assert Shards.open(Place(str(output)), job).results() == {}
    compute(output, job, service)
    assert len(read(output, "classified")) == 9


def test_rows_of_a_damaged_row_group_are_told_and_hold_up_nothing(service, samples, tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.parquet"
    parquet.write_table(pa.table({"key": range(12), "picture": [s.data for s in samples[:12]]}), path, row_group_size=4)
    job = folder_job(tmp_path / "in", service, format="parquet", image_column="picture", id_column="key")
    Shards.open(Place(str(tmp_path / "out")), job)
    column = parquet.read_metadata(path).row_group(1).column(1)
    damaged = bytearray(path.read_bytes())
    damaged[column.data_page_offset : column.data_page_offset + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    results = compute(tmp_path / "out", job, service)
    assert [results[shard].rejected["unreadable"] for shard in range(3)] == [0, 4, 0]
    assert {row["id"] for row in read(tmp_path / "out", "classified")} == {*range(4), *range(8, 12)}


def test_a_parquet_file_with_fewer_rows_or_other_columns_than_the_manifest_says_holds_up_nothing(service, samples, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    table = pa.table({"key": range(8), "image": [sample.data for sample in samples[:8]]})
    for name in "abcd":
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=4)
    job = folder_job(folder, service, format="parquet", id_column="key")
    Shards.open(Place(str(output)), job)
    parquet.write_table(table.slice(0, 7), folder / "b.parquet", row_group_size=4)
    parquet.write_table(table.rename_columns(["number", "image"]), folder / "c.parquet", row_group_size=4)
    parquet.write_table(table.set_column(0, "key", pa.array(map(str, range(8)))), folder / "d.parquet", row_group_size=4)
    results = compute(output, job, service)
    assert [(result.classified, result.rejected.total()) for result in results.values()] == [
        (4, 0), (4, 0), (4, 0), (0, 4), (0, 4), (0, 4), (4, 0), (4, 0)
    ]  # fmt: skip
    rejected = read(output, "rejected")
    assert {row["code"] for row in rejected} == {"unreadable"}
    assert {row["detail"] for row in rejected} == {
        f"{name}.parquet, row group {group}: the file has changed since the job began; use a new --output"
        for name, group in (("b", 1), ("c", 0), ("c", 1))
    }


def test_ids_that_are_no_utf8_hold_up_nothing(service, samples, tmp_path):
    offsets = pa.array([0, 1, 5, 6], pa.int32()).buffers()[1]
    ids = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"acaf\xe9b")])
    (tmp_path / "in").mkdir()
    data = [sample.data for sample in samples[:3]]
    parquet.write_table(pa.table({"key": ids, "image": data}), tmp_path / "in" / "a.parquet")
    compute(tmp_path / "out", folder_job(tmp_path / "in", service, format="parquet", id_column="key"), service)
    assert [row["id"] for row in read(tmp_path / "out", "classified")] == ["a", r"caf\xe9", "b"]


def test_ids_of_two_types_are_told_before_anything_runs(service, tmp_path):
    for name, ids in (("a", pa.array(["x"])), ("b", pa.array(["x"], pa.large_string())), ("c", pa.array([1]))):
        parquet.write_table(pa.table({"key": ids, "image": [b"x"]}), tmp_path / f"{name}.parquet")
    job = folder_job(tmp_path, service, format="parquet", id_column="key")
    with pytest.raises(StartupError, match=r"^column 'key' is string in a.parquet and int64 in c.parquet"):
        Shards.open(Place(str(tmp_path / "out")), job)


@pytest.fixture
def ended(monkeypatch) -> type[BaseException]:
    """What ends a worker's process, which is this one, is raised instead."""

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr("app.ray.records.os._exit", end)
    return Ended


def test_a_worker_whose_model_fails_on_everything_ends_and_after_ten_the_job_does(
    service, samples, tmp_path, monkeypatch, ended, capsys
):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the device is lost")

    write_images(tmp_path / "in", samples[:100])
    job = folder_job(tmp_path / "in", service, shard_size=100)
    shards = Shards.open(Place(str(tmp_path / "out")), job)
    monkeypatch.setattr(service.session, "infer", broken)
    for _ in range(9):
        with pytest.raises(ended, match=r"^70$"):
            classify_shard(shards, job, 0, service)
    assert "error: the model failed on the last" in capsys.readouterr().err
    assert not (tmp_path / "out" / "classified").exists()
    with pytest.raises(StartupError, match="10 engines failed over shard 0, one after the other; the last: the model failed"):
        classify_shard(shards, job, 0, service)
    shards.forget_failures()
    with pytest.raises(ended):
        classify_shard(shards, job, 0, service)
    monkeypatch.undo()
    assert classify_shard(shards, job, 0, service).classified == 100
    assert service.scheduler.failure() is None


def test_a_worker_that_hangs_ends(service, samples, tmp_path, monkeypatch, ended):
    go_on = threading.Event()
    infer = service.session.infer

    def hang(*arguments, **options):
        go_on.wait(30)
        return infer(*arguments, **options)

    write_images(tmp_path / "in", samples[:1])
    job = folder_job(tmp_path / "in", service)
    shards = Shards.open(Place(str(tmp_path / "out")), job)
    monkeypatch.setattr("app.ray.records._LOOK_S", 0.05)
    monkeypatch.setattr(service.scheduler, "hang_timeout_s", 0.1)
    monkeypatch.setattr(service.session, "infer", hang)
    try:
        with pytest.raises(ended, match=r"^70$"):
            classify_shard(shards, job, 0, service)
    finally:
        go_on.set()


def test_a_worker_says_in_one_line_why_it_cannot_go_on(service, samples, tmp_path):
    write_images(tmp_path / "in", samples[:1])
    job = folder_job(tmp_path / "in", service, model_sha256="0" * 64)
    Shards.open(Place(str(tmp_path / "out")), job)
    answer = compute_shards({"shard": np.array([0])}, output=str(tmp_path / "out"), job=job, settings=service.settings)
    assert answer["rows"].tolist() == [0]
    assert "is not the driver's" in answer["failure"][0]


def test_a_file_that_cannot_be_written_leaves_nothing_behind_and_is_one_line(tmp_path, monkeypatch):
    place = Place(str(tmp_path))
    synced = []
    monkeypatch.setattr(
        "app.ray.place.os.fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
    )
    place.write("a.json", b"{}")
    assert [path.name.startswith("a.json.") for path in synced] == [True]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.ray.place.os.fsync", full)
    with pytest.raises(StartupError, match=r"a\.json cannot be written: .*No space left on device$"):
        place.write("a.json", b"{ }")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.json", b"{}")]


@pytest.mark.parametrize("content", [b"", b"PAR1 and so on"])
def test_a_damaged_manifest_is_one_line(service, samples, tmp_path, content):
    write_images(tmp_path / "in", samples[:1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.parquet").write_bytes(content)
    with pytest.raises(StartupError, match=r"out/manifest\.parquet cannot be read: .*delete it, and all is computed again$"):
        Shards.open(Place(str(tmp_path / "out")), folder_job(tmp_path / "in", service))


def test_an_output_that_cannot_be_made_and_an_input_that_is_damaged_are_one_line(service, samples, tmp_path):
    write_images(tmp_path / "in", samples[:1])
    with pytest.raises(StartupError, match=r"00\.webp/out/manifest\.parquet cannot be written: .*Not a directory$"):
        Shards.open(Place(str(tmp_path / "in" / "00.webp" / "out")), folder_job(tmp_path / "in", service))
    path = tmp_path / "in" / "a.parquet"
    parquet.write_table(pa.table({"image": [b"x"]}), path)
    damaged = bytearray(path.read_bytes())
    begin = len(damaged) - 8 - int.from_bytes(damaged[-8:-4], "little")
    damaged[begin:-8] = b"\xff" * (len(damaged) - 8 - begin)
    path.write_bytes(damaged)
    with pytest.raises(StartupError, match=r"^a\.parquet in .* cannot be read, or is no Parquet file: .*$"):
        Shards.open(Place(str(tmp_path / "out")), folder_job(tmp_path / "in", service, format="parquet"))


def test_what_was_killed_while_it_wrote_is_removed_and_nothing_else(service, samples, tmp_path):
    output = tmp_path / "out"
    write_images(tmp_path / "in", samples[:1])
    job = folder_job(tmp_path / "in", service)
    compute(output, job, service)
    names = ["manifest.parquet", "summary.json", "classified/shard-000000.parquet", "rejected/shard-000000.parquet"]
    for name in names:
        (output / f"{name}.0a.unfinished").touch()
    (output / "mine.unfinished").touch()
    Shards(Place(str(output))).remove_unfinished()
    assert [path.relative_to(output).as_posix() for path in output.rglob("*.unfinished")] == ["mine.unfinished"]


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path):
    place = Place(str(tmp_path / "gone"))
    assert not list(place.files())
    assert not list(place.files(deep=False))


def test_storage_that_fails_later_is_one_line(service, samples, tmp_path):
    write_images(tmp_path / "in", samples[:1])
    output = tmp_path / "out"
    shards = Shards.open(Place(str(output)), folder_job(tmp_path / "in", service))
    (output / "failures").write_text("no folder")
    with pytest.raises(StartupError, match=r"^.*/out cannot be used: .*Not a directory"):
        shards.forget_failures()
    manifest = output / "manifest.parquet"
    size = manifest.stat().st_size
    with manifest.open("r+b") as file:
        file.write(bytes(size // 2))  # in place: the file is open
    with pytest.raises(StartupError, match=r"^.*/out cannot be used: "):
        shards.pieces(0)


def test_the_root_of_a_file_system_can_be_listed(monkeypatch):
    monkeypatch.setattr("app.ray.place.find_files", lambda folder, _: iter([f"{folder}proc/version"]))
    assert list(Place("/").files()) == ["proc/version"]


def test_the_engine_of_a_node_with_another_model_file_does_not_answer(service):
    with pytest.raises(StartupError, match="is not the driver's"):
        engine(service.settings, "0" * 64)


def test_rows_of_parquet_keep_their_ids_and_row_groups_their_shards(service, samples, expected, tmp_path):
    data = [*(sample.data for sample in samples[:5]), *BROKEN]
    ids = list(range(100, 100 + len(data)))
    (tmp_path / "in").mkdir()
    parquet.write_table(pa.table({"key": ids, "picture": data}), tmp_path / "in" / "a.parquet", row_group_size=3)
    nested = pa.table({"key": ids, "picture": [{"bytes": image, "path": "x"} for image in data]})
    parquet.write_table(nested, tmp_path / "in" / "b.parquet", row_group_size=5)
    job = folder_job(tmp_path / "in", service, format="parquet", image_column="picture", id_column="key")
    results = compute(tmp_path / "out", job, service)
    assert [results[shard].rows for shard in range(3)] == [6, 7, 3]
    rows = read(tmp_path / "out", "classified")
    assert Counter((row["id"], row["label"]) for row in rows) == Counter({(ids[i], expected[data[i]][0]): 2 for i in range(5)})
    rejected = Counter((row["id"], row["code"]) for row in read(tmp_path / "out", "rejected"))
    assert rejected == Counter({(105 + i, code): 2 for i, code in enumerate(BROKEN.values())})

    unnamed = folder_job(tmp_path / "in", service, format="parquet", image_column="picture")
    compute(tmp_path / "unnamed", unnamed, service)
    both = read(tmp_path / "unnamed", "classified") + read(tmp_path / "unnamed", "rejected")
    assert {row["id"] for row in both} == {f"{name}.parquet#{row}" for name in "ab" for row in range(8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_sha256": "0" * 64}, "holds another job"),
        ({"input": "nowhere"}, "holds no image file"),
        ({"input": "gopher://x"}, "no path or URI"),
        ({"format": "parquet"}, "holds no .parquet file"),
    ],
)
def test_a_job_that_cannot_be_done_says_why(service, samples, tmp_path, change, message):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.webp").write_bytes(samples[0].data)
    output = Place(str(tmp_path / "out"))
    if "model_sha256" in change:
        Shards.open(output, folder_job(folder, service))
    with pytest.raises(StartupError, match=message):
        Shards.open(output, JobDescription(**(vars(folder_job(folder, service)) | change)))


def test_links_are_followed_and_no_folder_is_listed_twice(service, samples, tmp_path):
    folder = tmp_path / "in"
    write_images(folder, samples[:2])
    write_images(tmp_path / "more", samples[2:3])
    (folder / "loop").symlink_to(".")
    (folder / "more").symlink_to(tmp_path / "more")
    (folder / "gone.webp").symlink_to("nothing")
    os.mkfifo(folder / "pipe.webp")  # reading it would wait for ever
    job = folder_job(folder, service)
    compute(tmp_path / "out", job, service)
    assert {row["id"] for row in read(tmp_path / "out", "classified")} == {"00.webp", "01.webp", "more/00.webp"}
    assert not read(tmp_path / "out", "rejected")


def test_names_that_are_no_utf8_are_told_before_anything_runs(service, samples, tmp_path):
    folder = tmp_path / "in"
    write_images(folder, samples[:1])
    (folder / os.fsdecode(b"caf\xe9.webp")).touch()
    with pytest.raises(StartupError, match=r"in holds files whose names are not UTF-8 \(1, caf\\xe9.webp is one\)"):
        Shards.open(Place(str(tmp_path / "out")), folder_job(folder, service))
    with pytest.raises(StartupError, match="no path or URI"):
        Place(os.fsdecode(b"caf\xe9"))


def test_what_is_done_of_many_shards_is_seen_at_once(service, samples, tmp_path, monkeypatch):
    """Names are not compared one by one with all others."""
    write_images(tmp_path / "in", samples[:1])
    shards = Shards.open(Place(str(tmp_path / "out")), folder_job(tmp_path / "in", service))
    many = 20_000
    monkeypatch.setattr(shards, "rows", [1] * many)
    compared = 0

    class Name(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    names = {kind: [Name(f"{kind}/other-{i}.parquet") for i in range(many)] for kind in ("classified", "rejected")}
    monkeypatch.setattr(shards.output, "files", lambda kind: iter(names[kind]))
    assert shards.results() == {}
    assert compared < 20 * many


@pytest.mark.parametrize(("column", "message"), [("nothing", "no column 'nothing'"), ("key", "must hold encoded images")])
def test_a_wrong_column_is_named_before_anything_runs(service, tmp_path, column, message):
    parquet.write_table(pa.table({"key": [1], "image": [b"x"]}), tmp_path / "a.parquet")
    job = folder_job(tmp_path, service, format="parquet", image_column=column)
    with pytest.raises(StartupError, match=message):
        Shards.open(Place(str(tmp_path / "out")), job)


def test_a_run_of_a_finished_job_counts_its_output_and_starts_no_cluster(service, samples, tmp_path, monkeypatch, capsys):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i, data in enumerate([samples[0].data, samples[1].data, b"broken"]):
        (folder / f"{i}.webp").write_bytes(data)
    compute(output, folder_job(folder, service), service)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    command = ["classify_dataset", "--input", str(folder), "--output", str(output), "--shard-size"]
    monkeypatch.setattr(sys, "argv", [*command, "4"])
    with pytest.raises(SystemExit, match=r"^0$"):
        classify_dataset.main()
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["classified"], summary["rejected"]) == (3, 2, {"unsupported_image": 1})
    assert summary["this_run"]["shards"] == 0
    monkeypatch.setattr(sys, "argv", [*command, "5"])
    with pytest.raises(SystemExit, match=r"error: .* holds another job .*shard_size=4"):
        classify_dataset.main()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + GIVE_UP_S
    while not condition():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """A head and a second node, each with one CPU, on loopback only; RAY_ADDRESS names it."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of Unix sockets must be short
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }.items():
            patch.setenv(name, value)
        coverage = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("COVERAGE_PROCESS")}
        from ray.cluster_utils import Cluster

        quick = {"health_check_period_ms": 1000, "health_check_initial_delay_ms": 1000}
        few = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True, "node_ip_address": "127.0.0.1"}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": quick, **few})
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        os.environ.update(coverage)  # Ray's own processes are a dozen, and would take twice as long to start
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def kill_node(node: object) -> None:
    """What a machine that loses power does: the node's daemon and all of its workers are gone at once."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    for pid in [raylet, *map(int, children)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_driver_and_a_killed_node_lose_nothing_and_double_nothing(cluster, samples, expected, tmp_path):
    data = [*(sample.data for sample in samples * REPEATS), *BROKEN]
    (tmp_path / "in").mkdir()
    table = pa.table({"key": range(len(data)), "image": data})
    parquet.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=50)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "app.ray.classify_dataset", "--input", str(tmp_path / "in"), "--output", str(output)]
    command += ["--format", "parquet", "--id-column", "key", "--shard-size", "50"]
    total = len(data) // 50 + 1

    def written() -> set[Path]:
        return set((output / "classified").glob("*.parquet"))

    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(written()) >= 3, driver)
    driver.kill()
    driver.communicate()
    first = Shards(Place(str(output))).results()
    assert 3 <= len(first) < total

    done = {shard: (output / "classified" / f"shard-{shard:06d}.parquet").stat().st_mtime_ns for shard in first}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(written()) >= len(first) + 3, driver)
    kill_node(next(iter(cluster.worker_nodes)))
    assert len(written()) < total, "too late: make the data set larger"
    stdout, stderr = driver.communicate(timeout=GIVE_UP_S)
    assert driver.returncode == 0, stderr

    summary = json.loads(stdout)
    assert summary == json.loads((output / "summary.json").read_text())
    assert (summary["images"], summary["classified"]) == (len(data), len(data) - len(BROKEN))
    assert summary["rejected"] == Counter(BROKEN.values())
    assert summary["this_run"]["shards"] == total - len(first)
    assert {shard: (output / "classified" / f"shard-{shard:06d}.parquet").stat().st_mtime_ns for shard in first} == done
    classified = {row["id"]: (row["label"], row["confidence"]) for row in read(output, "classified")}
    assert len(read(output, "classified")) == len(classified) == len(data) - len(BROKEN)
    wanted = {
        i: (expected[image][0], pytest.approx(expected[image][1], abs=1e-4)) for i, image in enumerate(data[: -len(BROKEN)])
    }
    assert classified == wanted
    assert {row["id"]: row["code"] for row in read(output, "rejected")} == {
        len(data) - len(BROKEN) + i: code for i, code in enumerate(BROKEN.values())
    }
    assert not [path for path in output.rglob("*") if path.suffix == ".unfinished"]


DRIVER = """
import os, sys
from dataclasses import replace
from app.ray import classify_dataset, records

flag = sys.argv.pop(1)

def broken(*arguments, **options):
    raise RuntimeError("the device is lost")

def compute_shards(batch, *, job, settings, **named):
    from app.ray import records
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pass
    except FileNotFoundError:
        job = replace(job, model_sha256="0" * 64)
    else:
        records.engine(settings, job.model_sha256).scheduler.session.infer = broken
    return records.compute_shards(batch, job=job, settings=settings, **named)

records.compute_shards = compute_shards
classify_dataset.main()
"""
"""The job, whose first engine breaks once it is open; or, where the flag cannot be, whose nodes have another model."""


def test_a_broken_engine_costs_a_process_and_another_model_the_job(cluster, samples, tmp_path):
    write_images(tmp_path / "in", samples[:100])
    (tmp_path / "driver.py").write_text(DRIVER)

    def run(flag: Path, output: Path) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(tmp_path / "driver.py"),
            str(flag),
            "--input",
            str(tmp_path / "in"),
            "--output",
            str(output),
        ]
        command += ["--shard-size", "50"]
        return subprocess.run(command, capture_output=True, text=True, timeout=GIVE_UP_S, check=False)

    result = run(tmp_path / "flag", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (json.loads(result.stdout)["classified"], json.loads(result.stdout)["rejected"]) == (100, {})
    (failure,) = (tmp_path / "out" / "failures").iterdir()
    assert failure.read_text().startswith("the model failed on the last")
    result = run(tmp_path / "nowhere" / "flag", tmp_path / "other")
    assert result.returncode == 1
    assert re.search(r"^error: a worker cannot go on: this node's .*; mend that and run", result.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def serve_url(cluster, repository, tmp_path_factory) -> Iterator[str]:
    """The shipped configuration on a free port, with a replica of one CPU and a short queue."""
    config = yaml.safe_load((repository / "deploy" / "ray" / "serve_config.yaml").read_text())
    config["http_options"]["port"] = free_port()
    options = config["applications"][0]["deployments"][0]["ray_actor_options"]
    options |= {"num_cpus": 1, "runtime_env": {"env_vars": {"CONVMIXER_MAX_QUEUE": str(MAX_QUEUE)}}}
    config["proxy_location"] = "HeadOnly"
    path = tmp_path_factory.mktemp("serve") / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    interruptible = ["env", "--default-signal=INT"]  # a background job would ignore it
    command = [*interruptible, sys.executable, "-m", "ray.serve.scripts", "run", str(path)]
    with (path.parent / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=repository)
    url = f"http://127.0.0.1:{config['http_options']['port']}"

    def is_ready() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/readyz").status_code == 200
        return False

    try:
        wait_until(is_ready, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(GIVE_UP_S)


def test_serve_answers_as_the_server_does(serve_url, client, samples):
    with httpx.Client(base_url=serve_url, timeout=60) as replica:
        for sample in samples[::50]:
            headers = {"Content-Type": "image/webp", "X-Request-ID": "mine"}
            answers = [c.post("/classify?top_k=2", content=sample.data, headers=headers) for c in (client, replica)]
            assert [answer.status_code for answer in answers] == [200, 200]
            direct, ours = (answer.json() for answer in answers)
            assert ours["predictions"][0]["confidence"] == pytest.approx(direct["predictions"][0]["confidence"], abs=1e-4)
            assert ours["predictions"][0]["label"] == direct["predictions"][0]["label"]
            assert (ours["model"], ours["request_id"]) == (direct["model"], "mine")
            assert answers[1].headers["x-request-id"] == "mine"
            assert "infer" in answers[1].headers["server-timing"]
        forms = [c.post("/classify", files=[("images", s.data) for s in samples[:3]]).json() for c in (client, replica)]
        assert [p["label"] for p in forms[0]["predictions"]] == [p["label"] for p in forms[1]["predictions"]]
        for body, content_type in [(b"not an image", "image/png"), (samples[0].data[:200], "image/webp"), (b"x", "text/plain")]:
            headers = {"Content-Type": content_type, "X-Request-ID": "mine"}
            direct, ours = (c.post("/classify", content=body, headers=headers) for c in (client, replica))
            assert (ours.status_code, ours.json()) == (direct.status_code, direct.json())
            assert ours.headers["content-type"] == "application/problem+json"
        assert replica.get("/readyz").json() == replica.get("/livez").json() == client.get("/readyz").json()
        card = replica.get("/model").json()
        assert (card["sha256"], card["workers"]) == (client.get("/model").json()["sha256"], 1)
        assert 'convmixer_requests_total{status="200"}' in replica.get("/metrics").text


def test_a_replica_refuses_with_its_own_503(serve_url, samples):
    files = [("images", sample.data) for sample in samples[: MAX_QUEUE + 1]]
    answer = httpx.post(f"{serve_url}/classify", files=files)
    assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
