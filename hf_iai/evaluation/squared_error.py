"""Squared error of real targets against the number of chunks read, beside regressions that keep all examples.

Axes: S examples read, Q queries, d features, o outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from ..data import chunk_vectors
from .accuracy import features_of
from .curve import Curve
from .extras import require_extra
from .labelled_curve import Value, checked_counts, labelled_curve, logits_after_each

Regressor = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # (S, d), (S, o), (Q, d) -> (Q, o)
PENALTIES, NEIGHBOURS = tuple(10.0**k for k in range(-4, 4)), 5


def ridge(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Ridge regression on all examples, with an intercept. Leave-one-out validation chooses one of eight penalties."""
    if len(x) == 1:  # leave-one-out validation needs two examples
        return np.repeat(y, len(queries), 0)
    return require_extra("sklearn.linear_model", "baselines").RidgeCV(PENALTIES).fit(x, y).predict(queries)


def nearest_neighbours(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The mean of the 5 nearest examples, weighted by the inverse of their distance."""
    neighbours = require_extra("sklearn.neighbors", "baselines")
    return neighbours.KNeighborsRegressor(min(NEIGHBOURS, len(x)), weights="distance").fit(x, y).predict(queries)


REGRESSORS: dict[str, Regressor] = {"ridge": ridge, "nearest_neighbours": nearest_neighbours}


def squared_error_curve(
    model,
    episodes: Iterable[dict],
    num_chunks: Sequence[int],
    baselines: Sequence[str],
    *,
    chunk_size: int,
    seed: int = 0,
    method: str = "iai",
    show_progress: bool = True,
) -> Curve:
    """`evaluate_curve` for real targets: the squared error of each query, averaged over its outputs.

    At n, the model has read the first n chunks of examples. The baselines (`ridge` and `nearest_neighbours`, see
    `REGRESSORS`) are fitted to the same features of all examples in these chunks; with `vector_width`, to the vectors
    themselves.

    Args:
        model: a PeftModel with an IAI adapter.
        episodes: rows `{"support": [{"vector", "label"}...], "query": [...], optional "group": str}`. A label is a
            floating number, or one number for each output.
        num_chunks: the values of n, at least 1.
        baselines, chunk_size, seed, method, show_progress: see `evaluate_curve`.

    Raises:
        ValueError: if a count is below 1, a baseline is unknown, there is no episode or no query, a support fills too
            few chunks, a row has no vector or no floating label, or vectors or labels differ in width.
    """
    counts = checked_counts(num_chunks, baselines, method, list(REGRESSORS))
    found = partial(_of_episode, model, method=method, baselines=baselines, chunk_size=chunk_size)
    options = {"chunk_size": chunk_size, "seed": seed, "metric": "squared_error", "show_progress": show_progress}
    return labelled_curve(episodes, counts, (method, *baselines), found, **options)


def _of_episode(
    model, episode: dict, counts: list[int], *, method: str, baselines: Sequence[str], chunk_size: int
) -> Iterator[Value]:
    x, y = _arrays(episode["support"][: counts[-1] * chunk_size])
    queries, wanted = _arrays(episode["query"])
    asked = {"inputs_embeds": torch.from_numpy(queries)}
    read = enumerate(logits_after_each(model, list(chunk_vectors(x, y, chunk_size)), asked), 1)
    if baselines:
        x, queries = (features_of(model, {"inputs_embeds": torch.from_numpy(part)}) for part in (x, queries))
    for n, means in read:
        if n in counts:
            yield (method, n), np.square(means.cpu().numpy() - wanted).mean(1)
            for name in baselines:
                fitted = REGRESSORS[name](x[: n * chunk_size], y[: n * chunk_size], queries)
                yield (name, n), np.square(fitted.reshape(wanted.shape) - wanted).mean(1)


def _arrays(rows: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:  # (S, d), (S, o)
    """The vectors (S, d) and targets (S, o) of rows.

    Raises:
        ValueError: if there is no row, a row has no vector or no floating label, or widths differ.
    """
    if not rows:
        raise ValueError("an episode needs at least one query and one example, got none")
    shapes = set()
    for row in rows:
        if "vector" not in row or not np.issubdtype((label := np.asarray(row.get("label"))).dtype, np.floating):
            raise ValueError(f"a regression needs a vector and floating targets, got {row!r:.120}: use float(label)")
        shapes.add((np.shape(row["vector"]), label.shape))
    if len(shapes) > 1:
        raise ValueError(f"vectors and targets of an episode must have one shape each, got {sorted(shapes)}")
    x, y = (np.asarray([row[key] for row in rows], dtype=np.float32) for key in ("vector", "label"))
    return x, y.reshape(len(y), -1)
