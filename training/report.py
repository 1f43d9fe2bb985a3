"""The model card: Markdown and pictures, generated from the released checkpoint and its evaluation. Never edited by hand.

The same card as one piece of HTML lies beside the artifact, for the service to show: it travels with the model, whoever
installs it and however.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import matplotlib.pyplot as plt
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image

from model.checkpoint import Checkpoint
from training.data import ImageSet
from training.figures import BLUE, GREY, finish
from training.metrics import proportion_interval

_MOST_NAMED_CLASSES = 40
"""Of more the confusion matrix shows colours alone, at the same size: with a thousand it would take gigabytes."""


def write_card(
    checkpoint: Checkpoint, evaluation: dict[str, Any], artifact: dict[str, Any], data: ImageSet, output: Path
) -> None:
    """Writes `output` (Markdown) and its pictures beside it in `images/`.

    Args:
        checkpoint: the released checkpoint.
        evaluation: report of `convmixer-train evaluate`.
        artifact: the exported artifact's metadata.
        data: the images of the evaluation.
        output: the Markdown file.
    """
    pictures = output.parent / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", artifact["name"]).strip(".-") or "model"  # a name may hold what no file's may
    draw_curves(checkpoint.description["training"], pictures / f"{stem}-curves.png")
    draw_confusion(evaluation, checkpoint.description["classes"], pictures / f"{stem}-confusion.png")
    draw_reliability(evaluation["bins"], pictures / f"{stem}-reliability.png")
    draw_mistakes(evaluation["mistakes"], data, pictures / f"{stem}-mistakes.png")
    output.write_text(_markdown(checkpoint.description, evaluation, artifact, quote(stem)), encoding="utf-8")


def render_card(card: Path) -> str:
    """The card as HTML with its pictures inside (`data:` URLs), without a frame: the service's page has that.

    Args:
        card: a Markdown file of `write_card`.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens: list[Token] = []
    for token in parser.parse(card.read_text(encoding="utf-8")):
        if token.info == "json":  # fifty lines of settings: for those who ask
            opening, closing = "<details>\n<summary>All settings of the run</summary>\n", "</details>\n"
            tokens += [Token("html_block", "", 0, content=opening), token, Token("html_block", "", 0, content=closing)]
        else:
            tokens.append(token)
    for inline in [child for token in tokens for child in token.children or ()]:
        if inline.type == "image":
            picture = card.parent / unquote(str(inline.attrs["src"]))
            with Image.open(picture) as image:
                inline.attrs["width"], inline.attrs["height"] = image.size  # the page does not jump when it is drawn
            inline.attrs["src"] = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    html = str(parser.renderer.render(tokens, parser.options, {}))
    nameless = "<thead>\n<tr>\n<th></th>\n<th></th>\n</tr>\n</thead>\n"  # Markdown cannot do without, HTML can
    return f'<article class="prose">\n{html.replace(nameless, "")}</article>\n'


def draw_curves(training: dict[str, Any], path: Path) -> None:
    """Loss and validation accuracy by epoch."""
    history = training["history"]
    epochs = [row["epoch"] for row in history]
    shown = ["augmented"]
    if training["config"]["label_smoothing"] and not (_teachers(training) and training["config"]["distill_weight"] == 1):
        shown.append("smoothed labels")
    if _teachers(training):
        shown.append("distance to a teacher")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(epochs, [row["train_loss"] for row in history], color=GREY, label=f"training ({', '.join(shown)})")
    left.plot(epochs, [row["val_loss"] for row in history], color=BLUE, label="validation")
    left.set(xlabel="epoch", ylabel="loss, nats" if _teachers(training) else "cross-entropy, nats", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(epochs, [100 * row["val_accuracy"] for row in history], color=BLUE, marker="o", markersize=3)
    right.set(xlabel="epoch", ylabel="validation accuracy, %")
    finish(figure, path, left, right)


def draw_confusion(evaluation: dict[str, Any], classes: list[str], path: Path) -> None:
    """Confusion matrix in percent of the true class."""
    confusion = evaluation["confusion"]
    shares = [[100 * value / max(1, sum(row)) for value in row] for row in confusion]
    few = len(classes) <= _MOST_NAMED_CLASSES
    side = 1.6 + 0.45 * min(len(classes), _MOST_NAMED_CLASSES)
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    # the diagonal would drown the mistakes, so colour ends at the largest mistake
    worst = max(shares[i][j] for i in range(len(classes)) for j in range(len(classes)) if i != j)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(worst, 1.0) * 1.5)
    for i, row in enumerate(shares):
        for j, value in enumerate(row):
            if few and value >= 0.05:
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if i == j else "black")
    if few:
        names = [_plain(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), names)
    axes.set(xlabel="predicted", ylabel="true", title=f"% of each true class ({evaluation['images']:,} test images)")
    finish(figure, path)


