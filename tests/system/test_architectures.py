"""A ViT, an MLP-Mixer and a ResNet go the way of a ConvMixer, unchanged: train → evaluate → export → serve → the same answers."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import torch

from model.checkpoint import build_model, load_checkpoint
from tests.conftest import IMAGES
from training.config import TrainConfig
from training.data import ImageSet, load_images
from training.evaluate import compute_logits, evaluate
from training.release import export_artifact
from training.runtime import Runtime
from training.train import train

NETWORKS = {
    "vit": {"model.heads": "4", "model.mlp_dim": "64"},
    "mlp-mixer": {"model.token_mlp_dim": "16", "model.channel_mlp_dim": "64"},
    "resnet": {"model.stages": "2"},
}
SMALL = {
    "model.hidden_dim": "32",
    "model.depth": "2",
    "model.patch_size": "4",
    "epochs": "2",
    "batch_size": "19",
    "ema_decay": "0.9",
}


@pytest.mark.parametrize("architecture", NETWORKS)
def test_the_service_answers_as_the_trained_network(architecture, tmp_path, start, samples):
    config = TrainConfig().override({"model.architecture": architecture, **SMALL, **NETWORKS[architecture]})
    data = load_images(IMAGES, "train", 32)
    checkpoint = train(config, data, tmp_path / "run", Runtime(tensorboard=False))
    report = evaluate(checkpoint, IMAGES, checkpoint.with_name("evaluation.json"), "cpu")
    export_artifact(checkpoint, tmp_path / "net.onnx", IMAGES, name=architecture, version="1", command="")

    released = load_checkpoint(checkpoint)
    shown = samples[::10]
    pictures = ImageSet(data.images[::10], data.labels[::10], data.classes)  # in the order of `samples`
    expected = compute_logits(build_model(released), pictures, config, torch.device("cpu"))
    temperature = released.description["calibration"]["temperature"]
    with httpx.Client(base_url=start(model=tmp_path / "net.onnx").wait_until_ready(), timeout=60) as client:
        card = client.get("/model").json()["metadata"]
        answer = (
            client.post("/classify", params={"explain": "true"}, files=[("images", (s.path.name, s.data)) for s in shown])
            .raise_for_status()
            .json()
        )
    assert card["architecture"] == config.model.name
    assert card["test"]["top1"] == report["top1"]
    assert [p["label"] for p in answer["predictions"]] == [data.classes[i] for i in expected.argmax(1)]
    probabilities = torch.softmax(expected / temperature, 1).amax(1)
    np.testing.assert_allclose([p["confidence"] for p in answer["predictions"]], probabilities, atol=1e-3)
    assert all(p["heat_map"] for p in answer["predictions"])
