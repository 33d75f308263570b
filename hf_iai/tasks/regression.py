"""GaussianInputs: chunks of examples with real targets. Axes: B tasks, n examples, T tokens, o outputs."""

from torch import Tensor

from ..state import TaskState
from .classification import LabelledChunk, LabelledInputs, check_one_kind


class GaussianInputs(LabelledInputs):
    """Checks what a model with a linear state of likelihood `"gaussian"` is given."""

    def labels(self, labels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:  # (B, n[, o]), (B, n, T) -> (B, n, o)
        """Targets in float32, 0 for padding."""
        examples = mask.shape[:-1]
        if labels is None or labels.dim() > mask.dim() or labels.shape[: len(examples)] != examples:
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels of examples {tuple(examples)} must be {tuple(examples)} or (..., o), got {found}")
        if not labels.is_floating_point():
            raise ValueError(
                f"labels under likelihood='gaussian' must be floating targets, got {labels.dtype}: use .float(), or "
                "likelihood='softmax' for classes"
            )
        labels = labels.unsqueeze(-1) if labels.dim() < mask.dim() else labels
        labels = labels.to(mask.device).float().masked_fill(~mask.any(-1, keepdim=True), 0.0)
        if not labels.isfinite().all():
            raise ValueError("labels hold values that are not finite: leave those examples out, with attention_mask 0")
        return labels

    def matched(self, group: list[LabelledChunk], state: TaskState) -> tuple[list[tuple[Tensor, ...]], list[int]]:
        """The chunks, and how many outputs the state has after each of them: as many as the first one's."""
        check_one_kind(group)
        num_outputs = state.tensors["target"].shape[1] or group[0][2].shape[-1]
        for _, _, labels, _ in group:
            if labels.shape[-1] != num_outputs:
                raise ValueError(
                    f"targets of {labels.shape[-1]} outputs for a state of {num_outputs}: the first chunk decides; "
                    "read others into a state of their own"
                )
        return [(ids, mask, labels) for ids, mask, labels, _ in group], [num_outputs] * len(group)
