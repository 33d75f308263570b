"""The looks of a curve: a table on the terminal, and a PNG."""

import os
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..files import replace_file
from .extras import require_extra


def print_curve(curve, from_token: int) -> None:
    counts = sorted({n for method in curve.methods for n in curve.counts(method)})
    tokens = "all query tokens" if from_token == 0 else f"query tokens {from_token}+"
    what = f"Loss in nats, {tokens}" if curve.metric == "loss" else curve.metric.replace("_", " ").capitalize()
    title = f"{what}, after n chunks"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("n", no_wrap=True)
    for n in counts:
        table.add_column(f"{n:g}", justify="right", no_wrap=True)
    for method in curve.methods:
        measured = curve.counts(method)
        table.add_row(method, *(_cell(curve.mean(method, n, from_token)) if n in measured else "" for n in counts))
    Console().print(table)


def _cell(interval: dict) -> str:
    return f"{interval['mean']:.4f}\n±{(interval['high'] - interval['low']) / 2:.3f}"


def draw_curve(curve, path: str | os.PathLike, from_token: int) -> None:
    figure = require_extra("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, method in enumerate(curve.methods):
        _draw_method(axes, curve, method, from_token, f"C{color}")
    axes.set_xscale("symlog", base=2, linthresh=1)
    ticks = sorted({n for method in curve.methods for n in curve.counts(method)})
    axes.set_xticks(ticks, [f"{n:g}" for n in ticks])
    axes.set_xlabel("chunks read")
    unit = "loss (nats per token)" if curve.metric == "loss" else curve.metric.replace("_", " ")
    axes.set_ylabel(unit + (f", query tokens {from_token}+" if from_token else ""))
    axes.grid(alpha=0.3)
    axes.legend()
    replace_file(Path(path), lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _draw_method(axes, curve, method: str, from_token: int, color: str) -> None:
    counts = curve.counts(method)
    points = [curve.mean(method, n, from_token) for n in counts]
    means = [point["mean"] for point in points]
    if len(counts) == 1:
        axes.axhline(means[0], color=color, linestyle="--", label=method)
        return
    axes.plot(counts, means, color=color, marker="o", label=method)
    low, high = ([point[name] for point in points] for name in ("low", "high"))
    axes.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
