"""Curve: losses, accuracy or errors of several methods against the number of chunks, and statistics on them."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import replace_file
from .bootstrap import bootstrap_mean
from .extras import require_extra
from .render import draw_curve, print_curve

NumChunks = int | float  # a fraction if part of a chunk filled a window
Key = tuple[str, NumChunks, int]  # method, number of chunks, training seed


@dataclass(frozen=True, eq=False)
class Curve:
    """The losses of E queries, token by token, for every method, number of chunks n and training seed.

    Intervals are 95% bootstrap intervals over whole groups. Many methods take `from_token` = k: then only the query
    tokens k, k+1, ... count. Token 0 has no loss. The text right before a query helps mostly with its first tokens, so
    later tokens show what else was learned.

    Args:
        losses: (method, n, seed) -> values (E, columns); NaN where there is none. See `metric`.
        groups: (E,), the document or task of each episode.
        metric: `"loss"`: the losses in nats of query tokens 1..T-1, (E, T - 1). `"accuracy"`: 1 for a query that is
            answered right, else 0, (E, Q); here more is better. `"squared_error"`: of each query, (E, Q).

    Raises:
        ValueError: if there is no method, or the arrays differ in shape, in their number of rows from `groups`, or in
            which tokens have a loss.

    Example:
        >>> import numpy as np
        >>> from hf_iai.evaluation import Curve
        >>> noise = np.random.default_rng(0).normal(size=(20, 9))
        >>> curve = Curve({("iai", n, 0): 3 - 0.1 * n + noise for n in (0, 1, 2)}, np.arange(20))
        >>> [round(step["mean"], 3) for step in curve.steps()]
        [-0.1, -0.1]
        >>> round(curve.difference(("iai", 2), ("iai", 0))["high"], 3)
        -0.2
    """

    losses: dict[Key, np.ndarray]
    groups: np.ndarray
    metric: str = "loss"

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError("a curve needs the losses of at least one method")
        first_key, first = next(iter(self.losses.items()))
        if first.ndim != 2 or len(first) != len(self.groups):
            raise ValueError(f"losses of {first_key} have shape {first.shape}, expected ({len(self.groups)}, T - 1)")
        for key, losses in self.losses.items():
            if losses.shape != first.shape or not np.array_equal(np.isnan(losses), np.isnan(first)):
                raise ValueError(f"losses of {key} {losses.shape} and {first_key} {first.shape} score different tokens")

    @staticmethod
    def concat(curves: Sequence["Curve"]) -> "Curve":
        """Join curves that were measured on the same episodes: all their methods and seeds in one curve.

        Raises:
            ValueError: if there is no curve, the episodes differ, or two curves hold different values for the same
                method, count and seed.
        """
        if not curves:
            raise ValueError("no curve given: pass at least one")
        losses: dict[Key, np.ndarray] = {}
        for curve in curves:
            if not np.array_equal(curve.groups, curves[0].groups):
                raise ValueError("the curves were measured on different episodes: their groups differ")
            for key, values in curve.losses.items():
                if key in losses and not np.array_equal(losses[key], values, equal_nan=True):
                    raise ValueError(f"two curves hold different losses of {key}: give each its own seed= or method=")
                losses[key] = values
        return Curve(losses, curves[0].groups, curves[0].metric)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _, _ in self.losses))

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, _, seed in self.losses})

    def counts(self, method: str) -> list[NumChunks]:
        """The numbers of chunks at which `method` was measured, ascending."""
        counts = sorted({n for name, n, _ in self.losses if name == method})
        if not counts:
            raise ValueError(f"no method {method!r} in this curve; it holds {self.methods}")
        return counts

    def rows(self, from_token: int = 0) -> list[dict]:
        """One row per method, count and seed, with method, num_chunks, seed, the metric, low, high, num_tokens."""
        columns = self._columns(from_token)
        rows = []
        for (method, n, seed), losses in self.losses.items():
            loss, low, high = bootstrap_mean(losses[:, columns], self.groups)
            num_tokens = int((~np.isnan(losses[:, columns])).sum())
            values = {self.metric: loss, "low": low, "high": high, "num_tokens": num_tokens}
            rows.append({"method": method, "num_chunks": n, "seed": seed, **values})
        return rows

    def mean(self, method: str, num_chunks: NumChunks, from_token: int = 0) -> dict:
        """The mean loss with low and high, averaged over seeds."""
        return _interval(self._over_seeds(method, num_chunks)[:, self._columns(from_token)], self.groups)

    def difference(self, a: tuple[str, NumChunks], b: tuple[str, NumChunks], from_token: int = 0) -> dict:
        """The mean paired difference loss(a) - loss(b) with low and high, averaged over seeds. Negative: a is lower.

        Args:
            a, b: (method, number of chunks).
            from_token: the first query token that counts.

        Raises:
            ValueError: if a method or count was not measured, or a and b were measured with different seeds.
        """
        if self._seeds_of(*a) != self._seeds_of(*b):
            raise ValueError(f"{a} has seeds {self._seeds_of(*a)}, {b} has {self._seeds_of(*b)}: they cannot be paired")
        paired = self._over_seeds(*a) - self._over_seeds(*b)
        return _interval(paired[:, self._columns(from_token)], self.groups)

    def steps(self, from_token: int = 0, *, method: str = "iai") -> list[dict]:
        """The paired difference between each count and the one before: from_chunks, to_chunks, mean, low, high.

        The loss falls significantly if `high < 0`, and rises significantly if `low > 0`.
        """
        counts = self.counts(method)
        return [
            {"from_chunks": a, "to_chunks": b, **self.difference((method, b), (method, a), from_token)}
            for a, b in zip(counts, counts[1:], strict=False)
        ]

    def to_pandas(self, from_token: int = 0):
        """`rows` as a `pandas.DataFrame`.

        Raises:
            ImportError: if pandas is not installed.
        """
        return require_extra("pandas").DataFrame(self.rows(from_token))

    def print(self, from_token: int = 0) -> None:
        """Print a table with one line per method, averaged over seeds: the loss and half the width of its interval."""
        print_curve(self, from_token)

    def plot(self, path: str | os.PathLike, from_token: int = 0) -> None:
        """Write a PNG of loss against chunks, with intervals. A method with a single count is a flat line.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        draw_curve(self, path, from_token)

    def to_json(self, path: str | os.PathLike, **extra) -> None:
        """Write a JSON file with `rows` for all tokens (`rows_from_token_0`) and for tokens 32+ (`rows_from_token_32`).

        The file is renamed into place when it is complete. An unknown interval is null.

        Args:
            path: the file.
            extra: further values for the file.

        Raises:
            ValueError: if an extra value has the name of the rows.
        """
        num_tokens = self._num_columns + 1
        parts = [k for k in (0, 32) if k < num_tokens] if self.metric == "loss" else [0]
        rows = {f"rows_from_token_{k}": [_jsonable(r) for r in self.rows(k)] for k in parts}
        taken = sorted(set(rows) & set(extra))
        if taken:
            raise ValueError(f"{taken} are written by to_json itself: name the extra values otherwise")
        text = json.dumps({**extra, **rows}, indent=1, allow_nan=False) + "\n"
        replace_file(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @property
    def _num_columns(self) -> int:
        return next(iter(self.losses.values())).shape[1]

    def _columns(self, from_token: int) -> slice:
        if not 0 <= from_token <= self._num_columns:
            raise ValueError(f"from_token must be in 0..{self._num_columns}, the last query token, got {from_token}")
        return slice(max(from_token - 1, 0), None)  # column j is the loss of token j + 1

    def _seeds_of(self, method: str, num_chunks: NumChunks) -> list[int]:
        seeds = sorted(seed for name, n, seed in self.losses if (name, n) == (method, num_chunks))
        if not seeds:
            raise ValueError(f"{method!r} was measured at {self.counts(method)} chunks, not at {num_chunks}")
        return seeds

    def _over_seeds(self, method: str, num_chunks: NumChunks) -> np.ndarray:  # (E, T - 1)
        return np.mean([self.losses[method, num_chunks, s] for s in self._seeds_of(method, num_chunks)], axis=0)


def _interval(values: np.ndarray, groups: np.ndarray) -> dict:  # (E, T), (E,)
    return dict(zip(("mean", "low", "high"), bootstrap_mean(values, groups), strict=True))


def _jsonable(row: dict) -> dict:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
