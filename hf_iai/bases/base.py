"""The pretrained transformer as the rest of the package sees it: passes over text that stands behind a state.

Axes: B rows, T tokens, m slots, L layers, H key/value heads, D head width, d hidden width, V vocabulary.
"""

from contextlib import AbstractContextManager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DynamicCache

from .compat import (
    PrefixCache,
    check_supported,
    embedding_scale,
    has_longrope,
    key_value_shape,
    lora_enabled,
    prepare_checkpointing,
    read_by_weight,
    rotations,
    window_of,
)

# What a base can offer: to answer in tokens, keys and values in every layer, or a vector for each text.
TOKENS, KEYS_VALUES, FEATURES = "tokens", "keys and values", "features"
LOGITS_AT_ONCE = 1024  # positions: logits of a long chunk over a large vocabulary would not fit in memory
KeysValues = list[tuple[Tensor, Tensor]]  # per layer (B, H, m, D) each
Prefix = KeysValues | Tensor  # what a base takes before a text; a `RecurrentBase` takes embeddings (B, m, d)


class Base:
    """Runs a decoder behind a key/value prefix at positions 0..m-1, with LoRA on or off.

    Not a module: it owns no parameters and is made anew for each use.
    """

    offers = frozenset({TOKENS, KEYS_VALUES})

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, model.config
        check_supported(model)

    @property
    def window(self) -> int:
        """The most positions a pass can have; `sys.maxsize` for a base without positions."""
        return window_of(self.config)

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @property
    def uncalled(self) -> set[str]:
        """Last parts of the names of modules whose weights are read without calling them."""
        return read_by_weight(self.model)

    def check_offers(self, need: str, what: str) -> None:
        """
        Args:
            need: what a kind of task or a state needs of a base: `TOKENS`, `KEYS_VALUES` or `FEATURES`.
            what: who needs it, such as `"state_type='linear'"`.

        Raises:
            ValueError: for a base that does not offer it.
        """
        if need not in self.offers:
            raise ValueError(self._why_not(what))

    def _why_not(self, what: str) -> str:
        return (
            f"{what} needs a sequence classifier, got {type(self.model).__name__}: load the base with "
            "AutoModelForSequenceClassification"
        )

    def prepare(self, config: LoraConfig, *, uses_lora: bool) -> None:
        """Before LoRA is put in: leave out what it would change without effect."""
        if config.target_modules == "all-linear":
            self._exclude(config, self.uncalled)

    @staticmethod
    def _exclude(config: LoraConfig, names: set[str]) -> None:
        if not isinstance(config.exclude_modules, str):  # a regular expression is left to its author
            config.exclude_modules = {*(config.exclude_modules or ()), *names} or None

    def reads(self, name: str) -> bool:
        """Whether passes depend on the module or parameter of that name."""
        return True

    def lora(self, enabled: bool) -> AbstractContextManager[None]:
        return lora_enabled([m for m in self.model.modules() if isinstance(m, LoraLayer)], enabled)

    def embed(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, d)
        """Embeddings (B, T, d) in place of ids are handed on."""
        if ids.is_floating_point():
            return ids
        return self.model.get_input_embeddings()(ids)

    @property
    def embedding_length(self) -> float:
        """Root mean square of a token's embedding; where all are 0, as of a vocabulary that is padding alone, 1."""
        return self.model.get_input_embeddings().weight.detach().float().square().mean().sqrt().item() or 1.0

    def expected_embedding(self, probabilities: Tensor) -> Tensor:  # (..., V) -> (..., d)
        """The mean of the tokens' embeddings."""
        weight = self.model.get_input_embeddings().weight
        return probabilities.to(weight.dtype) @ weight * embedding_scale(self.model)

    def no_prefix(self, rows: int) -> Prefix:
        num_layers, num_heads, width = key_value_shape(self.config)
        empty = self.model.get_input_embeddings().weight.new_zeros(rows, num_heads, 0, width)
        return [(empty, empty)] * num_layers

    def encode(self, embeddings: Tensor) -> Prefix:  # (B, m, d)
        """The prefix that m embeddings are, alone at positions 0..m-1."""
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.read(self.no_prefix(len(embeddings)), embeddings, mask, positions_of(mask), mask.shape[1])[1]

    @staticmethod
    def num_slots(prefix: Prefix) -> int:
        """m."""
        return prefix[0][0].shape[-2]

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:  # (B, L, H, T, D), (B, T) or (1, T)
        """Keys moved by so many positions; rotations compose, so minus its own position brings a key to position 0.

        Bases whose positions are absolute keep their keys as they are.
        """
        found = rotations(self.model, keys, positions)
        if found is None:
            return keys
        cos, sin = found  # (B, L or 1, 1, T, R), R <= D
        rotated, passed = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
        first, second = rotated.chunk(2, -1)
        return torch.cat([rotated * cos + torch.cat([-second, first], -1) * sin, passed], -1)

    def read(
        self,
        prefix: Prefix,
        embeddings: Tensor,  # (B, T, d)
        mask: Tensor,  # (B, T)
        positions: Tensor,  # (B, T)
        record: int,
        prefix_mask: Tensor | None = None,  # (B, m)
    ) -> tuple[Tensor, KeysValues]:
        """Last hidden states (B, record, d) and keys/values of the last `record` positions."""
        cache = PrefixCache(self.config, _match_rows(prefix, len(embeddings)), record=record)
        prepare_checkpointing(self.model)
        hidden = self.model.base_model(
            inputs_embeds=embeddings.to(self.model.get_input_embeddings().weight.dtype),
            attention_mask=_behind_prefix(mask, cache, prefix_mask),
            position_ids=positions,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state
        return hidden[:, -record:], cache.recorded()

    @torch.no_grad()
    def surprisal(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:  # (B, T, d), (B, T), (B, T)
        """-log p(token | tokens before it) in nats, (B, T); 0 for the first real token and for padding."""
        states, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        parts = zip(states.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
        loss = torch.cat([nn.functional.cross_entropy(self.logits(h), t, reduction="none") for h, t in parts])
        unknown = (mask[:, :-1] * mask[:, 1:]) == 0
        return nn.functional.pad(loss.view(unknown.shape).masked_fill(unknown, 0), (1, 0))

    def logits(self, hidden: Tensor) -> Tensor:  # (..., d) -> (..., V) in float32
        logits = self.model.get_output_embeddings()(hidden).float() / getattr(self.config, "logits_scaling", 1)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def answer(self, prefix: Prefix, ids: Tensor, mask: Tensor, labels: Tensor | None = None, **kwargs):
        """transformers' own output for the T tokens of a query (B, T) behind the prefix."""
        cache = PrefixCache(self.config, _match_rows(prefix, len(ids)))
        prepare_checkpointing(self.model)
        return self.model(
            input_ids=ids,
            attention_mask=_behind_prefix(mask, cache),
            position_ids=positions_of(mask) + cache.get_seq_length(),
            past_key_values=cache,
            use_cache=False,
            labels=None if labels is None else without_first(labels, mask),
            **kwargs,
        )

    def generate(self, prefix: Prefix, ids: Tensor, mask: Tensor, **kwargs):  # (B, T) each
        """transformers' own `generate` behind the prefix; prompt and new ids, (B, T + new)."""
        if has_longrope(self.config):
            self._check_stays_within_window(self.num_slots(prefix), ids.shape[1], kwargs)
        if self.num_slots(prefix):
            kwargs["past_key_values"] = self._written_to_by_generate(prefix, len(ids), kwargs)
        kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.num_slots(prefix)), mask], 1)
        kwargs["use_cache"] = True  # the prefix lies in the cache
        return self.model.generate(ids, **kwargs)

    def _setting(self, kwargs: dict, name: str):
        """As `generate` will find it: in its arguments, or in the configuration given to it or to the model."""
        return kwargs.get(name) or getattr(kwargs.get("generation_config") or self.model.generation_config, name, None)

    def _check_stays_within_window(self, num_slots: int, num_tokens: int, kwargs: dict) -> None:
        """Beyond it, generate of Phi-3 throws the cache away without a word, and the state with it."""
        room, new = self.window - num_slots - num_tokens, self._setting(kwargs, "max_new_tokens")
        if new is None and (length := self._setting(kwargs, "max_length")):
            new = length - num_tokens
        if new is None or new > room:
            raise ValueError(
                f"longrope turns keys differently beyond {self.window} positions: with {num_slots} slots and a query "
                f"of {num_tokens} tokens pass max_new_tokens <= {room}, got {new}"
            )

    def _written_to_by_generate(self, prefix: KeysValues, rows: int, kwargs: dict) -> DynamicCache:
        """The prefix in a cache of its own, with the rows it will have after generate's repetition for beams."""
        given = [self._setting(kwargs, name) or 1 for name in ("num_beams", "num_return_sequences")]
        cache = DynamicCache(config=self.config)
        for layer, keys_values in enumerate(_match_rows(prefix, rows * max(given))):
            cache.update(*(t.to(self.model.dtype) for t in keys_values), layer)
        return cache


