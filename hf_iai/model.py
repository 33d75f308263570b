"""IAIModel: reads chunks into a task state, answers queries under it, or refines their predictions."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from operator import length_hint

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .objectives import episode_loss, refinement_loss
from .predictions.answers import Answers
from .predictions.queries import Queries
from .state import TaskState
from .tasks.inputs import Chunk, batched
from .tasks.refined_text import Labels
from .tuner import IAITuner

# Of the base's forward: the state decides them.
OWN_ARGUMENTS = {"use_cache", "past_key_values", "position_ids"}


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
        self._refuse_when_implicit("initial_state")
        with torch.no_grad(), self._eval_mode():
            return self.core.initial_state(self._base, batch_size, self.identity).clone()

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
        for last in tqdm(steps, total=length_hint(chunks) or None, disable=not show_progress, unit="chunk"):
            if on_step is not None:
                on_step(last)
        if last is None:
            raise ValueError("adapt got no chunk: pass at least one, or use initial_state() for the state before any")
        return last

    def adapt_steps(
        self, chunks: Iterable[Chunk], state: TaskState | None = None, *, parallel: int = 1
    ) -> Iterator[TaskState]:
        """The state after each chunk of a stream that may never end; see `adapt`."""
        self._refuse_when_implicit("adapt")
        self._refuse_when_disabled("adapt")
        if parallel < 1:
            raise ValueError(f"parallel must be at least 1, got {parallel}")
        if state is not None:
            state = self._checked_state(state)
        chunks = iter(chunks)
        while group := [self._inputs.chunk(chunk) for chunk in islice(chunks, parallel)]:
            with torch.no_grad(), self._eval_mode():
                states = self._read_group(group, state)
            state = states[-1]
            yield from states

    def _read_group(self, group: list[tuple[Tensor, ...]], state: TaskState | None) -> list[TaskState]:
        batch = len(group[0][0])
        state = self.initial_state(batch) if state is None else state
        for rows in (len(tensors[0]) for tensors in group):
            if rows != state.batch_size:
                raise ValueError(f"a state of {state.batch_size} tasks cannot read a chunk of {rows} rows")
        group, classes = self._inputs.matched(group, state)
        evidence = self.core.read(self._base, *batched(group))
        states = []
        for number, met in enumerate(classes):
            part = {name: t[number * batch : (number + 1) * batch] for name, t in evidence.items()}
            states.append(state := self.core.step(self._base, self.core.met(state, met), part))
        return states

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
        if self._config.regime != "implicit":
            raise ValueError(
                f"refine needs regime='implicit', where the state is the query's own prediction, got "
                f"{self._config.regime!r}: use adapt, and answer under its state"
            )
        self._refuse_when_disabled("refine")
        queries, answers = self._inputs.asked(query, labels, num_answer_tokens)
        return self._refined(chunks, queries, answers, with_start)

    def _refined(
        self, chunks: Iterable[Chunk], queries: Queries, answers: Answers, with_start: bool
    ) -> Iterator[Tensor]:
        with torch.no_grad(), self._eval_mode():
            state = self.core.first(self._base, queries, answers)
            logits = self.core.logits(self._base, state)
        if with_start:
            yield state.answers.output(logits)
        for chunk in chunks:
            ids, mask, chunk_labels = self._inputs.chunk(chunk)
            self._inputs.check_fits(mask, queries, state.answers)
            with torch.no_grad(), self._eval_mode():
                state = self.core.step(self._base, state, self.core.read(self._base, ids, mask, chunk_labels))
                logits = self.core.logits(self._base, state)
            yield state.answers.output(logits)

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
        **kwargs,
    ):
        """Answer queries under a state, or go through a whole episode.

        Args:
            input_ids, attention_mask, labels: queries (B, T); in an episode (B, Q, T).
            task_state: of B tasks, or of one for all queries. None: the predictor with no slots at all.
            chunk_input_ids, chunk_attention_mask, chunk_labels: the episode's chunks (B, K, C); the objective decides,
                in training, which states the loss is taken under. Gradients are of the chunks' labels; see `adapt`.
            inputs_embeds, chunk_inputs_embeds: vectors (Q, d), in an episode (B, Q, d) and (B, K, n, d), in place of
                ids under a linear state or with `vector_width`.
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
        if chunk_input_ids is not None or chunk_inputs_embeds is not None:
            if task_state is not None:
                raise ValueError("an episode makes its own states: pass chunk_input_ids or task_state, not both")
            chunks = self._inputs.tokens(chunk_input_ids, chunk_inputs_embeds, chunk_attention_mask)
            queries = self._inputs.tokens(input_ids, inputs_embeds, attention_mask)
            if self._config.regime == "implicit":
                return self._refined_episode(
                    *queries, labels, *chunks, chunk_labels, label_input_ids, label_attention_mask
                )
            return self._episode(*queries, labels, *chunks, chunk_labels)
        state = self._state_for(task_state)
        if state is None:
            if not self._disabled or self._config.vector_width is not None:
                self.core.check_answers_without_state()
            with self._predictor_lora():
                kwargs |= {"attention_mask": attention_mask, "labels": labels}
                return self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        ids, mask = self._inputs.tokens(input_ids, inputs_embeds, attention_mask)
        self._inputs.check_query(ids, state.batch_size)
        labels = self._inputs.query_labels(labels, ids, mask)
        kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        return self._answer(state, ids, mask, labels, **kwargs)

    def _answer(self, state: TaskState, ids: Tensor, mask: Tensor, labels: Tensor | None, **kwargs):
        with self._predictor_lora():
            return self.core.answer(self._base, state, ids, mask, labels, **kwargs)

    def _episode(self, ids, mask, labels, chunk_ids, chunk_mask, chunk_labels):  # (B, Q, T) and (B, K, C)
        self._refuse_when_disabled("an episode")
        queries = ids.shape
        ids, mask = ids.flatten(0, 1), mask.flatten(0, 1)  # (B * Q, T)
        self._inputs.check_episode(ids, chunk_ids)
        labels = None if labels is None else self._inputs.query_labels(labels.flatten(0, 1), ids, mask)
        chunks = (chunk_ids, chunk_mask, self._inputs.labels(chunk_labels, chunk_ids, chunk_mask))
        outputs = episode_loss(self, self.objective, ids, mask, labels, *chunks)
        outputs.logits = outputs.logits.unflatten(0, queries[:2])
        return outputs

    def _refined_episode(self, ids, mask, labels, chunk_ids, chunk_mask, chunk_labels, label_ids, label_mask):
        self._refuse_when_disabled("an episode")  # (B, Q, T), (B, K, C) and (B, C, L)
        queries, answers, targets = self._inputs.episode(ids, mask, labels, label_ids, label_mask)
        start = self.core.first(self._base, queries, answers)
        self._inputs.check_episode_fits(chunk_ids, chunk_mask, start)
        chunks = (chunk_ids, chunk_mask, self._inputs.labels(chunk_labels, chunk_ids, chunk_mask))
        outputs = refinement_loss(self, self.objective, start, targets, chunks)
        outputs.logits = outputs.logits.unflatten(0, ids.shape[:2])
        return outputs

    def generate(self, input_ids: Tensor | None = None, task_state: TaskState | None = None, **kwargs) -> Tensor:
        """`generate` of transformers, under a state; returns prompt and new ids, (B, T + new)."""
        self._refuse_of_vectors("generate")
        state = self._state_for(task_state)
        if state is None:
            with self._predictor_lora():
                return self.model.generate(input_ids, **kwargs)
        if input_ids is None:
            raise ValueError("generate under a state needs input_ids (B, T); inputs_embeds cannot be used with it")
        self._inputs.check_query(input_ids, state.batch_size)
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask
        with torch.no_grad(), self._predictor_lora(), self.core.under(self._base, state) as prefix:
            return self._base.generate(prefix, input_ids, mask, **kwargs)

    @contextmanager
    def using(self, state: TaskState) -> Iterator[None]:
        """Every call inside answers under `state`, for code that cannot pass `task_state`; nests.

        Example:
            >>> with model.using(state):  # doctest: +SKIP
            ...     pipeline("text-generation", model=model, tokenizer=tokenizer)("def read(")
        """
        self._using.append(self._checked_state(state))
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
        self._refuse_of_vectors("state_effect")
        ids = query["input_ids"]
        mask = query.get("attention_mask", torch.ones_like(ids))
        labels = query.get("labels", ids.masked_fill(mask == 0, -100))
        with self._eval_mode():
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
        return None if task_state is None else self._checked_state(task_state)

    def _checked_state(self, state: TaskState) -> TaskState:
        self._refuse_when_implicit("adapt")
        self._refuse_when_disabled("a task state")
        if state.identity != self.identity:
            raise ValueError(
                f"this state belongs to {state.identity.name!r}, the model is {self.identity.name!r}: "
                "read the chunks again with this model, or load the adapter that made the state"
            )
        return state.to(self.model.device)
