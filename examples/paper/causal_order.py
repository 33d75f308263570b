"""Topological order of a structural causal model by reading chunks of its samples.

A task is a random acyclic graph over n variables, a mechanism for each variable, and noise that is not Gaussian. A
chunk is 32 samples. Every variable is standardised on samples that are not read, since its variance alone would reveal
much of the order. The query: which of two variables comes before the other? Training has all tested kinds of graphs and
mechanisms, and three kinds of noise. Test tasks are new ones, with Laplace noise (in training) and Gumbel noise (not in
training).

Axes: B tasks, K chunks of m samples, n variables, h channels.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .refined import tensor, train

CHUNK, HIDDEN, LAYERS, OTHERS = 32, 32, 3, 1000  # m, h
OF_GAUSSIAN = 0.6057  # E[u tanh u] of a standard normal u
TRAINED, COUNTS = 10, (1, 2, 5, 10, 20, 50)  # most chunks in training, counts that are measured
SIZES, GRAPHS, MECHANISMS = (5, 10), ("ER", "scale-free"), ("linear", "nonlinear")
NOISES, TESTED_NOISES = ("uniform", "Laplace", "exponential"), ("Laplace", "Gumbel")
STEPS, BATCH = {"cpu": 400, "gpu": 5000}, 8
VALUE, SCALE, COUNTED = "edges in order, %", "linear", "chunks"
Logits = Iterator[Tensor]  # (B, n, n) after each chunk: log-odds that i comes before j


class Tasks(NamedTuple):
    samples: Tensor  # (B, K, m, n)
    edges: Tensor  # (B, n, n) bool, from i to j
    before: Tensor  # (B, n, n) bool, i is an ancestor of j


# ---------------------------------------------------------------- data


def draw_graph(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:  # (n, n), from i to j > i
    """ER has n edges on average. Scale-free: each variable has one or two earlier parents, drawn by their degree."""
    if kind == "ER":
        return np.triu(rng.random((n, n)) < 2 / (n - 1), 1)
    edges = np.zeros((n, n), bool)
    for j in range(1, n):
        degree = 1 + edges[:j].sum(1) + edges[:, :j].sum(0)
        edges[rng.choice(j, min(j, rng.integers(1, 3)), replace=False, p=degree / degree.sum()), j] = True
    return edges


def draw_samples(rng: np.random.Generator, edges: np.ndarray, num: int, mechanism: str, noise: str) -> np.ndarray:
    """Samples (num, n), standardised with the mean and deviation of `OTHERS` more samples."""
    n, num = len(edges), num + OTHERS
    draw = {"uniform": partial(rng.uniform, -1.7, 1.7), "Laplace": rng.laplace, "exponential": rng.exponential}
    draw |= {"Gumbel": rng.gumbel}
    x = np.zeros((num, n))
    for j in range(n):
        parents = x[:, edges[:, j]]
        if parents.shape[1] and mechanism == "linear":
            weight = rng.uniform(0.5, 2, parents.shape[1]) * rng.choice([-1, 1], parents.shape[1])
            x[:, j] = parents @ weight
        elif parents.shape[1]:
            inner = np.tanh(parents @ rng.normal(size=(parents.shape[1], 8)) + rng.normal(size=8))
            x[:, j] = inner @ rng.normal(size=8)
        x[:, j] += rng.uniform(0.3, 1) * draw[noise](size=num)
    others, x = x[:OTHERS], x[OTHERS:]
    return (x - others.mean(0)) / others.std(0)


def draw_tasks(
    rng: np.random.Generator, num: int, num_chunks: int, n: int, graph: str, mechanism: str, noise: str
) -> Tasks:
    """The variables are in random order. A graph without an edge is drawn again."""
    samples, edges = [], []
    while len(edges) < num:
        drawn = draw_graph(rng, n, graph)
        if drawn.any():
            order = rng.permutation(n)
            x = draw_samples(rng, drawn, num_chunks * CHUNK, mechanism, noise)
            samples.append(x[:, order].reshape(num_chunks, CHUNK, n))
            edges.append(drawn[np.ix_(order, order)])
    found = tensor(np.stack(edges))
    return Tasks(tensor(np.stack(samples)).float(), found, ancestors(found))


def ancestors(edges: Tensor) -> Tensor:  # (B, n, n)
    paths = edges.float()
    for _ in range(edges.shape[1].bit_length()):
        paths = ((paths + paths @ paths) > 0).float()
    return paths > 0


# ---------------------------------------------------------------- scores of pairs, without learning


def moments(chunk: Tensor) -> Tensor:  # (B, m, n) -> (B, n, n, 3)
    """E[u v], E[u^2 v] and 10 E[u (tanh v - c v)] of every pair (u, v); the last is 0 for Gaussians."""
    v = torch.stack([chunk, chunk, 10 * (chunk.tanh() - OF_GAUSSIAN * chunk)], -1)
    u = torch.stack([chunk, chunk.square(), chunk], -1)
    return torch.einsum("bmik,bmjk->bijk", u, v) / chunk.shape[1]


def by_skewness(known: Tensor) -> Tensor:  # (B, n, n, 3) -> (B, n, n)
    """rho E[u^2 v - u v^2], of variables turned to positive skewness: above 0 where u comes before v.

    This and `by_tails` approximate the ratio of the likelihoods of the two directions of one linear edge.
    Source: Hyvarinen and Smith, Pairwise Likelihood Ratios for Estimation of Non-Gaussian Structural Equation Models,
    JMLR 14 (2013).
    """
    correlation, mixed = known[..., 0], known[..., 1]
    sign = mixed.diagonal(dim1=1, dim2=2).sign()
    mixed = mixed * sign.unsqueeze(1)
    return correlation * sign.unsqueeze(2) * sign.unsqueeze(1) * (mixed - mixed.mT)


def by_tails(known: Tensor) -> Tensor:
    """10 rho E[u tanh v - v tanh u], of the sign that fits noise with heavier or lighter tails than a Gaussian's."""
    correlation, bent = known[..., 0], known[..., 2]
    tails = bent.diagonal(dim1=1, dim2=2)
    heavier = -(tails.unsqueeze(1) + tails.unsqueeze(2)).sign()
    return heavier * correlation * (bent - bent.mT)


