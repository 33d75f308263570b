"""A small network whose weights are the state. It answers queries by itself.

Axes: B tasks, h hidden units, n width of a vector, V scores of an answer, d hidden width of the base.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from ..bases.base import Base
from ..bases.prefixes import Prefix
from ..config import IAIConfig
from ..predictions.likelihoods import Likelihood, UnitGaussian
from ..registry import STATES
from ..signals import Reading
from ..tensors import zero_linear
from .slots import SlotState, check_slots


@STATES.register("mlp")
class MLPState(SlotState):
    """State tensor `rows` (B, 1, 1, h, n + 1 + V): weights a, bias b and output weights c of each hidden unit.

        scores(x) = sum_j c_j gelu(<a_j, x> + b_j)

    c starts at 0, so at first nothing is known about any query. The base reads a row as one token: a linear map makes
    the read-out slots, which follow a chunk, from the rows of theta(0). A read-out is theta(0) plus a linear map of the
    slot's last hidden state; that map starts at 0.

    Args:
        width: n.
        num_units: h.
        num_scores: V.
        base_widths: the widths of the base's embeddings and of its hidden states. None if the base does not read
            chunks.

    Source: weights as tokens, Mittal et al., arXiv 2510.11471, section 3.
    """

    fields = fingerprint = frozenset({"num_state_tokens"})
    initial_rate = 0.1  # values from 0.03 to 0.3 train equally well
    packed_name = "rows"

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        check_slots(config)
        if config.vector_width is None:
            raise ValueError("state_type='mlp' answers about vectors: pass vector_width and num_outputs")

    @classmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> "MLPState":
        embeddings = base.model.get_input_embeddings().weight
        widths = (embeddings.shape[1], base.config.hidden_size) if reads else None
        return cls(config.vector_width, config.num_state_tokens, cls.likelihood(config).num_scores, widths)

    @classmethod
    def likelihood(cls, config: IAIConfig) -> Likelihood:
        """The distribution of the targets. Real targets have unit variance, since the state predicts no variance."""
        return UnitGaussian(config.num_outputs) if config.likelihood == "gaussian" else super().likelihood(config)

    @classmethod
    def default_regime(cls) -> str:
        return "parametric"

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        return f"mlp of {config.num_state_tokens} hidden units"

    def __init__(self, width: int, num_units: int, num_scores: int, base_widths: tuple[int, int] | None) -> None:
        super().__init__()
        self.sizes = [width, 1, num_scores]
        hidden = torch.cat([torch.randn(num_units, width) / width**0.5, torch.randn(num_units, 1)], 1)
        rows = torch.cat([hidden, torch.zeros(num_units, num_scores)], 1)
        self.start = nn.ParameterDict({"rows": nn.Parameter(rows[None, None])})
        if base_widths is not None:
            self.token = nn.Linear(sum(self.sizes), base_widths[0])
            self.project = zero_linear(base_widths[1], sum(self.sizes))

    @property
    def read_slots(self) -> Tensor:  # (h, e)
        return self.token(self.start["rows"][0, 0])

    @contextmanager
    def under(self, base: Base, tensors: dict[str, Tensor]) -> Iterator[Prefix]:
        """A context in which the base reads chunks without a prefix. It does not answer queries."""
        yield base.no_prefix(len(tensors["rows"]))

    def read_out(self, base: Base, reading: Reading, rate: Tensor, *, writes: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The rows that the chunk suggests, and the number of its examples, (B, 1, 1, 1)."""
        hidden = rms_norm(reading.hidden, reading.hidden.shape[-1:])  # (B, h, d)
        mass = reading.mask.sum(1).clamp_min(1).float().view(-1, 1, 1, 1)
        return {"rows": self.start["rows"] + self.project(hidden)[:, None, None]}, mass

    def scores(self, tensors: dict[str, Tensor], vectors: Tensor) -> Tensor:  # (B, Q, n) -> (B, Q, V)
        """The scores of the queries of each task."""
        weight, bias, added = tensors["rows"][:, 0, 0].split(self.sizes, -1)  # (B, h, ...)
        return gelu(vectors @ weight.mT + bias.mT) @ added
