"""The study's page: table, pictures and verdicts, made from its results alone and never edited by hand."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from training.figures import GREY, finish
from training.study import write_json

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and half the width of its 95 % interval, which is infinite for a single run."""

    mean: float
    half_width: float


def t_quantile(freedom: float) -> float:
    """The t for which a Student variable of so many degrees of freedom (≥ 1) lies in [-t, t] with probability 0.95.

    With t = √ν · tan θ the density becomes cos^(ν-1) θ, which is integrated numerically: five digits.
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(CONFIDENCE * area[-1], area, angles)))


def estimate(values: list[float]) -> Estimate:
    """Mean with its t-interval."""
    n = len(values)
    if n < 2:
        return Estimate(values[0], math.inf)
    deviation = float(np.std(values, ddof=1))
    if deviation == 0:  # of few test images two accuracies may be equal by chance; that tells nothing of their spread
        return Estimate(float(np.mean(values)), math.inf)
    return Estimate(float(np.mean(values)), t_quantile(n - 1) * deviation / math.sqrt(n))


def difference(first: list[float], second: list[float]) -> Estimate:
    """Difference of two means with Welch's t-interval, which does not take their spreads for equal."""
    mean = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return Estimate(mean, math.inf)
    a, b = (float(np.var(values, ddof=1)) / len(values) for values in (first, second))
    if a + b == 0:
        return Estimate(mean, math.inf)
    freedom = (a + b) ** 2 / (a * a / (len(first) - 1) + b * b / (len(second) - 1))
    return Estimate(mean, t_quantile(freedom) * math.sqrt(a + b))


def judge(test: str, margin: float, found: Estimate) -> str:
    """`held`, `did not hold` or `not decided`: whether the whole interval is where the claim wants it, or outside of that.

    Args:
        test: `better`: above 0; `as-good`: above -margin; `no-matter`: between -margin and margin.
        margin: percentage points.
        found: the difference.
    """
    low, high = found.mean - found.half_width, found.mean + found.half_width
    lowest = {"better": 0.0, "as-good": -margin, "no-matter": -margin}[test]
    highest = margin if test == "no-matter" else math.inf
    if low > lowest and high < highest:
        return "held"
    return "did not hold" if high < lowest or low > highest else "not decided"


def judge_all(verdicts: list[str]) -> str:
    """A claim of several comparisons holds if all do, and does not if one does not."""
    for verdict in ("did not hold", "not decided"):
        if verdict in verdicts:
            return verdict
    return "held"


def add_results(path: Path, budget: str, results: dict[str, Any]) -> None:
    """Puts a budget's results into the JSON file; those of other budgets stay."""
    studies = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**studies, budget: results})


def write_report(results: Path, page: Path) -> None:
    """Writes the page and its pictures, `images/study-*.png` beside it.

    Args:
        results: JSON file: name of a budget → what `training.study.collect` returned.
        page: the Markdown file.
    """
    pictures = page.parent / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    studies = json.loads(results.read_text(encoding="utf-8"))
    for budget, study in studies.items():
        _draw_bars(study, pictures / f"study-{budget}-accuracy.png")
        _draw_costs(study, pictures / f"study-{budget}-cost.png")
    page.write_text(render_page(studies), encoding="utf-8")


def render_page(studies: dict[str, Any]) -> str:
    """The Markdown of a page.

    Args:
        studies: name of a budget → what `training.study.collect` returned, with at least one run.
    """
    first = next(iter(studies.values()))
    explanation = [
        "Each network was trained once for each seed, with the same number of epochs and the same recipe.",
        first["about"],
        "± is the 95 % interval of the mean over seeds (Student's t) on one fixed test set: how well these seeds pin the mean",
        "down, and not what other test images would change. A difference has Welch's interval.",
        "A claim *held* if the whole interval is where the claim wants it, *did not hold* if none of it is, and is *not decided*",
        "otherwise. No interval is corrected for being one of several.",
        "Seconds tell also what else the machine did; multiply-accumulates do not.",
    ]
    sections = "\n".join(_section(budget, study) for budget, study in studies.items())
    return f"""# {first["title"]}

Written by `convmixer-train study` from `study.json` beside it, which has every setting; do not edit. What is run and what is
claimed is declared in the study's TOML file; those that ship are in `training/studies/`.

{_filled(explanation)}

{sections}"""


def _section(budget: str, study: dict[str, Any]) -> str:
    cells, first = _cells(study), study["runs"][0]
    reference = cells.get(study["reference"], [first])[0]
    seeds = sorted({run["seed"] for run in study["runs"]})
    machines = sorted({f"{run['hardware']}, {run['precision']}, torch {run['torch']}" for run in study["runs"]})
    minutes = sum(run["seconds"] for run in study["runs"]) / 60
    missing = study["declared_runs"] - len(study["runs"])
    facts = [
        f"**{missing} of {study['declared_runs']} runs are not finished yet.**" if missing else "",
        f"{len(study['runs'])} runs of seeds {', '.join(map(str, seeds))}:",
        f"{first['epochs']} epochs of {first['images']:,} training images in batches of {first['config']['batch_size']},",
        f"{first['validation_images']:,} more held out; {first['test_images']:,} test images, answered once by each run's final",
        f"weights. The reference has {reference['parameters']:,} parameters.",
        f"{minutes:.0f} minutes of training on {'; '.join(machines)}.",
        _caution(first),
    ]
    head = [
        "network",
        "parameters",
        "MMAC an image",
        "seconds a run",
        "runs",
        "test, %",
        "against the reference",
        "validation, %",
    ]
    rows = [_row(runs, name, cells.get(study["reference"])) for name, runs in cells.items()]
    return f"""## Budget `{budget}`

{_filled(facts)}

{_table(head, rows)}

![Accuracy with intervals](images/study-{budget}-accuracy.png)

![Accuracy against cost](images/study-{budget}-cost.png)

### Which claims held

{_table(["claim", "the paper", "here", "difference in points"], _verdicts(study, cells))}
"""


