"""Base class of all state types: the tensors of theta(0), and how states are made and described.

Axes: B tasks, P slots, d width of embeddings.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.base import TOKENS, Base
from ..config import IAIConfig
from ..predictions.likelihoods import LIKELIHOODS, Likelihood
from ..registry import Part


class SlotState(nn.Module, Part, ABC):
    """A state type. Its tensors are those of theta(0), `start`: name -> (...), to which a state adds the axis of tasks.

    Attributes:
        needs: what the base must offer, see `bases.base`.
        defaults: the values of fields of the configuration that were left None.
        num_slots_in_front: number of positions that the state takes before a text.
        initial_rate: initial value of the rates of gradient steps; measured with the embedded base (docs/gradients.md).
        exports: names of the PEFT methods that a state can be exported to, the default first.
        updates_weights: whether it is an update of the base's weights, in place of slots in front of a text.
        writes: whether observations write slots in front of a text, and gradients an update of the base's weights.
        packed_name: name of the only tensor (B, 1, 1, P, d), for states that have just one.
    """

    needs = TOKENS
    defaults: Mapping[str, Any] = {"signal": "observations", "accumulation": "average", "pin_bos": False}
    num_slots_in_front = 0
    initial_rate = 1.0
    exports: tuple[str, ...] = ()
    updates_weights = False
    writes = False
    packed_name: str | None = None
    start: nn.ParameterDict

    @classmethod
    @abstractmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> "SlotState":
        """Make the state type of an adapter.

        Args:
            base: the pretrained model.
            config: the adapter's configuration.
            reads: whether the base reads chunks out into slots.
        """

    @classmethod
    def default_regime(cls) -> str:
        return "explicit"

    @classmethod
    def complete_for_base(cls, config: IAIConfig, base_config) -> None:
        """Fill in fields that depend on the base, so that they are saved with the adapter."""

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        """A description in words, for model cards."""
        return f"{config.state_type} with {config.num_state_tokens} slots"

    @classmethod
    def size(cls, config: IAIConfig) -> int | str:
        """The size of the state, for an adapter's display name."""
        return config.num_state_tokens

    @classmethod
    def likelihood(cls, config: IAIConfig) -> Likelihood:
        """The distribution of the targets of vectors under such a state."""
        return LIKELIHOODS[config.likelihood](config.num_outputs)

    def initial(self, batch_size: int) -> dict[str, Tensor]:  # (B, ...) each
        """The state of B tasks that have read nothing."""
        return {name: t.expand(batch_size, *t.shape) for name, t in self.start.items()}

    def visible(self, base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:  # (B, ...) each
        """The part of a state that a query sees."""
        return {name: tensors[name] for name in self.start}

    def tensor_kind(self, name: str) -> str:
        """The group of a tensor. A head learns one rate for each group."""
        return name

    def pack(self, tensors: dict[str, Tensor]) -> Tensor:
        """One vector for each slot, layer and head: (B, 1, 1, P, d) -> (B, P, 1, 1, d)."""
        return tensors[self.packed_name].permute(0, 3, 1, 2, 4)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The inverse of `pack`."""
        return {self.packed_name: packed.permute(0, 2, 3, 1, 4)}


def check_slots(config: IAIConfig) -> None:
    """Fill in and check `num_state_tokens`.

    Raises:
        ValueError: if there is no slot.
    """
    config.num_state_tokens = 16 if config.num_state_tokens is None else config.num_state_tokens
    if config.num_state_tokens < 1:
        raise ValueError(f"num_state_tokens must be at least 1, got {config.num_state_tokens}")


def first_slots(base: Base, config: IAIConfig) -> Tensor:
    """Initial values of m slots: random token ids (m,), or random embeddings (m, d) if the base reads vectors."""
    embeddings = base.model.get_input_embeddings().weight
    if config.vector_width is None:
        return torch.randint(base.vocab_size, (config.num_state_tokens,)).to(embeddings.device)
    # A base for vectors has no tokens to start from. Random embeddings have the usual length, and all differ.
    shape = (config.num_state_tokens, embeddings.shape[1])
    return base.embedding_length * torch.randn(shape, device=embeddings.device)
