import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from app.cores import available_cores
from app.engine.artifact import METADATA_KEY, read_verified
from app.engine.session import Session
from app.errors import StartupError


@pytest.fixture(scope="module")
def session(artifact_path):
    return Session(read_verified(artifact_path), "cpu")


@pytest.fixture(scope="module")
def images(samples):
    return np.stack([np.asarray(Image.open(s.path).convert("RGB")) for s in samples[::20]])


def test_a_batch_gives_what_its_images_give_alone(session, images):
    together = session.infer(images).logits
    alone = np.concatenate([session.infer(image[None]).logits for image in images])
    assert np.allclose(together, alone, atol=1e-4)
    assert together.dtype == np.float32


def test_every_core_at_once_gives_the_same(artifact_path, session, images):
    both = Session(read_verified(artifact_path), "cpu", cores=2)
    for image in images:
        assert np.allclose(both.infer(image[None], alone=True).logits, session.infer(image[None]).logits, atol=1e-4)
    assert np.allclose(both.infer(images).logits, session.infer(images).logits, atol=1e-4)


def test_class_maps_average_to_the_logits(session, images):
    logits, _, maps = session.infer(images, explain=True)
    plain = session.infer(images)
    assert np.allclose(logits, plain.logits, atol=1e-4)
    assert plain.class_maps is None
    cells = session.metadata.model_extra["view_size"] // 2
    assert maps.shape == (len(images), 10, cells, cells)
    bias = logits - maps.mean((2, 3))
    assert np.allclose(bias, bias[0], atol=1e-3)


def test_memory_of_large_batches_is_given_back(artifact_path, images):
    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    session = Session(read_verified(artifact_path), "cpu", cores=2)
    expected = session.infer(images[:1]).logits
    session.infer(np.concatenate([images] * 12))
    large = resident_mib()
    session.release_memory()
    assert resident_mib() < large - 16, "120 images take 31 MiB a layer's activations"
    assert np.allclose(session.infer(images[:1]).logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/docker/not-seen-from-inside", {"cpu.max": "100000 100000"}, 1),
        ("3:cpu,cpuacct:/a\n4:memory:/b\n0::/", {"cpu/a/cpu.cfs_quota_us": "90000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
        ("nonsense", {}, 2),
    ],
)
def test_the_least_quota_of_all_groups_around_this_process_holds(tmp_path, monkeypatch, membership, files, expected):
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tmp_path / "self").write_text(membership + "\n")
    monkeypatch.setattr("app.cores.CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr("app.cores.MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert available_cores() == expected


def write(path, model):
    path.write_bytes(model.SerializeToString())
    return read_verified(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_graph_of_another_shape_is_refused(artifact_path, tmp_path):
    model = onnx.load(artifact_path)
    del model.graph.output[1]
    with pytest.raises(StartupError, match="class_maps"):
        Session(write(tmp_path / "m.onnx", model))
    model = onnx.load(artifact_path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 64
    with pytest.raises(StartupError):
        Session(write(tmp_path / "m.onnx", model))
    model = onnx.load(artifact_path)
    (maker,) = (node for node in model.graph.node if "similarity" in node.output)
    maker.output[0] = "flat"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
    model.graph.node.append(onnx.helper.make_node("Unsqueeze", ["flat", "axes"], ["similarity"]))
    (similarity,) = (output for output in model.graph.output if output.name == "similarity")
    similarity.type.tensor_type.shape.dim.add().dim_value = 1
    with pytest.raises(StartupError, match="similarity"):
        Session(write(tmp_path / "m.onnx", model))


def test_answers_that_are_not_finite_stop_the_start(artifact_path, tmp_path):
    model = onnx.load(artifact_path)
    names = {t.name: t for t in model.graph.initializer}
    head = next(t for t in names.values() if list(t.dims) == [10])
    head.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), head.name))
    assert METADATA_KEY in {p.key for p in model.metadata_props}
    with pytest.raises(StartupError, match="not finite"):
        Session(write(tmp_path / "m.onnx", model))
