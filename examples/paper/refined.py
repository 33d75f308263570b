"""Shared by the tables: refinement by gradients alone, training, and the device."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_iai.heads import SGD, LearnedStep, LearnedStepSettings, MetaSGD

Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]  # (theta, x, y of a chunk) -> as theta


def tensor(array: np.ndarray) -> Tensor:
    """As a tensor on torch's default device: the accelerator in tier `gpu`."""
    return torch.from_numpy(array).to(torch.get_default_device())


class Descent(nn.Module):
    """theta(i+1) = head(theta(i), d loss(chunk(i) | theta(i)) / d theta(i)), with one of `HEADS`.

    First order, the default of `IAIConfig`: training treats the gradient as a constant.

    Args:
        start: theta(0) (1, rows, d), learned. One row stands for all rows of a task: classes have no order.
        head: one of `HEADS`.
        rate: initial value of the learned rates.
        gradient: of the mean loss of a chunk of each of B tasks.
    """

    def __init__(self, start: Tensor, head: str, rate: float, gradient: Gradient) -> None:
        super().__init__()
        self.start, self.gradient = nn.Parameter(start), gradient
        self.head = HEADS[head]({"theta": start[0]}, rate)

    def forward(self, chunks: Iterable[tuple[Tensor, Tensor]], batch: int, rows: int) -> Iterator[Tensor]:
        """theta (B, rows, d) after each chunk."""
        theta = {"theta": self.start.expand(batch, rows, -1)}
        kept = self.head.initial(theta)
        for k, (x, y) in enumerate(chunks):
            gradient = {"theta": self.gradient(theta["theta"], x, y).detach()}
            theta, kept = self.head(theta, kept, gradient, torch.full((batch,), k), {"theta": self.start})
            yield theta["theta"]


def _learned_step(start: dict[str, Tensor], rate: float) -> LearnedStep:
    # Without the guard against harm: what is compared is the step.
    return LearnedStep({name: "theta" for name in start}, rate, LearnedStepSettings(doubt=1e9))


# All with a learned theta(0): with one rate this is MAML.
HEADS = {"learned optimizer": _learned_step, "MAML": SGD, "Meta-SGD": MetaSGD}


def train(module: nn.Module, loss_of: Callable[[], Tensor], *, steps: int, lr: float, title: str) -> None:
    """Train with Adam; `loss_of` draws a batch and returns its loss."""
    optimizer = torch.optim.Adam(module.parameters(), lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), title, leave=False, mininterval=5):
        optimizer.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
