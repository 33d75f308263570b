"""Accuracy against chunks read, next to classifiers fitted to all examples so far: rows, table, picture."""

from pathlib import Path

import numpy as np

from examples.research.classifiers.row_training import CHUNK
from examples.research.common.plots import draw_curve, finish, panels, save
from examples.research.common.rows import chosen, interval, print_curves
from hf_iai.evaluation.classifiers import CLASSIFIERS

COUNTS = [1, 2, 5, 10, 15, 20]


def rows_of(setting: str, found: dict[str, np.ndarray]) -> list[dict]:  # method -> (tasks, counts)
    """Accuracy of each method after each count, and how far the state is above it, in points.

    Intervals are bootstrapped over tasks.
    """
    rows = []
    for method, accuracy in found.items():
        for i, n in enumerate(COUNTS):
            gain = 100 * (found["iai"] - accuracy)[:, i : i + 1]
            rows.append({"setting": setting, "method": method, "num_chunks": n} | interval(gain, "gain"))
            rows[-1] |= {"accuracy": 100 * accuracy[:, i].mean(), "num_tasks": len(gain)}
    return rows


def print_table(rows: list[dict]) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = {}
        for method in ("iai", *CLASSIFIERS):
            if not (found := chosen(rows, setting=setting, method=method)):
                continue
            cells[method] = {r["num_chunks"]: f"{r['accuracy']:.2f}" for r in found}
            if method != "iai":
                above = {r["num_chunks"]: f"{r['gain']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]" for r in found}
                cells[f"  iai above {method}"] = above
        print_curves(setting, "after chunks", COUNTS, cells)


def draw(rows: list[dict], settings: list[str], path: Path) -> None:
    """A panel for each setting, two side by side; bands are intervals of the paired difference to the state."""
    figure, found = panels(settings, across=2, size=(5, 3.75))
    for axes, setting in zip(found, settings, strict=True):
        for color, method in enumerate(("iai", *CLASSIFIERS)):
            cells = chosen(rows, setting=setting, method=method)
            at, accuracy = ([cell[name] for cell in cells] for name in ("num_chunks", "accuracy"))
            own = np.add(accuracy, [cell["gain"] for cell in cells])
            band = (own - [cell[name] for cell in cells] for name in ("high", "low"))
            style = {"marker": "o"} if method == "iai" else {"linestyle": "--"}
            draw_curve(axes, at, accuracy, *band, color=f"C{color}", label=method, **style)
        axes.set(xscale="log")
        axes.set_xticks(COUNTS, COUNTS)
        finish(axes, xlabel=f"chunks read, {CHUNK} examples each", ylabel="accuracy, %")
    save(figure, path)
