"""Regime `implicit` for vectors: a chunk holds examples (x, y), a query is an x."""

from dataclasses import replace

from torch import Tensor, nn

from ..bases.base import Base
from ..config import IAIConfig
from ..predictions.answers import Answers
from ..predictions.prediction import Prediction
from ..predictions.queries import Queries, read_keys_values
from ..predictions.vector_answers import ClassAnswers, RealAnswers
from .core import full_precision
from .implicit import ImplicitCore


class ImplicitVectorCore(ImplicitCore):
    """Refines predictions for vectors (`vector_width`).

    Learned maps turn x and y of an example into one token. A query is a token of x and a slot after it. The step is
    that of `ImplicitCore`, but the map from hidden states to answers is learned too (`predictions.vector_answers`). The
    base is usually a small one without pretraining; LoRA and these maps teach it to read examples.
    """

    def __init__(self, base: Base, config: IAIConfig) -> None:
        super().__init__(base, config)
        width = len(self.slot)
        self.vector = nn.Linear(config.vector_width, width)
        self.answers = {"softmax": ClassAnswers, "gaussian": RealAnswers}[config.likelihood](width, config.num_outputs)

    def check_answers_without_state(self, *, disabled: bool) -> None:
        raise ValueError("a base says nothing of vectors by itself: use refine(chunks, {'inputs_embeds': vectors})")

    def first(self, base: Base, queries: Queries, answers: Answers) -> Prediction:
        """yhat(0) for queries that are vectors (N, 1, n). `answers` are the core's own."""
        return super().first(base, replace(queries, ids=self._embedded(base, queries.ids)), answers)

    def read(self, base: Base, vectors: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The evidence of vectors (B, n, w) with mask (B, n) and labels (B, n) or (B, n, o): their keys and values."""
        with full_precision(mask):
            examples = self.vector(vectors) + self.answers.of_targets(labels)
        with base.lora(True):
            return read_keys_values(base, examples.masked_fill((mask == 0).unsqueeze(-1), 0.0), mask)

    def _embedded(self, base: Base, vectors: Tensor) -> Tensor:
        with full_precision(vectors):
            return self.vector(vectors).to(base.model.dtype)
