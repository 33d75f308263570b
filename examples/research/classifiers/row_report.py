"""Accuracy against chunks read, next to classifiers fitted to all examples so far: rows, table, picture."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from examples.research.classifiers.row_training import CHUNK
from examples.research.common.provenance import provenance
from hf_iai.evaluation import bootstrap_mean
from hf_iai.evaluation.classifiers import CLASSIFIERS

COUNTS = [1, 2, 5, 10, 15, 20]


def rows_of(setting: str, found: dict[str, np.ndarray]) -> list[dict]:  # method -> (tasks, counts)
    """Accuracy of each method after each count, and what the state gains on it, in points; bootstrapped over tasks."""
    rows = []
    for method, accuracy in found.items():
        for i, n in enumerate(COUNTS):
            gain = 100 * (found["iai"] - accuracy)[:, i : i + 1]
            names = dict(zip(("gain", "low", "high"), bootstrap_mean(gain, np.arange(len(gain))), strict=True))
            rows.append({"setting": setting, "method": method, "num_chunks": n} | names)
            rows[-1] |= {"accuracy": 100 * accuracy[:, i].mean(), "num_tasks": len(gain)}
    return rows


def print_table(rows: list[dict]) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        print(f"\n{setting}, chunks: {COUNTS}")
        for method in ("iai", *CLASSIFIERS):
            cells = [r for r in rows if (r["setting"], r["method"]) == (setting, method)]
            print(f"  {method:22s}", *(f"{r['accuracy']:6.2f}" for r in cells))
            if method != "iai":
                print(
                    f"  {'  iai above it':22s}",
                    *(f"{r['gain']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]" for r in cells),
                )


def write(rows: list[dict], command: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"recipe": {"command": command, **provenance()}, "rows": rows}
    path.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".tmp").replace(path)


def draw(rows: list[dict], settings: list[str], path: Path) -> None:
    """A panel for each setting, two side by side; bands are intervals of the paired difference to the state."""
    num_rows, num_columns = -(-len(settings) // 2), min(len(settings), 2)
    figure = Figure(figsize=(5 * num_columns, 3.75 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in panels[len(settings) :]:
        axes.remove()
    for axes, setting in zip(panels, settings, strict=False):
        for color, method in enumerate(("iai", *CLASSIFIERS)):
            cells = [r for r in rows if (r["setting"], r["method"]) == (setting, method)]
            at, accuracy = ([cell[name] for cell in cells] for name in ("num_chunks", "accuracy"))
            axes.plot(at, accuracy, f"C{color}" + ("-o" if method == "iai" else "--"), label=method)
            own = np.add(accuracy, [cell["gain"] for cell in cells])
            low, high = (own - [cell[name] for cell in cells] for name in ("high", "low"))
            axes.fill_between(at, low, high, color=f"C{color}", alpha=0.2, linewidth=0)
        axes.set(title=setting, xscale="log", xlabel=f"chunks read, {CHUNK} examples each", ylabel="accuracy, %")
        axes.set_xticks(COUNTS, COUNTS)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path.with_suffix(".tmp"), format="png", dpi=100)
    path.with_suffix(".tmp").replace(path)