def draw_reliability(bins: list[dict[str, float]], path: Path) -> None:
    """Accuracy against confidence, after temperature scaling."""
    filled = [b for b in bins if b["count"]]
    figure, axes = plt.subplots(figsize=(3.6, 3.4), layout="constrained")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="honest")
    total = sum(b["count"] for b in filled)
    axes.scatter(
        [b["confidence"] for b in filled],
        [b["accuracy"] for b in filled],
        s=[12 + 300 * b["count"] / total for b in filled],
        color=BLUE,
        label="bins, area = share",
    )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="upper left")
    finish(figure, path, axes)


def draw_mistakes(mistakes: list[dict[str, Any]], data: ImageSet, path: Path) -> None:
    """The images that were wrong with the greatest confidence, each with what it was taken for."""
    columns = 8
    rows = max(1, -(-len(mistakes) // columns))
    figure, grid = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.6 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, mistake in zip(grid.flat, mistakes, strict=False):
        axes.imshow(data.images[mistake["index"]].permute(1, 2, 0).numpy(), interpolation="nearest")
        true, predicted = _plain(data.classes[mistake["label"]]), _plain(data.classes[mistake["predicted"]])
        axes.set_title(f"{predicted} {mistake['confidence']:.0%}\nis {true}", fontsize=7)
    finish(figure, path)


def _plain(name: str) -> str:
    """A class's name as matplotlib shows it; between dollar signs it would be mathematics."""
    return name.replace("$", r"\$")


def _escaped(name: str) -> str:
    """A class's name in Markdown, where no letter of it is markup."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", name)


def _teachers(training: dict[str, Any]) -> list[dict[str, str]]:
    """Of a checkpoint of before there could be several, too."""
    return training.get("teachers") or [teacher for teacher in [training.get("teacher")] if teacher]


def _compared(artifact: dict[str, Any]) -> str:
    if quantized := artifact.get("quantized"):
        return f"pointwise convolutions in 8 bits, against float32 (test accuracy {quantized['float32_top1']:.2%})"
    return "onnxruntime = PyTorch"


def _markdown(description: dict[str, Any], evaluation: dict[str, Any], artifact: dict[str, Any], stem: str) -> str:
    training = description["training"]
    teachers = _teachers(training)
    config = {key: value for key, value in training["config"].items() if teachers or not key.startswith("distill_")}
    calibrated, raw = evaluation["calibrated"], evaluation["uncalibrated"]
    n, top1 = evaluation["images"], evaluation["top1"]
    low, high = proportion_interval(top1, n)
    epochs = f"{config['epochs']} epochs"
    if training["steps"] < training["total_steps"]:
        epochs = (
            f"{config['epochs'] * training['steps'] / training['total_steps']:.1f} of the {epochs} its schedule was laid for,"
        )
    if training.get("code_changed"):
        epochs += " (resumed with another version of the training code)"
    batches = f"{training['images']:,} images, {epochs} of batch {config['batch_size']}"
    minutes = (
        f"{training['seconds'] / 60:.0f} minutes on {training['hardware']}, {training['precision']}, torch {training['torch']}"
    )
    if init := training.get("init"):
        batches += f", after {init['epochs']} epochs that made the weights it began with (checkpoint `{init['sha256'][:12]}…`)"
        minutes += f"; before it {init['seconds'] / 60:.0f} minutes for those weights"
    taught = {}
    if teachers:
        names = " and ".join(f"{teacher['name']}, checkpoint `{teacher['sha256'][:12]}…`" for teacher in teachers)
        answers = "its answers" if len(teachers) == 1 else "the mean of their answers"
        taught["Taught by"] = (
            f"{names}: the distance to {answers} to the same pictures is {config['distill_weight']:.0%} of the loss "
            "(arXiv 2106.05237)"
        )
    averaged = training.get("averaged", {})
    # checkpoints of before calibration measured it have it where it was measured last
    validation = description["calibration"].get("accuracy", {**training["history"][-1], **averaged}["val_accuracy"])
    if averaged:
        parts = ", ".join(f"`{sha256[:12]}…`" for sha256 in averaged["sha256"])
        batches += f"; released is the mean of the checkpoints {parts}, the last of which is this run's"
    small = artifact["resize"].get("through")
    view = artifact.get("view_size", artifact["input_size"])
    trained = config.get("train_size") or view
    side = small or artifact["input_size"]
    scaled = f", {'enlarged' if trained > side else 'reduced'} to {trained} × {trained}" if side != trained else ""
    seen = f", enlarged by the network to {view} × {view}" if view != artifact["input_size"] else ""
    seen += f", in training {trained} × {trained}" if trained != view else ""
    through = f", by way of {small} × {small}" if small else ""
    learnt = ""
    if evaluation.get("trained_with"):
        learnt = " **These are the images it was trained with: this says nothing of new ones.**"
    elif count := evaluation.get("learnt"):
        learnt = f" **{count:,} of these images are in the training, too: this says too much.**"
    in_float32 = " in float32" if "quantized" in artifact else ""
    chosen = ", by which cycles and view size were chosen" if init or averaged else ""
    honest = (
        f" (honest confidences like these would show an ECE of {evaluation['honest_ece']:.2%} on so many images)"
        if "honest_ece" in evaluation  # reports of before have none
        else ""
    )
    rows = {
        "Test accuracy, top-1": f"**{top1:.2%}** ({low:.2%} to {high:.2%}: 95 % sampling interval, {n:,} images; "
        f"one run, seed {config['seed']}){learnt}",
        **({"Test accuracy, top-5": f"{evaluation['top5']:.2%}"} if len(description["classes"]) > 5 else {}),  # else 100 %
        "Validation accuracy": f"{validation:.2%}{in_float32} ({training['validation_images']:,} held-out images{chosen})",
        "Network": f"{description['name']}, {artifact['parameters']:,} parameters, {artifact['macs'] / 1e9:.3f} GMAC an image",
        "Input": f"{artifact['input_size']} × {artifact['input_size']} RGB{seen}; "
        f"other shapes: {artifact['resize']['mode']}, {artifact['resize']['filter']}{through}",
        "Softmax temperature": f"{artifact['temperature']:.3f}, fitted on the held-out slice{in_float32}",
        "ECE (15 bins), NLL, Brier before": f"{raw['ece']:.2%}, {raw['nll']:.4f}, {raw['brier']:.4f}",
        "ECE (15 bins), NLL, Brier after": f"{calibrated['ece']:.2%}, {calibrated['nll']:.4f}, {calibrated['brier']:.4f}{honest}",
        "Called none of the classes": f"{artifact['out_of_distribution']['score'].replace('_', ' ')} below "
        f"{artifact['out_of_distribution']['threshold']:.3f} "
        f"(keeps at least 95 % of held-out images{in_float32})",
        "Trained on": batches,
        **taught,
        "Training time": minutes,
        "Checkpoint SHA-256": f"`{evaluation['checkpoint_sha256']}`",
        "Parity": f"{_compared(artifact)}: top-1 equal on {artifact['parity']['top1_equal']:,} "
        f"of {artifact['parity']['images']:,} images, "
        f"logits within {artifact['parity']['max_logit_difference']:.1e}",
    }
    repeats = (
        "\nEarlier cycles may have run with earlier versions of the code: this repeats the recipe, and not each bit.\n"
        if init
        else ""
    )
    made = f"Made by:\n\n    {artifact['command']}\n{repeats}" if artifact["command"] else ""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    classes = ", ".join(map(_escaped, description["classes"]))
    per_class = "\n".join(f"| {_escaped(name)} | {value:.1%} |" for name, value in evaluation["per_class"].items())
    return f"""# Model card: {artifact["name"]} {artifact["version"]}

Generated by `convmixer-train card`; do not edit.

| | |
|---|---|
{table}

{made}
## What it is for

Telling which of {len(description["classes"])} classes a picture shows: {classes}. In training
each had {side} × {side} pixels{scaled}, so large photos are judged by their rough shape and colour, and
a picture of anything else still gets one of these labels: look at `in_distribution`.

## Training

![Training curves](images/{stem}-curves.png)

```json
{json.dumps(config, indent=2)}
```

## Mistakes

![Confusion matrix](images/{stem}-confusion.png)

| class | accuracy |
|---|---|
{per_class}

The most confident ones, with what each was taken for:

![Worst mistakes](images/{stem}-mistakes.png)

## Honesty of the probabilities

![Reliability diagram](images/{stem}-reliability.png)
"""
