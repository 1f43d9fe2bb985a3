"""The study's page: table, pictures and verdicts, made from its results alone and never edited by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np

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
    return Estimate(float(np.mean(values)), t_quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n))


def difference(first: list[float], second: list[float]) -> Estimate:
    """Difference of two means with Welch's t-interval, which does not take their spreads for equal."""
    mean = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return Estimate(mean, math.inf)
    a, b = (float(np.var(values, ddof=1)) / len(values) for values in (first, second))
    if a + b == 0:
        return Estimate(mean, 0.0)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**studies, budget: results}, indent=1) + "\n")


def write_report(results: Path, page: Path) -> None:
    """Writes the page and its pictures, `images/study-*.png` beside it.

    Args:
        results: JSON file: name of a budget → what `training.study.collect` returned.
        page: the Markdown file.
    """
    pictures = page.parent / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    studies = json.loads(results.read_text())
    for budget, study in studies.items():
        _draw_bars(study, pictures / f"study-{budget}-accuracy.png")
        _draw_costs(study, pictures / f"study-{budget}-cost.png")
    page.write_text(render_page(studies))


def render_page(studies: dict[str, Any]) -> str:
    """The Markdown of a page.

    Args:
        studies: name of a budget → what `training.study.collect` returned, with at least one run.
    """
    title = next(iter(studies.values()))["title"]
    sections = "\n".join(_section(budget, study) for budget, study in studies.items())
    return f"""# {title}

Written by `convmixer-train study`, from `study.json` beside it; do not edit. What was run, with every setting:
`training/studies/paper.toml` and `study.json`.

Each network was trained once for each seed, all on the same images, with the same number of epochs and the same recipe, which was
not tuned for any of them. ± is the 95 % interval of the mean over seeds (Student's t): how far another set of seeds might lead.
The test images are the same for all. A difference has Welch's interval, and a claim *held* if all of the interval is where the
claim wants it, *did not hold* if none of it is, and is *not decided* otherwise. The intervals are not corrected for being several.

{sections}"""


def _section(budget: str, study: dict[str, Any]) -> str:
    cells = _cells(study)
    first = study["runs"][0]
    seeds = sorted({run["seed"] for run in study["runs"]})
    machines = sorted({f"{run['hardware']}, {run['precision']}, torch {run['torch']}" for run in study["runs"]})
    minutes = sum(run["seconds"] for run in study["runs"]) / 60
    reference = cells[study["reference"]][0] if study["reference"] in cells else first
    missing = study["declared_runs"] - len(study["runs"])
    unfinished = f"**{missing} of {study['declared_runs']} runs are not finished yet.** " if missing else ""
    rows = [_row(runs, name, cells.get(study["reference"])) for name, runs in cells.items()]
    return f"""## Budget `{budget}`

{unfinished}{len(study["runs"])} runs: networks of about {_thousands(reference["parameters"])} parameters, {first["epochs"]} epochs of
{first["images"]:,} training images in batches of {first["config"]["batch_size"]}, {first["validation_images"]:,} held out, seeds
{", ".join(map(str, seeds))}; {first["test_images"]:,} test images, looked at once by each run's final weights. {minutes:.0f} minutes of
training on {"; ".join(machines)}.{_small_print(first)}

{_table(["network", "parameters", "MMAC an image", "seconds a run", "seeds", "test, %", "against the reference", "validation, %"], rows)}

![Accuracy with intervals](images/study-{budget}-accuracy.png)

![Accuracy against cost](images/study-{budget}-cost.png)

### Which claims held

{_table(["claim", "the paper", "here", "difference in points"], _verdicts(study, cells))}
"""


def _small_print(run: dict[str, Any]) -> str:
    if run["images"] * run["epochs"] >= 1_000_000:
        return ""
    return (
        " So little training of so small networks says who learns faster from few images; it does not say who ends higher, which"
        " takes `--budget full`."
    )


def _thousands(count: int) -> str:
    return f"{count / 1e6:.2f} million" if count >= 1e6 / 2 else f"{count / 1e3:.0f},000"


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
        allowed = f" ({claim['margin']:g} points allowed)" if claim["margin"] else ""
        rows.append([claim["text"] + allowed, claim["paper"], f"**{judge_all(verdicts)}**", "<br>".join(details)])
    return rows


def _plain(found: Estimate) -> str:
    return f"{found.mean:.2f}" + (f" ± {found.half_width:.2f}" if math.isfinite(found.half_width) else "")


def _signed(found: Estimate) -> str:
    return f"{found.mean:+.2f}" + (f" ± {found.half_width:.2f}" if math.isfinite(found.half_width) else " (one run)")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _color(run: dict[str, Any], reference: str) -> str:
    architecture = run["config"]["model"]["architecture"]
    if architecture == "convmixer":
        return "#2563eb" if run["cell"] == reference else "#93c5fd"
    return {"vit": "#d97706", "mlp-mixer": "#059669"}[architecture]


def _draw_bars(study: dict[str, Any], path: Path) -> None:
    """Test accuracy of each network with its interval; dots are runs."""
    cells = _cells(study)
    ordered = sorted(cells, key=lambda name: float(np.mean(_percent(cells[name]))))
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.32 * len(cells)), layout="constrained")
    for height, name in enumerate(ordered):
        values = _percent(cells[name])
        found = estimate(values)
        axes.barh(height, found.mean, color=_color(cells[name][0], study["reference"]), height=0.7)
        axes.errorbar(
            found.mean, height, xerr=found.half_width if math.isfinite(found.half_width) else 0, color="black", capsize=3
        )
        axes.scatter(values, [height] * len(values), color="black", s=6, zorder=3)
    axes.set_yticks(range(len(ordered)), ordered)
    lowest = min(value for runs in cells.values() for value in _percent(runs))
    axes.set(xlabel="test accuracy, % (95 % intervals; dots are runs)", xlim=(max(0, lowest - 5), None))
    _finish(figure, path, axes)


def _draw_costs(study: dict[str, Any], path: Path) -> None:
    """Test accuracy against multiply-accumulates and against the seconds of a run."""
    cells = _cells(study)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for (name, runs), (axes, key, scale) in itertools.product(
        cells.items(), ((panels[0], "macs", 1e6), (panels[1], "seconds", 1.0))
    ):
        found = estimate(_percent(runs))
        cost = float(np.mean([run[key] for run in runs])) / scale
        error = found.half_width if math.isfinite(found.half_width) else 0
        axes.errorbar(
            cost, found.mean, yerr=error, fmt="o", markersize=5, color=_color(runs[0], study["reference"]), elinewidth=0.8
        )
        axes.annotate(name, (cost, found.mean), xytext=(5, 3), textcoords="offset points", fontsize=7)
    panels[0].set(xscale="log", xlabel="million multiply-accumulates an image", ylabel="test accuracy, %")
    panels[1].set(xscale="log", xlabel="seconds of training a run")
    _finish(figure, path, *panels)


def _finish(figure: Any, path: Path, *panels: Any) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e2e8f0", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
