"""A key/value prefix: m slots in every layer."""

import torch
from torch import Tensor, nn

from ..base import Base, KeysValues, positions_of
from ..signals import Reading, TokenPooling


class PrefixState(nn.Module):
    """State tensors `key` and `value`, (B, L, H, m, D) each, keys as the base stores them at positions 0..m-1.

    theta(0) starts as the keys/values of m real tokens, so that it looks to the base like text. `reads`: whether there
    are read-out slots.
    """

    def __init__(self, base: Base, token_ids: Tensor, num_recent: int, *, reads: bool) -> None:  # (m,)
        super().__init__()
        embeddings = base.embed(token_ids)[None]  # (1, m, d)
        with torch.no_grad(), base.lora(False):
            keys_values = self.encode(base, embeddings)
        self.start = nn.ParameterDict(
            {name: nn.Parameter(t[0].float()) for name, t in self.tensors_of(keys_values).items()}
        )
        if reads:
            self.read_slots = nn.Parameter(embeddings[0].detach().float().clone())  # (m, d)
            back = -torch.arange(len(token_ids), device=token_ids.device)[None]
            centroids = base.rotate(self.start["key"].detach()[None], back)[0]  # (L, H, m, D)
            self.pool = TokenPooling(centroids[:, :, : len(token_ids) - num_recent], num_recent)
            self.own = nn.ParameterDict(
                {name: nn.Parameter(torch.zeros_like(t[:, :, :1, :1])) for name, t in self.start.items()}
            )

    @staticmethod
    def encode(base: Base, embeddings: Tensor) -> KeysValues:  # (B, m, d)
        """Keys and values of m embeddings read alone at positions 0..m-1."""
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return base.read(base.no_prefix(len(embeddings)), embeddings, mask, positions_of(mask), mask.shape[1])[1]

    @staticmethod
    def tensors_of(keys_values: KeysValues) -> dict[str, Tensor]:
        keys, values = zip(*keys_values, strict=True)
        return {"key": torch.stack(keys, 1), "value": torch.stack(values, 1)}

    def keys_values(self, base: Base, tensors: dict[str, Tensor]) -> KeysValues:
        return list(zip(tensors["key"].unbind(1), tensors["value"].unbind(1), strict=True))

    def read_out(self, base: Base, reading: Reading, rate: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The chunk's keys and values pooled into slots, plus a learned share of what the read-out slots hold.

        Returns the evidence in the layout of the state, and the pooled mass (B, L, H, m).
        """
        held = {name: t.float() for name, t in self.tensors_of(reading.keys_values).items()}
        num_tokens = reading.mask.shape[1]
        tokens = {name: t[..., :num_tokens, :] for name, t in held.items()}
        own = {name: t[..., num_tokens:, :] for name, t in held.items()}
        keys, values, mass = self.pool(
            base.rotate(tokens["key"], -reading.positions), tokens["value"], reading.mask, rate
        )
        places = torch.arange(keys.shape[-2], device=keys.device)[None]
        pooled = {"key": base.rotate(keys, places), "value": values}
        return {name: pooled[name] + self.own[name] * own[name] for name in pooled}, mass

    def of_tokens(self, base: Base, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:  # (B, m) each
        """What the bare base holds of m tokens that it reads alone."""
        with base.lora(False):
            keys_values = base.read(
                base.no_prefix(len(ids)), base.embed(ids), mask, positions_of(mask), record=ids.shape[1]
            )[1]
        return self.tensors_of(keys_values)

    @staticmethod
    def pack(tensors: dict[str, Tensor]) -> Tensor:
        """(B, L, H, m, D) twice -> (B, m, L, H, 2D): one vector per slot, layer and head."""
        return torch.cat([tensors["key"], tensors["value"]], -1).permute(0, 3, 1, 2, 4)

    @staticmethod
    def unpack(packed: Tensor) -> dict[str, Tensor]:  # (B, m, L, H, 2D)
        key, value = packed.permute(0, 2, 3, 1, 4).chunk(2, -1)
        return {"key": key, "value": value}
