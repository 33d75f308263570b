"""The linear state: rows of a classifier, refined by each chunk of labelled texts."""

from dataclasses import replace

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..bases.encoder import Encoder, centred_unit
from ..config import IAIConfig
from ..heads import ClassRows
from ..label_names import Names, with_classes
from ..state import Identity, TaskState
from ..tensors import NO_LOSS
from .core import Core, full_precision


class LinearCore(Core):
    """`state_type="linear"`: an encoder embeds every example of a chunk, and `heads.ClassRows` refines the rows.

    With x the features of a text, the logits of a query are W x + b, where W and b are `rows(state)`. At the start they
    are those of the streaming nearest class mean m_c of what was read, `50 (m_c' x - |m_c|^2 / 2)`.

    No gradient is taken, but the learned correction of the rows adds up examples by coefficients of label minus
    probability, and those are the coefficients of the softmax loss's gradient with respect to the rows.
    """

    kind = "sums"

    def __init__(self, base: Encoder, config: IAIConfig) -> None:
        super().__init__(base, config, reads=True)
        self.head = self.make_head(config)

    @staticmethod
    def make_head(config: IAIConfig) -> nn.Module:
        return ClassRows()

    def initial_state(self, base: Encoder, batch_size: int, identity: Identity, num_classes: int = 0) -> TaskState:
        """theta(0) of tasks without a class or, in training, of as many classes with numbers for names."""
        nothing = super().initial_state(base, batch_size, identity)
        return self.met(nothing, (tuple(map(str, range(num_classes))),) * batch_size)

    def _initial(self, base: Encoder, batch_size: int) -> dict[str, Tensor]:
        device = base.model.get_input_embeddings().weight.device
        return self.head.initial(batch_size, 0, self.state.width, device)

    def first_of_episode(self, base: Encoder, batch_size: int, *labels: Tensor | None) -> TaskState:
        found = [int(some.max()) for some in labels if some is not None and some.numel()]
        return self.initial_state(base, batch_size, Identity("", "in training"), max(0, *found) + 1)

    def met(self, state: TaskState, names: tuple[Names, ...]) -> TaskState:
        tensors = with_classes(state.tensors, max(map(len, names)))
        return replace(state, tensors=tensors, class_names=names)

    def read(self, base: Encoder, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Features (B, n, d) of the examples, labels (B, n), and mask (B, n * T) of the tokens that count.

        Args:
            ids, mask: (B, n, T); vectors in place of ids (B, n, 1, d).
            labels: (B, n), -100 for padding; an example without a token is padding too.
        """
        labels = labels.masked_fill(~mask.any(-1), NO_LOSS)
        features = self.features(base, ids.flatten(0, 1), mask.flatten(0, 1))
        read = (mask != 0) & (labels >= 0).unsqueeze(-1)
        return {
            "features": features.unflatten(0, labels.shape),
            "labels": labels,
            "mask": read.flatten(1).long(),
        }

    def _next(self, base: Encoder, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        with full_precision(state.step):
            return self.head(state.tensors, evidence["features"], evidence["labels"])

    def rows(self, state: TaskState) -> tuple[Tensor, Tensor]:
        """The classifier: rows W (B, C, d) and biases b (B, C); -1e4 for a class without an example."""
        with full_precision(state.step):
            return self.head.rows(state.tensors)

    def check_answers_without_state(self) -> None:
        raise ValueError(
            "a linear adapter has no classes without a task state: pass task_state=model.adapt(...), or use "
            "disable_adapter() for the base with its own head"
        )

    def answer(
        self,
        base: Encoder,
        state: TaskState,
        ids: Tensor,  # (N, T), or vectors (N, 1, d)
        mask: Tensor,  # (N, T), (N, 1)
        labels: Tensor | None = None,  # (N,)
        **kwargs,
    ) -> SequenceClassifierOutput:
        """`logits` (N, C) of N queries; every task serves N / B of them, one after the other.

        `loss` is the mean cross-entropy of the queries whose class has an example in the state, 0 without such.
        """
        _check_arguments(kwargs)
        features = self.features(base, ids, mask).unflatten(0, (state.batch_size, -1))  # (B, N / B, d)
        rows, bias = self.rows(state)
        with full_precision(ids):
            logits = (features @ rows.mT + bias.unsqueeze(1)).flatten(0, 1)
            loss = None if labels is None else self._loss(logits, labels, mask, state)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def features(self, base: Encoder, ids: Tensor, mask: Tensor) -> Tensor:  # (N, T) each -> (N, d)
        """What the state sees of texts."""
        return centred_unit(self._pooled(base, ids, mask))

    def _pooled(self, base: Encoder, ids: Tensor, mask: Tensor) -> Tensor:
        trained = self.config.regime == "explicit"
        with base.lora(trained):
            return base.features(ids, mask, self.config.pooling, frozen=not trained)

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor, state: TaskState) -> Tensor:  # (N, C), (N,), (N, T)
        num_classes = logits.shape[1]
        if labels.is_floating_point() or labels.dim() != 1 or int(labels.max()) >= num_classes:
            raise ValueError(
                f"labels must be one number below {num_classes}, the classes of the state, for each query: got shape "
                f"{tuple(labels.shape)} of {labels.dtype}, up to {labels.max().item()}"
            )
        seen = (state.tensors["count"] > 0).repeat_interleave(len(labels) // state.batch_size, 0)  # (N, C)
        met = seen.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1) & (labels >= 0)
        losses = nn.functional.cross_entropy(logits, labels.masked_fill(~met, NO_LOSS), reduction="sum")
        return losses / met.sum().clamp_min(1)


def _check_arguments(kwargs: dict) -> None:
    """Tokenizers give token types, which are all 0 for a single text; transformers and PEFT pass unset options on."""
    types = kwargs.pop("token_type_ids", None)
    if types is not None and types.any():
        raise ValueError("token_type_ids mark a second text, but a linear state reads single texts: leave them out")
    asked = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
    if set(asked) - {"return_dict"}:
        raise ValueError(f"a linear state answers with logits and loss only, got {asked}: leave them out")
