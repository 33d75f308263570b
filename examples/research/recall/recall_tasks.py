"""Tasks of `associative_recall`: which pairs are written when, and what is asked.

A task writes `num_pairs` pairs of a key and a value symbol, 4 pairs in a chunk, in random order. A share `rewrite_rate`
of the keys is written again in a later chunk with another value; the newest value counts. Every key is asked.
"""

from collections.abc import Iterator

import numpy as np

NUM_KEYS, NUM_VALUES = 64, 64
ALL_KEYS = 128  # in the vocabulary, for tasks of more than 64 pairs
PAIRS_PER_CHUNK, PAIRS, REWRITE_RATE = 4, 64, 0.25
CHUNK = 2 * PAIRS_PER_CHUNK  # tokens


def key_ids(keys: np.ndarray) -> np.ndarray:
    return keys + 1  # token 0 is padding


def value_ids(values: np.ndarray) -> np.ndarray:
    return values + 1 + ALL_KEYS


def recall_episode(
    rng: np.random.Generator,
    num_pairs: int = PAIRS,
    rewrite_rate: float = 0.0,
    *,
    pairs_per_chunk: int = PAIRS_PER_CHUNK,
    num_keys: int = NUM_KEYS,
    num_values: int = NUM_VALUES,
) -> dict:
    """One task: `support` holds all writes, `query` an example `key value` for each key with its newest value.

    `num_chunks`: the chunks of the support. `rewritten`: for each query, whether its key was written twice. `age`: how
    many chunks before the query its newest value was written, from 1.

    Raises:
        ValueError: when there are fewer keys than pairs, or a rewritten key would have no later chunk.
    """
    num_again = round(rewrite_rate * num_pairs)
    num_chunks = -(-(num_pairs + num_again) // pairs_per_chunk)
    if not 0 < num_pairs <= num_keys:
        raise ValueError(f"{num_pairs} pairs need as many keys, got num_keys={num_keys}")
    if num_again > num_pairs or (num_again and num_pairs < pairs_per_chunk):
        raise ValueError(
            f"{num_again} rewrites of {num_pairs} pairs, {pairs_per_chunk} to a chunk: each needs a later chunk, "
            "so write at least as many pairs as a chunk has, and rewrite each once at most"
        )
    order = write_order(rng, num_pairs, num_again, pairs_per_chunk)  # (W,), rewritten pairs stand in it twice
    keys = rng.permutation(num_keys)[:num_pairs]
    first = rng.integers(num_values, size=num_pairs)
    newest = np.where(np.arange(num_pairs) < num_again, (first + rng.integers(1, num_values, num_pairs)), first)
    newest %= num_values
    seen, values, age = set(), np.empty_like(order), np.empty(num_pairs, dtype=int)
    for place, pair in enumerate(order):
        is_newest = pair in seen or pair >= num_again
        values[place] = newest[pair] if is_newest else first[pair]
        age[pair] = num_chunks - place // pairs_per_chunk
        seen.add(pair)
    writes = np.stack([key_ids(keys[order]), value_ids(values)], 1)  # (W, 2)
    labels = np.stack([np.full_like(writes[:, 1], -100), writes[:, 1]], 1)  # only gradients use them
    asked = np.stack([key_ids(keys), value_ids(newest)], 1).tolist()
    return {
        "support": [{"input_ids": writes.flatten().tolist(), "labels": labels.flatten().tolist()}],
        "query": [{"input_ids": [key, value], "labels": [-100, value]} for key, value in asked],
        "num_chunks": num_chunks,
        "rewritten": [pair < num_again for pair in range(num_pairs)],
        "age": age.tolist(),
    }


def write_order(rng: np.random.Generator, num_pairs: int, num_again: int, pairs_per_chunk: int) -> np.ndarray:
    """Every pair once and the first `num_again` twice, in random order, never twice in one chunk."""
    pairs = np.concatenate([np.arange(num_pairs), np.arange(num_again)])
    while True:
        order = rng.permutation(pairs)
        chunks = [order[i : i + pairs_per_chunk] for i in range(0, len(order), pairs_per_chunk)]
        if all(len(np.unique(chunk)) == len(chunk) for chunk in chunks):
            return order


def recall_episodes(num: int, num_pairs: int = PAIRS, rewrite_rate: float = 0.0, *, seed: int, **sizes) -> list[dict]:
    return [recall_episode(np.random.default_rng((seed, i)), num_pairs, rewrite_rate, **sizes) for i in range(num)]


def growing_episodes(
    num: int, num_pairs: int, rewrite_rate: float, num_asked: int, seed: int, growth: float = 0.5, **sizes
) -> Iterator:
    """A stream for training. The most pairs grow over a share `growth` of it; 3 of 4 larger tasks have rewrites.

    A task asks for `num_asked` of its keys, first those that were rewritten.
    """
    for i in range(num):
        rng = np.random.default_rng((seed, i))
        most = max(8, round(num_pairs * min(1.0, (i + 1) / max(1, growth * num))))
        pairs = int(rng.integers(4, most + 1)) if rng.random() < 0.3 else most
        rate = rewrite_rate if rng.random() < 0.75 and pairs > 8 else 0.0
        episode = recall_episode(rng, pairs, rate, **sizes)
        rewritten_first = sorted(rng.permutation(pairs), key=lambda j: not episode["rewritten"][j])
        yield {"support": episode["support"], "query": [episode["query"][j] for j in rewritten_first[:num_asked]]}
