"""Refined text (regime `implicit`): each query keeps a prediction of its own answer, and each chunk refines it.

Axes: B tasks, C tokens of a chunk, N queries of T tokens, S slots of an answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bases.base import KEYS_VALUES, Base
from ..config import IAIConfig
from ..cores import Core, EpisodeBatch, ImplicitCore
from ..data.examples import Chunk
from ..predictions.answers import Answers, FreeAnswer, LabelSet, label_tensors
from ..predictions.prediction import Prediction
from ..predictions.queries import Queries, prompts_of
from ..registry import TASKS, Part
from ..tensors import NO_LOSS
from .inputs import Inputs
from .task import Task, is_linear, is_of_vectors

Labels = Sequence[Sequence[int]]  # the token ids of each label


class ImplicitInputs(Inputs):
    """Checks chunks and queries whose predictions are refined, and brings them into shape."""

    @property
    def slots_in_front(self) -> int:
        return 0

    @property
    def max_chunk_size(self) -> int:
        """Half the window, since query and answer follow the chunk."""
        return self.base.window // 2

    def _check_chunk_length(self, length: int) -> None:
        """Nothing is checked here: `check_fits` checks a chunk together with the query."""

    def prepare_query(
        self, query: Chunk, labels: Labels | None, num_answer_tokens: int | None
    ) -> tuple[Queries, Answers]:
        """The prompts (N, T) of `refine`, and the possible answers."""
        ids, mask = self.on_device(query)
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"query needs input_ids (queries, tokens), got shape {tuple(ids.shape)}")
        self._check_ids(ids)
        given = query.get("labels")
        queries, answers = prompts_of(ids, mask, None if given is None else given.to(ids.device))
        if labels is not None:
            if num_answer_tokens is not None:
                raise ValueError(f"labels have their own lengths, got num_answer_tokens={num_answer_tokens} too")
            return queries, self.label_set(*label_tensors(labels, ids.device), len(queries))
        if num_answer_tokens is None:
            num_answer_tokens = 1 if answers is None else answers.shape[1]
        if num_answer_tokens < 1:
            raise ValueError(f"num_answer_tokens must be at least 1, got {num_answer_tokens}")
        return queries, FreeAnswer(num_answer_tokens)

    def label_set(self, ids: Tensor, mask: Tensor, num_queries: int) -> LabelSet:  # (B, C, L), or (1, C, L) for all
        """The set of labels for N queries, N / B consecutive ones of each task."""
        if ids.dim() != 3 or mask.shape != ids.shape or num_queries % len(ids):
            raise ValueError(
                f"label_input_ids and their mask must be (tasks, labels, tokens), got {tuple(ids.shape)} and "
                f"{tuple(mask.shape)} for {num_queries} queries"
            )
        self._check_ids(ids)
        if self.config.prediction == "latent" and ids.shape[2] > 1:
            raise ValueError(
                f"prediction='latent' says one token at a time, but a label has {ids.shape[2]}: use labels of one "
                "token, or prediction='logits'"
            )
        times = num_queries // len(ids)
        return LabelSet(ids.repeat_interleave(times, 0), mask.repeat_interleave(times, 0))

    def align_labels(self, group: list[tuple[Tensor, ...]], state: Prediction) -> tuple[list[tuple[Tensor, ...]], list]:
        for _, mask, _ in group:
            self.check_fits(mask, state.queries, state.answers)
        return group, [None] * len(group)

    def check_fits(self, chunk_mask: Tensor, queries: Queries, answers: Answers) -> None:  # (B, C)
        """Check that a chunk fits the window together with a query and its answer.

        Raises:
            ValueError: if it does not fit, or the number of queries is not a multiple of the number of tasks.
        """
        rows, length = chunk_mask.shape[0], chunk_mask.shape[-1]
        if not rows or len(queries) % rows:
            raise ValueError(f"{len(queries)} queries for a chunk of {rows} tasks: pass as many queries for each")
        asked, behind, window = queries.ids.shape[1], answers.length, self.base.window
        if length + asked + behind > window:
            raise ValueError(
                f"a chunk of {length} tokens, a query of {asked} and an answer of {behind} do not fit a window of "
                f"{window} together; pass chunk_size <= {max(0, window - asked - behind)}"
            )

    def episode(
        self,
        queries: tuple[Tensor, Tensor, Tensor | None],  # ids, mask and labels (B, Q, T)
        chunks: tuple[Tensor, Tensor, Tensor | None],  # (B, K, C)
        label_set: tuple[Tensor | None, Tensor | None],  # ids and mask (B, C, L)
    ) -> EpisodeBatch:
        """Check a batch of episodes and bring it into shape. Its `labels` are the targets (B * Q, S)."""
        if queries[2] is None:
            raise ValueError(
                "an episode of regime='implicit' needs labels of the queries, (B, Q, T) of texts or (B, Q) of vectors: "
                "they say what the answer is"
            )
        chunk_ids, chunk_mask, chunk_labels = chunks
        prompts, answers, targets = self._targets_of_episode(*queries, *label_set)
        self._check_ids(chunk_ids)
        self.check_fits(chunk_mask[:, :1].flatten(1), prompts, answers)
        chunks = (chunk_ids, chunk_mask, self.labels(chunk_labels, chunk_ids, chunk_mask))
        return EpisodeBatch(chunks, prompts.ids, prompts.mask, targets, queries[0].shape[1], answers)

    def _targets_of_episode(
        self, ids: Tensor, mask: Tensor, labels: Tensor, label_ids: Tensor | None, label_mask: Tensor | None
    ) -> tuple[Queries, Answers, Tensor]:
        """The prompts, the possible answers, and the targets (B * Q, S)."""
        self._check_ids(ids)
        queries, answers = prompts_of(*(t.flatten(0, 1) for t in (ids, mask, labels)))
        if label_ids is None:
            space = FreeAnswer(answers.shape[1])
        else:
            label_mask = torch.ones_like(label_ids) if label_mask is None else label_mask
            space = self.label_set(label_ids, label_mask, len(queries))
        return queries, space, space.targets(answers)


CARD_EXAMPLE = """\
import hf_iai  # registers the method with PEFT
from hf_iai import chunk_text
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

