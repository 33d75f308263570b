"""Synthetic tasks of `meta_train_vectors`. Axes: C classes, r intrinsic dimensions, d given dimensions.

Within a class, r coordinates vary with a power-law spectrum. The centres of the classes differ most where the spread is
large, or equally everywhere, or in between. Everything is rotated at random into d coordinates, since real vectors have
no special order of coordinates.
"""

import numpy as np
import torch

from examples.research.classifiers.row_training import CHUNK, Tasks

FEWEST_WAYS, MOST_WAYS, QUERIES = 3, 20, 200  # queries of a task, over all its classes


def training_tasks(rng: np.random.Generator, num: int, num_chunks: int, width: int) -> Tasks:
    """A batch of tasks; some are unbalanced (up to 1:20), some have wrong labels (up to 30%)."""
    drawn = [draw_task(rng, CHUNK * num_chunks, width) for _ in range(num)]
    most = max(len(targets) for _, _, _, targets in drawn)
    padded = [
        (x, said, np.pad(q, ((0, most - len(q)), (0, 0))), np.pad(t, (0, most - len(t)), constant_values=-100))
        for x, said, q, t in drawn
    ]
    x, said, queries, targets = (torch.from_numpy(np.stack(part)) for part in zip(*padded, strict=True))
    return Tasks(x.float(), said, queries.float(), targets, int(targets.max()) + 1)


def draw_task(rng: np.random.Generator, num_examples: int, width: int) -> tuple[np.ndarray, ...]:
    """Features and labels of the examples, features and classes of the queries."""
    ways = _log_integer(rng, FEWEST_WAYS, MOST_WAYS)
    sample = draw_population(rng, ways, width)
    imbalance = np.exp(rng.uniform(0, np.log(20))) if rng.random() < 0.25 else 1.0
    weights = imbalance ** -np.linspace(0, 1, ways)
    classes = rng.choice(ways, num_examples, p=weights / weights.sum())
    asked = np.repeat(np.arange(ways), QUERIES // ways)
    noise = rng.uniform(0, 0.3) if rng.random() < 0.1 else 0.0
    wrong = rng.random(num_examples) < noise
    said = np.where(wrong, (classes + rng.integers(1, ways, num_examples)) % ways, classes)
    x = sample(np.concatenate([classes, asked]))
    return x[:num_examples], said, x[num_examples:], asked


def draw_population(rng: np.random.Generator, ways: int, width: int):
    """A function: classes (N,) -> examples (N, d), centred over d and of unit length, as the state sees them."""
    r = _log_integer(rng, 3, width)
    spread = np.arange(1, r + 1) ** -rng.uniform(0, 1.5)  # (r,)
    modes = rng.integers(1, 4) if rng.random() < 0.3 else 1
    centres = rng.normal(size=(ways, 1, r)) * spread ** rng.uniform(0, 1)
    # Two classes lie this many standard deviations from each other.
    distance = np.exp(rng.uniform(np.log(2.5), np.log(12)))
    centres *= distance / np.sqrt(2 * np.square(centres / spread).sum(-1).mean())
    centres = centres + rng.uniform(0.5, 2) * spread * rng.normal(size=(ways, modes, r)) * (modes > 1)
    own = rng.uniform(0, 1) if rng.random() < 0.5 else 0.0  # share of the spread that is each class's own
    shapes = _directions(rng, ways, r, max(1, r // 3)) * np.exp(0.3 * rng.normal(size=(ways, 1, 1)))
    common = rng.normal(size=r) * rng.uniform(0, 3) * np.sqrt(np.square(centres).mean())
    tails = rng.uniform(3, 10) if rng.random() < 0.2 else None
    floor = 0.1 * np.sqrt(np.square(spread).mean()) * rng.random()
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    clipped = rng.random() < 0.3  # at 0 in some basis, as counts and intensities are

    def sample(classes: np.ndarray) -> np.ndarray:
        num = len(classes)
        z = np.sqrt(1 - own) * rng.normal(size=(num, r)) * spread
        z += np.sqrt(own) * np.einsum("nk,nkr->nr", rng.normal(size=(num, shapes.shape[1])), shapes[classes]) * spread
        if tails:
            z *= np.sqrt(tails / rng.chisquare(tails, size=(num, 1)))
        z += centres[classes, rng.integers(0, modes, num)] + common
        x = z @ rotation[:r] + floor * rng.normal(size=(num, width))
        x = np.maximum(x + 0.5 * x.std(), 0) if clipped else x
        x = x - x.mean(1, keepdims=True)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)

    return sample


def _directions(rng: np.random.Generator, ways: int, r: int, k: int) -> np.ndarray:  # (C, k, r)
    """k random directions for each class, of variance 1 in each coordinate on average."""
    return rng.normal(size=(ways, k, r)) / np.sqrt(k)


def _log_integer(rng: np.random.Generator, least: int, most: int) -> int:
    return int(np.exp(rng.uniform(np.log(least), np.log(most + 0.99))))
