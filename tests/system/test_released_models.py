"""Every model that ships, served by the real server: it answers as the checkpoint it was made of does, and as its card says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.server import ServerProcess
from model.checkpoint import build_model, load_checkpoint
from model.export import read_metadata

ARTIFACTS = Path(__file__).parents[2] / "app" / "artifacts"
NAMES = sorted(path.stem for path in ARTIFACTS.glob("*.onnx"))


@pytest.fixture(scope="module", params=NAMES)
def served(request) -> Iterator[tuple[str, httpx.Client]]:
    """A model's name, and a client of a server that answers with it."""
    with ServerProcess(model=request.param) as server, httpx.Client(base_url=server.wait_until_ready(), timeout=60) as client:
        yield request.param, client


def classify(client: httpx.Client, data: bytes, **parameters: Any) -> dict[str, Any]:
    response = client.post("/classify", content=data, headers={"Content-Type": "image/webp"}, params=parameters)
    assert response.status_code == 200, response.text
    prediction: dict[str, Any] = response.json()["predictions"][0]
    return prediction


def checkpoint_of(name: str, repository: Path) -> Path:
    return repository / "releases" / name.removesuffix("-int8") / "model.safetensors"


def test_all_models_are_there():
    assert NAMES == ["accurate", "fast", "fast-int8"]


def test_it_is_what_the_repository_released(served, repository):
    name, client = served
    model = client.get("/model").json()["metadata"]
    released = load_checkpoint(checkpoint_of(name, repository)).description
    assert (model["name"], model["input_size"]) == (name, released["image_size"])
    assert model["parameters"] == released["parameters"]
    card = (repository / "docs" / "models" / f"{name}.md").read_text()
    assert card.startswith(f"# Model card: {name} {model['version']}\n")
    assert f"**{model['test']['top1']:.2%}**" in card
    assert f"`{model['checkpoint_sha256']}`" in card
    assert f"Model card: {name} {model['version']}</h1>" in client.get("/card").text


def test_the_one_in_8_bits_was_made_from_the_one_that_ships(repository):
    """Else `convmixer-train quantize` was forgotten after `make export`."""
    artifacts = repository / "app" / "artifacts"
    expected = (artifacts / "fast.onnx.sha256").read_text().split()[0]
    assert read_metadata(artifacts / "fast-int8.onnx")["quantized"]["artifact_sha256"] == expected


def test_accuracy_is_what_the_card_says(served, samples):
    """Binomial: with the card's accuracy, fewer right answers than this happen once in some 30,000 runs."""
    _, client = served
    stated = client.get("/model").json()["metadata"]["test"]["top1"]
    right = sum(classify(client, s.data)["label"] == s.label for s in samples)
    spread = math.sqrt(len(samples) * stated * (1 - stated))
    assert abs(right - stated * len(samples)) <= 4 * spread


def test_every_answer_equals_pytorch(served, samples, repository):
    """In 8 bits nearly: now and then the second becomes the first."""
    name, client = served
    tolerance, others = (0.3, 0.02) if name.endswith("-int8") else (1e-4, 0)
    checkpoint = load_checkpoint(checkpoint_of(name, repository))
    description = checkpoint.description
    pixels = np.stack([np.asarray(Image.open(s.path).convert("RGB")) for s in samples])
    assert pixels.shape[1:] == (description["image_size"], description["image_size"], 3)
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    view = (description["view_size"], description["view_size"])
    scaled = torch.nn.functional.interpolate(scaled, view, mode=description["resample"], antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(description[k]).view(1, 3, 1, 1) for k in ("normalize_mean", "normalize_std"))
    with torch.inference_mode():
        logits = build_model(checkpoint)((scaled - mean) / std)
    expected = torch.softmax(logits / description["calibration"]["temperature"], 1).numpy()

    different = 0
    for sample, probabilities in zip(samples, expected, strict=True):
        answer = classify(client, sample.data, top_k=len(description["classes"]))
        found = {entry["label"]: entry["probability"] for entry in answer["top_k"]}
        different += answer["label"] != description["classes"][int(probabilities.argmax())]
        assert [found[name] for name in description["classes"]] == pytest.approx(probabilities, abs=tolerance)
    assert different <= others * len(samples)


def test_a_name_that_no_model_has_stops_the_start(start):
    server = start(model="acurate")
    assert server.wait() == 3
    assert (
        "CONVMIXER_MODEL='acurate' (--model) is neither a model that ships here (accurate, fast, fast-int8) nor the path"
        in server.log
    )
