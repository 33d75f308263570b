"""Classification: chunks are labelled texts or vectors, and the state is a linear classifier over their features.

Axes: B tasks, n examples, T tokens, d width of a vector. A given vector is treated as a text of one token whose
embedding is the vector. So wherever ids (..., T) are accepted, vectors (..., 1, d) with a mask (..., 1) are too.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from ..bases.base import Base
from ..config import IAIConfig
from ..cores import Core, LinearCore
from ..data import LabelledEpisodeCollator, VectorEpisodeCollator
from ..data.examples import Chunk
from ..label_names import Names, matched, names_of_tasks
from ..registry import STATES, TASKS, Part
from ..state import TaskState
from ..tensors import NO_LOSS
from .inputs import Inputs
from .task import Task, is_linear

CHUNK_SIZE = 20  # examples

# ids and mask (B, n, T), or vectors (B, n, 1, d) and mask (B, n, 1); labels (B, n); the chunk's `label_names`
LabelledChunk = tuple[Tensor, Tensor, Tensor, object]


class LabelledInputs(Inputs):
    """Checks labelled examples and queries for a linear state, and brings them into shape."""

    @property
    def max_chunk_size(self) -> int:
        """The usual number of examples. Examples are embedded one by one, so any number would fit."""
        return CHUNK_SIZE

    def tokens(self, ids: Tensor | None, vectors: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if (ids is None) == (vectors is None):
            raise ValueError(
                "examples and queries are input_ids or inputs_embeds, got "
                f"{'neither' if ids is None else 'both'}: pass one of the two"
            )
        if vectors is None:
            if ids.is_floating_point():
                raise ValueError(f"input_ids must be integers, got {ids.dtype}: pass vectors as inputs_embeds")
            return super().tokens(ids, None, mask)
        width = self.base.input_width
        if not vectors.is_floating_point() or vectors.dim() < 2 or vectors.shape[-1] != width:
            raise ValueError(
                f"inputs_embeds must be floating vectors (..., {width}), as wide as the base's embeddings, got shape "
                f"{tuple(vectors.shape)} of {vectors.dtype}: use .float(), or a base whose config has that width"
            )
        mask = torch.ones(vectors.shape[:-1], dtype=torch.long, device=vectors.device) if mask is None else mask
        if mask.shape != vectors.shape[:-1]:
            raise ValueError(
                f"the attention_mask of vectors {tuple(vectors.shape)} must be {tuple(vectors.shape[:-1])}, one number "
                f"for each, got {tuple(mask.shape)}"
            )
        vectors = vectors.masked_fill((mask == 0).unsqueeze(-1), 0.0)
        if not vectors.isfinite().all():
            raise ValueError(
                f"inputs_embeds hold {int((~vectors.isfinite()).sum())} values that are not finite: fill them in, or "
                "leave those examples out"
            )
        return vectors.unsqueeze(-2), mask.unsqueeze(-1).long()

    def chunk(self, chunk: Chunk) -> LabelledChunk:
        ids, mask = self.on_device(chunk)
        if mask.dim() != 3 or chunk.get("labels") is None:
            raise ValueError(
                "a chunk of a linear state has input_ids (batch, examples, tokens), or inputs_embeds (batch, examples, "
                f"width), and labels (batch, examples), got {_given(ids)} and "
                f"{'no' if chunk.get('labels') is None else 'its'} labels; chunk_examples makes them from rows "
                '{"text", "label"}, chunk_vectors from arrays'
            )
        self._check_ids(ids)
        self._check_chunk_length(ids.shape[2])
        return ids, mask, self.labels(chunk["labels"], ids, mask), chunk.get("label_names")

    def labels(self, labels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:  # (B, n), (B, n, T) -> (B, n)
        """The class numbers; -100 for an example without tokens."""
        examples = mask.shape[:-1]
        if labels is None or labels.shape[: len(examples)] != examples or labels.dim() > mask.dim():
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels of texts {tuple(mask.shape)} must have shape {tuple(examples)}, got {found}")
        if labels.is_floating_point() or labels.shape != examples:
            raise ValueError(
                f"labels of classes must be integers {tuple(examples)}, got {tuple(labels.shape)} of {labels.dtype}: "
                "real targets need IAIConfig(likelihood='gaussian')"
            )
        return labels.to(ids.device).masked_fill(~mask.any(-1), NO_LOSS)

    def align_labels(
        self, group: list[LabelledChunk], state: TaskState
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Names, ...]]]:
        super().align_labels(group, state)
        if len({ids.is_floating_point() for ids, *_ in group}) > 1:
            raise ValueError(
                "input_ids and inputs_embeds cannot be read in one batch: use parallel=1, or separate calls"
            )
        return self._aligned(group, state)

    def _aligned(
        self, group: list[LabelledChunk], state: TaskState
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Names, ...]]]:
        """The chunks with the class numbers of the state, and each task's classes after each of the chunks."""
        known, numbered, met = state.class_names, [], []
        for ids, mask, labels, given in group:
            labels, known = matched(labels, names_of_tasks(given, known, labels), known)
            numbered.append((ids, mask, labels))
            met.append(known)
        return numbered, met

    def check_query(self, ids: Tensor, num_tasks: int) -> None:  # (N, T), or (N, 1, d)
        """Check that each of B tasks gets N / B consecutive queries."""
        self._check_ids(ids)
        if ids.dim() != 2 + ids.is_floating_point() or not len(ids) or len(ids) % num_tasks:
            raise ValueError(
                "queries must be input_ids (number, tokens) or inputs_embeds (number, width), as many for each of the "
                f"{num_tasks} tasks of the state: got {_given(ids)}"
            )
        self._check_query_length(ids.shape[1])

    def check_episode(self, ids: Tensor, chunk_ids: Tensor) -> None:  # (B * Q, T), (B, K, n, T)
        self._check_ids(ids)
        self._check_ids(chunk_ids)
        if ids.dim() != 2 + ids.is_floating_point() or chunk_ids.dim() != 4 + chunk_ids.is_floating_point():
            raise ValueError(
                "an episode has chunks (batch, chunks, examples, tokens or width) and queries (batch, queries, tokens "
                f"or width), got chunk_{_given(chunk_ids)}, and queries in a row as {_given(ids)}"
            )
        self._check_query_length(ids.shape[1])
        self._check_chunk_length(chunk_ids.shape[3])

    def _check_ids(self, ids: Tensor) -> None:
        if not ids.is_floating_point():  # vectors were checked by `tokens`
            super()._check_ids(ids)

    def _check_chunk_length(self, length: int) -> None:
        self._check_text(length, "an example")

    def _check_query_length(self, length: int) -> None:
        self._check_text(length, "a query")

    def _check_text(self, length: int, what: str) -> None:
        if length > self.base.window:
            raise ValueError(
                f"{what} of {length} tokens does not fit the window of {self.base.window}: truncate it, such as by "
                f"tokenizer.model_max_length = {self.base.window}"
            )


