"""A checkpoint comes back as it went in, and whatever happens to a write, the last good file stays."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint import FORMAT, Checkpoint, CheckpointError, build_model, load_checkpoint, save_checkpoint
from model.convmixer import ConvMixer
from tests.disk import files_of_at_most

CLASSES = ["cat", "dog", "ship"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


def test_tensors_and_description_come_back(path: Path) -> None:
    tensors = {
        "weight": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "view": torch.arange(12).view(3, 4).t(),
        "scalar": torch.tensor(7.5),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(3),
        "graph": torch.ones(2, requires_grad=True) * 2,
    }
    description = {"name": "ключ ✓", "nested": {"list": [1, 2.5, None, True]}}
    save_checkpoint(path, tensors, description)
    loaded = load_checkpoint(path)
    assert loaded.description == description
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert json.loads(path.with_suffix(".json").read_text()) == description, "a copy for people"
    assert sorted(p.name for p in path.parent.iterdir()) == ["net.json", "net.safetensors"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "net.safetensors"
    save_checkpoint(path, {"t": torch.ones(1)}, {})
    assert load_checkpoint(path).tensors["t"] == 1


def test_a_rebuilt_network_answers_the_same(path: Path, released: Callable[..., Checkpoint]) -> None:
    checkpoint = released(CLASSES, 32)
    save_checkpoint(path, checkpoint.tensors, checkpoint.description)
    net = build_model(load_checkpoint(path))
    assert not net.training
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(images), build_model(checkpoint)(images))


def test_missing_file(path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no checkpoint at {path}"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_truncated_file(path: Path, kept: float) -> None:
    save_checkpoint(path, {"t": torch.randn(100)}, {"a": 1})
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept == 0.5 else int(kept)])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_checkpoint(path)


def test_pickles_are_not_opened(path: Path) -> None:
    torch.save({"t": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_checkpoint(path)


@pytest.mark.parametrize("header", [None, {"format": "pt"}, {"format": FORMAT + "0"}])
def test_foreign_safetensors(path: Path, header: dict[str, str] | None) -> None:
    save_file({"t": torch.ones(1)}, path, header)
    with pytest.raises(CheckpointError, match="not a checkpoint of format convmixer-checkpoint/1"):
        load_checkpoint(path)


@pytest.mark.parametrize("header", [{}, {"description": "{"}])
def test_damaged_description(path: Path, header: dict[str, str]) -> None:
    save_file({"t": torch.ones(1)}, path, {"format": FORMAT, **header})
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [{"model": {"hidden_dim": 8}}, {"model": {"hidden_dim": 16, "layers": 2}}, {"model": {"depth": 0}}],
    ids=["other shapes", "unknown key", "bad value"],
)
def test_weights_that_do_not_fit_the_description(released: Callable[..., Checkpoint], change: dict[str, Any]) -> None:
    checkpoint = released(CLASSES, 32)
    with pytest.raises(CheckpointError, match="the checkpoint does not hold the network that it describes"):
        build_model(Checkpoint(checkpoint.tensors, {**checkpoint.description, **change}))


def test_a_description_without_architecture(random_net: Callable[..., ConvMixer]) -> None:
    with pytest.raises(CheckpointError, match=r"the checkpoint describes no network.*model\.safetensors"):
        build_model(Checkpoint(random_net().state_dict(), {"step": 3}))


def test_a_new_file_replaces_the_old_one_in_one_move(path: Path) -> None:
    save_checkpoint(path, {"t": torch.ones(1000)}, {"step": 1})
    whole = path.read_bytes()
    with path.open("rb") as reader:
        save_checkpoint(path, {"t": torch.zeros(1000)}, {"step": 2})
        assert reader.read() == whole, "a file once published never changes"
    assert load_checkpoint(path).description == {"step": 2}


def test_a_reader_beside_a_run_that_saves_sees_one_whole_file(path: Path) -> None:
    """An evaluation, or a test that kills the run, may open the file at the moment another takes its name."""
    versions = []
    for step, size in enumerate((1, 300)):
        version = path.with_name(str(step))
        save_checkpoint(version, {"t": torch.full((size,), float(step))}, {"step": step, "long": "x" * size})
        versions.append(version)
    finished = threading.Event()

    def keep_replacing() -> None:
        for version in itertools.cycle(versions):
            link = path.with_name("link")
            link.hardlink_to(version)
            link.replace(path)
            link.unlink(missing_ok=True)  # a rename onto the same file is none
            if finished.is_set():
                return

    shutil.copy(versions[0], path)
    writer = threading.Thread(target=keep_replacing)
    writer.start()
    try:
        for _ in range(2000):
            checkpoint = load_checkpoint(path)
            assert float(checkpoint.tensors["t"][0]) == checkpoint.description["step"]
    finally:
        finished.set()
        writer.join()


def test_a_failed_write_leaves_the_old_file(path: Path) -> None:
    save_checkpoint(path, {"t": torch.ones(1000)}, {"step": 1})
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with files_of_at_most(10_000), pytest.raises(OSError, match=r"net\.safetensors"):
        save_checkpoint(path, {"t": torch.ones(100_000)}, {"step": 2})
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_without_room_for_its_copy_a_checkpoint_is_complete(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(path, {"t": torch.ones(1)}, {"step": 1})
    description = {"step": 2, "history": [0] * 2000}  # on lines of their own twice as long as in the header
    with files_of_at_most(10_000):
        save_checkpoint(path, {"t": torch.zeros(1)}, description)
    assert load_checkpoint(path) == Checkpoint({"t": torch.zeros(1)}, description)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "neither half a copy nor that of the checkpoint before"
    assert "net.json could not be written: File too large; the checkpoint is complete" in capsys.readouterr().err


def test_a_folder_in_the_place_of_the_copy_is_left_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.with_suffix(".json").mkdir()
    save_checkpoint(path, {"t": torch.ones(1)}, {"step": 1})
    assert load_checkpoint(path).description == {"step": 1}
    assert sorted(p.name for p in path.parent.iterdir()) == ["net.json", "net.safetensors"]
    assert "net.json could not be written: Is a directory" in capsys.readouterr().err


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("stays")
    with pytest.raises(OSError, match=r"net\.safetensors"):
        save_checkpoint(path, {"t": torch.ones(1)}, {})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert (path / "precious").read_text() == "stays"


KILLS = """
import os, signal, sys, time
from pathlib import Path
import torch
from model.checkpoint import load_checkpoint, save_checkpoint

