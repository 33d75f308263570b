"""The linear state of real targets: a linear regression over features, updated by each chunk of examples."""

from dataclasses import replace

from torch import Tensor

from ..bases.encoder import Encoder
from ..config import IAIConfig
from ..heads import GaussianRows, with_outputs
from ..state import Identity, TaskState
from .core import EpisodeBatch, Evidence, full_precision
from .rows import RowsCore


class GaussianCore(RowsCore):
    """`likelihood="gaussian"`: `heads.GaussianRows` updates a linear regression.

    With features x, the pooled vector without any scaling, the mean of a query is W x + b; `rows(state)` gives W and b.
    Before training they are those of streaming ridge regression. Only sums are kept, so the order of examples does not
    matter.
    """

    @staticmethod
    def make_head(config: IAIConfig) -> GaussianRows:
        return GaussianRows(fit_intercept=config.fit_intercept)

    def initial_state(self, base: Encoder, batch_size: int, identity: Identity, num_outputs: int = 0) -> TaskState:
        """theta(0), to which the first chunk adds the number of outputs; in training with `num_outputs` outputs."""
        return self.with_classes(super().initial_state(base, batch_size, identity), num_outputs)

    def begin(self, base: Encoder, episode: EpisodeBatch) -> TaskState:
        num_outputs = episode.chunks[2].shape[-1]
        return self.initial_state(base, episode.num_tasks, Identity("", "in training"), num_outputs)

    def with_classes(self, state: TaskState, classes: int) -> TaskState:
        """Make room in the state for this number of outputs."""
        return replace(state, tensors=with_outputs(state.tensors, classes))

    def read(self, base: Encoder, ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:
        """The evidence: features (B, n, d), targets (B, n, o), and a mask (B, n * T) of the tokens that count.

        Args:
            base: the encoder.
            ids, mask: (B, n, T); or vectors (B, n, 1, d) in place of ids, and mask (B, n, 1). An example without tokens
                is padding.
            labels: targets (B, n, o).
        """
        features = self.features(base, ids.flatten(0, 1), mask.flatten(0, 1))
        read = (mask != 0).flatten(1).long()
        return {"features": features.unflatten(0, labels.shape[:2]), "labels": labels, "mask": read}

    def _next(self, base: Encoder, state: TaskState, evidence: dict[str, Tensor]) -> dict[str, Tensor]:
        features = evidence["features"]
        real = evidence["mask"].unflatten(1, (features.shape[1], -1)).any(-1)  # (B, n)
        with full_precision(state.step):
            return self.head(state.tensors, features, evidence["labels"], real)

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor, state: TaskState) -> Tensor:  # (N, o), (N, o), (N, T)
        """Half the mean squared error over outputs and queries: -log p with unit variance, without its constant."""
        labels = labels.unsqueeze(-1) if labels.dim() == 1 else labels
        if not labels.is_floating_point() or labels.shape != logits.shape:
            raise ValueError(
                f"labels must be floating numbers {tuple(logits.shape)}, the outputs of the state for each query: got "
                f"shape {tuple(labels.shape)} of {labels.dtype}"
            )
        real = mask.any(-1)
        errors = (logits - labels.float())[real].square()
        return errors.sum() / (2 * max(1, errors.numel()))
