"""A soft prompt: m input embeddings. If all layers are attention, they are encoded once into keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..bases.base import Base
from ..bases.prefixes import Prefix
from ..config import IAIConfig
from ..registry import STATES
from ..signals import Reading
from .slots import SlotState, check_slots, first_slots


@STATES.register("prompt")
class PromptState(SlotState):
    """State tensor `prompt` (B, 1, 1, m, d). Its axes are those of a prefix with one layer and one head.

    A read-out is the last hidden state of its slot, scaled to the length of a token embedding, through a linear map
    that starts as the identity. On bases that need an attention sink, hidden states are so unlike embeddings that they
    do harm (SmolLM2: a loss of 4.5 in place of 3.2). There the map starts at zero, and is added to theta(0).

    Args:
        base: the pretrained model.
        token_ids: m tokens, whose embeddings the prompt starts as.
        reads: whether there are read-out slots.
        added: whether read-outs are added to theta(0).
    """

    fields = fingerprint = frozenset({"num_state_tokens"})
    initial_rate = 3.0
    # Once it is encoded, a soft prompt is also a prefix.
    exports = ("PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE")
    packed_name = "prompt"
    defaults = {"signal": "observations", "accumulation": "average"}

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        check_slots(config)
        if config.accumulation not in ("average", "recent"):
            raise ValueError(
                f"accumulation={config.accumulation!r} keeps keys and values, which state_type='prompt' cannot: use "
                "state_type='prefix'"
            )

    @classmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> "PromptState":
        averages = reads and config.accumulation == "average" and config.vector_width is None
        if config.pin_bos is None:
            config.pin_bos = averages and base.needs_sink()
        return cls(base, first_slots(base, config), reads=reads, added=config.pin_bos and averages)

    def __init__(self, base: Base, token_ids: Tensor, *, reads: bool, added: bool = False) -> None:  # (m,)
        super().__init__()
        self.added = added
        self.num_slots_in_front = len(token_ids)
        embeddings = base.embed(token_ids).detach().float()  # (m, d)
        self.start = nn.ParameterDict({"prompt": nn.Parameter(embeddings.clone()[None, None])})
        if reads:
            self.read_slots = nn.Parameter(embeddings.clone())
            self.project = nn.Linear(embeddings.shape[1], embeddings.shape[1], bias=False)
            (nn.init.zeros_ if added else nn.init.eye_)(self.project.weight)
            length = torch.tensor(base.embedding_length, device=embeddings.device)
            self.register_buffer("length", length, persistent=False)

    @contextmanager
    def under(self, base: Base, tensors: dict[str, Tensor]) -> Iterator[Prefix]:
        yield base.encode(tensors["prompt"][:, 0, 0])

    def read_out(self, base: Base, reading: Reading, rate: Tensor, *, writes: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The last hidden states of the slots as embeddings, and the number of tokens that they saw, (B, 1, 1, 1)."""
        hidden = nn.functional.rms_norm(reading.hidden, reading.hidden.shape[-1:])  # (B, m, d)
        mass = reading.mask.sum(1).clamp_min(1).float().view(-1, 1, 1, 1)
        found = self.project(hidden * self.length)[:, None, None]
        return {"prompt": self.start["prompt"] + found if self.added else found}, mass

    def of_tokens(self, base: Base, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:  # (B, m) each
        """The embeddings of m tokens."""
        return {"prompt": base.embed(ids)[:, None, None]}
