import hashlib
import json

import pytest

from app.engine.artifact import METADATA_KEY, parse_metadata, read_verified
from app.errors import StartupError

GOOD = {
    "contract": "convmixer-artifact/1",
    "name": "toy",
    "version": "1",
    "classes": ["a", "b"],
    "input_size": 8,
    "resize": {"mode": "pad", "filter": "lanczos"},
    "temperature": 1.5,
}


def test_hash_from_the_file_beside_it_or_from_the_setting(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"model")
    digest = hashlib.sha256(b"model").hexdigest()
    assert read_verified(path, digest).content == b"model"
    (tmp_path / "m.onnx.sha256").write_text(f"{digest}  m.onnx\n")
    assert read_verified(path).sha256 == digest
    with pytest.raises(StartupError, match="expected 0000"):
        read_verified(path, "0" * 64)
    path.write_bytes(b"Model")
    with pytest.raises(StartupError, match="damaged or not the released file"):
        read_verified(path)


def test_a_hash_file_of_windows_is_read_or_named(tmp_path):
    path, sums = tmp_path / "m.onnx", tmp_path / "m.onnx.sha256"
    path.write_bytes(b"model")
    digest = hashlib.sha256(b"model").hexdigest()
    sums.write_text(f"{digest.upper()}\r\n", encoding="utf-8-sig")
    assert read_verified(path).sha256 == read_verified(path, digest.upper()).sha256 == digest
    sums.write_text(digest, encoding="utf-16")
    with pytest.raises(StartupError, match=r"write .*m\.onnx\.sha256 \(UTF-8: sha256sum FILE"):
        read_verified(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(StartupError, match=r"gone\.onnx cannot be read"):
        read_verified(tmp_path / "gone.onnx")
    (tmp_path / "m.onnx").write_bytes(b"")
    (tmp_path / "m.onnx.sha256").write_text("")
    with pytest.raises(StartupError, match="no hash"):
        read_verified(tmp_path / "m.onnx")


def test_metadata_is_typed_and_unknown_keys_are_kept():
    metadata = parse_metadata({METADATA_KEY: json.dumps({**GOOD, "extra": [1]})})
    assert (metadata.resize.side, metadata.resize.mode, metadata.temperature) == (8, "pad", 1.5)
    assert metadata.model_dump()["extra"] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contract": "convmixer-artifact/9"}, "speaks convmixer-artifact/9"),
        ({"temperature": 0}, "temperature"),
        ({"resize": {"mode": "stretch"}}, "mode"),
        ({"resize": {"mode": "crop", "through": 9}}, "through 9 pixels a side to 8"),
        ({"resize": {"mode": "crop", "through": 0}}, "through 0 pixels"),
        ({"classes": ["only"]}, "classes"),
        ({"out_of_distribution": {"score": "magic", "threshold": 1}}, "score"),
    ],
)
def test_metadata_of_another_contract_is_refused(change, message):
    with pytest.raises(StartupError, match=message):
        parse_metadata({METADATA_KEY: json.dumps({**GOOD, **change})})


def test_a_model_without_metadata_is_refused():
    with pytest.raises(StartupError, match="convmixer-train export"):
        parse_metadata({})
