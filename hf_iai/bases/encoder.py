"""An encoder as the rest of the package sees it: a vector for each text. Axes: N texts, T tokens, d hidden width."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import LoraConfig
from torch import Tensor, nn

from .base import FEATURES, Base
from .compat import default_target_modules, encoder_window, leave_out_classifier, prepare_checkpointing


class Encoder(Base):
    """The part of an `AutoModelForSequenceClassification` below its own head, which is random and never used."""

    offers = frozenset({FEATURES})

    def _why_not(self, what: str) -> str:
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
        """The most tokens of a text."""
        return encoder_window(self.config)

    @property
    def width(self) -> int:
        """d."""
        return self.config.hidden_size

    @property
    def input_width(self) -> int:
        """Of the vectors that may stand in place of tokens."""
        return self._embeddings.shape[1]

    @property
    def _embeddings(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    def reads(self, name: str) -> bool:
        """Whether features depend on the module or parameter of that name; heads and poolers are drawn at loading."""
        return name.startswith(f"{self.model.base_model_prefix}.") and ".pooler." not in name

    def features(self, ids: Tensor, mask: Tensor, pooling: str, *, frozen: bool) -> Tensor:  # (N, T) -> (N, d)
        """Last hidden states, pooled, in float32.

        Texts without a token have no meaning, but are finite. Padding may stand on either side.

        Args:
            ids: of tokens (N, T), or floating vectors (N, T, e) in their place, e of `input_width`.
            frozen: without dropout and without a graph.
        """
        ids, mask = _right_padded(ids, mask)
        prepare_checkpointing(self.model)
        given = {"inputs_embeds": ids.to(self._embeddings.dtype)} if ids.is_floating_point() else {"input_ids": ids}
        with _frozen(self.model) if frozen else nullcontext():
            hidden = self.model.base_model(**given, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return {"cls": hidden[:, 0], "mean": mean}[pooling]


def centred_unit(pooled: Tensor) -> Tensor:  # (N, d)
    """Centred over the d features and brought to unit length.

    Centred, since then the classifiers of transformers can express it: their heads hold a LayerNorm, or a layer that
    ends in one can be put before them. One direction of d is lost.
    """
    return nn.functional.normalize(pooled - pooled.mean(-1, keepdim=True), dim=-1)


def _right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # (N, T) or (N, T, e), (N, T)
    """Tokens first, and no column that is padding; a text without a token attends to one place of padding."""
    mask = (mask != 0).long()
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : max(1, int(mask.sum(1).max()))]
    ids, mask = ids[torch.arange(len(ids), device=ids.device).unsqueeze(1), order], mask.gather(1, order)
    ids = ids.masked_fill((mask == 0).view(*mask.shape, *[1] * (ids.dim() - 2)), 0)
    mask[:, 0] = 1
    return ids, mask


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
