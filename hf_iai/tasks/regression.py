"""Regression: chunks are examples with real targets, and the state is a linear regression over their features.

Axes: B tasks, n examples, T tokens, o outputs.
"""

from torch import Tensor

from ..bases.base import Base
from ..cores import Core, GaussianCore
from ..registry import TASKS
from ..state import TaskState
from .classification import Classification, LabelledChunk, LabelledInputs
from .task import Task


class GaussianInputs(LabelledInputs):
    """Checks examples with real targets for a linear state, and brings them into shape."""

    def labels(self, labels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:  # (B, n[, o]), (B, n, T) -> (B, n, o)
        """The targets in float32, 0 for padding."""
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

    def _aligned(self, group: list[LabelledChunk], state: TaskState) -> tuple[list[tuple[Tensor, ...]], list[int]]:
        """The chunks, and the number of outputs of the state after each of them. The first chunk sets this number."""
        num_outputs = state.tensors["target"].shape[1] or group[0][2].shape[-1]
        for _, _, labels, _ in group:
            if labels.shape[-1] != num_outputs:
                raise ValueError(
                    f"targets of {labels.shape[-1]} outputs for a state of {num_outputs}: the first chunk decides; "
                    "read others into a state of their own"
                )
        return [(ids, mask, labels) for ids, mask, labels, _ in group], [num_outputs] * len(group)


CARD_EXAMPLE = """\
import hf_iai  # registers the method with PEFT
import torch
from hf_iai import chunk_vectors
from peft import AutoPeftModelForSequenceClassification

model = AutoPeftModelForSequenceClassification.from_pretrained("{model_id}")  # Hub id, or folder
vectors = torch.randn(100, model.config.hidden_size)  # any number of examples
targets = vectors[:, 0] - vectors[:, 1]
state = model.adapt(chunk_vectors(vectors, targets, chunk_size={examples_per_chunk}))
print(model(inputs_embeds=vectors[:3], task_state=state).logits)  # means of the targets
"""
CARD_EXAMPLE_OF_VECTORS = """\
import torch
from hf_iai import chunk_vectors, vector_base  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(vector_base({width}), "{model_id}")  # Hub id, or folder
vectors = torch.randn(100, {width})  # any number of examples
targets = vectors[:, 0] - vectors[:, 1]
state = model.adapt(chunk_vectors(vectors, targets, chunk_size={examples_per_chunk}))
print(model(inputs_embeds=vectors[:3], task_state=state).logits)  # means of the targets
"""


@TASKS.register("regression")
class Regression(Classification):
    """A linear state of real targets, `likelihood="gaussian"`: a linear regression over the features of an encoder."""

    asked_for_by = "state_type='linear' with likelihood='gaussian'"
    fields = Classification.fields | {"likelihood", "fit_intercept"}
    fingerprint = frozenset({"pooling", "likelihood"})
    fingerprint_if_changed = frozenset({"fit_intercept"})
    likelihoods = ("gaussian",)
    metric, unit, pipeline_tag = "squared_error", "half the squared error per target", "tabular-regression"
    exports = frozenset()
    refuses = Task.refuses | {
        "export_to_peft": "PEFT has no regression: keep the adapter, and the state with state.save_pretrained"
    }
    card_example, card_example_of_vectors = CARD_EXAMPLE, CARD_EXAMPLE_OF_VECTORS
    rows = "regression"

    def core(self, base: Base) -> Core:
        return GaussianCore(base, self.config)

    def inputs(self, base: Base, core: Core) -> GaussianInputs:
        return GaussianInputs(base, core)

    def scored(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"] != 0
