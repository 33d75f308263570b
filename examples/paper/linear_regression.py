"""Linear regression by reading chunks: excess error after every chunk, next to ridge regression on all data so far.

A task is y = w x + noise with w and x standard normal in d dimensions. The state is the predictor's weights (regime
parametric). They are refined from the chunk itself (`heads.GaussianRows`, with sums beside the weights) or from the
gradient of the chunk's loss alone. Heads are trained on up to 10 chunks, with the loss after each. The test tasks are
new, and some differ from training: more noise, larger weights, sparse weights.

Axes: B tasks, K chunks of n examples, d features.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_iai.heads import GaussianRows

from .refined import HEADS, Descent, tensor, train

CHUNK = {2: 16, 16: 32, 64: 64}  # d -> n
TRAINED, COUNTS = 10, (1, 2, 3, 5, 7, 10, 20, 50)  # most chunks in training, counts that are measured
NOISE = 0.1
SETTINGS = {"as trained": {}, "noise 0.5": {"noise": 0.5}, "weights times 3": {"scale": 3.0}, "sparse": {"share": 0.2}}
RATES = {"SGD": (0.03, 0.1, 0.2, 0.4, 0.7, 1.0), "Adam": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)}
STEPS, BATCH = {"cpu": 300, "gpu": 3000}, 16
FIRST_RATE = 0.3
SUMS = {  # name -> whether an intercept is fitted; ridge regression is told that there is none
    "observations, with sums": True,
    "observations, with sums, no intercept": False,
}
REFINED = (*SUMS, *(f"gradients, {head}" for head in HEADS))
Weights = Iterator[tuple[Tensor, Tensor]]  # after each chunk w (B, d) and the intercept (B,)


class Tasks(NamedTuple):
    x: Tensor  # (B, K, n, d)
    y: Tensor  # (B, K, n)
    weight: Tensor  # (B, d)
    noise: float


def draw_tasks(
    rng: np.random.Generator,
    num: int,
    num_chunks: int,
    d: int,
    *,
    noise: float = NOISE,
    scale: float = 1.0,
    share: float = 1.0,
) -> Tasks:
    """A `share` of the weights is not 0. Sparse weights are larger, so that all targets have the same variance."""
    weight = scale * rng.normal(size=(num, d)) * (rng.random((num, d)) < share) / share**0.5
    x = rng.normal(size=(num, num_chunks, CHUNK[d], d))
    y = np.einsum("bknd,bd->bkn", x, weight) + noise * rng.normal(size=x.shape[:3])
    return Tasks(*(tensor(a).float() for a in (x, y, weight)), noise)


def excess(found: Weights, tasks: Tasks) -> Tensor:  # (B, K)
    """Mean squared error of a standard normal query, minus that of the noise."""
    errors = [(weight - tasks.weight).square().sum(1) + intercept**2 for weight, intercept in found]
    return torch.stack(errors, 1)


# ---------------------------------------------------------------- states that are refined


def by_sums(head: GaussianRows, tasks: Tasks) -> Weights:
    """Observations: the head keeps sums of the chunks and makes the weights from them."""
    kept = head.initial(len(tasks.weight), 1, tasks.x.shape[-1])
    for x, y in zip(tasks.x.unbind(1), tasks.y.unbind(1), strict=True):
        kept = head(kept, x, y.unsqueeze(-1), torch.ones_like(y))
        rows, intercept = head.rows(kept)
        yield rows.squeeze(1), intercept.squeeze(1)


def by_gradients(descent: Descent, tasks: Tasks) -> Weights:
    chunks = zip(tasks.x.unbind(1), tasks.y.unbind(1), strict=True)
    for theta in descent(chunks, len(tasks.weight), 1):
        yield theta.squeeze(1), tasks.y.new_zeros(len(theta))


def gradient(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:  # (B, 1, d), (B, n, d), (B, n)
    """Gradient of half the mean squared error."""
    error = (x @ weight.mT).squeeze(-1) - y
    return error.unsqueeze(1) @ x / x.shape[1]


def refined(name: str, d: int) -> tuple[nn.Module, Callable[[Tasks], Weights]]:
    """The module to train, and the function from tasks to weights."""
    if name in SUMS:
        head = GaussianRows(fit_intercept=SUMS[name])
        return head, partial(by_sums, head)
    descent = Descent(torch.zeros(1, 1, d), name.removeprefix("gradients, "), FIRST_RATE, gradient)
    return descent, partial(by_gradients, descent)


def trained(name: str, d: int, seed: int, steps: int) -> Callable[[Tasks], Weights]:
    """Train on the logarithm of the excess error, mean over tasks and chunks."""
    torch.manual_seed(seed)
    module, find = refined(name, d)
    rng = np.random.default_rng([1, seed])

    def loss() -> Tensor:
        tasks = draw_tasks(rng, BATCH, TRAINED, d)
        return excess(find(tasks), tasks).log().mean()

    train(module, loss, steps=steps, lr=3e-3, title=f"{name}, d = {d}, seed {seed}")
    return find


# ---------------------------------------------------------------- baselines


def ridge(tasks: Tasks, penalty: float | None = None, last: bool = False) -> Weights:
    """On all data so far or on the last chunk alone; the default penalty is optimal for weights of variance 1."""
    penalty = tasks.noise**2 if penalty is None else penalty
    moment, cross = 0, 0
    for x, y in zip(tasks.x.double().unbind(1), tasks.y.double().unbind(1), strict=True):
        keep = 0 if last else 1
        moment, cross = keep * moment + x.mT @ x, keep * cross + x.mT @ y.unsqueeze(-1)
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        weight = torch.linalg.solve(moment + penalty * eye, cross).squeeze(-1)
        yield weight.float(), tasks.y.new_zeros(len(weight))


def descended(tasks: Tasks, method: str, rate: float) -> Weights:
    """One step of `torch.optim` on each chunk, weights from 0."""
    weight = torch.zeros_like(tasks.weight, requires_grad=True)
    optimizer = getattr(torch.optim, method)([weight], rate)
    for x, y in zip(tasks.x.unbind(1), tasks.y.unbind(1), strict=True):
        weight.grad = ((x @ weight.detach().unsqueeze(-1) - y.unsqueeze(-1)) * x).mean(1)
        optimizer.step()
        yield weight.detach().clone(), y.new_zeros(len(y))


def tuned(method: str, validation: Tasks, tasks: Tasks) -> Tensor:  # (B, K)
    """The excess error with the best of six rates, chosen on validation tasks for each number of chunks."""
    best = torch.stack([excess(descended(validation, method, rate), validation).mean(0) for rate in RATES[method]])
    found = torch.stack([excess(descended(tasks, method, rate), tasks) for rate in RATES[method]])  # (rates, B, K)
    return found.gather(0, best.nan_to_num(torch.inf).argmin(0).expand(1, *found.shape[1:])).squeeze(0)


BASELINES = {
    "ridge, true noise": ridge,
    "least squares": lambda tasks: ridge(tasks, penalty=1e-9),
    "ridge, the last chunk alone": lambda tasks: ridge(tasks, last=True),
}


# ---------------------------------------------------------------- the table

VALUE, SCALE, COUNTED = "excess squared error", "log", "chunks"


@torch.no_grad()
def errors_of(refined_by: list[dict], tasks: Tasks, validation: Tasks) -> Iterator[tuple[str, int, Tensor]]:
    """Method, seed and the excess error (B, K). Baselines have seed 0."""
    for name, method in BASELINES.items():
        yield name, 0, excess(method(tasks), tasks)
    for name in RATES:
        yield name, 0, tuned(name, validation, tasks)
    for seed, of_seed in enumerate(refined_by):
        for name, find in of_seed.items():
            yield name, seed, excess(find(tasks), tasks)


def table(tier: str, seeds: int, data: Path, output: Path, num: int = 256) -> list[dict]:
    """The excess error after each count of chunks, and its ratio to ridge regression's on the same tasks.

    `data` and `output` are not used.
    """
    rows = []
    for d in CHUNK:
        refined_by = [{name: trained(name, d, seed, STEPS[tier]) for name in REFINED} for seed in range(seeds)]
        for number, (setting, options) in enumerate(SETTINGS.items()):
            tasks = draw_tasks(np.random.default_rng([2, d, number]), num, max(COUNTS), d, **options)
            validation = draw_tasks(np.random.default_rng([3, d, number]), 64, max(COUNTS), d, **options)
            found = list(errors_of(refined_by, tasks, validation))
            for count in COUNTS:
                reference = found[0][2][:, count - 1].mean()
                for name, seed, errors in found:
                    row = {"setting": f"d = {d}, {setting}", "method": name, "seed": seed, "num_chunks": count}
                    mean = errors[:, count - 1].mean()
                    rows.append(row | {"value": mean.item(), "ratio": (mean / reference).item()})
    return rows
