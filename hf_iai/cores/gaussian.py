"""The linear state of real targets: a linear regression, refined by each chunk of examples."""

from dataclasses import replace

from torch import Tensor

from ..bases.encoder import Encoder
from ..config import IAIConfig
from ..heads import GaussianRows, with_outputs
from ..state import Identity, TaskState
from .core import EpisodeBatch, Evidence, full_precision
from .rows import RowsCore


class GaussianCore(RowsCore):
    """`likelihood="gaussian"`: `heads.GaussianRows` refines the rows of a regression.

    With x the features of an example, the pooled vector as it is, the predicted mean of a query is W x + b, where W and
    b are `rows(state)`: at the start those of streaming ridge regression. Only sums are kept, so the order of the
    examples does not matter.
    """

    @staticmethod
    def make_head(config: IAIConfig) -> GaussianRows:
        return GaussianRows(fit_intercept=config.fit_intercept)

    def initial_state(self, base: Encoder, batch_size: int, identity: Identity, num_outputs: int = 0) -> TaskState:
        """theta(0) of tasks whose first chunk says how many outputs there are; in training of `num_outputs`."""
        return self.with_classes(super().initial_state(base, batch_size, identity), num_outputs)

    def begin(self, base: Encoder, episode: EpisodeBatch) -> TaskState:
        num_outputs = episode.chunks[2].shape[-1]
        return self.initial_state(base, episode.num_tasks, Identity("", "in training"), num_outputs)

    def with_classes(self, state: TaskState, classes: int) -> TaskState:
        """Room for that many outputs."""
        return replace(state, tensors=with_outputs(state.tensors, classes))

    def read(self, base: Encoder, ids: Tensor, mask: Tensor, labels: Tensor) -> Evidence:
        """Features (B, n, d) of the examples, targets (B, n, o), and mask (B, n * T) of the tokens that count.

        Args:
            ids, mask: (B, n, T); vectors in place of ids (B, n, 1, d). An example without a token is padding.
            labels: (B, n, o).
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
        """Half the squared error, mean over outputs and queries: of unit variance, -log p but for its constant."""
        labels = labels.unsqueeze(-1) if labels.dim() == 1 else labels
        if not labels.is_floating_point() or labels.shape != logits.shape:
            raise ValueError(
                f"labels must be floating numbers {tuple(logits.shape)}, the outputs of the state for each query: got "
                f"shape {tuple(labels.shape)} of {labels.dtype}"
            )
        real = mask.any(-1)
        errors = (logits - labels.float())[real].square()
        return errors.sum() / (2 * max(1, errors.numel()))
