"""What all state types share: the tensors of theta(0), one row of each for a task, and how they are made and described.

Axes: B tasks, P slots, d width of embeddings.
"""

import torch
from torch import Tensor, nn

from ..bases.base import TOKENS, Base
from ..config import IAIConfig
from ..predictions.likelihoods import LIKELIHOODS, Likelihood
from ..registry import Part


class SlotState(nn.Module, Part):
    """A state type whose tensors are those of `start`, theta(0): name -> (...) without the axis of tasks.

    Attributes:
        needs: what the base must offer, see `bases.base`.
        num_slots_in_front: how many positions it takes in front of a text.
        initial_rate: what the rates of gradient steps start as; measured with the embedded base (docs/gradients.md).
        exports: names of the PEFT methods that a state can become, the default first.
        packed_name: the tensor (B, 1, 1, P, d) of a state that has just one.
    """

    needs = TOKENS
    num_slots_in_front = 0
    initial_rate = 1.0
    exports: tuple[str, ...] = ()
    packed_name: str | None = None
    start: nn.ParameterDict

    @classmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> "SlotState":
        """The state type of an adapter; `reads`: whether the base reads chunks out into slots."""
        raise NotImplementedError

    @classmethod
    def default_regime(cls) -> str:
        return "explicit"

    @classmethod
    def complete_for_base(cls, config: IAIConfig, base_config) -> None:
        """Fill in what depends on the base, so that it is saved with the adapter."""

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        """In words, for model cards."""
        return f"{config.state_type} with {config.num_state_tokens} slots"

    @classmethod
    def size(cls, config: IAIConfig) -> int | str:
        """Its size in an adapter's display name."""
        return config.num_state_tokens

    @classmethod
    def likelihood(cls, config: IAIConfig) -> Likelihood:
        """What is predicted of a vector under such a state."""
        return LIKELIHOODS[config.likelihood](config.num_outputs)

    def initial(self, batch_size: int) -> dict[str, Tensor]:  # (B, ...) each
        """The state of B tasks that have read nothing."""
        return {name: t.expand(batch_size, *t.shape) for name, t in self.start.items()}

    def visible(self, base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:  # (B, ...) each
        """What a query sees of all that the state keeps."""
        return {name: tensors[name] for name in self.start}

    def kind(self, name: str) -> str:
        """Groups the tensors: a head learns one rate for each group."""
        return name

    def pack(self, tensors: dict[str, Tensor]) -> Tensor:
        """One vector for each slot, layer and head: (B, 1, 1, P, d) -> (B, P, 1, 1, d)."""
        return tensors[self.packed_name].permute(0, 3, 1, 2, 4)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The inverse of `pack`."""
        return {self.packed_name: packed.permute(0, 2, 3, 1, 4)}


def check_slots(config: IAIConfig) -> None:
    """Complete and check `num_state_tokens`.

    Raises:
        ValueError: for fewer than one slot.
    """
    config.num_state_tokens = 16 if config.num_state_tokens is None else config.num_state_tokens
    if config.num_state_tokens < 1:
        raise ValueError(f"num_state_tokens must be at least 1, got {config.num_state_tokens}")


def first_slots(base: Base, config: IAIConfig) -> Tensor:
    """What m slots start as: ids of random tokens (m,), or random embeddings (m, d) where the base reads vectors."""
    embeddings = base.model.get_input_embeddings().weight
    if config.vector_width is None:
        return torch.randint(base.vocab_size, (config.num_state_tokens,)).to(embeddings.device)
    # A base of vectors has no tokens to start from: as long as its embeddings, and no two alike.
    shape = (config.num_state_tokens, embeddings.shape[1])
    return base.embedding_length * torch.randn(shape, device=embeddings.device)
