"""Generation by flow matching: new samples of a distribution that was read chunk by chunk.

A task is a distribution over the plane: a mixture of Gaussians, or a letter. Half of the alphabet is for training, the
other half for the test. A chunk is 32 samples. The three regimes differ in what the chunks refine:

    implicit    the sample itself: x(i+1) = x(i) + v(x(i), i / k, chunk i) / k, starting from noise, for k chunks: one
                step of the flow for each chunk, so another k starts again
    explicit    theta, the mean of the chunks' codes: 20 steps of a flow v(x, t, theta) turn noise into a sample
    parametric  theta, a mixture of 64 Gaussians, updated by sums over the chunks or by the gradient of their likelihood

The measure is the energy distance of 1024 generated samples to as many real ones.

Axes: B tasks, K chunks of m samples, N generated samples.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from torch import Tensor, nn

from examples.research.common.plots import panels, save

from .refined import Descent, tensor, train

CHUNK, SAMPLES, HIDDEN, COMPONENTS = 32, 1024, 64, 64  # m, N
LEAST_WIDTH = 0.05
COUNTS, TRAINED, FLOW_STEPS = (1, 2, 5, 10, 20, 50), 10, 20
LETTERS = {"train": "ACEGIKMOQSUWY", "test": "BDFHJLNPRTVXZ"}
KINDS = ("mixtures of Gaussians", "letters")
STEPS, BATCH, FIRST_RATE = {"cpu": 1000, "gpu": 10000}, 16, 0.3
VALUE, SCALE, COUNTED = "energy distance", "log", "chunks"
Generate = Callable[[Tensor, int, torch.Generator], Tensor]  # (B, K, m, 2), N -> (B, N, 2), after all K chunks


# ---------------------------------------------------------------- data


def draw_mixture(rng: np.random.Generator, num: int) -> np.ndarray:  # (num, 2)
    modes = rng.integers(2, 8)
    centres, spread = rng.uniform(-1.5, 1.5, (modes, 2)), rng.uniform(0.05, 0.3, (modes, 1))
    of = rng.choice(modes, num, p=rng.dirichlet(np.full(modes, 5.0)))
    return centres[of] + spread[of] * rng.normal(size=(num, 2))


def draw_letter(rng: np.random.Generator, num: int, letters: str) -> np.ndarray:  # (num, 2)
    """Points inside the outline of a letter, slightly turned, sheared and stretched."""
    outline = TextPath((0, 0), str(rng.choice(list(letters))), size=1)
    corners = np.concatenate(outline.to_polygons())
    low, high = corners.min(0), corners.max(0)
    inside = np.zeros((0, 2))
    while len(inside) < num:
        points = rng.uniform(low, high, (4 * num, 2))
        inside = np.concatenate([inside, points[_inside(outline, points)]])
    bend = np.eye(2) + 0.15 * rng.normal(size=(2, 2))
    return (inside[:num] - (low + high) / 2) * 3 / (high - low).max() @ bend


def _inside(outline: Outline, points: np.ndarray) -> np.ndarray:
    """Whether a point is inside an odd number of the outline's closed curves; a hole is inside two."""
    curves = [Outline(polygon) for polygon in outline.to_polygons()]
    return sum(curve.contains_points(points) for curve in curves) % 2 == 1


def draw_tasks(rng: np.random.Generator, num: int, num_samples: int, kind: str, part: str) -> Tensor:  # (B, S, 2)
    draw = draw_mixture if kind == KINDS[0] else lambda rng, num: draw_letter(rng, num, LETTERS[part])
    return tensor(np.stack([draw(rng, num_samples) for _ in range(num)])).float()


def energy_distance(x: Tensor, y: Tensor) -> Tensor:  # (B, N, 2), (B, M, 2) -> (B,)
    """2 E|x - y| - E|x - x'| - E|y - y'|, without the distance of a sample to itself; 0 for equal distributions."""
    within = [torch.cdist(z, z).sum((1, 2)) / (z.shape[1] * (z.shape[1] - 1)) for z in (x, y)]
    return 2 * torch.cdist(x, y).mean((1, 2)) - within[0] - within[1]


# ---------------------------------------------------------------- regimes


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs)
    )


class Noised(NamedTuple):
    """A point between noise and data: x = (1 - t) noise + t data, with velocity data - noise."""

    x: Tensor  # (B, N, 2)
    t: Tensor  # (B, N, 1)
    velocity: Tensor  # (B, N, 2)


def noised(data: Tensor) -> Noised:
    noise, t = torch.randn_like(data), torch.rand(*data.shape[:2], 1)
    return Noised(noise.lerp(data, t), t, data - noise)


