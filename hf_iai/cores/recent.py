"""The control `accumulation="recent"`: a state that is exactly the last m tokens."""

import torch
from torch import Tensor

from ..bases.base import KEYS_VALUES, Base
from ..config import IAIConfig
from ..state import TaskState
from .core import StateCore


class RecentCore(StateCore):
    """`accumulation="recent"`: the slots hold the m most recent tokens, as the bare base reads them alone.

    Slots that no token has filled yet show theta(0). A prefix hides them, with a `mask` (B, m), if the base needs an
    attention sink: any theta(0) does harm to such a base.
    """

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config, reads=False)
        self.bos_token_id = _bos_token_id(base) if config.pin_bos else None
        self.hides_empty = self.state.needs == KEYS_VALUES and base.needs_sink()

    def _initial(self, base: Base, batch_size: int) -> dict[str, Tensor]:
        tensors = self.state.initial(batch_size)
        size = self.config.num_state_tokens - self.config.pin_bos
        device = next(iter(tensors.values())).device
        tensors["recent_ids"] = torch.zeros(batch_size, size, dtype=torch.long, device=device)
        if self.config.pin_bos or self.hides_empty:
            tensors |= self._slots(base, tensors["recent_ids"], tensors["recent_ids"].bool())
        return tensors

    def _next(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        size = state.tensors["recent_ids"].shape[1]
        count = state.num_tokens.clamp_max(size)
        ids, count = push_tokens(state.tensors["recent_ids"], count, evidence["ids"], evidence["mask"])
        real = torch.arange(size, device=ids.device) < count[:, None]
        return self._slots(base, ids, real) | {"recent_ids": ids}

    def _slots(self, base: Base, ids: Tensor, real: Tensor) -> dict[str, Tensor]:  # (B, m) each
        """The real tokens as the bare base reads them alone, at positions 0..m-1; theta(0) in the other slots."""
        if self.config.pin_bos:
            ids = torch.cat([ids.new_full((len(ids), 1), self.bos_token_id), ids], 1)
            real = torch.cat([real.new_ones(len(real), 1), real], 1)
        slots = self.state.of_tokens(base, ids, real.long())
        start, keep = self.state.initial(len(ids)), real[:, None, None, :, None]
        tensors = {name: torch.where(keep, slots[name].float(), start[name]) for name in start}
        return tensors | ({"mask": real.long()} if self.hides_empty else {})


def push_tokens(
    recent: Tensor,  # (B, m) ids, real ones first
    count: Tensor,  # (B,) how many are real
    ids: Tensor,  # (B, C)
    mask: Tensor,  # (B, C)
) -> tuple[Tensor, Tensor]:
    """First in, first out: keep the last m real tokens of [recent][ids].

    Returns:
        The ids (B, m), real ones first, and their number (B,).
    """
    m = recent.shape[1]
    kept = torch.arange(m, device=ids.device) < count[:, None]
    everything, real = torch.cat([recent, ids], 1), torch.cat([kept, mask.bool()], 1)
    # A stable sort moves the real tokens to the right end, in order. Then the last m are moved to the left.
    right = everything.gather(1, real.long().sort(dim=1, stable=True).indices)[:, -m:]
    count = real.sum(1).clamp_max(m)
    columns = (torch.arange(m, device=ids.device) - count[:, None]) % m
    return right.gather(1, columns), count


def _bos_token_id(base: Base) -> int:
    bos = base.config.bos_token_id
    if bos is None:
        raise ValueError(f"pin_bos=True, but {base.config.model_type!r} has no bos_token_id: set pin_bos=False")
    return bos
