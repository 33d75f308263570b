"""Train the head that makes classifier rows, on tasks whose features are known."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_iai.heads import ClassRows

CHUNK, MOST_CHUNKS = 20, 20  # examples in a chunk, chunks of a task
LEAST_LOSS = 0.03  # nats


class Tasks(NamedTuple):
    """B tasks of S examples and Q queries; a label of -100 marks a query that is padding."""

    features: Tensor  # (B, S, d)
    labels: Tensor  # (B, S)
    queries: Tensor  # (B, Q, d)
    targets: Tensor  # (B, Q)
    num_classes: int
    chunk_size: int = CHUNK


def states(head: ClassRows, tasks: Tasks) -> Iterator[dict[str, Tensor]]:
    """The state after every chunk."""
    kept = head.initial(len(tasks.labels), tasks.num_classes, tasks.features.shape[-1])
    size = tasks.chunk_size
    for x, y in zip(tasks.features.split(size, 1), tasks.labels.split(size, 1), strict=True):
        kept = head(kept, x, y)
        yield kept


def logits_of(head: ClassRows, kept: dict[str, Tensor], queries: Tensor) -> Tensor:  # (B, Q, C)
    rows, bias = head.rows(kept)
    return queries @ rows.mT + bias.unsqueeze(1)


def loss_of(head: ClassRows, kept: dict[str, Tensor], tasks: Tasks) -> Tensor:
    """Mean logarithm of each task's cross-entropy, so that tasks with many and with few examples count alike.

    Queries of a class that was not read yet are left out.
    """
    met = (kept["count"] > 0).gather(1, tasks.targets.clamp_min(0)) & (tasks.targets >= 0)
    targets = tasks.targets.masked_fill(~met, -100)
    nats = nn.functional.cross_entropy(logits_of(head, kept, tasks.queries).mT, targets, reduction="none").clamp_max(10)
    return (nats.sum(1) / met.sum(1).clamp_min(1) + LEAST_LOSS).log().mean()


def train_head(
    head: ClassRows, draw: Callable[[int], Tasks], rng: np.random.Generator, *, steps: int, lr: float
) -> None:
    """Train with Adam on the loss after all chunks of a batch of tasks, and after half of them.

    Args:
        draw: most chunks -> a batch of tasks.
        rng: draws the most chunks of a batch log-uniformly from 1 to `MOST_CHUNKS`.
    """
    head.train()
    optimizer = torch.optim.Adam(head.parameters(), lr, betas=(0.9, 0.98))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    for _ in (bar := tqdm(range(steps), "train", mininterval=10)):
        tasks = draw(int(np.exp(rng.uniform(0, np.log(MOST_CHUNKS + 0.99)))))
        num_chunks = -(-tasks.features.shape[1] // tasks.chunk_size)
        scored = {num_chunks, max(1, num_chunks // 2)}
        losses = [loss_of(head, kept, tasks) for n, kept in enumerate(states(head, tasks), 1) if n in scored]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        decay.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    head.eval()