class Implicit(nn.Module):
    """Samples attend to one chunk. Training needs no stream: every step draws its own data and time."""

    def __init__(self) -> None:
        super().__init__()
        self.of_point, self.of_sample, self.last = mlp(2, HIDDEN), mlp(3, HIDDEN), mlp(2 * HIDDEN, 2)
        self.layers = nn.ModuleList(nn.MultiheadAttention(HIDDEN, 4, batch_first=True) for _ in range(2))
        self.between = nn.ModuleList(mlp(2 * HIDDEN, HIDDEN) for _ in range(2))

    def velocity(self, x: Tensor, t: Tensor, chunk: Tensor) -> Tensor:  # (B, N, 2), (B, N, 1), (B, m, 2) -> (B, N, 2)
        sample, points = self.of_sample(torch.cat([x, t], -1)), self.of_point(chunk)
        z = sample
        for attend, mix in zip(self.layers, self.between, strict=True):
            read, _ = attend(z, points, points, need_weights=False)
            z = z + mix(torch.cat([z, read], -1))
        return self.last(torch.cat([sample, z], -1))

    def loss(self, chunks: Tensor, data: Tensor) -> Tensor:  # (B, K, m, 2), (B, N, 2)
        at = noised(data)
        return (self.velocity(at.x, at.t, chunks[:, 0]) - at.velocity).square().mean()

    def forward(self, chunks: Tensor, num: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(len(chunks), num, 2, generator=generator)
        for i, chunk in enumerate(chunks.unbind(1)):
            t = torch.full_like(x[..., :1], i / chunks.shape[1])
            x = x + self.velocity(x, t, chunk) / chunks.shape[1]
        return x


class Explicit(nn.Module):
    """A flow that sees the running mean of the chunks' features; trained after a random number of chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.of_point, self.flow = mlp(2, 2 * HIDDEN), mlp(3 + 2 * HIDDEN, 2)

    def theta(self, chunks: Tensor) -> Tensor:  # (B, K, m, 2) -> (B, 1, h), the mean over chunks as over their samples
        return self.of_point(chunks).mean((1, 2)).unsqueeze(1)

    def velocity(self, x: Tensor, t: Tensor, theta: Tensor) -> Tensor:
        return self.flow(torch.cat([x, t, theta.expand(-1, x.shape[1], -1)], -1))

    def loss(self, chunks: Tensor, data: Tensor) -> Tensor:
        at = noised(data)
        return (self.velocity(at.x, at.t, self.theta(chunks)) - at.velocity).square().mean()

    def forward(self, chunks: Tensor, num: int, generator: torch.Generator) -> Tensor:
        theta, x = self.theta(chunks), torch.randn(len(chunks), num, 2, generator=generator)
        for i in range(FLOW_STEPS):
            x = x + self.velocity(x, torch.full_like(x[..., :1], i / FLOW_STEPS), theta) / FLOW_STEPS
        return x


class Parametric(nn.Module):
    """theta (B, 64, 4) holds the centres, log widths and log masses of a mixture of round Gaussians."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.cat(
            [torch.randn(COMPONENTS, 2), torch.full((COMPONENTS, 1), -1.0), torch.zeros(COMPONENTS, 1)], 1
        )
        self.start = nn.Parameter(start.unsqueeze(0))

    def states(self, chunks: Tensor) -> Iterator[Tensor]:  # (B, K, m, 2) -> (B, 64, 4) after each chunk
        raise NotImplementedError

    def loss(self, chunks: Tensor, data: Tensor) -> Tensor:
        return torch.stack([-log_likelihood(theta, data).mean() for theta in self.states(chunks)]).mean()

    def forward(self, chunks: Tensor, num: int, generator: torch.Generator) -> Tensor:
        *_, theta = self.states(chunks)
        of = torch.multinomial(theta[..., 3].softmax(-1), num, replacement=True, generator=generator)  # (B, N)
        drawn = theta.gather(1, of.unsqueeze(-1).expand(-1, -1, 4))
        return drawn[..., :2] + log_width(drawn).exp().unsqueeze(-1) * torch.randn(*of.shape, 2, generator=generator)


