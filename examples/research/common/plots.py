"""Pictures of curves, written as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.research.common.files import replacing


def panels(
    titles: Sequence[str], across: int = 4, size: tuple[float, float] = (4.0, 3.0), share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, at most `across` in a row; `size` is that of one panel in inches."""
    across = min(across, len(titles))
    down = -(-len(titles) // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
    found = figure.subplots(down, across, squeeze=False, sharey=share_y).flatten()
    for axes in found[len(titles) :]:
        axes.remove()
    for axes, title in zip(found, titles, strict=False):
        axes.set_title(title)
    return figure, list(found[: len(titles)])


def draw_curve(
    axes: Axes, at: Sequence[float], mean: Sequence[float], low=None, high=None, *, color: str, **style
) -> None:
    """A line and, if `low` and `high` are given, the band between them; `style` goes to `Axes.plot`."""
    if not len(at):  # nothing of the kind was measured
        return
    axes.plot(at, mean, color=color, **style)
    if low is not None:
        axes.fill_between(at, np.asarray(low), np.asarray(high), color=color, alpha=0.15, linewidth=0)


def doubling_axis(axes: Axes, ticks: Sequence[int] | None = None) -> None:
    """Counts along x, each doubling equally wide; there is room for 0."""
    axes.set_xscale("symlog", base=2, linthresh=1)
    if ticks is not None:
        axes.set_xticks(ticks, ticks)


def finish(axes: Axes, fontsize: float = 7, legend: bool = True, **settings) -> None:
    """Grid, legend and, as `settings`, what `Axes.set` takes."""
    axes.set(**settings)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=fontsize)


def save(figure: Figure, path: Path, dpi: int = 100) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
