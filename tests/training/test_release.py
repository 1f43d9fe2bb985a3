"""What ships says where it comes from, and nothing ships without its evaluation."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model.checkpoint import load_checkpoint
from model.errors import ExportError
from model.export import METADATA_KEY
from tests.training.conftest import CIFAR10, QUIET, TINY
from training.calibrate import recalibrate
from training.data import ImageSet, load_images
from training.errors import DataError
from training.evaluate import evaluate
from training.release import export_artifact, load_evaluation, write_card_for
from training.report import _markdown, render_card, write_card
from training.train import train

NAMED = {"name": "tiny", "version": "9.8.7", "command": "convmixer-train train --preset cpu"}


@pytest.fixture(scope="module")
def artifact(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tiny.onnx"
    export_artifact(evaluated, path, CIFAR10, **NAMED)
    return path


def metadata(artifact: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads({p.key: p.value for p in onnx.load(artifact).metadata_props}[METADATA_KEY])
    return found


@pytest.mark.parametrize(("what", "text"), [("name", "mine/first"), ("name", ""), ("version", "1.0\n")])
def test_a_name_that_no_address_could_hold_is_refused(evaluated: Path, tmp_path: Path, what: str, text: str) -> None:
    with pytest.raises(ExportError, match=f"{what} .* no address could name it"):
        export_artifact(evaluated, tmp_path / "tiny.onnx", CIFAR10, **{**NAMED, what: text})
    assert not list(tmp_path.iterdir())


def test_a_card_leaves_out_what_says_nothing(artifact: Path, evaluated: Path) -> None:
    """The command that nobody gave, and how often one of at most five classes is among the first five."""
    description, evaluation, found = load_checkpoint(evaluated).description, load_evaluation(evaluated), metadata(artifact)
    full = _markdown(description, evaluation, found, "tiny")
    assert f"Made by:\n\n    {NAMED['command']}\n" in full
    assert "top-5" in full
    few = _markdown({**description, "classes": description["classes"][:5]}, evaluation, {**found, "command": ""}, "tiny")
    assert "Made by" not in few
    assert "top-5" not in few


def test_artifact_carries_its_evidence(artifact: Path, evaluated: Path) -> None:
    found, evaluation = metadata(artifact), json.loads(evaluated.with_name("evaluation.json").read_text())
    assert {key: found[key] for key in NAMED} == NAMED
    assert found["resize"] == {"mode": "crop", "filter": "bilinear"}
    assert found["checkpoint_sha256"] == evaluation["checkpoint_sha256"]
    assert found["test"] == {
        key: evaluation[key] for key in ("images", "trained_with", "top1", "top5", "per_class", "calibrated", "uncalibrated")
    }
    assert found["test"]["trained_with"], "of which the page warns"
    assert found["training"]["epochs"] == TINY.epochs
    assert found["training"]["hardware"]
    assert datetime.date.fromisoformat(found["date"]) <= datetime.datetime.now(datetime.UTC).date()
    assert found["temperature"] == evaluation["temperature"]
    assert found["parity"]["images"] == found["parity"]["top1_equal"] == 200


@pytest.mark.usefixtures("no_compiler")
def test_where_all_pictures_were_enlarged_the_service_makes_others_as_small_first(tmp_path: Path) -> None:
    images = load_images(CIFAR10, "train", 36, "bicubic")
    assert images.enlarged_from == 32
    config = replace(TINY, image_size=36, resample="bicubic", epochs=1)
    checkpoint = train(config, images, tmp_path, QUIET)
    evaluate(checkpoint, CIFAR10, tmp_path / "evaluation.json", "cpu")
    export_artifact(checkpoint, tmp_path / "tiny.onnx", CIFAR10, **NAMED)
    found = metadata(tmp_path / "tiny.onnx")
    assert found["resize"] == {"mode": "crop", "filter": "bicubic", "through": 32}
    description = load_checkpoint(checkpoint).description
    for train_size, scaled in ((34, ", enlarged to 34 × 34"), (32, ""), (30, ", reduced to 30 × 30")):
        description["training"]["config"]["train_size"] = train_size
        card = _markdown(description, load_evaluation(checkpoint), found, "tiny")
        training = f"in training {train_size} × {train_size}"
        assert f"| Input | 36 × 36 RGB, {training}; other shapes: crop, bicubic, by way of 32 × 32 |" in card
        assert f"each had 32 × 32 pixels{scaled}, so" in card


def test_the_card_says_what_the_network_enlarges(evaluated: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(evaluated, tmp_path))
    recalibrate(checkpoint, CIFAR10, "cpu", 40)
    evaluate(checkpoint, CIFAR10, tmp_path / "evaluation.json", "cpu")
    export_artifact(checkpoint, tmp_path / "tiny.onnx", CIFAR10, **NAMED)
    found = metadata(tmp_path / "tiny.onnx")
    assert (found["input_size"], found["view_size"], found["resize"]) == (32, 40, {"mode": "crop", "filter": "bilinear"})
    assert found["parity"]["top1_equal"] == 200
    write_card_for(checkpoint, tmp_path / "tiny.onnx", CIFAR10, tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text()
    assert (
        "| Input | 32 × 32 RGB, enlarged by the network to 40 × 40, in training 32 × 32; other shapes: crop, bilinear |" in card
    )
    assert "each had 32 × 32 pixels, so" in card


def test_artifact_scores_what_was_reported(artifact: Path, photos: ImageSet) -> None:
    session = onnxruntime.InferenceSession(artifact, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": photos.images.permute(0, 2, 3, 1).contiguous().numpy()})
    top1 = float((torch.from_numpy(np.asarray(logits)).argmax(1) == photos.labels).float().mean())
    assert top1 == pytest.approx(metadata(artifact)["test"]["top1"])


def test_card_tells_the_numbers_and_shows_the_pictures(artifact: Path, evaluated: Path, tmp_path: Path) -> None:
    card = tmp_path / "docs" / "model-card.md"
    write_card_for(evaluated, artifact, CIFAR10, card)
    text, evaluation = card.read_text(), load_evaluation(evaluated)
    assert text.startswith("# Model card: tiny 9.8.7\n")
    for fact in (
        f"**{evaluation['top1']:.2%}**",
        f"{evaluation['top5']:.2%}",
        "200 images",
        f"{load_checkpoint(evaluated).description['parameters']:,} parameters",
        evaluation["checkpoint_sha256"],
        NAMED["command"],
        f'"lr": {TINY.lr}',
        "| truck | ",
    ):
        assert fact in text
    pictures = sorted((card.parent / "images").iterdir())
    assert [p.name for p in pictures] == [f"tiny-{kind}.png" for kind in ("confusion", "curves", "mistakes", "reliability")]
    for picture in pictures:
        assert f"(images/{picture.name})" in text
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_services_card_is_the_same_and_needs_no_other_file(artifact: Path, evaluated: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    write_card_for(evaluated, artifact, CIFAR10, card)
    html = artifact.with_name("tiny.card.html").read_text()
    assert html == render_card(card)
    for picture in (card.parent / "images").iterdir():
        assert base64.b64encode(picture.read_bytes()).decode() in html
    assert "src=" not in re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", html)
    assert f"<strong>{load_evaluation(evaluated)['top1']:.2%}</strong>" in html


@pytest.mark.parametrize(
    ("name", "stem"), [("my cats", "my-cats"), ("../a/b", "a-b"), ("größe 100% (neu)", "größe-100-neu"), ("?", "model")]
)
def test_a_models_name_need_not_be_a_files(
    artifact: Path, evaluated: Path, photos: ImageSet, tmp_path: Path, name: str, stem: str
) -> None:
    card = tmp_path / "my card.md"
    write_card(load_checkpoint(evaluated), load_evaluation(evaluated), metadata(artifact) | {"name": name}, photos, card)
    assert card.read_text().startswith(f"# Model card: {name} 9.8.7\n")
    pictures = list((tmp_path / "images").iterdir())
    assert {p.name for p in pictures} == {f"{stem}-{kind}.png" for kind in ("confusion", "curves", "mistakes", "reliability")}
    html = render_card(card)
    for picture in pictures:
        assert base64.b64encode(picture.read_bytes()).decode() in html


def test_a_classs_name_is_no_markup_and_no_mathematics(artifact: Path, evaluated: Path, photos: ImageSet, tmp_path: Path) -> None:
    checkpoint, evaluation, card = load_checkpoint(evaluated), load_evaluation(evaluated), tmp_path / "card.md"
    classes = ["$5_$10", "a|b", "*c*", "`d`", "<e>", r"\f", *photos.classes[6:]]
    checkpoint.description["classes"] = classes
    evaluation["per_class"] = dict(zip(classes, evaluation["per_class"].values(), strict=True))
    write_card(checkpoint, evaluation, metadata(artifact), replace(photos, classes=classes), card)
    cells = re.findall(r"<td>([^\n]*)</td>\n<td>[0-9.]+%</td>", render_card(card))
    assert [unescape(cell) for cell in cells[1:]] == classes, "behind the top-5 accuracy"


def test_the_card_has_the_validation_accuracy_that_was_measured_last(artifact: Path, evaluated: Path) -> None:
    """Earlier versions measured it at the end of each epoch, then for a mean of several, and not when calibrating."""
    checkpoint = load_checkpoint(evaluated)
    training, calibration = checkpoint.description["training"], checkpoint.description["calibration"]
    training["history"][-1]["val_accuracy"] = 0.25
    del calibration["accuracy"]
    for owner, changes, said in (
        (training, {}, "25.00%"),
        (training, {"averaged": {"sha256": ["0" * 64], "val_accuracy": 0.5}}, "50.00%"),
        (calibration, {"accuracy": 0.75}, "75.00%"),
    ):
        owner.update(changes)
        card = _markdown(checkpoint.description, load_evaluation(evaluated), metadata(artifact), "tiny")
        assert f"| Validation accuracy | {said} (" in card


def test_the_card_says_what_its_figures_are_of(artifact: Path, evaluated: Path) -> None:
    """Of 8 bits only the test set was looked at; of one run nothing was chosen; older reports do not know what chance does."""
    checkpoint, evaluation, found = load_checkpoint(evaluated), load_evaluation(evaluated), metadata(artifact)
    card = _markdown(checkpoint.description, evaluation, found, "tiny")
    assert "in float32" not in card
    assert "(10 held-out images) |" in card
    assert f"would show an ECE of {evaluation.pop('honest_ece'):.2%} on so many images) |" in card
    checkpoint.description["training"]["init"] = {"epochs": 1, "seconds": 60, "sha256": "0" * 64}
    quantized = found | {"quantized": {"float32_top1": 0.5}}
    card = _markdown(checkpoint.description, evaluation, quantized, "tiny")
    assert "% in float32 (10 held-out images, by which cycles and view size were chosen) |" in card
    assert "fitted on the held-out slice in float32 |" in card
    assert "of held-out images in float32) |" in card
    assert "would show" not in card
    assert "this repeats the recipe, and not each bit" in card


@pytest.mark.parametrize("name", ["accurate", "fast", "fast-int8"])
def test_the_card_that_ships_is_the_one_in_the_documentation(repository: Path, name: str) -> None:
    shipped = repository / "app" / "artifacts" / f"{name}.card.html"
    assert shipped.read_text() == render_card(repository / "docs" / "models" / f"{name}.md"), "run `convmixer-train card`"


def test_a_card_cannot_bring_markup_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Card\n\n<script>alert(1)</script>\n\n[link](javascript:alert(1))\n")
    html = render_card(tmp_path / "card.md")
    assert "<script" not in html
    assert "href" not in html


def test_no_export_without_evaluation(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"evaluation\.json is missing; run `convmixer-train evaluate .*model\.safetensors` first"
    ):
        export_artifact(trained, tmp_path / "tiny.onnx", CIFAR10, **NAMED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ['{"checkpoint_sha256": "0000"}', "{}"])
def test_no_export_with_the_evaluation_of_other_weights(evaluated: Path, tmp_path: Path, text: str) -> None:
    checkpoint = Path(shutil.copy(evaluated, tmp_path))
    checkpoint.with_name("evaluation.json").write_text(text)
    with pytest.raises(DataError, match=r"is of another checkpoint; run `convmixer-train evaluate .*` again"):
        export_artifact(checkpoint, tmp_path / "tiny.onnx", CIFAR10, **NAMED)
    assert not (tmp_path / "tiny.onnx").exists()


def test_a_damaged_evaluation(evaluated: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(evaluated, tmp_path))
    checkpoint.with_name("evaluation.json").write_text('{"images": 2')
    with pytest.raises(DataError, match=r"evaluation\.json is damaged; run"):
        load_evaluation(checkpoint)


@pytest.mark.usefixtures("no_compiler")
def test_no_card_of_another_networks_artifact(artifact: Path, photos: ImageSet, tmp_path: Path) -> None:
    other = train(TINY.override({"seed": "5", "epochs": "1"}), photos, tmp_path, QUIET)
    evaluate(other, CIFAR10, tmp_path / "evaluation.json", "cpu")
    with pytest.raises(ExportError, match=r"tiny\.onnx was exported from another checkpoint than "):
        write_card_for(other, artifact, CIFAR10, tmp_path / "card.md")
    assert not (tmp_path / "card.md").exists()


def test_no_card_with_other_images(artifact: Path, evaluated: Path, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not what .* was evaluated on; give the same --data"):
        write_card_for(evaluated, artifact, folder_of("cat", "dog"), tmp_path / "card.md")


def test_no_export_with_other_images(evaluated: Path, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """They also decide how the service resizes."""
    with pytest.raises(DataError, match=r"is not what .* was evaluated on; give the same --data"):
        export_artifact(evaluated, tmp_path / "tiny.onnx", folder_of("cat", "dog"), **NAMED)
    assert not (tmp_path / "tiny.onnx").exists()


@pytest.mark.usefixtures("no_compiler")
def test_the_card_names_the_teacher(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    student = train(replace(TINY, epochs=1, distill_weight=0.75), photos, tmp_path, QUIET, teachers=[trained])
    evaluate(student, CIFAR10, tmp_path / "evaluation.json", "cpu")
    export_artifact(student, tmp_path / "tiny.onnx", CIFAR10, **NAMED)
    write_card_for(student, tmp_path / "tiny.onnx", CIFAR10, tmp_path / "card.md")
    sha256 = hashlib.sha256(trained.read_bytes()).hexdigest()
    card = (tmp_path / "card.md").read_text()
    assert f"| Taught by | convmixer-16-2-k3-p2, checkpoint `{sha256[:12]}…`: " in card
    assert "is 75% of the loss" in card
    assert '"distill_weight": 0.75' in card


@pytest.mark.parametrize("content", [b"", b"not onnx at all"])
def test_no_card_of_something_else(evaluated: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tiny.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"tiny\.onnx is not an artifact of this project"):
        write_card_for(evaluated, tmp_path / "tiny.onnx", CIFAR10, tmp_path / "card.md")
