"""IAICore: all that an adapter learns besides LoRA, and one refinement step h_phi."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .base import Base, Prefix
from .config import IAIConfig
from .heads import KEPT, NEVER, WRITES, Correction, DeltaRule, RunningAverage, followed_by, push_tokens
from .heads.average import include
from .signals import read_observations
from .state import Identity, TaskState
from .states import STATE_TYPES


class IAICore(nn.Module):
    """theta(0), what reads a chunk out, the weights of the average, and the correction of one adapter.

    Args:
        base: the transformer; its embeddings give theta(0) and the slots their first values.
        config: the adapter's configuration.
    """

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__()
        self.config = config
        token_ids = torch.randint(base.vocab_size, (config.num_state_tokens,))
        device = base.model.get_input_embeddings().weight.device
        reads = config.accumulation == "average"
        self.state = STATE_TYPES[config.state_type](base, token_ids.to(device), config.num_kept_tokens, reads=reads)
        if not reads:
            self.bos_token_id = _bos_token_id(base) if config.pin_bos else None
        elif config.correction:
            _, num_slots, num_layers, num_heads, width = self.state.pack(self.state.initial(1)).shape
            self.average = RunningAverage(num_layers, num_heads, num_slots, base.config.hidden_size)
            self.correction = Correction(num_layers, num_heads, width)
            if config.delta_rule:
                self.delta = DeltaRule(num_layers, num_heads, width // 2)  # a packed slot is key and value
        self.to(device)

    def initial_state(self, base: Base, batch_size: int, identity: Identity) -> TaskState:
        """theta(0) for `batch_size` tasks."""
        tensors = self.state.initial(batch_size)
        device = next(iter(tensors.values())).device
        if self.config.accumulation == "recent":
            size = self.config.num_state_tokens - self.config.pin_bos
            tensors["recent_ids"] = torch.zeros(batch_size, size, dtype=torch.long, device=device)
            if self.config.pin_bos:
                tensors |= self._recent_slots(base, tensors["recent_ids"], tensors["recent_ids"].bool())
        else:
            first = next(iter(tensors.values()))  # (B, L, H, P, D), P = m but for kept tokens
            tensors["precision"] = first.new_zeros(first.shape[:-1])
        zero = torch.zeros(batch_size, dtype=torch.long, device=device)
        return TaskState(tensors, zero, zero.clone(), identity, self.config.accumulation)

    def read(self, base: Base, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:  # (B, C) each
        """Evidence of a chunk: a state of one chunk, or for `"recent"` just its tokens."""
        # What stands under the mask must not even route: experts compute all tokens that chose them in one batch.
        ids = ids.masked_fill(mask == 0, 0)
        if self.config.accumulation == "recent":
            return {"ids": ids, "mask": mask}
        with base.lora(True):
            surprisal = self.config.num_kept_tokens > 0
            reading = read_observations(base, self.state, ids, mask, surprisal=surprisal)
        with _full_precision(ids):
            evidence, mass = self.state.read_out(base, reading, self._rate(), writes=self.config.delta_rule)
            if self.config.correction:
                precision = self.average.precision(reading.hidden, mass)
            else:
                precision = torch.ones_like(next(iter(evidence.values()))[..., 0]) * (mass > 0)
        return evidence | {"precision": precision, "mask": mask}

    def step(self, base: Base, state: TaskState, evidence: dict[str, Tensor]) -> TaskState:
        """theta(i+1) = h(theta(i), evidence). Rows that read no token keep their state bitwise."""
        num_tokens = evidence["mask"].sum(1)  # (B,)
        if self.config.accumulation == "recent":
            tensors = self._step_recent(base, state, evidence)
        else:
            readout = {name: t for name, t in evidence.items() if name not in (*KEPT, *WRITES, "mask")}
            with _full_precision(num_tokens):
                if self.config.delta_rule:
                    readout["value"] = readout["value"] - self._replaced(state, evidence)
                retention = (-self._rate() * num_tokens.view(-1, 1, 1, 1)).exp()
                tensors = include(state.tensors, readout, state.step, retention)
                if self.config.num_kept_tokens:
                    tensors |= followed_by(*({n: t[n] for n in KEPT} for t in (state.tensors, evidence)), num_tokens)
        read = num_tokens > 0
        tensors = {
            name: torch.where(read.view(-1, *[1] * (t.dim() - 1)), t, state.tensors[name])
            for name, t in tensors.items()
        }
        return replace(state, tensors=tensors, step=state.step + read, num_tokens=state.num_tokens + num_tokens)

    def _replaced(self, state: TaskState, evidence: dict[str, Tensor]) -> Tensor:  # (B, L, H, P, D)
        """What the chunk's tokens replace, per slot; nothing where nothing was read."""
        replaced = self.delta(state.tensors["value"], *(evidence[name] for name in WRITES))
        return replaced * (state.step > 0).view(-1, 1, 1, 1, 1)

    def _rate(self) -> Tensor:  # (L, H, P), or what broadcasts to it
        """Forgetting per token; none without the correction."""
        return self.average.rate() if self.config.correction else self.state.read_slots.new_zeros(1, 1, 1)

    def prefix(self, base: Base, state: TaskState) -> Prefix:
        """What a query is read behind: the state, corrected."""
        return self.state.prefix(base, self.corrected(base, state))

    def corrected(self, base: Base, state: TaskState) -> dict[str, Tensor]:
        """The state as a query sees it: all m slots, in the layout of the state type, after the learned correction."""
        with _full_precision(state.step):
            tensors = self.state.visible(base, state.tensors)
            if self.config.accumulation == "average" and self.config.correction:
                packed = self.state.pack(tensors)
                corrected = self.correction(packed, self._weights(state), state.step, state.num_tokens)
                tensors = self.state.unpack(corrected)
        return tensors

    def _weights(self, state: TaskState) -> Tensor:  # (B, L, H, m)
        """How much each slot has seen: its weight in the average; of a kept token, how much was read after it."""
        weights = state.step.view(-1, 1, 1, 1) * state.tensors["precision"]
        if self.config.num_kept_tokens:
            age = state.tensors["kept_age"][..., 0]  # (B, 1, 1, K)
            age = age.masked_fill(age == NEVER, 0).to(weights.dtype)
            weights = torch.cat([weights, age.expand(*weights.shape[:3], -1)], -1)
        return weights

    def _step_recent(self, base: Base, state: TaskState, chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        size = state.tensors["recent_ids"].shape[1]
        count = state.num_tokens.clamp_max(size)
        ids, count = push_tokens(state.tensors["recent_ids"], count, chunk["ids"], chunk["mask"])
        real = torch.arange(size, device=ids.device) < count[:, None]
        return self._recent_slots(base, ids, real) | {"recent_ids": ids}

    def _recent_slots(self, base: Base, ids: Tensor, real: Tensor) -> dict[str, Tensor]:  # (B, m) each
        """The bare base's slots for the real tokens, read alone at positions 0..m-1; theta(0) in the others."""
        if self.config.pin_bos:
            ids = torch.cat([ids.new_full((len(ids), 1), self.bos_token_id), ids], 1)
            real = torch.cat([real.new_ones(len(real), 1), real], 1)
        slots = self.state.of_tokens(base, ids, real.long())
        start, keep = self.state.initial(len(ids)), real[:, None, None, :, None]
        return {name: torch.where(keep, slots[name].float(), start[name]) for name in start}


def _full_precision(tensor: Tensor) -> torch.autocast:
    """State and head compute in float32, also where autocast runs the base in less."""
    return torch.autocast(tensor.device.type, enabled=False)


def _bos_token_id(base: Base) -> int:
    bos = base.config.bos_token_id
    if bos is None:
        raise ValueError(f"pin_bos=True, but {base.config.model_type!r} has no bos_token_id: set pin_bos=False")
    return bos
