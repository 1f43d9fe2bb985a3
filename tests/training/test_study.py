"""A study runs what is declared, goes on where it was stopped, and says of each claim what its numbers allow."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.architectures import build_network
from model.convmixer import count_parameters
from tests.training.conftest import CIFAR10, QUIET, Outcome, signal_at
from training.config import TrainConfig
from training.data import ImageSet
from training.errors import ConfigError, ResumeError, Stopped
from training.study import STUDIES, balanced_subset, read_study, run_study
from training.study_report import Estimate, difference, estimate, judge, judge_all, render_page, t_quantile, write_report

TINY = """
title = "Tiny"
about = "Of whatever came to hand."
reference = "convmixer"
[recipe]
batch_size = 16
ema_decay = 0.0
[cells]
convmixer = {}
[budgets.default]
images = 100
epochs = 2
seeds = [0, 1]
model = { hidden_dim = 8, depth = 1, kernel_size = 3, patch_size = 4 }
[budgets.default.cells]
vit = { architecture = "vit", hidden_dim = 8, depth = 1, heads = 2, mlp_dim = 8 }
[[claims]]
text = "ConvMixer is better."
paper = "Says so."
test = "better"
pairs = [["convmixer", "vit"]]
"""


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize("budget", ["default", "full"])
def test_the_papers_study_compares_networks_of_equal_size(budget: str) -> None:
    study = read_study(STUDIES / "paper.toml", budget)
    sizes = {cell.name: count_parameters(build_network(cell.config.model)) for cell in study.cells if cell.config.seed == 0}
    for name in ("vit-patch-2", "vit-patch-4", "mlp-mixer-patch-2", "mlp-mixer-patch-4"):
        assert sizes[name] == pytest.approx(sizes["convmixer"], rel=0.03)
    recipes = {json.dumps({**cell.config.to_dict(), "model": None, "seed": None}) for cell in study.cells}
    assert len(recipes) == 1, "everything but the network is equal"
    assert len(study.cells) == 3 * len(sizes)
    assert len({json.dumps(cell.config.to_dict()["model"]) for cell in study.cells}) == len(sizes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[budgets.default", "[budgets.large", "tiny.toml has no budget 'default'; known: large"),
        ("reference =", "reference", "tiny.toml: Expected '='"),
        ("epochs = 2", "", "tiny.toml: 'epochs' is missing"),
        ("kernel_size = 3", "kernel = 3", "tiny.toml: unknown convmixer settings: kernel"),
        ("batch_size = 16", "batch = 16", "batch"),
        ('["convmixer", "vit"]', '["convmixer", "mlp"]', "tiny.toml: no cell is called mlp"),
        ('reference = "convmixer"', 'reference = "resnet"', "tiny.toml: no cell is called resnet"),
        ('"better"', '"worse"', "a claim's test must be one of better, as-good, no-matter"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(declared: Path, old: str, new: str, message: str) -> None:
    declared.write_text(TINY.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_study(declared, "default")


def test_a_missing_file_is_one_line(command_line: Callable[..., Outcome]) -> None:
    outcome = command_line("study", "none.toml")
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert "none.toml" in outcome.err


def test_a_subset_has_the_same_share_of_each_class_and_is_always_the_same(photos: ImageSet) -> None:
    subset = balanced_subset(photos, 50)
    assert subset.labels.bincount().tolist() == [5] * 10
    assert subset.fingerprint() == balanced_subset(photos, 50).fingerprint()
    assert balanced_subset(photos, 0) is balanced_subset(photos, 1000) is photos


# Running


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what the clock says."""
    runs = [{k: v for k, v in run.items() if k not in ("seconds", "checkpoint_sha256")} for run in results["runs"]]
    return {**results, "runs": runs}


@pytest.mark.usefixtures("no_compiler")
def test_an_interrupted_study_ends_with_the_same_results_and_page(
    declared: Path, tmp_path: Path, command_line: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.study.MEASURE_S", 0.05)
    study = read_study(declared, "default")
    whole = run_study(study, CIFAR10, tmp_path / "whole", QUIET)
    assert [(run["cell"], run["seed"]) for run in whole["runs"]] == [
        ("convmixer", 0), ("vit", 0), ("convmixer", 1), ("vit", 1)
    ]  # fmt: skip
    assert [run["images"] for run in whole["runs"]] == [90] * 4
    assert {run["test_images"] for run in whole["runs"]} == {200}
    assert TrainConfig.from_dict(whole["runs"][1]["config"]) == study.cells[1].config

    output = tmp_path / "runs" / "default"
    for step, finished in ((3, 0), (9, 2)):  # in the first run, then in the third: 5 steps an epoch, 7 + 2 to go
        with signal_at([step]), pytest.raises(Stopped) as end:
            run_study(study, CIFAR10, output, QUIET)
        assert end.value.signal_number == signal.SIGTERM
        assert len(list(output.glob("*/*/result.json"))) == finished
        assert len(list(output.glob("*/*/last.safetensors"))) == 1
    assert len(run_study(study, CIFAR10, output, QUIET, minutes=1e-6)["runs"]) == 2, "no time, no run"
    arguments = ["study", declared, "--data", CIFAR10, "--output", output.parent, "--docs", tmp_path / "docs", "--device=cpu"]
    outcome = command_line(*arguments, "--precision=float32")
    assert outcome.code == 0, outcome
    assert outcome.out == f"wrote {tmp_path / 'docs' / 'study.md'} from 4 of 4 runs\n"
    written = json.loads((tmp_path / "docs" / "study.json").read_text())
    assert figures(written["default"]) == figures(whole)
    page = (tmp_path / "docs" / "study.md").read_text()
    assert page == render_page(written)
    assert "Of whatever came to hand." in page
    assert {path.name for path in (tmp_path / "docs" / "images").iterdir()} == {
        "study-default-accuracy.png",
        "study-default-cost.png",
    }

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "study-tiny").symlink_to(output.parent)
    assert command_line("study", declared, "--data", CIFAR10, "--device=cpu", "--precision=float32").out == (
        f"wrote {Path('runs/study-tiny/study.md')} from 4 of 4 runs\n"
    ), "what is published of the study that ships is left alone"

    first = output / "convmixer" / "seed-0" / "result.json"
    before = first.stat().st_mtime_ns
    assert command_line(*arguments).code == 0
    assert first.stat().st_mtime_ns == before, "a finished run is not run again"
    for old, new, message in (
        ("epochs = 2", "epochs = 3", "is of other settings or another version"),
        ("images = 100", "images = 50", "holds runs on other images"),
    ):
        declared.write_text(TINY.replace(old, new))
        with pytest.raises(ResumeError, match=message):
            run_study(read_study(declared, "default"), CIFAR10, output, QUIET)