def _filled(sentences: list[str]) -> str:
    return textwrap.fill(" ".join(filter(None, sentences)), 127)


def _caution(run: dict[str, Any]) -> str:
    if run["images"] * run["epochs"] >= 1_000_000:
        return ""
    return (
        "So little training of such small networks tells which learns faster from few images, and not which ends higher: "
        "that takes a larger budget, and a GPU."
    )


def _cells(study: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    cells: dict[str, list[dict[str, Any]]] = {}
    for run in study["runs"]:
        cells.setdefault(run["cell"], []).append(run)
    return cells


def _percent(runs: list[dict[str, Any]], key: str = "test_top1") -> list[float]:
    return [100 * run[key] for run in runs]


def _row(runs: list[dict[str, Any]], name: str, reference: list[dict[str, Any]] | None) -> list[str]:
    seconds = float(np.mean([run["seconds"] for run in runs]))
    is_reference = reference is None or name == reference[0]["cell"]
    against = "" if is_reference or reference is None else _signed(difference(_percent(runs), _percent(reference)))
    return [
        f"{name} (`{runs[0]['network']}`)",
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['macs'] / 1e6:.1f}",
        f"{seconds:.0f}",
        str(len(runs)),
        _plain(estimate(_percent(runs))),
        against,
        _plain(estimate(_percent(runs, "validation_top1"))),
    ]


def _verdicts(study: dict[str, Any], cells: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for claim in study["claims"]:
        verdicts, details = [], []
        for first, second in claim["pairs"]:
            if first not in cells or second not in cells:
                verdicts.append("not decided")
                details.append(f"{first} − {second}: not run yet")
                continue
            found = difference(_percent(cells[first]), _percent(cells[second]))
            verdicts.append(judge(claim["test"], claim["margin"], found))
            details.append(f"{first} − {second}: {_signed(found)}, {verdicts[-1]}")
        allowed = f" ({claim['margin']:g} percentage point allowed)" if claim["margin"] else ""
        rows.append([claim["text"] + allowed, claim["paper"], f"**{judge_all(verdicts)}**", "<br>".join(details)])
    return rows


def _plain(found: Estimate) -> str:
    return f"{found.mean:.2f}" + (f" ± {found.half_width:.2f}" if math.isfinite(found.half_width) else "")


def _signed(found: Estimate) -> str:
    return f"{found.mean:+.2f}" + (f" ± {found.half_width:.2f}" if math.isfinite(found.half_width) else " (spread not known)")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _color(run: dict[str, Any], reference: str) -> str:
    architecture = run["config"]["model"]["architecture"]
    if architecture == "convmixer":
        return "#2563eb" if run["cell"] == reference else "#93c5fd"
    return {"vit": "#d97706", "mlp-mixer": "#059669", "resnet": "#7c3aed"}[architecture]


def _draw_bars(study: dict[str, Any], path: Path) -> None:
    """Test accuracy of each network with its interval; dots are runs."""
    cells = _cells(study)
    ordered = sorted(cells, key=lambda name: float(np.mean(_percent(cells[name]))))
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.32 * len(cells)), layout="constrained")
    for height, name in enumerate(ordered):
        values = _percent(cells[name])
        found = estimate(values)
        axes.barh(height, found.mean, color=_color(cells[name][0], study["reference"]), height=0.7)
        axes.errorbar(found.mean, height, xerr=_drawn(found), color="black", capsize=3)
        axes.scatter(values, [height] * len(values), color="black", s=6, zorder=3)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set(xlabel="test accuracy, % (95 % intervals; dots are runs; the axis does not begin at 0)", xlim=_limits(cells))
    finish(figure, path, axes)


def _draw_costs(study: dict[str, Any], path: Path) -> None:
    """Test accuracy against multiply-accumulates and against the seconds of a run."""
    cells = _cells(study)
    low, high = _limits(cells)
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for axes, key, scale in ((panels[0], "macs", 1e6), (panels[1], "seconds", 1.0)):
        labels: list[tuple[float, float]] = []
        for name, runs in sorted(cells.items(), key=lambda item: float(np.mean(_percent(item[1])))):
            found, cost = estimate(_percent(runs)), float(np.mean([run[key] for run in runs])) / scale
            color = _color(runs[0], study["reference"])
            axes.errorbar(cost, found.mean, yerr=_drawn(found), fmt="o", markersize=5, color=color, elinewidth=0.8)
            height = found.mean  # a label stands above those of points that cost about the same
            while any(abs(height - y) < 0.03 * (high - low) and abs(math.log(cost / x)) < 1 for x, y in labels):
                height += 0.005 * (high - low)
            labels.append((cost, height))
            at, line = (cost * 1.12, height), {"arrowstyle": "-", "color": GREY, "linewidth": 0.5}
            axes.annotate(name, (cost, found.mean), xytext=at, fontsize=7, va="center", arrowprops=line)
        axes.set(xscale="log", ylim=(low, high))
        axes.margins(x=0.2)
        costs = [x for x, _ in labels]
        if max(costs) < 1.5 * min(costs):  # where all cost alike, labels would be far outside
            axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set(xlabel="million multiply-accumulates an image", ylabel="test accuracy, %")
    panels[1].set(xlabel="seconds of training a run")
    finish(figure, path, *panels)


def _drawn(found: Estimate) -> float:
    return found.half_width if math.isfinite(found.half_width) else 0.0


def _limits(cells: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    values = [value for runs in cells.values() for value in _percent(runs)]
    return max(0.0, min(values) - 4), min(100.0, max(values) + 4)
