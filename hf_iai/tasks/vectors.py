"""Vectors (`vector_width`): a chunk holds examples (x, y), a query is an x, and the base is usually a small one.

Axes: B tasks, n examples, N queries, w width, o outputs.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..bases.base import Base
from ..config import IAIConfig
from ..cores import Core, ExplicitVectorCore, MLPCore, MLPGradientCore
from ..data import VectorEpisodeCollator
from ..data.examples import Chunk
from ..label_names import Names, are_numbers, names_of_tasks
from ..predictions.likelihoods import vector_targets
from ..registry import TASKS
from ..tensors import NO_LOSS
from .classification import CHUNK_SIZE
from .inputs import Inputs
from .task import Task, is_of_vectors


class VectorExamples(Inputs):
    """Checks examples that are vectors, and brings them into shape."""

    def tokens(self, ids: Tensor | None, vectors: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        width = self.config.vector_width
        if ids is not None or vectors is None:
            raise ValueError(f"vector_width={width} reads inputs_embeds (..., {width}), not input_ids")
        mask = torch.ones(vectors.shape[:-1], device=vectors.device).long() if mask is None else mask
        if mask.shape != vectors.shape[:-1]:
            raise ValueError(
                f"the attention_mask of vectors {tuple(vectors.shape)} must be {tuple(vectors.shape[:-1])}, one number "
                f"for each, got {tuple(mask.shape)}"
            )
        vectors = vectors.masked_fill((mask == 0).unsqueeze(-1), 0)
        if not vectors.is_floating_point() or vectors.shape[-1] != width or not vectors.isfinite().all():
            raise ValueError(
                f"inputs_embeds must be finite floating vectors (..., {width}), got shape {tuple(vectors.shape)} of "
                f"{vectors.dtype}: vector_width says how wide they are"
            )
        return vectors.float(), mask.long()

    def chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (B, n, w), mask (B, n), and labels (B, n), or (B, n, o) for real targets.

        If all `label_names` of a task are whole numbers, these numbers are the classes. Otherwise the labels are used
        as they are.
        """
        vectors, mask = self.on_device(chunk)
        if vectors.dim() != 3:
            raise ValueError(f"a chunk's inputs_embeds must be (tasks, examples, width), got {tuple(vectors.shape)}")
        self._check_chunk_length(vectors.shape[1])
        labels = chunk.get("labels")
        if labels is not None and not labels.is_floating_point() and labels.shape == mask.shape:
            if chunk.get("label_names") is not None:
                labels = _as_named(labels, names_of_tasks(chunk["label_names"], (), labels))
            mask = mask * (labels.to(mask.device) != NO_LOSS)
        return vectors, mask, self.labels(labels, vectors, mask)

    def labels(self, labels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:
        """Class numbers, or floating targets with `num_outputs` values; 0 for padding."""
        real, most = self.config.likelihood == "gaussian", self.config.num_outputs
        if labels is None:
            raise ValueError("chunks of vectors need labels, one for each: chunk_vectors makes them")
        labels = labels.to(mask.device)
        labels = labels.unsqueeze(-1) if real and labels.dim() == mask.dim() else labels
        if labels.is_floating_point() != real or labels.shape != (*mask.shape, *([most] if real else [])):
            expected = f"floating targets (..., {most})" if real else f"whole numbers below {most}"
            raise ValueError(
                f"labels of vectors {tuple(mask.shape)} must be {expected} under likelihood="
                f"{self.config.likelihood!r}, got {tuple(labels.shape)} of {labels.dtype}"
            )
        labels = (labels.float() if real else labels.long()).masked_fill((mask == 0).view(*mask.shape, *[1] * real), 0)
        if real and not labels.isfinite().all():
            raise ValueError("labels hold values that are not finite: leave those examples out, with attention_mask 0")
        if not real and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < most:
            found = f"{int(labels.min())}..{int(labels.max())}"
            raise ValueError(f"labels must be from 0 to num_outputs - 1 = {most - 1}, got {found}")
        return labels

    def _targets(self, labels: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:  # (..., Q), (..., Q, w), (..., Q)
        """The labels of queries in the form of the losses: -100 where the class is missing, NaN where targets are."""
        classes = not labels.is_floating_point() and labels.shape == mask.shape
        asked = mask * (labels != NO_LOSS) if classes else mask
        return vector_targets(self.labels(labels, vectors, asked), asked)

    def _check_ids(self, ids: Tensor) -> None:
        """Vectors belong to no vocabulary, so nothing is checked."""


class VectorInputs(VectorExamples):
    """Checks chunks and queries of vectors for a task state."""

    @property
    def max_chunk_size(self) -> int:
        """The usual number of examples, or fewer if only fewer fit the window."""
        most = self.base.window - self.slots_around
        if most < 1 and self.reads_out:
            raise ValueError(f"no example fits a window of {self.base.window} beside {self.slots_around} slots")
        return CHUNK_SIZE if not self.reads_out else min(CHUNK_SIZE, most)

    def _check_chunk_length(self, length: int) -> None:
        if self.reads_out:
            super()._check_chunk_length(length)

    def check_query(self, ids: Tensor, num_tasks: int) -> None:  # (N, w)
        """Check that each of B tasks gets N / B consecutive queries."""
        if ids.dim() != 2 or not len(ids) or len(ids) % num_tasks:
            raise ValueError(
                f"queries must be inputs_embeds (queries, width), as many for each of the {num_tasks} tasks of the "
                f"state, got shape {tuple(ids.shape)}"
            )

    def check_episode(self, ids: Tensor, chunk_ids: Tensor) -> None:  # (B * Q, w), (B, K, n, w)
        if ids.dim() != 2 or chunk_ids.dim() != 4:
            raise ValueError(
                "an episode has chunk_inputs_embeds (batch, chunks, examples, width) and inputs_embeds (batch, "
                f"queries, width), got chunks {tuple(chunk_ids.shape)}, and queries in a row as {tuple(ids.shape)}"
            )
        self._check_chunk_length(chunk_ids.shape[2])

    def query_labels(self, labels: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor | None:  # (N,) or (N, o)
        return None if labels is None else self._targets(labels, ids, mask).unsqueeze(1)


def _as_named(labels: Tensor, names: tuple[Names, ...]) -> Tensor:  # (B, n)
    """Replace labels by the numbers that their names are, for each task whose names are all whole numbers."""
    rows = []
    for row, own in zip(labels, names, strict=True):
        if own and are_numbers(own):
            row = torch.tensor([*map(int, own)], device=row.device)[row.clamp_min(0).long()].where(row >= 0, NO_LOSS)
        rows.append(row)
    return torch.stack(rows)


# Methods of the model that are for text, with the error message that names the call for vectors.
REFUSED = dict.fromkeys(
    ("generate", "state_effect"),
    "{method} is for text, but vector_width={config.vector_width}: ask with model(inputs_embeds=..., task_state=...)",
)
NOT_FOR_PEFT = {
    "export_to_peft": "vector_width={config.vector_width}: answers about vectors are read out by a learned map, or by "
    "the state itself, and PEFT has neither: keep the adapter, and the state with state.save_pretrained"
}
CARD_DATA = """\
import torch
from hf_iai import chunk_vectors  # registers the method with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{model_id}")  # its Hub id, or its folder
vectors = torch.randn(100, {width})  # any number of examples
"""
CARD_CLASSES = "labels = torch.randint({num_outputs}, (100,))  # numbered as they come\n"
CARD_TARGETS = "targets = torch.randn(100, {num_outputs})\n"
CARD_ANSWER = """\
state = model.adapt(chunk_vectors(vectors, {labels}))
print(model(inputs_embeds=vectors[:3], task_state=state).logits)  # {meaning}
"""


class VectorTask(Task):
    """What both kinds of task over vectors share."""

    fingerprint_if_changed = frozenset({"likelihood"})
    likelihoods = ("softmax", "gaussian")
    reads_vectors, has_teacher = True, False

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        super().check(config)
        width, num = config.vector_width, config.num_outputs
        if width is None or num is None or width < 1 or num < 1:
            raise ValueError(
                f"vector_width and num_outputs must both be at least 1, or both None for text, got {width} and {num}"
            )

    @property
    def has_classes(self) -> bool:
        """Whether a vector's target is a class, or a real number."""
        return self.config.likelihood == "softmax"

    def collator(self, tokenizer: PreTrainedTokenizerBase | None, chunk_size: int) -> VectorEpisodeCollator:
        """The collator for vectors.

        Raises:
            ValueError: if there is a tokenizer, which vectors do not need.
        """
        if tokenizer is not None:
            raise ValueError(
                f"vector_width={self.config.vector_width} is trained on vectors: leave processing_class out"
            )
        return VectorEpisodeCollator(chunk_size, num_classes=self.config.num_outputs if self.has_classes else None)

    def scored(self, batch: dict[str, Tensor]) -> Tensor:  # (B, Q)
        """Which queries have a loss. For real targets the mask says it."""
        labels = batch["labels"]
        return batch["attention_mask"] != 0 if labels.is_floating_point() else labels != NO_LOSS

    @property
    def metric(self) -> str:
        return "accuracy" if self.has_classes else "squared_error"

    @property
    def pipeline_tag(self) -> str:
        return "tabular-classification" if self.has_classes else "tabular-regression"

    def describe(self) -> list[str]:
        targets = "classes" if self.has_classes else "real targets"
        reads = f"Reads vectors of {self.config.vector_width} numbers; answers: {self.config.num_outputs} {targets}"
        return [*super().describe(), reads]


@TASKS.register("vectors")
class Vectors(VectorTask):
    """A state of vectors: slots or a LoRA under which a base reads queries, or the weights of a small network."""

    asked_for_by = "vector_width"
    fields = frozenset({"regime", "state_type", "signal", "vector_width", "num_outputs", "likelihood"})
    fingerprint = frozenset({"vector_width", "num_outputs"})
    refuses = Task.refuses | REFUSED | NOT_FOR_PEFT

    @classmethod
    def matches(cls, config: IAIConfig) -> bool:
        return config.regime != "implicit" and is_of_vectors(config) and config.state_type != "linear"

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        super().check(config)
        if (config.regime == "parametric") != (config.state_type == "mlp"):
            raise ValueError(
                f"vector_width={config.vector_width} with regime={config.regime!r} and state_type="
                f"{config.state_type!r}: the bare base says nothing of vectors. Use regime='explicit' with 'prefix', "
                "'prompt' or 'lora', 'parametric' with 'mlp', or 'implicit'"
            )
        signals = {"explicit": ("observations",), "parametric": ("observations", "gradients")}[config.regime]
        if config.signal not in signals:
            raise ValueError(f"vectors in regime={config.regime!r} have the signals {signals}, got {config.signal!r}")
        for name, default in (("accumulation", "average"), ("num_kept_tokens", 0), ("delta_rule", False)):
            if (given := getattr(config, name)) != default:
                raise ValueError(
                    f"{name}={given!r} is for text, got vector_width={config.vector_width}: leave it {default!r}"
                )

    def core(self, base: Base) -> Core:
        if self.config.regime == "explicit":
            return ExplicitVectorCore(base, self.config)
        return {"observations": MLPCore, "gradients": MLPGradientCore}[self.config.signal](base, self.config)

    def inputs(self, base: Base, core: Core) -> Inputs:
        return VectorInputs(base, core)

    @property
    def unit(self) -> str:
        answers_by_itself = self.config.state_type == "mlp" and not self.has_classes
        return "half the squared error per target" if answers_by_itself else "nats per prediction"

    @property
    def card_example(self) -> str:
        labels, meaning = ("labels", "of the classes") if self.has_classes else ("targets", "means")
        answer = CARD_ANSWER.replace("{labels}", labels).replace("{meaning}", meaning)
        return CARD_DATA + (CARD_CLASSES if self.has_classes else CARD_TARGETS) + answer

    def who_answers(self) -> str:
        return "a query is answered by the state" if self.config.state_type == "mlp" else super().who_answers()
