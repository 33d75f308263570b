"""IAIModel: reads chunks into a task state, and answers queries under it or refines their predictions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from operator import length_hint
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache

from .bases.compat import names_in_use
from .bases.recurrent import base_of
from .data.checks import checked_chunks
from .data.examples import Chunk
from .objectives import Objective, episode_loss
from .state import TaskState
from .tasks.refined_text import Labels
from .tensors import NO_LOSS, eval_mode
from .tuner import IAITuner

# Arguments of the base's forward that the state sets.
OWN_ARGUMENTS = ("past_key_values", "position_ids", "cache_position")
# Model -> the state of `using` in this thread.
_using: ContextVar[Mapping["IAIModel", TaskState | None]] = ContextVar("using", default={})  # noqa: B039, never changed


class IAIModel(IAITuner):
    """The predictor f_gamma(x, theta) and the update theta(i+1) = h_phi(theta(i), chunk(i)), on one pretrained model.

    `get_peft_model(base, IAIConfig(...))` and `AutoPeftModelForCausalLM.from_pretrained(folder)` make one. They return
    a PeftModel, which passes all calls below on to it.

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
        """theta(0) for `batch_size` tasks: the state before anything was read, learned or, for prefix+lora, empty.

        Raises:
            ValueError: in regime `"implicit"`, which has no task state.
        """
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
        """Read chunks of B tasks and return the state after the last chunk.

        No gradient is kept, and memory does not grow with the number of chunks. A row whose mask is all 0 leaves its
        task's state unchanged. The tensors of a chunk depend on the kind of task:

            kind of task      input                         attention_mask    labels
            text              input_ids (B, C)              (B, C)            (B, C) token ids, -100 for no loss
            classification    input_ids (B, n, T)           (B, n, T)         (B, n) class numbers, -100 for padding
                              or inputs_embeds (B, n, d)    (B, n)
            regression        the same                      the same          (B, n) or (B, n, o), floating
            vectors           inputs_embeds (B, n, w)       (B, n)            (B, n) classes below num_outputs,
                                                                              or (B, n) or (B, n, o), floating

        C are the tokens of a chunk, n its examples, T the tokens of an example, o the targets of an example. The mask
        is optional, 1 by default. For text, labels are used only by gradients; by default every token where the mask is
        1 is a label. A classification chunk may have `label_names`, the names of its class numbers. They are matched by
        name to the classes of the state; new names become new classes.

        Args:
            chunks: a finite iterable of chunks, or a single one. `chunk_text`, `chunk_examples` and `chunk_vectors`
                make them.
            state: the state to continue from. None: theta(0).
            show_progress: whether to show a progress bar, which advances by one for each chunk.
            on_step: called with the state after every chunk.
            parallel: how many chunks the base reads in one batch. The result is the same up to rounding. Gradients are
                still taken one chunk after the other.

        Raises:
            ValueError: if there is no chunk, a chunk is text or longer than `max_chunk_size`, an id is not in the
                vocabulary, the batch size differs from the state's, the state belongs to another base or adapter, or in
                regime `"implicit"`.
        """
        last, total = None, 1 if isinstance(chunks, Mapping) else length_hint(chunks)
        steps = self.adapt_steps(chunks, state, parallel=parallel)
        for last in tqdm(steps, total=total or None, disable=None if show_progress else True, unit="chunk"):
            if on_step is not None:
                on_step(last)
        if last is None:
            raise ValueError("adapt got no chunk: pass at least one, or use initial_state() for the state before any")
        return last

    def adapt_steps(
        self, chunks: Iterable[Chunk], state: TaskState | None = None, *, parallel: int = 1
    ) -> Iterator[TaskState]:
        """Yield the state after each chunk of a stream that may be endless; see `adapt`."""
        self.task.check_can("adapt")
        self._refuse_when_disabled("adapt")
        if parallel < 1:
            raise ValueError(f"parallel must be at least 1, got {parallel}")
        state = None if state is None else self.checked_state(state)
        first = self.initial_state if state is None else lambda batch_size: state
        yield from self.reader.states(checked_chunks(chunks), first, parallel)

    def state_of_cache(
        self, cache: Cache, attention_mask: Tensor | None = None, attentions: Sequence[Tensor] | None = None
    ) -> TaskState:
        """`TaskState.from_past_key_values`; see there."""
        self._refuse_when_disabled("a task state")
        return self.reader.state_of_cache(cache, attention_mask, attentions, self.identity)

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
        """Yield the logits of the queries' answers after each chunk, in regime `"implicit"`. The stream may be endless.

            yhat(i+1) = r_gamma([x, yhat(i)], chunk(i)),    yhat(0) = the prediction of base and LoRA without a chunk

        Each chunk is read once for all its queries. Memory does not grow with the number of chunks. See
        `cores.ImplicitCore`.

        Args:
            chunks: mappings with `input_ids` (B, C) and optionally `attention_mask`. A row whose mask is all 0 leaves
                the predictions of its queries unchanged. With `vector_width`, chunks as `chunk_vectors` makes them.
            query: `input_ids` (N, T) and optionally `attention_mask`. N / B consecutive queries belong to each of the B
                tasks. A query may have `labels` (N, T): then its labelled tokens, which must be its last ones, are the
                answer. They are cut off and replaced by as many slots. With `vector_width`, `inputs_embeds` (N,
                vector_width).
            labels: token ids of each possible answer, if the answer is one of a set of labels. None: any tokens.
            num_answer_tokens: A, number of tokens of a free answer. None: as many as the query's labels have, or 1.
            with_start: whether to yield the logits of yhat(0) first.

        Returns:
            A generator of float32 tensors: logits (N, C) for labels or for the classes of vectors, logits (N, A, V) for
            free answers, means (N, o) for real targets. Token a of a free answer is predicted given the current
            prediction of the tokens before it.

        Raises:
            ValueError: in another regime, if labels are empty or equal, if N is not a multiple of B, if an id is not in
                the vocabulary, or if chunk, query and answer together do not fit the window.

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
        reader = self.reader
        queries, answers = reader.inputs.prepare_query(query, labels, num_answer_tokens)
        return reader.answers_after(checked_chunks(chunks), queries, answers, with_start=with_start)

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
        """Answer queries under a state, or run a whole episode: read its chunks, then answer its queries.

        An episode is what `IAITrainer` trains on. A call with `chunk_input_ids` or `chunk_inputs_embeds` is an episode.

            kind of task      queries                 logits           labels             loss
            text              input_ids (B, T)        (B, T, V)        (B, T)             cross-entropy of next tokens
            classification    input_ids (N, T), or    (N, C)           (N,)               cross-entropy
                              inputs_embeds (N, d)
            regression        the same                (N, o) means     (N,) or (N, o)     half the mean squared error
            vectors, softmax  inputs_embeds (N, w)    (N, C)           (N,)               cross-entropy
            and gaussian      the same                (N, o) means     (N,) or (N, o)     -log p; with an mlp state
                                                                                          half the mean squared error

        T are the tokens of a query, N the queries of all B tasks (N / B consecutive ones of each), V the vocabulary, C
        the classes, o the targets of a query. Labels of a classification are the state's class numbers.

        In an episode queries and labels have the leading axes (B, Q, ...), and so have the logits. In regime
        `"implicit"` the logits of an episode are (B, Q, A, V) for the tokens of free answers, (B, Q, C) for labels or
        classes, and means (B, Q, o) for real targets; the loss is the mean cross-entropy, or the mean of -log p for
        real targets.

        Args:
            input_ids, attention_mask, labels: the queries. Text uses `labels[:, 1:]`, as in transformers.
            task_state: the state of B tasks, or of one task for all queries. None: the predictor without a state, which
                is the bare base in regime `"parametric"` and base + LoRA in `"explicit"`. It has no slots and is not
                theta(0). Vectors, and labelled texts, have no predictor without a state; inside `disable_adapter()` the
                encoder of a linear state answers with its own head.
            chunk_input_ids, chunk_attention_mask, chunk_labels: chunks of an episode (B, K, C), or (B, K, n, T) and
                labels (B, K, n) for labelled examples; see `adapt`.
            inputs_embeds, chunk_inputs_embeds: vectors in place of ids, (N, d); in an episode (B, Q, d) and (B, K, n,
                d).
            label_input_ids, label_attention_mask: in an episode of regime `"implicit"`, the labels (B, C, L) that each
                task's answers are chosen from. None: free answers.
            objective: which states of an episode are scored in training, see `hf_iai.objectives`. None: unrolled.

        Returns:
            The output of transformers, with `logits` and, if there are labels, `loss`. The loss of an episode is that
            of the objective in training mode; in eval mode it is the loss of the queries after all chunks.

        Raises:
            ValueError: if both chunks and a state are given, the state belongs to another base or adapter, a batch size
                or shape does not fit, or a chunk or query is too long for the window.
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
        return reader.answer(state, ids, mask, labels, **_without_own(kwargs))

    def _predictor_without_state(self) -> AbstractContextManager[None]:
        """The bare base in regime parametric and inside `disable_adapter()`, else base + LoRA."""
        return base_of(self.model).lora(self._config.lora_answers and not self._disabled)

    def generate(self, input_ids: Tensor | None = None, task_state: TaskState | None = None, **kwargs) -> Tensor:
        """Generate with transformers' `generate` under a state. Returns the prompt and the new ids, (B, T + new).

        Args:
            input_ids: the prompts (B, T); an `attention_mask` may go with them.
            task_state: the state of B tasks, or of one task for all prompts. None: the predictor without a state.
            kwargs: options of transformers' `generate`.
        """
        self.task.check_can("generate")
        state, inputs = self._state_for(task_state), kwargs.pop("inputs", None)
        if input_ids is not None and inputs is not None:
            raise ValueError("generate got input_ids and inputs, which are the same: pass one of the two")
        input_ids = inputs if input_ids is None else input_ids
        if state is None:
            with self._predictor_without_state():
                return self.model.generate(input_ids, **kwargs)
        if input_ids is None:
            raise ValueError("generate under a state needs input_ids (B, T); inputs_embeds cannot be used with it")
        return self.reader.generate(state, input_ids, **_without_own(kwargs))

    @contextmanager
    def using(self, state: TaskState) -> Iterator[None]:
        """Answer all calls in this context under `state`, for code that cannot pass `task_state`. Contexts nest.

        A context holds for its own thread, or asyncio task. A thread that is started inside it knows nothing of it:
        pass `task_state` there, or start it as `Thread(target=contextvars.copy_context().run, args=(function,))`.

        Example:
            >>> with model.using(state):  # doctest: +SKIP
            ...     pipeline("text-generation", model=model, tokenizer=tokenizer)("def read(")
        """
        with self._asked_under(self.checked_state(state)):
            yield

    @contextmanager
    def _asked_under(self, state: TaskState | None) -> Iterator[None]:
        token = _using.set({**_using.get(), self: state})
        names = state.class_names[0] if state is not None and state.class_names and state.batch_size == 1 else ()
        try:
            with names_in_use(self.model.config, names):
                yield
        finally:
            _using.reset(token)

    @torch.no_grad()
    def state_effect(self, state: TaskState, query: Chunk) -> dict[str, float]:
        """Compare the answers with and without a state, to see whether the state is used.

        Args:
            state: the state of one task, or of as many tasks as the query has rows.
            query: `input_ids` (B, T), optionally `attention_mask` and `labels`; by default the ids are the labels.

        Returns:
            `kl`, the mean of KL(with state || without state) over the predicted tokens, in nats; `loss_with` and
            `loss_without`, in nats per token; and `loss_difference`, their difference. If it is negative, the state
            helps.
        """
        self.task.check_can("state_effect")
        ids = query["input_ids"]
        mask = query.get("attention_mask", torch.ones_like(ids))
        labels = query.get("labels", ids.masked_fill(mask == 0, NO_LOSS))
        with eval_mode(self):
            with_state = self.forward(ids, mask, labels, task_state=state)
            with self._asked_under(None):
                without = self.forward(ids, mask, labels)
        scored = labels[:, 1:] != NO_LOSS
        p, q = (out.logits[:, :-1][scored].float().log_softmax(-1) for out in (with_state, without))
        result = {"kl": (p.exp() * (p - q)).sum(-1).mean().item()}
        result |= {"loss_with": with_state.loss.item(), "loss_without": without.loss.item()}
        return result | {"loss_difference": result["loss_with"] - result["loss_without"]}

    # ---------------------------------------------------------------- checks

    def _state_for(self, task_state: TaskState | None) -> TaskState | None:
        """The state to answer under, on the model's device: the given one, or that of `using`."""
        if task_state is None and (in_use := _using.get().get(self)) is not None:
            self._refuse_when_disabled("a task state")
            return in_use
        return None if task_state is None else self.checked_state(task_state)

    def checked_state(self, state: TaskState) -> TaskState:
        """The state on the base's device.

        Raises:
            ValueError: if the state belongs to another base or adapter, or the model can use no state.
        """
        self.task.check_can("a task state")
        self._refuse_when_disabled("a task state")
        if state.identity != self.identity:
            raise ValueError(
                f"this state belongs to {state.identity.name!r}, the model is {self.identity.name!r}: "
                "read the chunks again with this model, or load the adapter that made the state"
            )
        return state.to(self.model.device)


def _without_own(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that go to the base; it keeps no cache of ours, so `use_cache` has no meaning.

    Raises:
        ValueError: for arguments that say where a text stands, which only the state can.
    """
    if given := [name for name in OWN_ARGUMENTS if kwargs.get(name) is not None]:
        raise ValueError(
            f"{given[0]} cannot be used under a task state, which stands before the text itself: pass the whole text, "
            "or let generate write it"
        )
    return {name: value for name, value in kwargs.items() if name not in (*OWN_ARGUMENTS, "use_cache")}
