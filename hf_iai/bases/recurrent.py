"""RecurrentBase: decoders with layers other than attention. A state is given as embeddings in front of the text."""

import copy

import torch
from torch import Tensor, nn

from ..tensors import NO_LOSS
from .base import KEYS_VALUES, TOKENS, Base
from .compat import has_recurrent_layers, is_classifier, prepare_checkpointing
from .encoder import Encoder
from .places import in_order, positions_of, without_first

LENGTHS = ("max_length", "min_length")  # arguments of `generate` that count the prompt too


def base_of(model: nn.Module) -> Base:
    """Wrap a model in the class that fits it: `Encoder` for classifiers, `RecurrentBase`, or `Base`."""
    if is_classifier(model):
        return Encoder(model)
    return RecurrentBase(model) if has_recurrent_layers(model.config) else Base(model)


class RecurrentBase(Base):
    """Runs a decoder on text after m embeddings, with LoRA on or off.

    Recurrent layers keep no keys and values, and transformers can continue from their state with a single token only.
    So every pass reads the prefix again. Recurrent layers do read padding, so padding must not stand between the prefix
    and the text or inside the text. Every pass is therefore arranged as [padding][prefix][text], and its results are
    put back into the original order.

    Args:
        model: a causal language model of transformers, with or without LoRA layers.
    """

    offers = frozenset({TOKENS})

    def _why_not(self, need: str, what: str) -> str:
        if need != KEYS_VALUES:
            return super()._why_not(need, what)
        return (
            f"{what} needs keys and values in every layer, which {self.config.model_type!r} does not have: use "
            "regime='explicit' with state_type='prompt' or 'lora'"
        )

    def needs_sink(self) -> bool:
        """Never: not all layers are attention."""
        return False

    def no_prefix(self, rows: int) -> Tensor:  # (B, 0, d)
        weight = self.model.get_input_embeddings().weight
        return weight.new_zeros(rows, 0, weight.shape[1])

    def encode(self, embeddings: Tensor) -> Tensor:  # (B, m, d)
        return embeddings

    @staticmethod
    def num_slots(prefix: Tensor) -> int:  # (B, m, d)
        return prefix.shape[1]

    def read(
        self,
        prefix: Tensor,  # (B, m, d)
        embeddings: Tensor,  # (B, T, d)
        mask: Tensor,  # (B, T)
        positions: Tensor,  # (B, T)
        record: int,
    ) -> tuple[Tensor, list]:
        """As `Base.read`: the last hidden states (B, record, d), and an empty list in place of keys and values."""
        inputs, order = self._laid_out(prefix, embeddings, mask, positions)
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return in_order(hidden, order.argsort(1))[:, -record:], []

    def answer(self, prefix: Tensor, ids: Tensor, mask: Tensor, labels: Tensor | None = None, **kwargs):
        """As `Base.answer`."""
        self._check_shows_no_places(kwargs)
        num_slots, keep = prefix.shape[1], kwargs.pop("logits_to_keep", 0)
        inputs, order = self._laid_out(prefix, self.embed(ids), mask, positions_of(mask) + num_slots)
        if labels is not None:
            labels = without_first(labels, mask)
            labels = torch.cat([labels.new_full((len(labels), num_slots), NO_LOSS), labels], 1).gather(1, order)
        outputs = self.model(**inputs, use_cache=False, labels=labels, **kwargs)
        logits = in_order(outputs.logits, order.argsort(1))[:, num_slots:]
        outputs.logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        return outputs

    def generate(self, prefix: Tensor, ids: Tensor, mask: Tensor, **kwargs):  # (B, T) each
        """As `Base.generate`."""
        inputs, _ = self._laid_out(prefix, self.embed(ids), mask, positions_of(mask) + prefix.shape[1])
        del inputs["position_ids"]  # generate counts positions itself, and some model families take none
        if kwargs.get("generation_config") is not None:
            kwargs["generation_config"] = settings = copy.copy(kwargs["generation_config"])
            given = {name: value for name in LENGTHS if (value := getattr(settings, name))}
            settings.update(**_longer(given, inputs["inputs_embeds"].shape[1]))
        kwargs |= _longer({name: kwargs[name] for name in LENGTHS if name in kwargs}, inputs["inputs_embeds"].shape[1])
        kwargs["use_cache"] = True
        return self.model.generate(ids, **inputs, **kwargs)

    def _laid_out(
        self,
        prefix: Tensor,  # (B, m, d)
        embeddings: Tensor,  # (B, T, d)
        mask: Tensor,  # (B, T)
        positions: Tensor,  # (B, T)
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Arrange prefix and text as [padding][prefix][text].

        Returns:
            The model's inputs, with m + T places, and the original index of each place, (B, m + T).
        """
        prepare_checkpointing(self.model)
        embeddings = embeddings.to(self.model.get_input_embeddings().weight.dtype)
        rows, num_slots = len(mask), prefix.shape[1]
        prefix = prefix.repeat_interleave(rows // len(prefix), 0).to(embeddings.dtype)
        places = torch.arange(num_slots, device=mask.device).expand(rows, -1)
        mask = torch.cat([mask.new_ones(rows, num_slots), mask], 1)
        order = mask.argsort(dim=1, stable=True)
        inputs = {
            "inputs_embeds": in_order(torch.cat([prefix, embeddings], 1), order),
            "attention_mask": mask.gather(1, order),
            "position_ids": torch.cat([places, positions], 1).gather(1, order),
        }
        return inputs, order


def _longer(lengths: dict[str, int], num_tokens: int) -> dict[str, int]:
    """Add the length of the embeddings, which transformers subtracts from lengths that count the prompt."""
    return {name: value + num_tokens for name, value in lengths.items()}
