"""Base: a pretrained decoder that reads text with a state in front of it.

Axes: B rows, T tokens, m slots, L layers, H key/value heads, D head width, d hidden width, V vocabulary.
"""

from contextlib import AbstractContextManager

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DynamicCache

from ..tensors import eval_mode
from .compat import (
    AttentionReceived,
    PrefixCache,
    check_causal,
    check_supported,
    embedding_scale,
    has_longrope,
    key_value_shape,
    lora_enabled,
    prepare_checkpointing,
    read_by_weight,
    rotations,
    smallest_window,
    window_of,
)
from .places import in_order, positions_of, without_first
from .prefixes import KeysValues, Prefix, behind_prefix, mask_of, match_rows

# What a base can offer: next-token predictions, keys and values in every layer, or a feature vector for each text.
TOKENS, KEYS_VALUES, FEATURES = "tokens", "keys and values", "features"
LOGITS_AT_ONCE = 1024  # positions; all logits of a long chunk over a large vocabulary would not fit in memory
SINK = 0.3  # share of attention on the first token, over all layers and heads, from which a base needs it


class Base:
    """Runs a decoder on text after a key/value prefix at positions 0..m-1, with LoRA on or off.

    This is no `nn.Module`: it owns no parameters, and a new one can be made for each use.

    Args:
        model: a causal language model of transformers, with or without LoRA layers.

    Raises:
        ValueError: if the model is of a kind that would be read wrongly; see `compat.check_supported`.
    """

    offers = frozenset({TOKENS, KEYS_VALUES})

    def __init__(self, model: nn.Module) -> None:
        self.model, self.config = model, model.config
        check_supported(model)

    @property
    def window(self) -> int:
        """The largest number of positions in a pass; `sys.maxsize` for a base without positions."""
        return window_of(self.config)

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @property
    def uncalled(self) -> set[str]:
        """Ends of the names of modules whose weights are used without calling the module."""
        return read_by_weight(self.model)

    def check_offers(self, need: str, what: str) -> None:
        """Refuse a base that lacks what a task or a state needs.

        Args:
            need: `TOKENS`, `KEYS_VALUES` or `FEATURES`.
            what: the setting that needs it, such as `"state_type='linear'"`.

        Raises:
            ValueError: if this base does not offer it.
        """
        if need not in self.offers:
            raise ValueError(self._why_not(need, what))

    def _why_not(self, need: str, what: str) -> str:
        """The error message for a setting that this base cannot serve."""
        return (
            f"{what} needs a sequence classifier, got {type(self.model).__name__}: load the base with "
            "AutoModelForSequenceClassification"
        )

    def prepare(self, config: LoraConfig, *, uses_lora: bool) -> None:
        """Exclude modules on which LoRA would have no effect. Called before PEFT adds the LoRA layers.

        Args:
            config: the adapter's configuration, which is changed in place.
            uses_lora: whether the adapter has LoRA layers at all.

        Raises:
            ValueError: if the model is not causal.
        """
        check_causal(self.model)
        if config.target_modules == "all-linear":
            self._exclude(config, self.uncalled)

    @staticmethod
    def _exclude(config: LoraConfig, names: set[str]) -> None:
        if not isinstance(config.exclude_modules, str):  # a regular expression is left to its author
            config.exclude_modules = {*(config.exclude_modules or ()), *names} or None

    def reads(self, name: str) -> bool:
        """Whether the results of passes depend on the module or parameter of this name."""
        return True

    def lora(self, enabled: bool) -> AbstractContextManager[None]:
        """A context in which passes use LoRA, or do not."""
        return lora_enabled([m for m in self.model.modules() if isinstance(m, LoraLayer)], enabled)

    def embed(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, d)
        """Look up token embeddings. Floating values (B, T, d) already are embeddings and are returned as they are."""
        if ids.is_floating_point():
            return ids
        return self.model.get_input_embeddings()(ids)

    @property
    def embedding_length(self) -> float:
        """Root mean square of the token embeddings; 1 if all are 0, as when padding is the only token."""
        return self.model.get_input_embeddings().weight.detach().float().square().mean().sqrt().item() or 1.0

    def expected_embedding(self, probabilities: Tensor) -> Tensor:  # (..., V) -> (..., d)
        """The mean of the token embeddings, weighted by the probabilities."""
        weight = self.model.get_input_embeddings().weight
        return probabilities.to(weight.dtype) @ weight * embedding_scale(self.model)

    def check_differentiable(self) -> None:
        """Refuse weights that no gradient can pass.

        Raises:
            ValueError: if the base was made in inference mode.
        """
        if self.model.get_input_embeddings().weight.is_inference():
            raise ValueError(
                "the base was loaded inside torch.inference_mode(), and no gradient can pass such weights: load it "
                "outside; reading and answering may be inside"
            )

    def no_prefix(self, rows: int) -> Prefix:
        """A prefix of 0 slots."""
        num_layers, num_heads, width = key_value_shape(self.config)
        empty = self.model.get_input_embeddings().weight.new_zeros(rows, num_heads, 0, width)
        return [(empty, empty)] * num_layers

    @torch.no_grad()
    def needs_sink(self) -> bool:
        """Whether tokens put much of their attention on the first one, as most pretrained models of real size do.

        Slots that stand in its place, and hold no first token, do harm to such a base. Measured on random tokens: a
        base without this habit has below 0.1, SmolLM2 has 0.5.

        Source: attention sinks, Xiao et al., arXiv 2309.17453.
        """
        length = min(64, self.window // 2)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocab_size, (1, length), generator=draw).to(self.model.device)
        mask, num_heads = torch.ones_like(ids), key_value_shape(self.config)[1]
        with eval_mode(self.model), self.lora(False), AttentionReceived(mask, num_heads) as recording:
            self.read(self.no_prefix(1), self.embed(ids), mask, positions_of(mask), record=1)
        if not recording.layers:  # kernels that keep their weights to themselves
            return False
        return float(torch.stack(recording.layers)[..., 0].mean()) / length > SINK

    @torch.no_grad()
    def first_token(self) -> KeysValues:
        """Keys and values of a beginning token at position 0, (1, H, 1, D) each, as the base alone computes them."""
        begin = self.config.bos_token_id
        begin = begin[0] if isinstance(begin, list) else begin
        ids = torch.full((1, 1), begin or 0, device=self.model.device)
        with self.lora(False):
            return self.encode(self.embed(ids))

    def encode(self, embeddings: Tensor) -> Prefix:  # (B, m, d)
        """Turn m embeddings into a prefix, by reading them alone at positions 0..m-1."""
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.read(self.no_prefix(len(embeddings)), embeddings, mask, positions_of(mask), mask.shape[1])[1]

    @staticmethod
    def num_slots(prefix: Prefix) -> int:
        """m, the number of slots of a prefix."""
        return prefix[0][0].shape[-2]

    def next_position(self, prefix: Prefix, rows: int) -> Tensor | int:  # (rows, 1)
        """The position of the first token behind a prefix, for each row of a text."""
        mask = mask_of(prefix, rows)
        return self.num_slots(prefix) if mask is None else mask.sum(1, keepdim=True)

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:  # (B, L, H, T, D), (B, T) or (1, T)
        """Move keys by a number of positions. Moving a key by minus its own position brings it to position 0.

        If the base has absolute positions, keys are returned unchanged.

        Args:
            keys: keys as the base stores them.
            positions: how far to move each token's key.
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
    ) -> tuple[Tensor, KeysValues]:
        """One pass over embeddings after a prefix.

        Args:
            prefix: stands in front of the text. It may have fewer rows: each one then serves as many consecutive rows
                of the text as any other.
            embeddings: the text.
            mask: 1 for real tokens, 0 for padding.
            positions: position of each token; the prefix has 0..m-1.
            record: how many of the last positions to return.

        Returns:
            Last hidden states (B, record, d), and keys and values of the same positions for every layer.
        """
        order = self.packing(mask, self.num_slots(prefix))
        if order is not None:
            embeddings, mask, positions = (in_order(t, order) for t in (embeddings, mask, positions))
        cache = PrefixCache(
            self.config, match_rows(prefix, len(embeddings)), record if order is None else mask.shape[1]
        )
        prepare_checkpointing(self.model)
        hidden = self.model.base_model(
            inputs_embeds=embeddings.to(self.model.get_input_embeddings().weight.dtype),
            attention_mask=behind_prefix(mask, prefix),
            position_ids=positions,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state
        recorded = cache.recorded()
        if order is not None:
            back = order.argsort(1)
            hidden = in_order(hidden, back)
            recorded = [tuple(in_order(t, back, axis=2)[..., -record:, :] for t in pair) for pair in recorded]
        return hidden[:, -record:], recorded

    def packing(self, mask: Tensor, others: int) -> Tensor | None:  # (B, T) -> (B, T)
        """The order of tokens in which each row's padding stands at its end; None if it may stay where it is.

        Layers with a sliding window count padding between the slots and a token. At the end it is out of the way.

        Args:
            mask: 1 for real tokens, 0 for padding.
            others: number of places before and after the text, slots and tokens to generate.
        """
        if mask.shape[1] + others <= smallest_window(self.config) or bool((mask.diff(dim=1) <= 0).all()):
            return None
        return (mask != 0).long().argsort(dim=1, descending=True, stable=True)

    @torch.no_grad()
    def surprisal(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:  # (B, T, d), (B, T), (B, T)
        """-log p(token | tokens before it) in nats, (B, T); 0 for the first real token and for padding."""
        states, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        parts = zip(states.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
        loss = torch.cat([nn.functional.cross_entropy(self.logits(h), t, reduction="none") for h, t in parts])
        unknown = (mask[:, :-1] * mask[:, 1:]) == 0
        return nn.functional.pad(loss.view(unknown.shape).masked_fill(unknown, 0), (1, 0))

    def logits(self, hidden: Tensor) -> Tensor:  # (..., d) -> (..., V) in float32
        """Next-token logits for last hidden states, scaled and capped as the model itself does it."""
        logits = self.model.get_output_embeddings()(hidden).float() / getattr(self.config, "logits_scaling", 1)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def answer(self, prefix: Prefix, ids: Tensor, mask: Tensor, labels: Tensor | None = None, **kwargs):
        """transformers' own model output for the T tokens of a query, read after the prefix.

        Args:
            prefix: stands in front of the query.
            ids: token ids (B, T).
            mask: 1 for real tokens, 0 for padding, (B, T).
            labels: token ids, -100 where no loss is taken, (B, T); the output then has a loss.
            kwargs: passed on to the model.
        """
        labels, order = (
            None if labels is None else without_first(labels, mask),
            self.packing(mask, self.num_slots(prefix)),
        )
        if order is None:
            return self._answer(prefix, ids, mask, labels, **kwargs)
        self._check_shows_no_places(kwargs)
        keep = kwargs.pop("logits_to_keep", 0)
        packed = (None if t is None else in_order(t, order) for t in (ids, mask, labels))
        outputs = self._answer(prefix, *packed, **kwargs)
        logits = in_order(outputs.logits, order.argsort(1))
        outputs.logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        return outputs

    def _answer(self, prefix: Prefix, ids: Tensor, mask: Tensor, labels: Tensor | None, **kwargs):
        cache = PrefixCache(self.config, match_rows(prefix, len(ids)))
        prepare_checkpointing(self.model)
        return self.model(
            input_ids=ids,
            attention_mask=behind_prefix(mask, prefix),
            position_ids=positions_of(mask) + self.next_position(prefix, len(ids)),
            past_key_values=cache,
            use_cache=False,
            labels=labels,
            **kwargs,
        )

    def _check_shows_no_places(self, kwargs: dict) -> None:
        """Refuse outputs of single places, where the base reads tokens in another order than they were given."""
        asked = [name for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)]
        if asked or kwargs.get("return_dict") is False:
            raise ValueError(
                f"{self.config.model_type!r} reads a state, padding and text in another order, which "
                f"{asked or 'return_dict=False'} would show: leave it out"
            )

    def generate(self, prefix: Prefix, ids: Tensor, mask: Tensor, **kwargs):  # (B, T) each
        """transformers' own `generate` after the prefix.

        Returns:
            The ids of prompt and new tokens, (B, T + new), or what else `generate` is asked for in `kwargs`.
        """
        if has_longrope(self.config):
            self._check_stays_within_window(self.num_slots(prefix), ids.shape[1], kwargs)
        if self.num_slots(prefix):
            kwargs["past_key_values"] = self._written_to_by_generate(prefix, len(ids), kwargs)
        kwargs["attention_mask"] = behind_prefix(mask, prefix)
        kwargs["use_cache"] = True  # the prefix lies in the cache
        return self.model.generate(ids, **kwargs)

    def mask_of_prompts(self, ids: Tensor, kwargs: dict) -> Tensor:  # (B, T) -> (B, T)
        """The mask of prompts that came without one: 0 where they hold the padding token, unless it also ends texts."""
        pad, ends = self.setting(kwargs, "pad_token_id"), self.setting(kwargs, "eos_token_id")
        if pad is None or pad in (ends if isinstance(ends, list | tuple) else [ends]):
            return torch.ones_like(ids)
        return (ids != pad).long()

    def setting(self, kwargs: dict, name: str):
        """The value `generate` will use: from its arguments, the configuration given to it, or the model's."""
        configs = (kwargs.get("generation_config"), self.model.generation_config)
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    def _check_stays_within_window(self, num_slots: int, num_tokens: int, kwargs: dict) -> None:
        """Refuse to generate beyond the window: Phi-3 would silently drop the cache there, and the state with it."""
        room, new = self.window - num_slots - num_tokens, self.setting(kwargs, "max_new_tokens")
        if new is None and (length := self.setting(kwargs, "max_length")):
            new = length - num_tokens
        if new is None or new > room:
            raise ValueError(
                f"longrope turns keys differently beyond {self.window} positions: with {num_slots} slots and a query "
                f"of {num_tokens} tokens pass max_new_tokens <= {room}, got {new}"
            )

    def _written_to_by_generate(self, prefix: KeysValues, rows: int, kwargs: dict) -> DynamicCache:
        """Copy the prefix into a cache that `generate` may write to, with one row for every beam."""
        given = [self.setting(kwargs, name) or 1 for name in ("num_beams", "num_return_sequences")]
        cache = DynamicCache(config=self.config)
        for layer, keys_values in enumerate(match_rows(prefix, rows * max(given))):
            cache.update(*(t.to(self.model.dtype) for t in keys_values), layer)
        return cache
