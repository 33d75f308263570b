"""IAIModel: reads chunks into a task state, answers queries under it, or refines their predictions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from operator import length_hint
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .bases.recurrent import base_of
from .data.examples import Chunk
from .objectives import Objective, episode_loss
from .state import TaskState
from .tasks.refined_text import Labels
from .tensors import eval_mode
from .tuner import IAITuner

# Of the base's forward: the state decides them.
OWN_ARGUMENTS = {"use_cache", "past_key_values", "position_ids"}
NOT_TEXT = (
    "a chunk is a mapping with input_ids (batch, tokens), got {given}: use "
    "model.adapt(chunk_text(text, tokenizer, model=model)), or chunk_examples for a list of examples"
)


class IAIModel(IAITuner):
    """f_gamma(x, theta) and theta(i+1) = h_phi(theta(i), chunk(i)), on one pretrained decoder or encoder.

    Made by `get_peft_model(base, IAIConfig(...))`, or `AutoPeftModelForCausalLM.from_pretrained(folder)`; everything
    below is reached through the PeftModel that these return.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from hf_iai import IAIConfig, chunk_text, embedded_base
        >>> tokenizer = AutoTokenizer.from_pretrained(embedded_base())
        >>> base = AutoModelForCausalLM.from_pretrained(embedded_base())
        >>> model = get_peft_model(base, IAIConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        >>> state = model.adapt(chunk_text("def read(path):\\n    return open(path).read()", tokenizer, chunk_size=8))
        >>> query = tokenizer("def write", return_tensors="pt")
        >>> model(**query, task_state=state).logits.shape[-1]
        1024

    Source: Mittal et al., arXiv 2510.11471, equations 2-4; the averaging form is ours.
    """

    # ---------------------------------------------------------------- reading

    def initial_state(self, batch_size: int = 1) -> TaskState:
        """theta(0) for `batch_size` tasks: the learned state before anything was read."""
        self.task.check_can("initial_state")
        return self.reader.initial_state(batch_size, self.identity)

    def adapt(
        self,
        chunks: Iterable[Chunk],
        *,
        state: TaskState | None = None,
        show_progress: bool = False,
        on_step: Callable[[TaskState], None] | None = None,
        parallel: int = 1,
    ) -> TaskState:
        """Read chunks and return the state after the last one.

        Args:
            chunks: a finite iterable of mappings with `input_ids` (B, C) and optionally `attention_mask` and `labels`
                (B, C). Gradients are of the labels' loss, -100 for none; default: all tokens where the mask is 1.
                Of a linear state ids and mask (B, n, T) of n examples, or `inputs_embeds` (B, n, d) and mask (B, n),
                `labels` (B, n), -100 for padding, and optionally `label_names`, what the labels' numbers mean: matched
                by name to the state's classes. Of a regression floating `labels` (B, n) or (B, n, o). With
                `vector_width` as of vectors under a linear state, but classes are numbers below `num_outputs`.
            state: where to go on; theta(0) by default.
            show_progress: a progress bar, one tick per chunk.
            on_step: called with the state after every chunk.
            parallel: how many chunks the base reads in one batch; the result is the same up to rounding. Gradients
                are taken one after the other all the same.

        Raises:
            ValueError: for no chunk, one longer than `max_chunk_size`, ids beyond the vocabulary, a batch that
                differs from the state's, or a state of another base or adapter.
        """
        last = None
        steps = self.adapt_steps(chunks, state, parallel=parallel)
        for last in tqdm(
            steps, total=length_hint(chunks) or None, disable=None if show_progress else True, unit="chunk"
        ):
            if on_step is not None:
                on_step(last)
        if last is None:
            raise ValueError("adapt got no chunk: pass at least one, or use initial_state() for the state before any")
        return last

    def adapt_steps(
        self, chunks: Iterable[Chunk], state: TaskState | None = None, *, parallel: int = 1
    ) -> Iterator[TaskState]:
        """The state after each chunk of a stream that may never end; see `adapt`."""
        self.task.check_can("adapt")
        self._refuse_when_disabled("adapt")
        if parallel < 1:
            raise ValueError(f"parallel must be at least 1, got {parallel}")
        state = None if state is None else self.checked_state(state)
        first = self.initial_state if state is None else lambda batch_size: state
        yield from self.reader.states(checked_chunks(chunks), first, parallel)

    # ---------------------------------------------------------------- refining

    def refine(
        self,
        chunks: Iterable[Chunk],
        query: Chunk,
        *,
        labels: Labels | None = None,
        num_answer_tokens: int | None = None,
        with_start: bool = False,
    ) -> Iterator[Tensor]:
        """The logits of queries' answers after each chunk of a stream that may never end (regime `"implicit"`).

            yhat(i+1) = r_gamma([x, yhat(i)], chunk(i)),    yhat(0) = what base and LoRA say without a chunk

        Each chunk is read once for all its queries; nothing grows with the number of chunks. See `cores.ImplicitCore`.

        Args:
            chunks: mappings with `input_ids` (B, C) and optionally `attention_mask`; a row whose mask is all 0 leaves
                its queries' predictions as they are, bitwise. With `vector_width` examples as of `chunk_vectors`.
            query: `input_ids` (N, T), optionally `attention_mask`; N / B consecutive queries of each task. If it has
                `labels` (N, T), the labelled tokens, its last ones, are the answer: they are cut off, and there are as
                many slots. With `vector_width` `inputs_embeds` (N, vector_width).
            labels: token ids of the answers to choose among, any number of tokens each; none: any tokens.
            num_answer_tokens: A, the slots of a free answer. None: as many as the query's labels have, or 1.
            with_start: yield the logits of yhat(0) first.

        Returns:
            A generator of float32 logits (N, C) of labels or of a vector's classes, (N, A, V) of free answers, or means
            (N, o) of real targets. Token a of a free answer is predicted behind the current prediction of those before.

        Raises:
            ValueError: for another regime, labels that are empty or alike, queries that cannot be shared out among the
                tasks, ids beyond the vocabulary, or chunk, query and answer that do not fit the window together.

        Example:
            >>> from peft import get_peft_model
            >>> from transformers import AutoModelForCausalLM, AutoTokenizer
            >>> from hf_iai import IAIConfig, chunk_text, embedded_base
            >>> tokenizer = AutoTokenizer.from_pretrained(embedded_base())
            >>> base = AutoModelForCausalLM.from_pretrained(embedded_base())
            >>> config = IAIConfig(task_type="CAUSAL_LM", regime="implicit", target_modules="all-linear")
            >>> model = get_peft_model(base, config)
            >>> chunks = chunk_text("size = 3\\nwidth = 3\\nheight = 3\\n", tokenizer, chunk_size=8)
            >>> query = tokenizer("depth =", return_tensors="pt")
            >>> labels = tokenizer([" 3", " 12"], add_special_tokens=False)["input_ids"]
            >>> [logits.shape for logits in model.refine(chunks, query, labels=labels)][-1]
            torch.Size([1, 2])

        Source: Mittal et al., arXiv 2510.11471, equation 4.
        """
        self.task.check_can("refine")
        self._refuse_when_disabled("refine")
        prepared = self.reader.inputs.prepare_query(query, labels, num_answer_tokens)
        return self._refined(checked_chunks(chunks), prepared, with_start)

    def _refined(self, chunks: Iterable[Chunk], prepared: tuple, with_start: bool) -> Iterator[Tensor]:
        reader = self.reader
        core, base = reader.core, reader.base
        with torch.no_grad(), reader.frozen():
            start = core.first(base, *prepared)
            answers = core.answer(base, start)
        if with_start:
            yield answers
        for prediction in reader.states(chunks, lambda batch_size: start):
            with torch.no_grad(), reader.frozen():
                answers = core.answer(base, prediction)
            yield answers

    # ---------------------------------------------------------------- answering

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task_state: TaskState | None = None,
        chunk_input_ids: Tensor | None = None,
        chunk_attention_mask: Tensor | None = None,
        chunk_labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        chunk_inputs_embeds: Tensor | None = None,
        label_input_ids: Tensor | None = None,
        label_attention_mask: Tensor | None = None,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer queries under a state, or go through a whole episode.

        Args:
            input_ids, attention_mask, labels: queries (B, T); in an episode (B, Q, T).
            task_state: of B tasks, or of one for all queries. None: the predictor with no slots at all.
            chunk_input_ids, chunk_attention_mask, chunk_labels: the episode's chunks (B, K, C); the objective decides,
                in training, which states the loss is taken under. Gradients are of the chunks' labels; see `adapt`.
            inputs_embeds, chunk_inputs_embeds: vectors (Q, d), in an episode (B, Q, d) and (B, K, n, d), in place of
                ids under a linear state or with `vector_width`.
            objective: which states of an episode are scored in training, see `hf_iai.objectives`; default: unrolled.
            label_input_ids, label_attention_mask: in an episode of regime implicit, the labels (B, C, L) that each
                task's answers are of; without them answers are free.

        Returns:
            transformers' output, `logits` (B, T, V) (episode: (B, Q, T, V)), `loss` over `labels[:, 1:]`. Of a linear
            state `logits` (Q, C) (episode: (B, Q, C)), `loss` over `labels` (Q,) (episode: (B, Q)); chunks are
            (B, K, n, T), `chunk_labels` (B, K, n), and without a state only `disable_adapter()` lets the base answer.
            Of a regression `logits` (Q, o) are means, `labels` (Q,) or (Q, o), `loss` half the mean squared error. With
            `vector_width` the same, but that in regime explicit the `loss` of means is their negative log-likelihood.
            Of an episode in regime implicit `logits` (B, Q, A, V) of the answers' tokens after the last chunk, or
            (B, Q, C) of the labels or classes, and `loss` their mean cross-entropy; of real targets means (B, Q, o),
            and `loss` the mean negative log-likelihood.
        """
        reader = self.reader
        if chunk_input_ids is not None or chunk_inputs_embeds is not None:
            if task_state is not None:
                raise ValueError("an episode makes its own states: pass chunk_input_ids or task_state, not both")
            self._refuse_when_disabled("an episode")
            queries = (*reader.inputs.tokens(input_ids, inputs_embeds, attention_mask), labels)
            chunks = (*reader.inputs.tokens(chunk_input_ids, chunk_inputs_embeds, chunk_attention_mask), chunk_labels)
            episode = reader.inputs.episode(queries, chunks, (label_input_ids, label_attention_mask))
            outputs = episode_loss(reader, objective or Objective(), episode, training=self.training)
            outputs.logits = outputs.logits.unflatten(0, queries[0].shape[:2])
            return outputs
        state = self._state_for(task_state)
        if state is None:
            reader.core.check_answers_without_state(disabled=self._disabled)
            with self._predictor_without_state():
                kwargs |= {"attention_mask": attention_mask, "labels": labels}
                return self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        ids, mask = reader.inputs.tokens(input_ids, inputs_embeds, attention_mask)
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        return reader.answer(state, ids, mask, labels, **kwargs)

    def _predictor_without_state(self) -> AbstractContextManager[None]:
        """Regime parametric, and inside `disable_adapter()`: the bare base; else base + LoRA."""
        return base_of(self.model).lora(self._config.lora_answers and not self._disabled)

    def generate(self, input_ids: Tensor | None = None, task_state: TaskState | None = None, **kwargs) -> Tensor:
        """`generate` of transformers, under a state; returns prompt and new ids, (B, T + new)."""
        self.task.check_can("generate")
        state = self._state_for(task_state)
        if state is None:
            with self._predictor_without_state():
                return self.model.generate(input_ids, **kwargs)
        if input_ids is None:
            raise ValueError("generate under a state needs input_ids (B, T); inputs_embeds cannot be used with it")
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask
        return self.reader.generate(state, input_ids, mask, **kwargs)

    @contextmanager
    def using(self, state: TaskState) -> Iterator[None]:
        """Every call inside answers under `state`, for code that cannot pass `task_state`; nests.

        Example:
            >>> with model.using(state):  # doctest: +SKIP
            ...     pipeline("text-generation", model=model, tokenizer=tokenizer)("def read(")
        """
        self._using.append(self.checked_state(state))
        try:
            yield
        finally:
            self._using.pop()

    @torch.no_grad()
    def state_effect(self, state: TaskState, query: Chunk) -> dict[str, float]:
        """Is the state used at all? Compares answers with and without it.

        Args:
            state: of one task, or as many as the query has rows.
            query: `input_ids` (B, T), optionally `attention_mask` and `labels` (default: the ids).

        Returns:
            `kl`: mean over predicted tokens of KL(with state || without), nats; `loss_with`, `loss_without` and
            their difference `loss_difference` (negative: the state helps), nats per token.
        """
        self.task.check_can("state_effect")
        ids = query["input_ids"]
        mask = query.get("attention_mask", torch.ones_like(ids))
        labels = query.get("labels", ids.masked_fill(mask == 0, -100))
        with eval_mode(self):
            with_state = self.forward(ids, mask, labels, task_state=state)
            using, self._using = self._using, []
            without = self.forward(ids, mask, labels)
            self._using = using
        scored = labels[:, 1:] != -100
        p, q = (out.logits[:, :-1][scored].float().log_softmax(-1) for out in (with_state, without))
        result = {"kl": (p.exp() * (p - q)).sum(-1).mean().item()}
        result |= {"loss_with": with_state.loss.item(), "loss_without": without.loss.item()}
        return result | {"loss_difference": result["loss_with"] - result["loss_without"]}

    # ---------------------------------------------------------------- checks

    def _state_for(self, task_state: TaskState | None) -> TaskState | None:
        """The state to answer under, on our device: the one given, or that of `using`."""
        if task_state is None and self._using:
            self._refuse_when_disabled("a task state")
            return self._using[-1]
        return None if task_state is None else self.checked_state(task_state)

    def checked_state(self, state: TaskState) -> TaskState:
        """The state on the base's device.

        Raises:
            ValueError: for a state of another base or adapter, or where a state has no meaning.
        """
        self.task.check_can("a task state")
        self._refuse_when_disabled("a task state")
        if state.identity != self.identity:
            raise ValueError(
                f"this state belongs to {state.identity.name!r}, the model is {self.identity.name!r}: "
                "read the chunks again with this model, or load the adapter that made the state"
            )
        return state.to(self.model.device)


def checked_chunks(chunks: Iterable[Chunk]) -> Iterable[Chunk]:
    """What `adapt` and `refine` read; one mapping, such as a tokenizer's output, is a single chunk.

    Raises:
        ValueError: for text, which has to be cut into chunks first.
    """
    if isinstance(chunks, Mapping):
        return [chunks]
    if isinstance(chunks, str):
        raise ValueError(NOT_TEXT.format(given=f"the text {chunks!r:.40}"))
    return map(_checked_chunk, chunks)


def _checked_chunk(chunk: Chunk) -> Chunk:
    if not isinstance(chunk, Mapping):
        given = f"the text {chunk!r:.40}" if isinstance(chunk, str) else f"{type(chunk).__name__} {chunk!r:.40}"
        raise ValueError(NOT_TEXT.format(given=given))
    return chunk
