"""The report of `steps_to_quality` as tables, verdicts and a picture."""

from pathlib import Path

import numpy as np
from rich.console import Console

from examples.research.common.plots import doubling_axis, draw_curve, finish, panels, save
from examples.research.common.rows import chosen, interval, print_curves

LEARNED = ("learned_optimizer", "learned")
FEW, MANY = 5, 25  # learned updates, and those of Adam that they are held against
LINES = {
    LEARNED: ("learned optimizer", "C3", "-"),
    ("adam", "learned"): ("Adam, learned start", "C0", "-"),
    ("sgd", "learned"): ("SGD, learned start", "C1", "-"),
    ("meta_sgd", "learned"): ("Meta-SGD, learned start", "C2", "-"),
    ("meta_sgd", "own"): ("Meta-SGD, its own start", "C2", ":"),
    ("adam", "peft"): ("Adam, PEFT's start", "C0", "--"),
    ("adam_few", "peft"): ("Adam, PEFT's start, the last 5 chunks alone", "C4", ""),
    ("sgd", "peft"): ("SGD, PEFT's start", "C1", "--"),
    ("meta_sgd", "peft"): ("Meta-SGD, PEFT's start", "C2", "--"),
}


def losses(report: dict, method: str, start: str, num_updates: int) -> np.ndarray:  # (S, E), S seeds
    """Loss of each window. Without an update, all methods from the same start have the same loss."""
    if num_updates == 0:
        method = {"learned": "learned_optimizer", "peft": "none"}.get(start, method)
    rows = chosen(report["rows"], method=method, start=start, num_updates=num_updates)
    return np.array([row["losses"] for row in sorted(rows, key=lambda row: row["seed"])])


def counts(report: dict, method: str, start: str) -> list[int]:
    found = {row["num_updates"] for row in chosen(report["rows"], method=method, start=start)}
    return sorted(found | {0})


def over_documents(values: np.ndarray, report: dict) -> tuple[float, float, float]:  # (S, E)
    """Mean over seeds and windows, and its interval over documents."""
    return tuple(interval(values.T, groups=np.array(report["groups"])).values())


def share_of_gain(report: dict, num_resamples: int = 1000) -> tuple[float, float, float]:
    """(gain of 5 learned updates) / (gain of Adam's 25), both from the learned start, and its interval."""
    start, few = losses(report, *LEARNED, 0).mean(0), losses(report, *LEARNED, FEW).mean(0)
    many = losses(report, "adam", "learned", MANY).mean(0)
    names, index = np.unique(report["groups"], return_inverse=True)
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), num_resamples)
    gains = [np.bincount(index, weights=start - after) for after in (few, many)]
    ratios = (drawn @ gains[0]) / (drawn @ gains[1])
    return gains[0].sum() / gains[1].sum(), *np.quantile(ratios, [0.025, 0.975])


def print_report(report: dict) -> None:
    at = sorted({n for key in LINES for n in counts(report, *key)})
    seeds = len({row["seed"] for row in report["rows"]})
    title = f"{report['model']}, {report['state']} state: loss after n updates, {seeds} seeds"
    cells = {
        name: {n: f"{losses(report, *key, n).mean():.3f}" for n in counts(report, *key)}
        for key, (name, _, _) in LINES.items()
    }
    print_curves(title, "method", at, cells)
    console = Console(width=120)
    share = share_of_gain(report)
    console.print(f"{FEW} learned updates: {_shown(share)} of what Adam gains in {MANY} from the same start")
    for method, chunks in (("adam", "all chunks"), ("adam_few", "the same 5 chunks")):
        ahead = losses(report, method, "peft", 100) - losses(report, *LEARNED, FEW)
        console.print(
            f"ahead of Adam's 100 from PEFT's start, {chunks}, by {_shown(over_documents(ahead, report))} nats"
        )
    for n in (20, 50, 100):
        later = losses(report, *LEARNED, FEW) - losses(report, *LEARNED, n)
        console.print(f"{n} learned updates: {_shown(over_documents(later, report))} nats better than {FEW}")


def _shown(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.3f} ({found[1]:.3f} .. {found[2]:.3f})"


def means(report: dict) -> dict:
    """The report with the mean loss in place of the loss of each window, in the columns of a published curve."""
    rows = []
    for row in report["rows"]:
        key = row["method"], row["start"]
        method = "iai" if key == LEARNED else LINES[key][0] if key in LINES else "no update, PEFT's start"
        own = {name: row[name] for name in ("seed", "rate")}
        rows.append({"method": method, "num_chunks": row["num_updates"], "loss": round(row["loss"], 4), **own})
    found = {"share_of_adam": share_of_gain(report), "recipe": report["recipe"], "rates": report["rates"]}
    return found | {"num_windows": len(report["groups"]), "num_documents": len(set(report["groups"])), "rows": rows}


def draw(report: dict, path: Path) -> None:
    """Loss against updates."""
    figure, (axes,) = panels([f"{report['model']}, {report['state']} state"], size=(6.5, 4.5))
    for key, (name, color, style) in LINES.items():
        at = counts(report, *key)
        mean = [losses(report, *key, n).mean() for n in at]
        draw_curve(axes, at, mean, color=color, linestyle=style, label=name, marker=".")
    doubling_axis(axes)
    # From PEFT's start a few updates are far away.
    best = min(losses(report, *LEARNED, n).mean() for n in counts(report, *LEARNED))
    ylim = (best - 0.02, losses(report, *LEARNED, 0).mean() + 0.15)
    xlabel = f"updates, one chunk of {report['chunk_size']} tokens each"
    finish(axes, xlabel=xlabel, ylabel="loss of the text that follows, nats per token", ylim=ylim)
    save(figure, path, dpi=110)
