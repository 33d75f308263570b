"""The linear state of classes: a classifier over features, updated by each chunk of labelled examples."""

from dataclasses import replace

from torch import Tensor, nn

from ..bases.encoder import Encoder, centred_unit
from ..config import IAIConfig
from ..heads import ClassRows
from ..label_names import Names, with_classes
from ..state import Identity, TaskState
from ..tensors import NO_LOSS
from .core import EpisodeBatch, Evidence, full_precision
from .rows import RowsCore


class LinearCore(RowsCore):
    """`state_type="linear"`: `heads.ClassRows` updates a classifier.

    With features x of a text, the logits of a query are W x + b; `rows(state)` gives W and b. Before training they are
    those of a logistic regression on prototypes of what was read, which starts from the nearest class mean.
    """

    @staticmethod
    def make_head(config: IAIConfig) -> nn.Module:
        return ClassRows()

    def initial_state(self, base: Encoder, batch_size: int, identity: Identity, num_classes: int = 0) -> TaskState:
        """theta(0) without classes; in training with `num_classes` classes that are named by their numbers."""
        nothing = super().initial_state(base, batch_size, identity)
        return self.with_classes(nothing, (tuple(map(str, range(num_classes))),) * batch_size)

    def begin(self, base: Encoder, episode: EpisodeBatch) -> TaskState:
        labels = (episode.chunks[2], episode.labels)
        found = [int(some.max()) for some in labels if some is not None and some.numel()]
        return self.initial_state(base, episode.num_tasks, Identity("", "in training"), max(0, *found) + 1)

    def with_classes(self, state: TaskState, classes: tuple[Names, ...]) -> TaskState:
        tensors = with_classes(state.tensors, max(map(len, classes)))
        return replace(state, tensors=tensors, class_names=classes)

    def read(self, base: Encoder, ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:
        """The evidence: features (B, n, d), labels (B, n), and a mask (B, n * T) of the tokens that count.

        Args:
            base: the encoder.
            ids, mask: (B, n, T); or vectors (B, n, 1, d) in place of ids, and mask (B, n, 1).
            labels: class numbers (B, n), -100 for padding. An example without tokens is padding too.
        """
        labels = labels.masked_fill(~mask.any(-1), NO_LOSS)
        features = self.features(base, ids.flatten(0, 1), mask.flatten(0, 1))
        read = (mask != 0) & (labels >= 0).unsqueeze(-1)
        return {
            "features": features.unflatten(0, labels.shape),
            "labels": labels,
            "mask": read.flatten(1).long(),
        }

    def _next(self, base: Encoder, state: TaskState, evidence: Evidence) -> dict[str, Tensor]:
        with full_precision(state.step):
            return self.head(state.tensors, evidence["features"], evidence["labels"])

    def features(self, base: Encoder, ids: Tensor, mask: Tensor) -> Tensor:  # (N, T) each -> (N, d)
        """The features of texts: the pooled vector, centred and scaled to unit length."""
        return centred_unit(super().features(base, ids, mask))

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor, state: TaskState) -> Tensor:  # (N, C), (N,), (N, T)
        """The mean cross-entropy of the queries whose class has an example in the state; 0 if there are none."""
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