# Judging


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (24, 2.0639), (1000, 1.9623)])
def test_quantiles_are_those_of_the_tables(freedom: float, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=2e-4)


def test_intervals() -> None:
    assert estimate([60.0, 61.0, 62.0]) == pytest.approx((61, 4.3027 / math.sqrt(3)), abs=1e-3)
    assert estimate([60.0]) == (60, math.inf)
    # Welch: variances 1 and 4, three each: standard error sqrt(5/3), (5/3)² / ((1/3)²/2 + (4/3)²/2) = 2.941 degrees of freedom
    found = difference([9.0, 10.0, 11.0], [3.0, 5.0, 7.0])
    assert found == pytest.approx((5, t_quantile(50 / 17) * math.sqrt(5 / 3)), abs=1e-6)
    assert difference([1.0], [2.0, 3.0]).half_width == math.inf
    assert estimate([1.0, 1.0]) == (1, math.inf)
    assert difference([1.0, 1.0], [0.0, 0.0]) == (1, math.inf), "two images of twenty may say so by chance"


@pytest.mark.parametrize(
    ("test", "margin", "mean", "half_width", "expected"),
    [
        ("better", 0, 2, 1, "held"),
        ("better", 0, 1, 2, "not decided"),
        ("better", 0, -2, 1, "did not hold"),
        ("better", 0, 9, math.inf, "not decided"),
        ("as-good", 1, 0, 0.5, "held"),
        ("as-good", 1, 5, 1, "held"),
        ("as-good", 1, -1, 0.5, "not decided"),
        ("as-good", 1, -3, 1, "did not hold"),
        ("no-matter", 1, 0.2, 0.5, "held"),
        ("no-matter", 1, 0.8, 0.5, "not decided"),
        ("no-matter", 1, 0, 3, "not decided"),
        ("no-matter", 1, 3, 1, "did not hold"),
        ("no-matter", 1, -3, 1, "did not hold"),
    ],
)
def test_a_verdict_needs_the_whole_interval(test: str, margin: float, mean: float, half_width: float, expected: str) -> None:
    assert judge(test, margin, Estimate(mean, half_width)) == expected


def test_a_claim_holds_if_all_of_it_does() -> None:
    assert judge_all(["held", "held"]) == "held"
    assert judge_all(["held", "not decided"]) == "not decided"
    assert judge_all(["not decided", "did not hold", "held"]) == "did not hold"


def test_an_unfinished_study_says_so() -> None:
    run = {"cell": "a", "seed": 0, "network": "a-1", "parameters": 1000, "macs": 10**6, "test_top1": 0.5, "validation_top1": 0.5}
    run |= {"seconds": 60.0, "epochs": 2, "images": 90, "validation_images": 10, "test_images": 200, "hardware": "abacus"}
    run |= {"precision": "float32", "torch": "2", "config": {"batch_size": 16}}
    claim = {"text": "A is better.", "paper": "", "test": "better", "margin": 0.0, "pairs": [["a", "b"]]}
    study = {"title": "T", "about": "", "reference": "b", "declared_runs": 4, "claims": [claim], "runs": [run]}
    page = render_page({"tiny": study})
    assert "**3 of 4 runs are not finished yet.**" in page
    assert "| A is better. |  | **not decided** | a − b: not run yet |" in page


def test_the_page_that_ships_is_what_its_results_say(repository: Path) -> None:
    results = json.loads((repository / "docs" / "study.json").read_text())
    assert (repository / "docs" / "study.md").read_text() == render_page(results)


def test_networks_that_cost_the_same_are_drawn(repository: Path, tmp_path: Path) -> None:
    written = json.loads((repository / "docs" / "study.json").read_text())
    for number, run in enumerate(written["default"]["runs"]):
        run["seconds"] = 0.5 + 0.0001 * (number % 2)
    (tmp_path / "study.json").write_text(json.dumps(written))
    write_report(tmp_path / "study.json", tmp_path / "study.md")
    assert (tmp_path / "images" / "study-default-cost.png").stat().st_size > 0
