"""What all figures of the model card and the study have in common."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE = "#2563eb"
GREY = "#94a3b8"


def finish(figure: Figure, path: Path, *axes: Axes) -> None:
    """Draws a light grid behind the given axes, writes the PNG and frees the figure.

    Args:
        figure: the whole picture.
        path: of the file.
        axes: those of its parts that have a scale.
    """
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
        a.grid(color="#e2e8f0", linewidth=0.6)
        a.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