class Gradients(Parametric):
    """Meta-SGD on the likelihood of each chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.descent = Descent(self.start.data, "Meta-SGD", FIRST_RATE, gradient)
        self.start = self.descent.start

    def states(self, chunks: Tensor) -> Iterator[Tensor]:
        return self.descent(((chunk, None) for chunk in chunks.unbind(1)), len(chunks), COMPONENTS)


class Sums(Parametric):
    """Observations, as in online EM: each chunk is divided among the components and added to their sums.

    The sums start as those of imagined samples; the learned masses say how many.
    """

    def states(self, chunks: Tensor) -> Iterator[Tensor]:
        centre, width, mass = self.start[..., :2], log_width(self.start), self.start[..., 3].exp()
        square = centre.square().sum(-1) + 2 * (2 * width).exp()
        sums = [t.expand(len(chunks), *t.shape[1:]) for t in (mass, mass.unsqueeze(-1) * centre, mass * square)]
        theta = self.start.expand(len(chunks), -1, -1)
        for x in chunks.unbind(1):
            share = component_log_likelihoods(theta, x).softmax(-1).mT  # (B, M, m)
            new = share.sum(-1), share @ x, (share @ x.square().sum(-1, keepdim=True)).squeeze(-1)
            sums = [old + more for old, more in zip(sums, new, strict=True)]
            mass, centre = sums[0], sums[1] / sums[0].unsqueeze(-1)
            variance = (sums[2] / mass - centre.square().sum(-1)) / 2
            width = variance.clamp_min(LEAST_WIDTH**2).log() / 2
            theta = torch.cat([centre, torch.stack([width, mass.log()], -1)], -1)
            yield theta


def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:  # (B, M, 4), (B, N, 2) -> (B, N)
    """Log-likelihood of a mixture of round Gaussians, nats."""
    return component_log_likelihoods(theta, x).logsumexp(-1)


def component_log_likelihoods(theta: Tensor, x: Tensor) -> Tensor:  # (B, N, M), weights included
    square = torch.cdist(x, theta[..., :2]).square()
    width, weight = log_width(theta).unsqueeze(1), theta[..., 3].log_softmax(-1).unsqueeze(1)
    return weight - 0.5 * square * (-2 * width).exp() - 2 * width - np.log(2 * np.pi)


def log_width(theta: Tensor) -> Tensor:  # (B, M)
    """Clamped from below: the likelihood of a Gaussian on a single sample grows without bound as it gets narrow."""
    return theta[..., 2].clamp_min(np.log(LEAST_WIDTH))


def gradient(theta: Tensor, x: Tensor, _: None) -> Tensor:
    """Gradient of the mean negative log-likelihood, clipped to length 1 for each task."""
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        found = torch.autograd.grad(-log_likelihood(theta, x).mean(1).sum(), theta)[0]
    return found / found.norm(dim=(1, 2), keepdim=True).clamp_min(1)


REFINED = {"implicit": Implicit, "explicit": Explicit, "parametric, sums": Sums, "parametric, gradients": Gradients}


def trained(name: str, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    rng, model = np.random.default_rng([1, seed]), REFINED[name]()

    def loss() -> Tensor:
        num_chunks = int(rng.integers(1, TRAINED + 1))
        samples = draw_tasks(rng, BATCH, num_chunks * CHUNK + 128, KINDS[rng.integers(2)], "train")
        chunks = samples[:, : num_chunks * CHUNK].unflatten(1, (num_chunks, CHUNK))
        return model.loss(chunks, samples[:, num_chunks * CHUNK :])

    train(model, loss, steps=steps, lr=2e-3, title=f"{name}, seed {seed}")
    return model


# ---------------------------------------------------------------- the table


def resampled(chunks: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Baseline: draw again from all samples read so far."""
    flat = chunks.flatten(1, 2)
    return flat[:, torch.randint(flat.shape[1], (num,), generator=generator)]


def last_chunk(chunks: Tensor, num: int, generator: torch.Generator) -> Tensor:
    return resampled(chunks[:, -1:], num, generator)


BASELINES = {"real samples so far, again": resampled, "the last chunk's, again": last_chunk}


def table(tier: str, seeds: int, data: Path, output: Path, num: int = 64) -> list[dict]:
    """Energy distance after each count of chunks, and generation_samples.png. Baselines have seed 0; no `data`."""
    methods = [(name, 0, generate) for name, generate in BASELINES.items()]
    methods += [(name, seed, trained(name, seed, STEPS[tier])) for seed in range(seeds) for name in REFINED]
    rows, shown = [], {}
    for number, kind in enumerate(KINDS):
        samples = draw_tasks(np.random.default_rng([2, number]), num, max(COUNTS) * CHUNK + SAMPLES, kind, "test")
        chunks, real = samples[:, SAMPLES:].unflatten(1, (-1, CHUNK)), samples[:, :SAMPLES]
        shown |= {(kind, "real"): real[:4].cpu()}
        for name, seed, generate in methods:
            for count in COUNTS:
                made = _generated(generate, chunks[:, :count])
                row = {"setting": kind, "method": name, "seed": seed, "num_chunks": count}
                rows.append(row | {"value": energy_distance(made, real).mean().item()})
                if name in REFINED and seed == 0:
                    shown[kind, f"{name}, {count}"] = made[:4].cpu()
    draw_samples(shown, output / "generation_samples.png")
    return rows


@torch.no_grad()
def _generated(generate: Generate, chunks: Tensor) -> Tensor:
    return generate(chunks, SAMPLES, torch.Generator(torch.get_default_device()).manual_seed(0))


def draw_samples(shown: dict[tuple[str, str], Tensor], path: Path) -> None:
    """Four tasks of each kind: real samples, and those generated after 1, 10 and 50 chunks."""
    titles = ["real", *(f"{name}, {count}" for name in REFINED for count in (1, 10, 50))]
    tasks = [(kind, task) for kind in KINDS for task in range(4)]
    figure, axes_of = panels(titles * len(tasks), across=len(titles), size=(1.4, 1.5))
    for axes, (kind, task), title in zip(
        axes_of, [of for of in tasks for _ in titles], titles * len(tasks), strict=True
    ):
        axes.scatter(*shown[kind, title][task].T, s=1, color="C0" if title == "real" else "C3")
        axes.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, fontsize=7)
    save(figure, path, dpi=90)