def positions_of(mask: Tensor) -> Tensor:  # (B, T) -> (B, T)
    """Positions that count real tokens only, so that padding on either side moves nothing."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def without_first(labels: Tensor, mask: Tensor) -> Tensor:  # (B, T) each
    """A query's own first token is not predicted, whether padding stands before it or not."""
    return labels.masked_fill(positions_of(mask) == 0, -100)


def ages_of(mask: Tensor) -> Tensor:  # (B, T) -> (B, T)
    """How many real tokens come after each."""
    return mask.flip(1).cumsum(1).flip(1) - mask


def _behind_prefix(mask: Tensor, cache: PrefixCache, prefix_mask: Tensor | None = None) -> Tensor:
    """(B, T) -> (B, m + T)."""
    if prefix_mask is None:
        prefix_mask = mask.new_ones(len(mask), cache.get_seq_length())
    return torch.cat([prefix_mask.repeat_interleave(len(mask) // len(prefix_mask), 0), mask], 1)


def _match_rows(prefix: KeysValues, rows: int) -> KeysValues:
    """A prefix of one row serves all rows; one of B rows serves rows/B consecutive queries each."""
    repeats = rows // len(prefix[0][0])
    if repeats == 1:
        return prefix
    return [(k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)) for k, v in prefix]
