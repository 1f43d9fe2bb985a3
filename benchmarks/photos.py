"""What happens to photos that were never 32 pixels wide: which resize rule, and which score tells "none of my classes".

    python -m benchmarks.photos CHECKPOINT ARTIFACT PHOTOS [--data CIFAR10] [--output FILE.json]

PHOTOS has one folder per class of the model, and `other/` with photos that show none of them. Every photo goes through
the service's own decoder, once per resize rule. For each rule: accuracy on the photos of the classes, and how well each
score separates the CIFAR-10 test images from `other/` (AUROC, and the share of `other/` that passes where 95 % of the
test images do), with the 95 % interval that so many strangers leave: it takes the test images and the choice of the score for
given, and other strangers for alike. The scores, all higher for what the model knows:

- max_probability: the largest calibrated probability (arXiv 1610.02136);
- energy: log Σ exp of the calibrated logits (arXiv 2010.03759);
- feature_distance: cosine to the 50th nearest of 5,000 training features (arXiv 2204.06507), from the network itself;
- feature_cosine: cosine to the nearest class's mean features, from the network itself;
- feature_similarity: the same after whitening, which the artifact computes (model/similarity.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from app.engine.artifact import read_verified
from app.engine.session import Session
from app.errors import ServiceError
from app.images import DecodeLimits, ResizeRule, decode_image
from model.architectures import Network
from model.checkpoint import build_model, build_similarity, load_checkpoint
from training.config import TrainConfig
from training.data import ImageSet, load_images
from training.evaluate import compute_outputs

NEIGHBOURS = 50
OTHER = "other"
MODES = ("crop", "squash", "pad")
FILTERS = ("bilinear", "bicubic", "lanczos", "box", "hamming")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as folders; downloaded without")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()

    session = Session(read_verified(options.artifact), "cpu")
    names, temperature = session.metadata.classes, session.metadata.temperature
    checkpoint = load_checkpoint(options.checkpoint)
    network = build_model(checkpoint)
    means = F.normalize(build_similarity(checkpoint).class_means)
    config = TrainConfig.from_dict(checkpoint.description["training"]["config"])
    size = (config.image_size, config.resample)
    bank = F.normalize(features(network, load_images(options.data, "train", *size).images[::10], config))
    known = load_images(options.data, "test", *size).images
    known_scores = scores(session, network, config, known.permute(0, 2, 3, 1).contiguous().numpy(), temperature, bank, means)

    files = sorted(p for p in options.photos.glob("*/*") if p.parent.name in (*names, OTHER))
    print(f"{len(files)} photos, {sum(p.parent.name == OTHER for p in files)} of them {OTHER}; {len(known):,} test images")
    rows = []
    for mode, method in itertools.product(MODES, FILTERS):
        rule = replace(session.metadata.resize, mode=mode, filter=method)  # type: ignore[arg-type]
        pixels, folders = decode_all(files, rule)
        predicted = np.concatenate([session.infer(part).logits for part in np.array_split(pixels, 8)]).argmax(1)
        is_other = np.array([folder == OTHER for folder in folders])
        right = np.array([names[p] == folder for p, folder in zip(predicted, folders, strict=True)])
        row: dict[str, object] = {"mode": mode, "filter": method, "accuracy": float(right[~is_other].mean())}
        for name, values in scores(session, network, config, pixels[is_other], temperature, bank, means).items():
            beaten, accepted = above(known_scores[name], values), passes(known_scores[name], values)
            row[name] = {
                "auroc": float(beaten.mean()),
                "auroc_interval": interval(beaten),
                "fpr95": float(accepted.mean()),
                "fpr95_interval": interval(accepted),
            }
        rows.append(row)
        described = "  ".join(
            f"{k} {v['auroc']:.3f} ({v['auroc_interval'][0]:.3f} to {v['auroc_interval'][1]:.3f}) / "
            f"{v['fpr95']:.1%} ({v['fpr95_interval'][0]:.1%} to {v['fpr95_interval'][1]:.1%})"
            for k, v in row.items()
            if isinstance(v, dict)
        )
        print(f"{mode:6} {method:8} accuracy {row['accuracy']:.1%}   AUROC / FPR95: {described}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


def decode_all(files: list[Path], rule: ResizeRule) -> tuple[NDArray[np.uint8], list[str]]:
    """uint8 [N, S, S, 3] and each photo's folder; what cannot be decoded is named and left out."""
    pixels, folders = [], []
    for path in files:
        try:
            pixels.append(decode_image(path.read_bytes(), rule, DecodeLimits(50_000_000, 20_000)).pixels)
        except ServiceError as error:
            print(f"{path}: {error.detail}")
            continue
        folders.append(path.parent.name)
    return np.stack(pixels), folders


def features(network: Network, images: Tensor, config: TrainConfig) -> Tensor:
    """Pooled features before the head: uint8 [N, 3, S, S] → float32 [N, h]."""
    unlabelled = ImageSet(images, torch.zeros(len(images), dtype=torch.int64), [])
    return compute_outputs(network, unlabelled, config, torch.device("cpu"), progress=True)[1]


def scores(
    session: Session,
    network: Network,
    config: TrainConfig,
    pixels: NDArray[np.uint8],
    temperature: float,
    bank: Tensor,
    means: Tensor,
) -> dict[str, NDArray[np.float64]]:
    """Every score of uint8 [N, S, S, 3]."""
    parts = np.array_split(pixels, max(1, len(pixels) // 64))
    answers = [session.infer(part) for part in parts]
    logits = torch.from_numpy(np.concatenate([answer.logits for answer in answers])).double() / temperature
    whitened = np.concatenate([answer.similarity for answer in answers if answer.similarity is not None])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    own = F.normalize(features(network, images, config))
    nearest = torch.cat([(part @ bank.T).topk(NEIGHBOURS, dim=1).values[:, -1] for part in own.split(500)])
    return {
        "max_probability": logits.softmax(1).amax(1).numpy(),
        "energy": logits.logsumexp(1).numpy(),
        "feature_distance": nearest.double().numpy(),
        "feature_cosine": (own @ means.T).amax(1).double().numpy(),
        "feature_similarity": whitened.astype(np.float64),
    }


def above(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each unknown picture the share of the known ones that score higher, ties by half: their mean is the AUROC."""
    ordered = np.sort(known)
    not_below, higher = (len(known) - np.searchsorted(ordered, unknown, side) for side in ("left", "right"))
    shares: NDArray[np.float64] = (not_below + higher) / (2 * len(known))
    return shares


def passes(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for each unknown picture that is accepted at the threshold that accepts 95 % of the known, else 0."""
    return (unknown >= np.quantile(known, 0.05)).astype(np.float64)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile interval of a mean, from the same 2,000 bootstrap samples each time."""
    chosen = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
