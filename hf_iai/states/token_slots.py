"""Slots in front of a text that hold single tokens, where each layer and head may hold other ones.

Axes: B tasks, L layers, H key/value heads, m slots, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..bases.base import KEYS_VALUES, Base
from ..bases.compat import key_value_shape
from ..bases.prefixes import MaskedPrefix
from ..config import IAIConfig
from ..heads.kept import NEVER
from .slots import SlotState


class TokenSlots(SlotState):
    """State tensors `key` and `value` (B, L, H, m, D), keys at position 0, and `worth` and `age` (B, L, H, m, 1).

    See `heads.chosen`. `loss` (B,) is the loss of the last chunk as it was read, in nats per token: behind the state
    before it, or behind nothing (`read_behind="start"`).

    Slots are filled from the right. Empty ones are masked, so a state that has read nothing takes no place in front of
    a text. theta(0) has no learned tensors.

    Args:
        base: the pretrained model.
        num_slots: m.
    """

    needs = KEYS_VALUES
    exports = ("PREFIX_TUNING", "CARTRIDGE")

    @classmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> "TokenSlots":
        return cls(base, config.num_state_tokens)

    def __init__(self, base: Base, num_slots: int) -> None:
        super().__init__()
        self.num_slots_in_front = num_slots
        self.start = nn.ParameterDict()
        num_layers, num_heads, width = key_value_shape(base.config)
        self.shape = (num_layers, num_heads, num_slots, width)
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # knows the device

    def initial(self, batch_size: int) -> dict[str, Tensor]:
        """Empty slots of B tasks."""
        empty = self.zero.float().expand(batch_size, *self.shape)
        one = empty[..., :1]
        age, loss = torch.full_like(one, NEVER, dtype=torch.long), one.new_zeros(batch_size)
        return {"key": empty, "value": empty, "worth": one, "age": age, "loss": loss}

    def visible(self, base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`key` and `value` of the slots, with the keys at their places 0, 1, ..., and `mask` (B, m), 0 where empty."""
        mask = (tensors["age"][:, 0, 0, :, 0] != NEVER).long()
        places = (mask.cumsum(1) - 1).clamp_min(0)
        return {"key": base.rotate(tensors["key"], places), "value": tensors["value"], "mask": mask}

    @contextmanager
    def under(self, base: Base, tensors: dict[str, Tensor]) -> Iterator[MaskedPrefix]:
        """A context in which the base reads a text behind the slots; `tensors` are those of `visible`."""
        layers = list(zip(tensors["key"].unbind(1), tensors["value"].unbind(1), strict=True))
        yield MaskedPrefix(layers, tensors["mask"])


def check_token_slots(config: IAIConfig) -> None:
    """Check the fields of slots that hold single tokens.

    Raises:
        ValueError: if there are too few slots, or chunks that are read apart cannot be compared.
    """
    if config.accumulation == "novelty" and config.read_behind != "state":
        raise ValueError(
            f"accumulation='novelty' compares what was read at different times, so it needs read_behind='state', got "
            f"{config.read_behind!r}: use accumulation='attention' for states that are to be merged"
        )
    if config.num_state_tokens is not None and config.num_state_tokens < 2:
        raise ValueError(
            f"num_state_tokens must be at least 2 for slots that hold tokens, the first one read and the latest, got "
            f"{config.num_state_tokens}"
        )
