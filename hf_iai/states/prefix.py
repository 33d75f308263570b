"""A key/value prefix: m slots in every layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..bases.base import KEYS_VALUES, Base
from ..bases.places import ages_of, positions_of
from ..bases.prefixes import KeysValues, MaskedPrefix
from ..config import IAIConfig
from ..heads import KEPT, NEVER, WRITES, keep_tokens, trace
from ..registry import STATES
from ..signals import Reading, TokenPooling
from .slots import SlotState, check_slots, first_slots
from .token_slots import TokenSlots, check_token_slots

# How `TokenSlots` choose; "recent" encodes the latest tokens anew instead.
TOKEN_RULES = ("attention", "novelty", "surprisal")


@STATES.register("prefix")
class PrefixState(SlotState):
    """State tensors `key` and `value`, (B, L, H, P, D) each, with keys as the base stores them at positions 0..P-1.

    With `num_kept_tokens` = K, P is m - K. The last K slots hold single tokens: `kept_key` and `kept_value`
    (B, L, H, K, D), with keys at position 0, and `kept_trace` and `kept_age` (B, 1, 1, K, 1); see `heads.kept`.

    theta(0) starts as the keys and values of m real tokens, so that it looks like text to the base.

    Args:
        base: the pretrained model.
        token_ids: the m tokens.
        num_kept: K.
        reads: whether there are read-out slots.
        pinned: whether a beginning token stands before the slots, which are then at positions 1..m. Queries see neither
            it nor the slots before something was read, since theta(0) could harm such a base.
    """

    fields = frozenset({"num_state_tokens", "num_kept_tokens", "delta_rule", "read_behind"})
    fingerprint = frozenset({"num_state_tokens", "num_kept_tokens"})
    fingerprint_if_changed = frozenset({"read_behind"})
    needs = KEYS_VALUES
    initial_rate = 30.0
    exports = ("PREFIX_TUNING", "CARTRIDGE")
    defaults = {"signal": "observations", "accumulation": "average"}

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        check_slots(config)
        averages = config.accumulation == "average"
        if config.accumulation in TOKEN_RULES:
            check_token_slots(config)
        elif config.read_behind != "state":
            raise ValueError(
                f"read_behind={config.read_behind!r} needs accumulation='attention' or 'surprisal', got "
                f"{config.accumulation!r}"
            )
        if not 0 <= config.num_kept_tokens < config.num_state_tokens:
            raise ValueError(
                f"num_kept_tokens must be from 0 to num_state_tokens - 1 = {config.num_state_tokens - 1}, "
                f"got {config.num_kept_tokens}"
            )
        if config.num_kept_tokens and not averages:
            raise ValueError(
                f"num_kept_tokens={config.num_kept_tokens} needs accumulation='average', got {config.accumulation!r}"
            )
        if config.delta_rule and not (averages and config.correction):
            raise ValueError(
                "delta_rule=True needs accumulation='average' and correction=True, "
                f"got {config.accumulation!r} and {config.correction}"
            )

    @classmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> SlotState:
        if config.accumulation in TOKEN_RULES:
            return TokenSlots.make(base, config, reads=reads)
        averages = reads and config.accumulation == "average" and config.vector_width is None
        if config.pin_bos is None:
            config.pin_bos = averages and base.needs_sink()
        pinned = config.pin_bos and averages
        return cls(base, first_slots(base, config), config.num_kept_tokens, reads=reads, pinned=pinned)

    @classmethod
    def describe(cls, config: IAIConfig) -> str:
        kept = f", {config.num_kept_tokens} of which keep single tokens" if config.num_kept_tokens else ""
        return super().describe(config) + kept

    def __init__(
        self,
        base: Base,
        token_ids: Tensor,  # (m,)
        num_kept: int,
        *,
        reads: bool,
        pinned: bool = False,
    ) -> None:
        super().__init__()
        self.num_slots_in_front = len(token_ids) + pinned
        self.num_kept, self.pinned = num_kept, pinned
        for name, t in (self.tensors_of(base.first_token()) if pinned else {}).items():
            self.register_buffer(f"first_{name}", t.float(), persistent=False)  # (1, L, H, 1, D)
        num_pooled = len(token_ids) - num_kept
        embeddings = base.embed(token_ids)[None]  # (1, m, d)
        with torch.no_grad(), base.lora(False):
            keys_values = base.encode(embeddings)
        self.start = nn.ParameterDict(
            {name: nn.Parameter(t[0].float()) for name, t in self.tensors_of(keys_values).items()}
        )
        if reads:
            self.read_slots = nn.Parameter(embeddings[0, :num_pooled].detach().float().clone())  # (P, d)
            back = -torch.arange(len(token_ids), device=token_ids.device)[None]
            centroids = base.rotate(self.start["key"].detach()[None], back)[0]  # (L, H, m, D)
            self.pool = TokenPooling(centroids[:, :, :num_pooled])
            self.own = nn.ParameterDict(
                {name: nn.Parameter(torch.zeros_like(t[:, :, :1, :1])) for name, t in self.start.items()}
            )

    @staticmethod
    def tensors_of(keys_values: KeysValues) -> dict[str, Tensor]:
        keys, values = zip(*keys_values, strict=True)
        return {"key": torch.stack(keys, 1), "value": torch.stack(values, 1)}

    def initial(self, batch_size: int) -> dict[str, Tensor]:
        """The state of B tasks that have read nothing."""
        tensors = {name: t[:, :, : t.shape[2] - self.num_kept] for name, t in self.start.items()}  # (L, H, P, D)
        if self.num_kept:
            shape = self.start["key"][:, :, -self.num_kept :].shape  # (L, H, K, D)
            key, age = self.start["key"].new_zeros(shape), self.start["key"].new_zeros(1, 1, self.num_kept, 1)
            tensors |= dict(zip(KEPT, (key, key, age, age.long() + NEVER), strict=True))
        return {name: t.expand(batch_size, *t.shape) for name, t in tensors.items()}

    def visible(self, base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`key` and `value` of all m slots, (B, L, H, m, D), to which a query attends. Empty slots show theta(0)."""
        shown = self._shown(base, tensors) | {name: t for name, t in tensors.items() if name == "mask"}
        if not self.pinned:
            return shown
        read = tensors["precision"].flatten(1).any(1)  # (B,)
        return shown | {"mask": read[:, None].long().expand(-1, self.num_slots_in_front)}

    def _shown(self, base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All m slots."""
        if not self.num_kept:
            return {name: tensors[name] for name in ("key", "value")}
        num_pooled, num_slots = tensors["key"].shape[-2], tensors["key"].shape[-2] + self.num_kept
        places = torch.arange(num_pooled, num_slots, device=tensors["key"].device)[None]
        kept = {"key": base.rotate(tensors["kept_key"], places), "value": tensors["kept_value"]}
        empty = tensors["kept_age"] == NEVER
        kept = {name: torch.where(empty, self.start[name][:, :, num_pooled:], t) for name, t in kept.items()}
        return {name: torch.cat([tensors[name], t], -2) for name, t in kept.items()}

    @contextmanager
    def under(self, base: Base, tensors: dict[str, Tensor]) -> Iterator[KeysValues]:
        """A context in which the base reads a text after the prefix that it yields."""
        key, value = tensors["key"], tensors["value"]
        if self.pinned:
            # The first token is at position 0, so the slots move on by one.
            key = torch.cat([self.first_key.expand(len(key), *key.shape[1:3], -1, -1), base.rotate(key, _one(key))], -2)
            value = torch.cat([self.first_value.expand(len(value), *value.shape[1:3], -1, -1), value], -2)
        prefix = list(zip(key.unbind(1), value.unbind(1), strict=True))
        yield MaskedPrefix(prefix, tensors["mask"]) if "mask" in tensors else prefix

    def read_out(self, base: Base, reading: Reading, rate: Tensor, *, writes: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Pool the keys and values of a chunk into slots, and add a learned share of what the read-out slots hold.

        Returns:
            The evidence in the layout of the state, including kept tokens and, if `writes`, the tensors `WRITES`; and
            the pooled mass (B, L, H, P).
        """
        held = {name: t.float() for name, t in self.tensors_of(reading.keys_values).items()}
        num_tokens = reading.mask.shape[1]
        tokens = {name: t[..., :num_tokens, :] for name, t in held.items()}
        own = {name: t[..., num_tokens:, :] for name, t in held.items()}
        tokens["key"] = base.rotate(tokens["key"], -reading.positions)
        pooled = self.pool(tokens["key"], tokens["value"], reading.mask, rate)
        places = torch.arange(pooled.keys.shape[-2], device=pooled.keys.device)[None]
        evidence = {"key": base.rotate(pooled.keys, places), "value": pooled.values}
        evidence = {name: t + self.own[name] * own[name] for name, t in evidence.items()}
        if writes:
            evidence |= zip(WRITES, (pooled.address, pooled.written, tokens["value"]), strict=True)
        return evidence | self._kept(reading, tokens), pooled.mass

    def _kept(self, reading: Reading, tokens: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.num_kept:
            return {}
        padding = reading.mask[:, None, None, :, None] == 0  # (B, 1, 1, C, 1)
        felt, age = (t[:, None, None, :, None] for t in (trace(reading.surprisal), ages_of(reading.mask)))
        held = [t.masked_fill(padding, 0) for t in (tokens["key"], tokens["value"], felt)]
        held = dict(zip(KEPT, (*held, age.masked_fill(padding, NEVER)), strict=True))
        empty = self.initial(len(age))
        return keep_tokens({name: torch.cat([empty[name], held[name]], -2) for name in KEPT}, self.num_kept)

    def of_tokens(self, base: Base, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:  # (B, m) each
        """The keys and values of m tokens that the bare base reads alone."""
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


def _one(keys: Tensor) -> Tensor:  # (B, L, H, m, D) -> (1, m)
    """By one position, for every slot."""
    return torch.ones(1, keys.shape[-2], dtype=torch.long, device=keys.device)
