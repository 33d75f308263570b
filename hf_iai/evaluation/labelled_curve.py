"""Curves over episodes of labelled examples: the common part of accuracy and squared error.

Axes: Q queries, C classes, o outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .bootstrap import groups_of
from .curve import Curve, Key

Value = tuple[tuple[str, int], np.ndarray]  # (method, number of chunks), and one value (Q,) for each query
OfEpisode = Callable[[dict, list[int]], Iterator[Value]]  # (episode, counts) -> values


def labelled_curve(
    episodes: Iterable[dict],
    counts: list[int],
    methods: Sequence[str],
    of_episode: OfEpisode,
    *,
    chunk_size: int,
    seed: int,
    metric: str,
    show_progress: bool,
) -> Curve:
    """The curve of the values that `of_episode` measures on every episode, after each of `counts` chunks of examples.

    Args:
        episodes: the episodes.
        counts: numbers of chunks, ascending.
        methods: names of the model's rows and the baselines.
        of_episode: measures one episode.
        chunk_size: examples per chunk.
        seed: the training seed, which labels the rows.
        metric: the metric of the curve.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: if there is no episode, or a support fills too few chunks.
    """
    episodes = list(episodes)
    if not episodes:
        raise ValueError("there is no episode to evaluate on")
    rows: dict[Key, list[np.ndarray]] = {(name, n, seed): [] for name in methods for n in counts}
    for index, episode in enumerate(tqdm(episodes, "evaluating", disable=None if show_progress else True)):
        needed = counts[-1] * chunk_size
        if len(episode["support"]) < needed:
            raise ValueError(
                f"the support of episode {index} has {len(episode['support'])} examples, but {counts[-1]} chunks of "
                f"{chunk_size} take {needed}: use longer episodes, a smaller chunk_size or fewer num_chunks"
            )
        for (name, n), values in of_episode(episode, counts):
            rows[name, n, seed].append(values)
    return Curve({key: _join(values) for key, values in rows.items()}, groups_of(episodes), metric)


def checked_counts(num_chunks: Sequence[int], baselines: Sequence[str], method: str, known: Sequence[str]) -> list[int]:
    """The counts in ascending order.

    Raises:
        ValueError: if a count is below 1, a baseline is not among `known`, or `method` is the name of a baseline.
    """
    counts = sorted(set(num_chunks))
    if not counts or counts[0] < 1:
        raise ValueError(f"num_chunks of labelled examples must be one or more counts of at least 1, got {counts}")
    if unknown := [name for name in baselines if name not in known]:
        raise ValueError(f"unknown baselines {unknown} of labelled examples; use any of {list(known)}")
    if method in known:
        raise ValueError(f"method={method!r} is the name of a baseline: choose another")
    return counts


@torch.no_grad()
def logits_after_each(model, chunks: list[dict], query: dict[str, Tensor]) -> Iterator[Tensor]:  # (Q, C) or (Q, o)
    """The model's answers to the queries after each chunk: under its state, or as refined in regime implicit."""
    query = {name: tensor.to(model.device) for name, tensor in query.items()}
    if model.base_model.task.makes_states:
        yield from (model(**query, task_state=state).logits for state in model.adapt_steps(chunks))
    else:
        yield from model.refine(chunks, query)


def _join(rows: list[np.ndarray]) -> np.ndarray:  # (E, Q), NaN after the end of episodes with fewer queries
    longest = max(map(len, rows))
    return np.stack([np.pad(row.astype(float), (0, longest - len(row)), constant_values=np.nan) for row in rows])
