"""Refined vectors (regime `implicit` with `vector_width`): chunks of examples refine the prediction of each query.

Axes: B tasks, N queries, w width, o outputs.
"""

from torch import Tensor

from ..bases.base import Base
from ..config import IAIConfig
from ..cores import Core, ImplicitVectorCore
from ..data.examples import Chunk
from ..predictions.answers import Answers
from ..predictions.queries import Queries
from ..registry import TASKS
from .classification import CHUNK_SIZE
from .inputs import Inputs
from .refined_text import ImplicitInputs, Labels, RefinedText
from .task import is_of_vectors
from .vectors import CARD_CLASSES, CARD_DATA, CARD_TARGETS, REFUSED, VectorExamples, VectorTask


class RefinedVectorInputs(VectorExamples, ImplicitInputs):
    """Checks chunks and queries that are vectors and whose predictions are refined, and brings them into shape."""

    @property
    def max_chunk_size(self) -> int:
        """The usual number of examples, or fewer if only fewer fit the window together with a query."""
        return min(CHUNK_SIZE, self.base.window - 2)

    def prepare_query(
        self, query: Chunk, labels: Labels | None, num_answer_tokens: int | None
    ) -> tuple[Queries, Answers]:
        if labels is not None or num_answer_tokens is not None:
            raise ValueError("labels and num_answer_tokens are for texts: num_outputs says what a vector's answers are")
        vectors, mask = self.on_device(query)
        if vectors.dim() != 2:
            raise ValueError(f"query needs inputs_embeds (queries, width), got shape {tuple(vectors.shape)}")
        return Queries(vectors.unsqueeze(1), mask.unsqueeze(1).clamp_min(1)), self.core.answers

    def _targets_of_episode(
        self, ids: Tensor, mask: Tensor, labels: Tensor, *label_set: Tensor | None
    ) -> tuple[Queries, Answers, Tensor]:
        """The queries, the core's answers, and the targets (B * Q, 1) or (B * Q, 1, o)."""
        if any(given is not None for given in label_set):
            raise ValueError("label_input_ids are for texts: num_outputs says what a vector's answers are")
        queries, answers = self.prepare_query({"inputs_embeds": ids.flatten(0, 1)}, None, None)
        return queries, answers, self._targets(labels, ids, mask).flatten(0, 1).unsqueeze(1)


CARD_MEANS = """\
for means in model.refine(chunk_vectors(vectors, targets), {{"inputs_embeds": vectors[:3]}}):
    print(means)  # after each chunk
"""
CARD_LOGITS = """\
for logits in model.refine(chunk_vectors(vectors, labels), {{"inputs_embeds": vectors[:3]}}):
    print(logits.argmax(-1))  # after each chunk
"""


@TASKS.register("refined_vectors")
class RefinedVectors(VectorTask, RefinedText):
    """`regime="implicit"` for vectors: examples refine each query's own class or real targets."""

    asked_for_by = "regime='implicit' with vector_width"
    fields = RefinedText.fields | {"vector_width", "num_outputs", "likelihood"}
    refuses = RefinedText.refuses | REFUSED

    @classmethod
    def matches(cls, config: IAIConfig) -> bool:
        return config.regime == "implicit" and is_of_vectors(config)

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        super().check(config)
        if config.likelihood == "gaussian" and config.prediction != "logits":
            raise ValueError(
                f"likelihood='gaussian' keeps natural parameters, got prediction={config.prediction!r}: leave it out"
            )

    def core(self, base: Base) -> Core:
        return ImplicitVectorCore(base, self.config)

    def inputs(self, base: Base, core: Core) -> Inputs:
        return RefinedVectorInputs(base, core)

    @property
    def card_example(self) -> str:
        return CARD_DATA + (CARD_CLASSES + CARD_LOGITS if self.has_classes else CARD_TARGETS + CARD_MEANS)
