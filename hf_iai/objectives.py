"""Training objectives: which states of an episode are scored, and where gradients flow.

Axes: B tasks, K chunks of C tokens, Q queries of T tokens each.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from .bases.base import Base
from .cores import EpisodeBatch, State
from .reader import Reader
from .signals.one_pass import LossOfReading, losses_of_reading
from .tensors import NO_LOSS, eval_mode

KINDS = ("unrolled", "truncated", "greedy")
SCORED = ("doubling", "last", "next")


@dataclass
class Objective:
    """Which states of an episode of K chunks are scored in training, and through which chunks gradients flow.

    The loss is the mean over the queries and the scored states. theta(0), the state before any chunk, is always scored.

    Args:
        kind: the objective. `"unrolled"`: gradients flow through all chunks, and `scored_states` are scored.
            `"truncated"`: gradients flow through a random window of `window` chunks, and the state after it is scored.
            `"greedy"`: the same with a window of one chunk, as in the paper. With the last two, memory does not grow
            with K.
        window: number of chunks with gradient, for `"truncated"`.
        scored_states: for `"unrolled"`. `"doubling"`: the states after the last 1, 2, 4, ..., K chunks. `"last"`: only
            the state after all K chunks, for queries that may be about any chunk. `"next"`: every state on the chunk
            after it, and the last one on the queries: (sum of the chunks' mean losses + number of queries x their
            mean loss) / (chunks + queries). A prefix+lora state reads the former anyway, so a step costs little more
            than reading, and no pass is kept until the end. Slots are constants.
        kl_weight: weight of KL(teacher || student) under the last state. The teacher is the bare base; it sees as much
            of the real context as its window holds.
        draw: the source of randomness. The trainer makes one from (seed, step) for every step, so all ranks draw alike.

    Raises:
        ValueError: for an unknown value, `"last"` or `"next"` without `"unrolled"`, or a window below 1.
    """

    kind: str = "unrolled"
    window: int = 4
    scored_states: str = "doubling"
    kl_weight: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"objective must be one of {list(KINDS)}, got {self.kind!r}")
        if self.scored_states not in SCORED:
            raise ValueError(f"scored_states must be one of {list(SCORED)}, got {self.scored_states!r}")
        if self.scored_states != "doubling" and self.kind != "unrolled":
            raise ValueError(f"scored_states={self.scored_states!r} needs objective='unrolled', got {self.kind!r}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")


def episode_loss(reader: Reader, objective: Objective, episode: EpisodeBatch, *, training: bool) -> Any:
    """The model output for the queries under the last state. Its `loss` is that of the objective.

    Args:
        reader: reads and answers with the adapter.
        objective: which states are scored in training.
        episode: B checked episodes.
        training: if False, queries are scored only after all chunks.
    """
    losses: list[LossOfReading] = []
    if training and objective.scored_states == "next":
        state, losses = _read_with_losses(reader, episode)
        states = [state]
    else:
        states = _states(reader, objective, episode, training=training)
    outputs = reader.score(states, episode)
    if losses:
        total, num = sum(loss.total for loss in losses), sum(loss.num_tasks for loss in losses)
        outputs.loss = (total + len(episode.ids) * outputs.loss) / (num + len(episode.ids))
    weight = objective.kl_weight if training and reader.task.has_teacher else 0.0
    if weight and episode.labels is not None and episode.chunks[0].shape[1]:
        loss = _teacher_loss(reader.base, outputs.logits, episode)
        outputs.loss = outputs.loss + weight * loss
    return outputs


def _read_with_losses(reader: Reader, episode: EpisodeBatch) -> tuple[State, list[LossOfReading]]:
    """The state after all chunks, and the loss of each of them before it was learned from."""
    if not reader.core.scores_reading:
        raise ValueError(
            "scored_states='next' takes the loss of each chunk that is read behind slots and under fast weights: use "
            "state_type='prefix+lora' and read_behind='state', or scored_states='doubling'"
        )
    if episode.labels is None:
        raise ValueError("scored_states='next' scores the queries too: give them labels")
    with losses_of_reading() as losses:
        state = reader.read_on(reader.core.begin(reader.base, episode), episode.chunks)
    return state, losses


def _states(reader: Reader, objective: Objective, episode: EpisodeBatch, *, training: bool) -> list[State]:
    """The states to score, ending with the last one."""
    start, chunks = reader.core.begin(reader.base, episode), episode.chunks
    num_chunks = chunks[0].shape[1]
    if not training:
        return [reader.read_on(start, chunks)]
    if num_chunks == 0:
        return [start]
    if objective.kind == "unrolled":
        powers = {2**i for i in range(num_chunks.bit_length())} if objective.scored_states == "doubling" else set()
        return [start, *reader.after_last(start, chunks, sorted(powers | {num_chunks}))]
    last = objective.draw.randint(1, num_chunks)
    first = max(0, last - (objective.window if objective.kind == "truncated" else 1))
    # The chunks right before the query: there the state is used later too.
    chunks = tuple(t[:, num_chunks - last :] for t in chunks)
    with torch.no_grad():
        earlier = reader.read_on(start, tuple(t[:, :first] for t in chunks)) if first else start
    return [start, reader.read_on(earlier, tuple(t[:, first:] for t in chunks))]


def _teacher_loss(base: Base, logits: Tensor, episode: EpisodeBatch) -> Tensor:  # (B * Q, T, V)
    """KL(teacher || student) over the predicted query tokens, in nats per token."""
    ids, mask, (chunk_ids, chunk_mask, _) = episode.ids, episode.mask, episode.chunks
    room = base.window - ids.shape[1]
    context = chunk_ids.flatten(1)[:, -room:].repeat_interleave(episode.num_queries, 0)  # (B * Q, R)
    context_mask = chunk_mask.flatten(1)[:, -room:].repeat_interleave(episode.num_queries, 0)
    full_ids, full_mask = torch.cat([context, ids], 1), torch.cat([context_mask, mask], 1)
    with torch.no_grad(), eval_mode(base.model), base.lora(False):
        teacher = base.answer(base.no_prefix(len(ids)), full_ids, full_mask).logits[:, -ids.shape[1] :]
    scored = episode.labels[:, 1:] != NO_LOSS
    student, teacher = (x[:, :-1][scored].float().log_softmax(-1) for x in (logits, teacher))
    return kl_div(student, teacher, reduction="batchmean", log_target=True)
