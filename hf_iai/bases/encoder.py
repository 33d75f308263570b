"""Encoder: a pretrained encoder that turns each text into a vector. Axes: N texts, T tokens, d hidden width."""

from contextlib import ExitStack

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..tensors import eval_mode
from .base import FEATURES, Base
from .compat import (
    default_target_modules,
    encoder_window,
    leave_out_classifier,
    prepare_checkpointing,
)


class Encoder(Base):
    """The encoder of an `AutoModelForSequenceClassification`. The model's own head is random and never used."""

    offers = frozenset({FEATURES})

    def _why_not(self, need: str, what: str) -> str:
        return (
            f"{type(self.model).__name__} is a sequence classifier, which reads state_type='linear' only, got {what}: "
            "load the base with AutoModelForCausalLM"
        )

    def prepare(self, config: LoraConfig, *, uses_lora: bool) -> None:
        leave_out_classifier(config)
        if uses_lora:
            if config.target_modules is None:
                config.target_modules = default_target_modules(self.config)
            linear = {name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
            self._exclude(config, {name for name in linear if not self.reads(name)})

    @property
    def window(self) -> int:
        """The largest number of tokens in a text."""
        return encoder_window(self.config)

    @property
    def width(self) -> int:
        """d, the width of the features."""
        return self.config.hidden_size

    @property
    def input_width(self) -> int:
        """The width of vectors that are given in place of token ids."""
        return self._embeddings.shape[1]

    @property
    def _embeddings(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    def reads(self, name: str) -> bool:
        """Whether features depend on the module or parameter of this name; heads and poolers are not used."""
        return name.startswith(f"{self.model.base_model_prefix}.") and ".pooler." not in name

    def features(self, ids: Tensor, mask: Tensor, pooling: str, *, frozen: bool) -> Tensor:  # (N, T) -> (N, d)
        """The pooled last hidden states of texts, in float32.

        Padding may stand on either side. The features of a text without tokens are meaningless, but finite.

        Args:
            ids: token ids (N, T), or floating vectors (N, T, `input_width`) in place of the token embeddings.
            mask: 1 for real tokens, 0 for padding, (N, T).
            pooling: "cls" (the first token) or "mean" (over all real tokens).
            frozen: True turns dropout and the recording of gradients off.
        """
        ids, mask = _right_padded(ids, mask)
        prepare_checkpointing(self.model)
        given = {"inputs_embeds": ids.to(self._embeddings.dtype)} if ids.is_floating_point() else {"input_ids": ids}
        with ExitStack() as stack:
            if frozen:
                stack.enter_context(eval_mode(self.model))
                stack.enter_context(torch.no_grad())
            hidden = self.model.base_model(**given, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return {"cls": hidden[:, 0], "mean": mean}[pooling]


def centred_unit(pooled: Tensor) -> Tensor:  # (N, d)
    """Subtract each vector's mean over its d features, then scale the vector to unit length.

    A LayerNorm does the same up to a factor. So the classifier models of transformers can express it: their heads
    contain a LayerNorm, or get a layer in front that ends in one. Centring loses one of the d dimensions.
    """
    return nn.functional.normalize(pooled - pooled.mean(-1, keepdim=True), dim=-1)


def _right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # (N, T) or (N, T, e), (N, T)
    """Move padding to the right and drop columns of padding. A text without tokens attends to one padding place."""
    mask = (mask != 0).long()
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : max(1, int(mask.sum(1).max()))]
    ids, mask = ids[torch.arange(len(ids), device=ids.device).unsqueeze(1), order], mask.gather(1, order)
    ids = ids.masked_fill((mask == 0).view(*mask.shape, *[1] * (ids.dim() - 2)), 0)
    mask[:, 0] = 1
    return ids, mask
