"""The paper's experiments: one command for each table.

    python -m examples.paper.run --table linear_regression        # writes TABLE.json and TABLE.png beside this file

docs/paper.md compares the paper's findings with what was measured here.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from examples.research.common.plots import draw_curve, finish, panels, save
from examples.research.common.rows import chosen, print_curves, write_rows

FOLDER = Path(__file__).parent
TABLES = ("linear_regression", "in_context", "regimes", "classification", "causal_order", "generation")


def main(
    table: Annotated[str, typer.Option()],
    tier: str = "cpu",
    seeds: int = 3,
    data: Path = Path("data"),
    output: Path = FOLDER,
) -> None:
    if table not in TABLES or tier not in ("cpu", "gpu"):
        raise typer.BadParameter(f"--table is one of {list(TABLES)}, --tier cpu or gpu; got {table!r} and {tier!r}")
    if tier == "gpu":  # everything is made where it is used
        device = torch.accelerator.current_accelerator(check_available=True)
        if device is None or device.type == "mps":  # which has no float64
            raise typer.BadParameter(f"--tier gpu needs an accelerator with float64, got {device}: use --tier cpu")
        torch.set_default_device(device)
    module = import_module(f"examples.paper.{table}")
    rows = means(module.table(tier, seeds, data, output))
    command = f"paper.run --table {table} --tier {tier} --seeds {seeds}"
    command += " --data DATA" if table == "classification" else ""
    write_rows(rows, output / f"{table}.json", command, value=module.VALUE, counted=module.COUNTED)
    show(rows, module.COUNTED)
    draw(rows, module.COUNTED, module.VALUE, module.SCALE, output / f"{table}.png")


def means(rows: list[dict]) -> list[dict]:
    """Means over seeds, with the standard deviation if there are several seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["setting"], row["method"], row["num_chunks"]), []).append(row)
    found = []
    for key, same in groups.items():
        row = dict(zip(("setting", "method", "num_chunks"), key, strict=True)) | {"num_seeds": len(same)}
        for name in same[0].keys() - row.keys() - {"seed"}:
            values = np.array([r[name] for r in same])
            row[name] = values.mean()
            if len(same) > 1:
                row[f"{name}_deviation"] = values.std(ddof=1)
        found.append(row)
    return found


def curves(rows: list[dict], setting: str) -> dict[str, list[dict]]:
    """method -> its rows, sorted by the number of chunks."""
    of_setting = chosen(rows, setting=setting)
    methods = dict.fromkeys(row["method"] for row in of_setting)
    return {m: sorted(chosen(of_setting, method=m), key=lambda row: row["num_chunks"]) for m in methods}


def show(rows: list[dict], counted: str) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        found = curves(rows, setting)
        counts = sorted({row["num_chunks"] for of_method in found.values() for row in of_method})
        cells = {method: {row["num_chunks"]: _cell(row) for row in of_method} for method, of_method in found.items()}
        print_curves(setting, f"after {counted}", counts, cells)


def _cell(row: dict) -> str:
    ratio = f" ({row['ratio']:.2f})" if "ratio" in row else ""
    return f"{row['value']:.3g}{ratio}"


def draw(rows: list[dict], counted: str, value: str, scale: str, path: Path) -> None:
    """A panel for each setting, four in a row."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes_of = panels(settings)
    for axes, setting in zip(axes_of, settings, strict=True):
        for color, (method, of_method) in enumerate(curves(rows, setting).items()):
            at, values = ([row[name] for row in of_method] for name in ("num_chunks", "value"))
            draw_curve(axes, at, values, color=f"C{color}", marker=".", label=method)
        finish(axes, legend=False, xscale="log", yscale=scale, xlabel=counted, ylabel=value)
    axes_of[0].legend(fontsize=6)
    save(figure, path, dpi=90)


if __name__ == "__main__":
    typer.run(main)
