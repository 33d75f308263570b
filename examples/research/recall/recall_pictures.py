"""The report of `associative_recall` as a table and three pictures."""

from pathlib import Path

from matplotlib.axes import Axes
from rich.console import Console

from examples.research.common.plots import doubling_axis, draw_curve, finish, panels, save
from examples.research.common.rows import Points, chosen, grouped, print_rows, with_deviation

TRAINED = 16  # slots of the adapters in the main picture


NAMES = {"delta": "delta rule", "average": "average alone"}


def points_of(rows: list[dict], by: str = "num_chunks") -> Points:
    """Exact match at each value of `by`: mean over seeds, and mean minus and plus the standard deviation."""
    return with_deviation(grouped(rows, "exact_match", by))


def print_table(report: dict) -> None:
    """Exact match after all chunks, mean over seeds and their spread."""
    lines = []
    names = ("setting", "asked", "method", "slots")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in report["rows"]):
        line = dict(zip(names, key, strict=True))
        rows = chosen(report["rows"], **line)
        at, mean, low, _ = points_of(rows)
        line |= {"chunks": at[-1], "seeds": len({row.get("seed", 0) for row in rows})}
        lines.append(line | {"exact match": float(mean[-1]), "spread": float((mean - low)[-1])})
    print_rows(lines)
    for slots, size in sorted({(row["slots"], row["state_bytes"]) for row in report["rows"] if "state_bytes" in row}):
        Console().print(f"{slots} slots: {size} bytes of state, {size / 64:.0f} a pair at 64 pairs")
    Console().print(f"chance: {report['chance']:.4f}")


def draw_chunks(report: dict, path: Path) -> None:
    """Exact match of all asked keys against chunks read."""
    # Below, twice the pairs and chunks: keys that are all written twice, and twice as many keys.
    settings = ("64 pairs", "25% rewritten", "100% rewritten", "128 pairs")
    figure, found = panels(settings, across=2, size=(5, 4.2), share_y=True)
    for axes, setting in zip(found, settings, strict=True):
        of_setting = chosen(report["rows"], setting=setting)
        for color, method in enumerate(("delta", "average")):
            rows = chosen(of_setting, method=method, slots=TRAINED)
            _line(axes, points_of(chosen(rows, asked="all")), f"C{color}", f"hf_iai, {NAMES[method]}")
            at, mean, *_ = points_of(chosen(rows, asked="rewritten"))
            label = f"{NAMES[method]}: rewritten keys"
            draw_curve(axes, at, mean, color=f"C{color}", linestyle="", marker="*", markersize=12, label=label)
        for style, method in ((":", "fewer_shots"), ("--", "full_context")):
            for row in chosen(of_setting, method=method):
                axes.axhline(row["exact_match"], color="grey", linestyle=style, label=method.replace("_", " "))
        axes.axhline(report["chance"], color="black", linewidth=0.5, label="chance")
        doubling_axis(axes)
        _finish(axes, "chunks read, 4 pairs each", xlim=(-0.2, None))
    save(figure, path, dpi=130)


def draw_sizes(report: dict, path: Path) -> None:
    """Exact match after all chunks against the number of slots."""
    figure, (axes,) = panels(["Recall after all chunks"], size=(6, 4.2))
    for color, (setting, asked) in enumerate((("64 pairs", "all"), ("25% rewritten", "rewritten"))):
        rows = chosen(report["rows"], setting=setting, asked=asked, method="delta")
        rows = [row for row in rows if row["num_chunks"] == max(r["num_chunks"] for r in rows)]
        _line(axes, points_of(rows, "slots"), f"C{color}", f"{setting}: {asked} keys")
    axes.set_xscale("log", base=2)
    _finish(axes, "slots of the state, m")
    save(figure, path, dpi=130)


def draw_steps(report: dict, path: Path) -> None:
    """Exact match on other tasks during training, m = 16."""
    figure, (axes,) = panels(["Recall against training, 64 pairs"], size=(6, 4.2))
    for color, method in enumerate(("delta", "average")):
        runs = [t["history"] for t in report["training"] if t["adapter"].startswith(f"m{TRAINED}-keys64-{method}-")]
        for style, name in (("-", "once"), ("--", "rewritten")):
            rows = [{"step": r["step"], "exact_match": r[name]} for run in runs for r in run]
            label = f"{NAMES[method]}: keys written {name}"
            _line(axes, points_of(rows, "step"), f"C{color}", label, style, marker="")
    _finish(axes, "training steps")
    save(figure, path, dpi=130)


def _line(axes: Axes, points: Points, color: str, label: str, style: str = "-", marker: str = "o") -> None:
    draw_curve(axes, *points, color=color, label=label, linestyle=style, marker=marker)


def _finish(axes: Axes, xlabel: str, **settings) -> None:
    finish(axes, fontsize=8, xlabel=xlabel, ylabel="exact match", ylim=(0, 1.02), **settings)
