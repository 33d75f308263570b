"""A low-rank update of the base's weights that a hypernetwork computes from a small code."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..bases.base import Base
from ..bases.low_rank import linear_modules, low_rank_updates
from ..bases.prefixes import Prefix
from ..config import IAIConfig
from ..signals import Reading
from .slots import SlotState, first_slots

CODE_WIDTH = 64


class HypernetworkState(SlotState):
    """State tensor `code` (B, 1, 1, P, k): the lora state of adapters whose base reads chunks out. Each module gives

        W x + B(code) A x,        B(code) = U (M code)^T / k,        A (r, I), M (r, P), U (O, k) learned

    B is linear in the code, so the average of the codes of several chunks gives the average of their updates. U starts
    at zero, so at first there is no effect. A read-out is the last hidden state of its slot, normed, through a linear
    map to k numbers.

    Args:
        base: the transformer, with its LoRA layers already added.
        token_ids: P tokens, whose embeddings the read-out slots start as.
        rank: r.
        target_modules: see `low_rank.linear_modules`.

    Source: hypernetworks, Ha et al., arXiv 1609.09106; refining a code, Rusu et al., arXiv 1807.05960.
    """

    packed_name = "code"

    @classmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> "HypernetworkState":
        return cls(base, first_slots(base, config), config.state_r, config.state_target_modules)

    def __init__(self, base: Base, token_ids: Tensor, rank: int, target_modules: str | list[str]) -> None:
        super().__init__()
        num_slots, embeddings = len(token_ids), base.embed(token_ids).detach().float()
        shapes = linear_modules(base.model, target_modules, base.uncalled)
        self.paths = {path.replace(".", "_"): path for path in shapes}
        self.start = nn.ParameterDict({"code": nn.Parameter(torch.randn(1, 1, num_slots, CODE_WIDTH))})
        self.read_slots = nn.Parameter(embeddings.clone())
        self.project = nn.Linear(embeddings.shape[1], CODE_WIDTH, bias=False)
        self.down, self.mix, self.up = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, path in self.paths.items():
            width_in, width_out = shapes[path]
            self.down[name] = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, width_in), a=5**0.5))
            self.mix[name] = nn.Parameter(torch.randn(rank, num_slots) / num_slots**0.5)
            self.up[name] = nn.Parameter(torch.zeros(width_out, CODE_WIDTH))

    def update(self, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The update of each module: path -> A (B, r, I), B (B, O, r)."""
        # Divided by k, so that an optimizer step on U moves B as far as a step on LoRA's own B would.
        code = tensors["code"][:, 0, 0] / CODE_WIDTH  # (B, P, k)
        of_each = lambda t: t.expand(len(code), -1, -1)  # noqa: E731
        with torch.autocast(code.device.type, enabled=False):
            return {
                # bmm, since a plain matmul rounds differently without gradients.
                path: (of_each(self.down[name]), of_each(self.up[name]).bmm(of_each(self.mix[name]).bmm(code).mT))
                for name, path in self.paths.items()
            }

    @contextmanager
    def under(self, base: Base, tensors: dict[str, Tensor]) -> Iterator[Prefix]:
        updates = {base.model.get_submodule(path): pair for path, pair in self.update(tensors).items()}
        with low_rank_updates(updates):
            yield base.no_prefix(len(tensors["code"]))

    def read_out(self, base: Base, reading: Reading, rate: Tensor, *, writes: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The last hidden states of the slots as a code, and the number of tokens that they saw, (B, 1, 1, 1)."""
        hidden = nn.functional.rms_norm(reading.hidden, reading.hidden.shape[-1:])  # (B, P, d)
        mass = reading.mask.sum(1).clamp_min(1).float().view(-1, 1, 1, 1)
        return {"code": self.project(hidden)[:, None, None]}, mass