torch.set_num_threads(1)  # a forked child has no other
path = Path(sys.argv[1])

def save(step):
    save_checkpoint(path, {"t": torch.full((200_000,), float(step))}, {"step": step})

begin = time.monotonic()
save(0)
took_s, last = time.monotonic() - begin, 0
for moment in range(20):
    writer = os.fork()
    if not writer:
        for step in range(last + 1, last + 200):  # it ends, too, if nobody is left to kill it
            save(step)
        os._exit(0)
    time.sleep(took_s * moment / 10)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    checkpoint = load_checkpoint(path)
    step = checkpoint.description["step"]
    assert step >= last, f"{step} after {last}"
    assert (checkpoint.tensors["t"] == step).all()
    last = step
assert last > 0, "nobody came to the end of a save"
"""


def test_kills_spread_over_the_time_of_two_saves_leave_a_whole_file(path: Path, repository: Path) -> None:
    kills = subprocess.run([sys.executable, "-c", KILLS, str(path)], cwd=repository, capture_output=True, text=True, check=False)
    assert kills.returncode == 0, kills.stderr


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    written = []
    monkeypatch.setattr(os, "fsync", lambda file: written.append((str(Path(f"/proc/self/fd/{file}").readlink()), path.exists())))
    save_checkpoint(path, {"x": torch.zeros(1)}, {})
    assert (f"{path}.tmp", False) in written
    assert path.exists()
