"""The bootstrap over groups. Tokens of one document are not independent, so whole documents or tasks are drawn."""

import numpy as np


def bootstrap_mean(
    values: np.ndarray,  # (E, T)
    groups: np.ndarray,  # (E,)
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The mean over all tokens, and its percentile interval over resamples of whole groups.

    With sum_g and count_g over the tokens of group g, and G groups drawn with replacement in each resample,

        mean = sum_g sum_g / sum_g count_g

    Args:
        values: (E, T), one row per episode; NaN for a token that does not count.
        groups: (E,), the document or task of each episode.
        num_resamples: number of resamples.
        confidence: share of the resamples inside the interval.
        seed: seed of the resampling. The same groups and seed give the same resamples.

    Returns:
        mean, low, high. With a single group the spread is unknown, and low and high are NaN.

    Raises:
        ValueError: if the lengths differ, or no token counts.

    Example:
        >>> import numpy as np
        >>> from hf_iai.evaluation import bootstrap_mean
        >>> mean, low, high = bootstrap_mean(np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), np.array(["a", "b", "c"]))
        >>> mean, 1.0 <= low < mean < high <= 3.0
        (2.0, True)

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} rows of values but {len(groups)} groups: pass one group per row")
    counted = ~np.isnan(values)
    _, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, weights=np.where(counted, values, 0.0).sum(1))  # (G,)
    counts = np.bincount(index, weights=counted.sum(1))  # (G,)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(counts):
        raise ValueError(f"none of the {values.size} tokens is counted: give tokens with a loss")
    mean = float(sums.sum() / counts.sum())
    if len(counts) == 1:
        return mean, float("nan"), float("nan")
    num_groups = len(counts)
    times = np.random.default_rng(seed).multinomial(num_groups, np.full(num_groups, 1 / num_groups), num_resamples)
    means = (times @ sums) / (times @ counts)  # (num_resamples,)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return mean, float(low), float(high)


def groups_of(episodes: list[dict]) -> np.ndarray:  # (E,)
    """The document or task of each episode. An episode without one is a group of its own."""
    groups = [episode.get("group") for episode in episodes]
    return np.array([f"episode {i}" if group is None else str(group) for i, group in enumerate(groups)])