def _given(ids: Tensor) -> str:
    if ids.is_floating_point():
        return f"inputs_embeds of shape {tuple(ids.squeeze(-2).shape)}"
    return f"input_ids of shape {tuple(ids.shape)}"


CARD_EXAMPLE = """\
import hf_iai  # registers the method with PEFT
from hf_iai import chunk_examples
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

examples = [{{"text": "where is my card", "label": "arrival"}}, {{"text": "what does it cost", "label": "fee"}}]
model = AutoPeftModelForSequenceClassification.from_pretrained("{model_id}")  # Hub id, or folder
tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)
state = model.adapt(chunk_examples(examples, tokenizer, chunk_size={examples_per_chunk}))
query = tokenizer("is it on its way", return_tensors="pt")
print(state.label_names[model(**query, task_state=state).logits.argmax()])
"""
CARD_EXAMPLE_OF_VECTORS = """\
import torch
from hf_iai import chunk_vectors, vector_base  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(vector_base({width}), "{model_id}")  # Hub id, or folder
vectors = torch.randn(100, {width})  # any number of examples
labels = ["left" if x < 0 else "right" for x in vectors[:, 0]]
state = model.adapt(chunk_vectors(vectors, labels, chunk_size={examples_per_chunk}))
logits = model(inputs_embeds=vectors[:3], task_state=state).logits
print([state.label_names[c] for c in logits.argmax(-1)])
"""


@TASKS.register("classification")
class Classification(Task):
    """A linear state of classes, `state_type="linear"`: a classifier over the features of an encoder."""

    asked_for_by = "state_type='linear'"
    fields = frozenset({"regime", "state_type", "pooling"})
    fingerprint = frozenset({"pooling"})
    task_type = "SEQ_CLS"
    metric, unit, pipeline_tag = "accuracy", "nats per query", "text-classification"
    exports = frozenset({"classifier"})
    auto_class = AutoModelForSequenceClassification
    has_teacher = learns_start = False
    refuses = Task.refuses | {"export_to_peft": "a linear state is a classifier, not an adapter: use export_classifier"}
    card_example, card_example_of_vectors = CARD_EXAMPLE, CARD_EXAMPLE_OF_VECTORS
    rows = "classifier"

    @classmethod
    def matches(cls, config: IAIConfig) -> bool:
        return config.regime != "implicit" and is_linear(config) and config.likelihood in cls.likelihoods

    @classmethod
    def complete(cls, config: IAIConfig) -> None:
        """There is neither signal nor head to fill in."""

    @classmethod
    def parts(cls, config: IAIConfig) -> list[type[Part]]:
        return [cls, STATES["linear"]]

    @classmethod
    def default_regime(cls, config: IAIConfig) -> str:
        return STATES["linear"].default_regime()

    @classmethod
    def reads_out(cls, config: IAIConfig) -> bool:
        return False

    @classmethod
    def called(cls, config: IAIConfig) -> str:
        return "state_type='linear'"

    def core(self, base: Base) -> Core:
        return LinearCore(base, self.config)

    def inputs(self, base: Base, core: Core) -> Inputs:
        return LabelledInputs(base, core)

    def collator(self, tokenizer: PreTrainedTokenizerBase | None, chunk_size: int) -> Any:
        """The collator: for texts if there is a tokenizer, else for vectors."""
        if tokenizer is None:
            return VectorEpisodeCollator(chunk_size)
        return LabelledEpisodeCollator(tokenizer, chunk_size)

    def scored(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"] != NO_LOSS

    def describe(self) -> list[str]:
        regime, pooling = self.config.regime, self.config.pooling
        return [
            f"Regime: {regime} ({self.who_answers()})",
            f"State: linear, the rows of a {self.rows}; pooling: {pooling}",
        ]

    def who_answers(self) -> str:
        return "encoder and LoRA embed examples and queries" if self.config.lora_answers else "the encoder is frozen"
