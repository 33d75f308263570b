"""Reader: reads chunks into a state and answers queries under it. All reading and answering goes through this class.

A state is a `TaskState`, or a `Prediction` for each query in regime `implicit`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .bases.base import Base
from .bases.compat import attention_received, key_value_shape, keys_values_of
from .cores import Core, EpisodeBatch, State, TokensCore
from .cores.core import Chunks
from .data.examples import Chunk
from .predictions.answers import Answers
from .predictions.queries import Queries
from .state import Identity, TaskState
from .tasks import Task
from .tasks.inputs import batched
from .tensors import eval_mode


class Reader:
    """Reads and answers with one adapter on one base.

    This is no `nn.Module`: it owns no parameters, and a new one is made for each use.

    Args:
        task: the kind of task.
        base: the pretrained model.
        core: what the adapter learns besides LoRA.
    """

    def __init__(self, task: Task, base: Base, core: Core) -> None:
        self.task, self.base, self.core = task, base, core
        self.inputs = task.inputs(base, core)

    def frozen(self) -> AbstractContextManager[None]:
        """A context in which passes run in eval mode, as for reading and answering outside of training."""
        return eval_mode(self.base.model, self.core)

    # ---------------------------------------------------------------- reading

    def initial_state(self, batch_size: int, identity: Identity) -> TaskState:
        """theta(0) for `batch_size` tasks."""
        with torch.no_grad(), self.frozen():
            return self.core.initial_state(self.base, batch_size, identity).clone()

    def states(self, chunks: Iterable[Chunk], first: Callable[[int], State], parallel: int = 1) -> Iterator[State]:
        """Yield the state after each chunk. Memory does not grow with the number of chunks.

        Args:
            chunks: any number of chunks.
            first: makes the state before the first chunk from the batch size of that chunk.
            parallel: how many chunks the base reads in one batch.
        """
        chunks, state = iter(chunks), None
        while group := [self.inputs.chunk(chunk) for chunk in islice(chunks, parallel)]:
            state = first(len(group[0][0])) if state is None else state
            with torch.no_grad(), self.frozen():
                states = self._read_group(group, state)
            state = states[-1]
            yield from states

    def state_of_cache(
        self, cache: Cache, mask: Tensor | None, attentions: Sequence[Tensor] | None, identity: Identity
    ) -> TaskState:
        """The state of B texts whose keys and values are in a cache; see `TaskState.from_past_key_values`."""
        layers, expected = keys_values_of(cache), key_value_shape(self.base.config)
        keys = layers[0][0]  # (B, H, T, D)
        if not isinstance(self.core, TokensCore):
            raise ValueError(
                f"{self.task.called(self.task.config)} keeps no tokens: use state_type='prefix+lora', or 'prefix' with "
                "accumulation='attention'"
            )
        if (len(layers), keys.shape[1], keys.shape[3]) != expected:
            raise ValueError(
                f"the cache has (layers, heads, width) {(len(layers), keys.shape[1], keys.shape[3])}, and the base "
                f"{expected}: pass a cache of this base"
            )
        shape = (len(keys), keys.shape[2])
        mask = torch.ones(shape, dtype=torch.long, device=keys.device) if mask is None else mask.long()
        if mask.shape != shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, and the cache {shape} texts and tokens")
        received = None if attentions is None else attention_received(attentions, keys.shape[1])
        with torch.no_grad(), self.frozen():
            return self.core.of_cache(self.base, self.initial_state(len(keys), identity), layers, mask, received)

    def _read_group(self, group: list[tuple[Tensor, ...]], state: State) -> list[State]:
        group, classes = self.inputs.align_labels(group, state)
        batch, states = len(group[0][0]), []
        evidence = self.core.read(self.base, *batched(group))
        for number, met in enumerate(classes):
            part = {name: t[number * batch : (number + 1) * batch] for name, t in evidence.items()}
            state = self.core.step(self.base, self.core.with_classes(state, met), part)
            states.append(state)
        return states

    # ---------------------------------------------------------------- in training

    def read_on(self, state: State, chunks: Chunks) -> State:
        """The state after K more chunks (B, K, C), read one after the other. Gradients flow if they are enabled."""
        for ids, mask, labels in zip(*(t.unbind(1) for t in chunks), strict=True):
            state = self.core.step(self.base, state, self.core.read(self.base, ids, mask, labels))
        return state

    def after_last(self, state: State, chunks: Chunks, counts: list[int]) -> list[State]:
        """The states after the last n chunks, for each n of `counts`. All chunks are read in one batch."""
        batch, num_chunks = chunks[0].shape[:2]
        evidence = self.core.read(self.base, *(t.flatten(0, 1) for t in chunks))  # (B * K, ...)
        evidence = {name: t.unflatten(0, (batch, num_chunks)).unbind(1) for name, t in evidence.items()}
        evidence = [dict(zip(evidence, chunk, strict=True)) for chunk in zip(*evidence.values(), strict=True)]
        states = []
        for count in counts:
            after = state
            for chunk in evidence[num_chunks - count :]:
                after = self.core.step(self.base, after, chunk)
            states.append(after)
        return states

    def score(self, states: list[State], episode: EpisodeBatch) -> Any:
        """The model output: `loss` over the queries under all states, `logits` under the last one."""
        with self.base.lora(self.task.config.lora_answers):
            return self.core.score(self.base, states, episode)

    # ---------------------------------------------------------------- answering

    def answer(self, state: TaskState, ids: Tensor, mask: Tensor, labels: Tensor | None, **kwargs: Any) -> Any:
        """The model output for queries (N, T) under a task state."""
        self.inputs.check_query(ids, state.batch_size)
        labels = self.inputs.query_labels(labels, ids, mask)
        with self.base.lora(self.task.config.lora_answers):
            return self.core.answer(self.base, state, ids, mask, labels, **kwargs)

    def answers_after(
        self, chunks: Iterable[Chunk], queries: Queries, answers: Answers, *, with_start: bool
    ) -> Iterator[Tensor]:
        """The answers of queries after each chunk, in regime implicit; `with_start`: yhat(0) comes first."""
        with torch.no_grad(), self.frozen():
            start = self.core.first(self.base, queries, answers)
            found = self.core.output(self.base, start)
        if with_start:
            yield found
        for prediction in self.states(chunks, lambda batch_size: start):
            with torch.no_grad(), self.frozen():
                found = self.core.output(self.base, prediction)
            yield found

    def generate(self, state: TaskState, ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The prompt and new token ids, (B, T + new). Without a mask, padding is found as transformers finds it."""
        self.inputs.check_query(ids, state.batch_size)
        mask = self.base.mask_of_prompts(ids, kwargs) if attention_mask is None else attention_mask
        new = self.base.setting(kwargs, "max_new_tokens") or self.base.setting(kwargs, "max_length") or sys.maxsize
        if self.base.packing(mask, self.core.state.num_slots_in_front + new) is None:
            return self._generate(state, ids, mask, **kwargs)
        return self._generate_by_length(state, ids, mask, kwargs)

    def _generate(self, state: TaskState, ids: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        with (
            torch.no_grad(),
            self.base.lora(self.task.config.lora_answers),
            self.core.under(self.base, state) as prefix,
        ):
            return self.base.generate(prefix, ids, mask, **kwargs)

    def _generate_by_length(self, state: TaskState, ids: Tensor, mask: Tensor, kwargs: dict) -> Tensor:
        """Generate from prompts of one length at a time, so that no padding stands between the slots and a text."""
        setting = partial(self.base.setting, kwargs)
        if setting("return_dict_in_generate"):
            raise ValueError(
                f"{self.base.config.model_type!r} generates from prompts of one length at a time, which "
                "return_dict_in_generate=True would show: give prompts of one length, or leave it out"
            )
        for name, new in (
            ("max_length", "max_new_tokens"),
            ("min_length", "min_new_tokens"),
        ):  # which count padding too
            if (length := setting(name)) and setting(new) is None:
                if name == "max_length" and length <= ids.shape[1]:
                    raise ValueError(f"max_length={length}, but the prompts have {ids.shape[1]} tokens: raise it")
                kwargs[new] = max(0, length - ids.shape[1])
            kwargs.pop(name, None)
        ends = setting("eos_token_id") or 0
        pad = next(x for x in (setting("pad_token_id"), ends[0] if isinstance(ends, list) else ends) if x is not None)
        several = setting("num_return_sequences") or 1
        rows: list[Tensor] = [ids[0]] * (len(ids) * several)
        lengths = (mask != 0).sum(1)
        for length in lengths.unique().tolist():
            group = (lengths == length).nonzero()[:, 0]
            prompts = torch.stack([ids[row][mask[row] != 0] for row in group])  # (b, length)
            own = state if state.batch_size == 1 else state.map(itemgetter(group))
            found = self._generate(own, prompts, torch.ones_like(prompts), **kwargs)
            padding = found.new_full((len(found), ids.shape[1] - length), pad)
            for number, row in enumerate(torch.cat([padding, found], 1)):
                rows[int(group[number // several]) * several + number % several] = row
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    def features(self, inputs: Chunk) -> Tensor:  # (N, d)
        """The features of texts (N, T) or vectors (N, d) that a linear state is computed from."""
        ids, mask = self.inputs.on_device(inputs)
        with torch.no_grad(), self.frozen():
            return self.core.features(self.base, ids, mask)