def by_fit(known: Tensor) -> Tensor:
    """R^2 of v minus R^2 of u, each regressed on all others: the variable with the larger R^2 comes later.

    Source: Reisach et al., A Scale-Invariant Sorting Criterion to Find a Causal Order, arXiv 2303.18211.
    """
    _, r2 = regressed(known[..., 0])
    return r2.unsqueeze(1) - r2.unsqueeze(2)


def regressed(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Partial correlations (B, n, n), and R^2 (B, n) of each variable regressed on all others."""
    eye = torch.eye(moment.shape[1], dtype=moment.dtype)
    precision = torch.linalg.inv(moment + 0.01 * eye)
    scale = precision.diagonal(dim1=1, dim2=2)
    correlations = -precision / (scale.unsqueeze(1) * scale.unsqueeze(2)).sqrt()
    return correlations, 1 - 1 / (scale * (moment.diagonal(dim1=1, dim2=2) + 0.01))


BASELINES = {"sorted by R^2": by_fit, "pairs, by skewness": by_skewness, "pairs, by tails": by_tails}


def running_mean(tasks: Tasks, of_chunk: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    mean = 0
    for i, chunk in enumerate(tasks.samples.unbind(1)):
        mean = mean + (of_chunk(chunk) - mean) / (i + 1)
        yield mean


def without_learning(score: Callable[[Tensor], Tensor], tasks: Tasks) -> Logits:
    """Apply a score to the moments of all data so far."""
    return map(score, running_mean(tasks, moments))


# ---------------------------------------------------------------- models


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs))


class Reader(nn.Module):
    """Features of every ordered pair (u, v) of variables, averaged over a chunk: (B, m, n) -> (B, n, n, h + 3).

    The last channels are `moments` of the pair, the others are learned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_pair = mlp(2, HIDDEN)

    def forward(self, chunk: Tensor) -> Tensor:
        n = chunk.shape[2]
        pairs = [chunk.unsqueeze(3).expand(-1, -1, -1, n), chunk.unsqueeze(2).expand(-1, -1, n, -1)]
        return torch.cat([self.of_pair(torch.stack(pairs, -1)).mean(1), moments(chunk)], -1)


class Decoder(nn.Module):
    """Log-odds of the order of every pair (i, j), from features of it, of (j, i), and products of (i, k) and (k, j).

    Untrained, they are the sum of the likelihood ratios of the pair; training can change the weight of each ratio.
    """

    def __init__(self, more: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN + 14 + more, HIDDEN)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(LAYERS))
        self.layers = nn.ModuleList(mlp(4 * HIDDEN, HIDDEN) for _ in range(LAYERS))
        self.last = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.last.weight)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, read: Tensor, *more: Tensor) -> Tensor:  # (B, n, n, h + 3), (B, n, n) -> (B, n, n)
        known = read[..., -3:]
        ratios = torch.stack([by_skewness(known), by_tails(known), by_fit(known)], -1)
        others, _ = regressed(known[..., 0])
        own = known.diagonal(dim1=1, dim2=2).mT  # (B, n, 3)
        own = torch.cat(torch.broadcast_tensors(own.unsqueeze(1), own.unsqueeze(2)), -1)
        z = self.first(torch.cat([read, ratios, own, torch.stack([others, known[..., 0].abs(), *more], -1)], -1))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = norm(z)
            through = torch.einsum("bikh,bkjh->bijh", x, x) / x.shape[1]
            z = z + layer(torch.cat([x, x.transpose(1, 2), through, through.transpose(1, 2)], -1))
        score = self.last(z).squeeze(-1)
        return ratios @ self.weight + score - score.mT


