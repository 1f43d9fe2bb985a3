"""Our training step against the step of a usual script: the same network, batch size and augmentation, in one run.

    python -m benchmarks.train [--set model.hidden_dim=256] [--rounds 3] [--output FILE.json]

The usual script is what most tutorials have: float32, a DataLoader that opens each image with PIL and runs torchvision
transforms on it, AdamW, nothing else. Ours is the real loop of training/train.py, timed between its own epoch marks, so
with averaging, clipping and validation. Rounds alternate the two, so a noisy neighbour hits both; the first epoch of
each, where kernels are chosen and compiled, is not counted. The images are those of tests/data, repeated: speed does not
depend on what they show.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from model.architectures import build_network, count_macs
from model.checkpoint import load_checkpoint
from training.config import TrainConfig
from training.data import ImageSet, load_images
from training.presets import get_preset
from training.runtime import Runtime, autocast, hardware
from training.train import train

PHOTOS = Path(__file__).parent.parent / "tests" / "data" / "cifar10"
BACKWARD = 2
"""A backward pass costs two forward passes: one for the inputs' gradients, one for the weights'."""


class _Files(Dataset[tuple[torch.Tensor, int]]):
    """Pictures as the usual script has them: PIL images, transformed one by one."""

    def __init__(self, data: ImageSet, config: TrainConfig) -> None:
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images]
        self.labels = data.labels.tolist()
        augment = config.augment
        steps: list[nn.Module] = [v2.RandomResizedCrop(config.image_size, (augment.crop_scale, 1.0), (1.0, 1.0))]
        steps += [v2.RandomHorizontalFlip(augment.flip)]
        if augment.randaugment_ops:
            steps += [v2.RandAugment(augment.randaugment_ops, augment.randaugment_magnitude)]
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        steps += [v2.Normalize(list(config.normalize_mean), list(config.normalize_std))]
        if augment.erase:
            steps += [v2.RandomErasing(augment.erase)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def measure_usual(config: TrainConfig, data: ImageSet, device: str) -> float:
    """Images a second of the usual script, from its second epoch."""
    loader = DataLoader(_Files(data, config), config.batch_size, shuffle=True, drop_last=True, num_workers=2)
    model = build_network(config.model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    begin, seen = 0.0, 0
    for _ in range(2):
        begin, seen = time.perf_counter(), 0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            seen += len(images)
        loss.item()  # a GPU has finished when its number is here
    return seen / (time.perf_counter() - begin)


def measure_ours(config: TrainConfig, data: ImageSet, runtime: Runtime) -> float:
    """Images a second of training/train.py, from its second epoch."""
    with tempfile.TemporaryDirectory() as folder:
        path = train(replace(config, epochs=2), data, Path(folder), runtime)
        training = load_checkpoint(path).description["training"]
    first, second = (row["seconds"] for row in training["history"])
    return float(training["steps"] / 2 * config.batch_size / (second - first))


def measure_peak(runtime: Runtime) -> float:
    """FLOP/s of large matrix products in the precision of the run: what the machine can do at most."""
    device = torch.device(runtime.device)
    side = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, side, side, device=device)
    rates = []
    for _ in range(4):
        begin = time.perf_counter()
        with autocast(device, runtime.precision):
            product = a @ b
        product[0, 0].item()
        rates.append(2 * side**3 / (time.perf_counter() - begin))
    return max(rates)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--images", type=int, default=1600, help="images an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()

    runtime = Runtime.detect(compile=options.compile, tensorboard=False)
    if malformed := [text for text in options.settings if "=" not in text]:
        parser.error(f"--set takes NAME=VALUE, not {malformed[0]!r}")
    config = get_preset(options.preset).config.override(dict(text.split("=", 1) for text in options.settings))
    ours_alone = {name: getattr(config.augment, name) for name in ("pad_crop", "trivialaugment", "mixup", "cutmix")}
    if used := [f"augment.{name}=0" for name, value in ours_alone.items() if value]:
        parser.error(
            f"the usual script has no such augmentation, and both must do the same work: give --set {' --set '.join(used)}"
        )
    size = config.largest_size  # in every step
    config = replace(config, image_size=size, view_size=0, train_size=0, start_size=0, val_fraction=0.01)
    few = load_images(PHOTOS, "train", config.image_size, config.resample)
    times = -(-options.images // len(few))
    data = ImageSet(few.images.repeat(times, 1, 1, 1), few.labels.repeat(times), few.classes)

    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    print(f"{hardware(runtime)}; {versions}")
    print(f"{config.model.name}, batch {config.batch_size}, {config.image_size} px; ours in {runtime.precision}")
    pairs = []
    for number in range(options.rounds):
        usual, ours = measure_usual(config, data, runtime.device), measure_ours(config, data, runtime)
        pairs.append((usual, ours))
        print(f"round {number + 1}: usual {usual:,.0f} images/s, ours {ours:,.0f}, ratio {ours / usual:.2f}", flush=True)
    usual, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = [ours / usual for usual, ours in pairs]
    flops = 2 * count_macs(config.model, config.image_size) * (1 + BACKWARD) * ours
    peak = measure_peak(runtime)
    print(
        f"median: usual {usual:,.0f}, ours {ours:,.0f} images/s; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}); {flops / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s = {flops / peak:.0%} of a "
        "large matrix product"
    )
    if options.output:
        figures = {
            "hardware": hardware(runtime),
            "torch": torch.__version__,
            "network": config.model.name,
            "batch_size": config.batch_size,
            "precision": runtime.precision,
            "rounds": [{"usual_images_s": usual, "ours_images_s": ours} for usual, ours in pairs],
            "ratio": statistics.median(ratios),
            "peak_share": flops / peak,
        }
        options.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