text = {text}  # what the task is learned from, of any length
prompt = {prompt}
model = AutoPeftModelForCausalLM.from_pretrained("{model_id}")  # its Hub id, or its folder
tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)
query = tokenizer(prompt, return_tensors="pt")
for logits in model.refine(chunk_text(text, tokenizer, {chunking}), query):
    print(tokenizer.decode(logits[0].argmax(-1)))  # the next token, after each chunk
"""


@TASKS.register("refined_text")
class RefinedText(Task):
    """`regime="implicit"` for text: there is no task state; chunks refine each query's own prediction."""

    asked_for_by = "regime='implicit'"
    fields = frozenset({"regime", "prediction"})
    fingerprint = frozenset({"prediction", "vector_width", "num_outputs"})
    unit = "nats per prediction"
    makes_states = has_teacher = learns_start = False
    refuses = dict.fromkeys(
        ("adapt", "initial_state", "a task state", "export_to_peft"),
        "{method} needs a task state, which regime='implicit' does not have: the state belongs to the query. Use "
        "refine(chunks, query), or regime='explicit'",
    )
    card_intro = "the base reads a task chunk by chunk, and each query refines its own prediction by each of them."
    card_example = CARD_EXAMPLE

    @classmethod
    def matches(cls, config: IAIConfig) -> bool:
        return config.regime == "implicit" and not is_of_vectors(config)

    @classmethod
    def complete(cls, config: IAIConfig) -> None:
        """There is neither signal nor head to fill in."""

    @classmethod
    def parts(cls, config: IAIConfig) -> list[type[Part]]:
        return [cls]

    @classmethod
    def check(cls, config: IAIConfig) -> None:
        if is_linear(config):
            raise ValueError("regime='implicit' predicts tokens, got task_type='SEQ_CLS': use task_type='CAUSAL_LM'")
        config.prediction = config.prediction or "logits"

    @classmethod
    def reads_out(cls, config: IAIConfig) -> bool:
        return False

    @classmethod
    def called(cls, config: IAIConfig) -> str:
        return "regime='implicit'"

    def check_base(self, base: Base) -> None:
        base.check_offers(KEYS_VALUES, "regime='implicit'")  # a chunk is read once for all queries

    def core(self, base: Base) -> Core:
        return ImplicitCore(base, self.config)

    def inputs(self, base: Base, core: Core) -> Inputs:
        return ImplicitInputs(base, core)

    def scored(self, batch: dict[str, Tensor]) -> Tensor:
        """The scored tokens of free answers; with a label set, the scored queries."""
        scored = batch["labels"][..., 1:] != NO_LOSS
        return scored.any(-1) if "label_input_ids" in batch else scored

    def display_name(self) -> str:
        return f"implicit {self.config.prediction}"

    def describe(self) -> list[str]:
        return [
            "Regime: implicit (base and LoRA refine each query's own prediction; there is no task state)",
            f"Prediction: kept as {self.config.prediction}",
        ]
