"""Rows of measured figures: selecting, averaging over seeds, intervals, tables, files.

A row is a dict: some names that say what was measured (method, setting, seed, number of chunks) and the figures.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from examples.research.common.files import write_json
from examples.research.common.provenance import recipe
from hf_iai.evaluation import bootstrap_mean

WIDTH = 200  # of a printed table, in characters


class Points(NamedTuple):
    """A curve with a band around it, each (N,)."""

    at: list
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


# ---------------------------------------------------------------- selecting and averaging


def chosen(rows: Iterable[dict], **values) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in values.items())]


def grouped(rows: Iterable[dict], value: str, by: str = "num_chunks") -> dict[int, list[float]]:
    """`by` -> the values of all rows with it, one for each seed; sorted."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row[by], []).append(row[value])
    return dict(sorted(found.items()))


def with_range(groups: Mapping[int, Sequence[float]]) -> Points:
    """Mean over seeds, smallest and largest value."""
    values = list(groups.values())
    return Points(list(groups), *(np.array([pick(v) for v in values]) for pick in (np.mean, min, max)))


def with_deviation(groups: Mapping[int, Sequence[float]]) -> Points:
    """Mean over seeds, less and plus the standard deviation, which is 0 for a single seed."""
    mean = np.array([np.mean(v) for v in groups.values()])
    spread = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in groups.values()])
    return Points(list(groups), mean, mean - spread, mean + spread)


def interval(
    values: np.ndarray,  # (E, T), NaN where nothing counts
    name: str = "mean",
    groups: np.ndarray | None = None,  # (E,)
) -> dict[str, float]:
    """Mean, called `name`, and its bootstrap interval `low`, `high` over groups; each row is a group by default."""
    groups = np.arange(len(values)) if groups is None else groups
    return dict(zip((name, "low", "high"), bootstrap_mean(values, groups), strict=True))


# ---------------------------------------------------------------- showing and keeping


def print_curves(title: str, head: str, counts: Sequence, cells: Mapping[str, Mapping]) -> None:
    """A table with a line for each method of `cells`: count -> text. A count without text stays empty."""
    table = Table(Column(head, no_wrap=True), *map(str, counts), title=title, title_justify="left")
    for name, texts in cells.items():
        table.add_row(name, *(texts.get(count, "") for count in counts))
    Console(width=WIDTH).print(table)


def print_rows(rows: Sequence[dict]) -> None:
    """All rows as they are, under the names of all of them. A name that a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names)
    for row in rows:
        cells = (row.get(name, "") for name in names)
        table.add_row(*(f"{cell:.5g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=WIDTH).print(table)


def write_rows(
    rows: list[dict], path: Path, command: str, settings: Mapping | None = None, *, indent: int | None = 1, **beside
) -> None:
    """Write `{"recipe": ..., **beside, "rows": rows}`.

    Args:
        command, settings: see `recipe`.
        beside: what a reader of the rows has to know, such as the level of chance.
    """
    report = {"recipe": recipe(command, **(settings or {})), **beside, "rows": rows}
    write_json(report, path, indent)
