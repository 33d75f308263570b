"""The report of `associative_recall` as a table and three pictures."""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

TRAINED = 16  # slots of the adapters in the main picture


def chosen(report: dict, **values) -> list[dict]:
    return [row for row in report["rows"] if all(row.get(name) == value for name, value in values.items())]


def over_seeds(rows: list[dict], by: str) -> tuple[list, np.ndarray, np.ndarray]:
    """Values of the column `by`; mean and standard deviation (0 for one seed) of the exact match over seeds at each."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[by]].append(row["exact_match"])
    at = sorted(groups)
    spread = [np.std(groups[x], ddof=1) if len(groups[x]) > 1 else 0.0 for x in at]
    return at, np.array([np.mean(groups[x]) for x in at]), np.array(spread)


def print_table(report: dict) -> None:
    """Exact match after all chunks, mean over seeds and their spread."""
    table = Table("setting", "asked", "method", "slots", "chunks", "seeds", "exact match", "spread", title="Recall")
    keys = dict.fromkeys((r["setting"], r["asked"], r["method"], r["slots"]) for r in report["rows"])
    for setting, asked, method, slots in keys:
        rows = chosen(report, setting=setting, asked=asked, method=method, slots=slots)
        counts, mean, spread = over_seeds(rows, "num_chunks")
        seeds = len({row.get("seed", 0) for row in rows})
        table.add_row(
            setting, asked, method, f"{slots}", f"{counts[-1]}", f"{seeds}", f"{mean[-1]:.4f}", f"{spread[-1]:.4f}"
        )
    Console().print(table)
    bytes_of = sorted({(row["slots"], row["state_bytes"]) for row in report["rows"] if "state_bytes" in row})
    for slots, size in bytes_of:
        Console().print(f"{slots} slots: {size} bytes of state, {size / 64:.0f} a pair at 64 pairs")
    Console().print(f"chance: {report['chance']:.4f}")


def draw_chunks(report: dict, path: Path) -> None:
    """Exact match of all asked keys against chunks read."""
    figure = Figure(figsize=(10, 8.4), layout="constrained")
    # Below, twice the pairs and chunks: keys that are all written twice, and twice as many keys.
    settings = ("64 pairs", "25% rewritten", "100% rewritten", "128 pairs")
    for axes, setting in zip(figure.subplots(2, 2, sharey=True).flat, settings, strict=True):
        for color, method in enumerate(("delta", "average")):
            rows = chosen(report, setting=setting, asked="all", method=method, slots=TRAINED)
            _line(axes, over_seeds(rows, "num_chunks"), f"C{color}", f"hf_iai, {NAMES[method]}")
            again = chosen(report, setting=setting, asked="rewritten", method=method, slots=TRAINED)
            if again:
                at, mean, _ = over_seeds(again, "num_chunks")
                axes.plot(at, mean, "*", color=f"C{color}", markersize=12, label=f"{NAMES[method]}: rewritten keys")
        for style, method in ((":", "fewer_shots"), ("--", "full_context")):
            for row in chosen(report, setting=setting, method=method):
                axes.axhline(row["exact_match"], color="grey", linestyle=style, label=method.replace("_", " "))
        axes.axhline(report["chance"], color="black", linewidth=0.5, label="chance")
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xlim(left=-0.2)
        axes.set_xlabel("chunks read, 4 pairs each")
        _finish(axes, setting)
    _save(figure, path)


def draw_sizes(report: dict, path: Path) -> None:
    """Exact match after all chunks against the number of slots."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for color, (setting, asked) in enumerate((("64 pairs", "all"), ("25% rewritten", "rewritten"))):
        rows = chosen(report, setting=setting, asked=asked, method="delta")
        rows = [row for row in rows if row["num_chunks"] == max(r["num_chunks"] for r in rows)]
        _line(axes, over_seeds(rows, "slots"), f"C{color}", f"{setting}: {asked} keys")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("slots of the state, m")
    _finish(axes, "Recall after all chunks")
    _save(figure, path)


def draw_steps(report: dict, path: Path) -> None:
    """Exact match on other tasks during training, m = 16."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for color, method in enumerate(("delta", "average")):
        runs = [t["history"] for t in report["training"] if t["adapter"].startswith(f"m{TRAINED}-keys64-{method}-")]
        for style, name in (("-", "once"), ("--", "rewritten")):
            rows = [{"step": r["step"], "exact_match": r[name]} for run in runs for r in run]
            _line(
                axes, over_seeds(rows, "step"), f"C{color}", f"{NAMES[method]}: keys written {name}", style, marker=""
            )
    axes.set_xlabel("training steps")
    _finish(axes, "Recall against training, 64 pairs")
    _save(figure, path)


NAMES = {"delta": "delta rule", "average": "average alone"}


def _line(axes: Axes, points: tuple, color: str, label: str, style: str = "-", marker: str = "o") -> None:
    at, mean, spread = points
    if not at:  # nothing of the kind was trained
        return
    axes.plot(at, mean, color=color, linestyle=style, marker=marker, label=label)
    axes.fill_between(at, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_ylabel("exact match")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=130)
    os.replace(temporary, path)