class Explicit(nn.Module):
    """theta is the running mean of the chunks' features; a learned decoder reads the order from it."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.decoder = Reader(), Decoder()

    def forward(self, tasks: Tasks) -> Logits:
        return map(self.decoder, running_mean(tasks, self.reader))


class LastChunk(Explicit):
    """In-context learning of the last chunk alone."""

    def forward(self, tasks: Tasks) -> Logits:
        return map(self.decoder, map(self.reader, tasks.samples.unbind(1)))


class Implicit(nn.Module):
    """The state is the log-odds. Each chunk is read next to them and adds to them; earlier steps get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.decoder = Reader(), Decoder(more=1)

    def forward(self, tasks: Tasks) -> Logits:
        logits = torch.zeros_like(tasks.before, dtype=torch.float32)
        for chunk in tasks.samples.unbind(1):
            logits = logits.detach() + self.decoder(self.reader(chunk), logits.detach())
            yield logits


REFINED = {"explicit, running mean": Explicit, "implicit, log-odds": Implicit, "the last chunk alone": LastChunk}


def loss_of(logits: Tensor, tasks: Tasks) -> Tensor:
    """Mean over all pairs of an ancestor and its descendant."""
    wrong = nn.functional.softplus(-logits)
    return (wrong * tasks.before).sum() / tasks.before.sum()


def trained(name: str, seed: int, steps: int) -> nn.Module:
    """Train on the loss after each chunk."""
    torch.manual_seed(seed)
    rng, model = np.random.default_rng([1, seed]), REFINED[name]()

    def loss() -> Tensor:
        kind = [rng.choice(options) for options in (SIZES, GRAPHS, MECHANISMS, NOISES)]
        tasks = draw_tasks(rng, BATCH, TRAINED, *kind)
        return torch.stack([loss_of(logits, tasks) for logits in model(tasks)]).mean()

    train(model, loss, steps=steps, lr=3e-3, title=f"{name}, seed {seed}")
    return model


# ---------------------------------------------------------------- the table


def in_order(logits: Tensor, tasks: Tasks) -> float:
    """Percent of the edges that point forward in the order given by the log-odds; a tie counts half."""
    place = -logits.double().sigmoid().sum(2)  # (B, n): what comes before many has a low place
    forward = 1 + (place.unsqueeze(1) - place.unsqueeze(2)).sign()
    return 50 * (forward * tasks.edges).sum().item() / tasks.edges.sum().item()


@torch.no_grad()
def scores(find: Callable[[Tasks], Logits], tasks: Tasks) -> list[float]:
    return [in_order(logits, tasks) for number, logits in enumerate(find(tasks), 1) if number in COUNTS]


def table(tier: str, seeds: int, data: Path, output: Path, num: int = 64) -> list[dict]:
    """Percent of edges in order after each count of chunks. Baselines have seed 0; `data` and `output` are not used."""
    methods = [(name, 0, partial(without_learning, score)) for name, score in BASELINES.items()]
    methods += [(name, seed, trained(name, seed, STEPS[tier])) for seed in range(seeds) for name in REFINED]
    kinds = [(n, graph, mechanism) for n in SIZES for graph in GRAPHS for mechanism in MECHANISMS]
    rows = []
    for number, (n, graph, mechanism) in enumerate(kinds):
        for noise in TESTED_NOISES:
            tasks = draw_tasks(np.random.default_rng([2, number]), num, max(COUNTS), n, graph, mechanism, noise)
            for name, seed, find in methods:
                row = {"setting": f"n = {n}, {graph}, {mechanism}, {noise} noise", "method": name, "seed": seed}
                found = zip(COUNTS, scores(find, tasks), strict=True)
                rows += [row | {"num_chunks": count, "value": value} for count, value in found]
    return rows
