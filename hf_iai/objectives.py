"""Which states of an episode the outer loss is taken under, and what gets gradient.

Axes: B tasks, K chunks of C tokens, Q queries of T tokens each, S states that are scored.
"""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers.modeling_outputs import CausalLMOutput

from .predictions.prediction import Prediction
from .state import TaskState

# ids, mask and labels, (B, K, C) each; of a linear state (B, K, n, T) twice, and (B, K, n); vectors (B, K, n, 1, d) for
# ids, and real targets (B, K, n, o)
Chunks = tuple[Tensor, Tensor, Tensor]
State = TaskState | Prediction
KINDS = ("unrolled", "truncated", "greedy")
SCORED = ("doubling", "last")


@dataclass
class Objective:
    """How an episode of K chunks becomes a loss; theta(0) is always scored too.

    Args:
        kind: `"unrolled"`: gradient to every chunk, loss under `scored_states`. `"truncated"`: one window of
            `window` chunks, drawn, gets gradient, loss after it. `"greedy"`: a window of one, the paper's objective;
            memory does not grow with K in the last two.
        window: chunks with gradient, `"truncated"` only.
        scored_states: of `"unrolled"`; `"doubling"`: loss after the last 1, 2, 4, ..., K chunks; `"last"`: after all K
            alone, for queries that may be about any chunk.
        kl_weight: weight of KL(teacher || student) under the last state; the teacher is the bare base that sees as
            much of the real context as its window holds.
        draw: source of randomness; the trainer sets it from (seed, step), equal on all ranks.
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
        if self.scored_states == "last" and self.kind != "unrolled":
            raise ValueError(f"scored_states='last' needs objective='unrolled', got {self.kind!r}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")


def episode_loss(
    model,
    objective: Objective,
    ids: Tensor,  # (B * Q, T), or (B * Q, 1, d) of vectors
    mask: Tensor,
    labels: Tensor | None,  # (B * Q, T), or (B * Q,) or (B * Q, o) of a linear state
    chunk_ids: Tensor,  # (B, K, C)
    chunk_mask: Tensor,
    chunk_labels: Tensor,
):
    """transformers' output of the queries under the last state; its `loss` is the objective's."""
    start = model.core.first_of_episode(model._base, len(chunk_ids), chunk_labels, labels)
    states = _states(model, objective, start, (chunk_ids, chunk_mask, chunk_labels))
    scored = len(states)
    outputs = model._answer(
        TaskState.stack(states),
        torch.cat([ids] * scored),
        torch.cat([mask] * scored),
        None if labels is None else torch.cat([labels] * scored),
    )
    outputs.logits = outputs.logits[-len(ids) :]
    if model.training and objective.kl_weight and labels is not None and chunk_ids.shape[1]:
        loss = _teacher_loss(model, outputs.logits, ids, mask, labels, chunk_ids, chunk_mask)
        outputs.loss = outputs.loss + objective.kl_weight * loss
    return outputs


def refinement_loss(
    model,
    objective: Objective,
    start: Prediction,  # of B * Q queries
    targets: Tensor,  # (B * Q, S), or (B * Q, S, o) of real targets
    chunks: Chunks,
) -> CausalLMOutput:
    """`logits` (B * Q, ...) of the last prediction; `loss` is the objective's, over yhat(0) and those it scores."""
    states = _states(model, objective, start, chunks)
    logits = [model.core.logits(model._base, state) for state in states]
    losses = [start.answers.loss(one, targets) for one in logits]
    return CausalLMOutput(loss=torch.stack(losses).mean(), logits=start.answers.output(logits[-1]))


def _states(model, objective: Objective, start: State, chunks: Chunks) -> list[State]:
    """The states to score, the last one last."""
    base, core = model._base, model.core
    num_chunks = chunks[0].shape[1]
    if not model.training:
        return [_read_on(core, base, start, chunks)]
    if num_chunks == 0:
        return [start]
    if objective.kind == "unrolled":
        powers = {2**i for i in range(num_chunks.bit_length())} if objective.scored_states == "doubling" else set()
        return [start, *_unrolled(core, base, start, chunks, sorted(powers | {num_chunks}))]
    last = objective.draw.randint(1, num_chunks)
    first = max(0, last - (objective.window if objective.kind == "truncated" else 1))
    # The chunks that lie right before the query: the state is then as old as it will be in use.
    chunks = tuple(t[:, num_chunks - last :] for t in chunks)
    with torch.no_grad():
        earlier = _read_on(core, base, start, tuple(t[:, :first] for t in chunks)) if first else start
    return [start, _read_on(core, base, earlier, tuple(t[:, first:] for t in chunks))]


def _read_on(core, base, state: State, chunks: Chunks) -> State:
    for ids, mask, labels in zip(*(t.unbind(1) for t in chunks), strict=True):
        state = core.step(base, state, core.read(base, ids, mask, labels))
    return state


def _unrolled(core, base, start: State, chunks: Chunks, counts: list[int]) -> list[State]:
    """States of the last n chunks for each n of `counts`; what does not depend on the state is read in one batch."""
    batch, num_chunks = chunks[0].shape[:2]
    evidence = core.read(base, *(t.flatten(0, 1) for t in chunks))  # (B * K, ...)
    evidence = {name: t.unflatten(0, (batch, num_chunks)).unbind(1) for name, t in evidence.items()}
    evidence = [dict(zip(evidence, chunk, strict=True)) for chunk in zip(*evidence.values(), strict=True)]
    states = []
    for count in counts:
        state = start
        for chunk in evidence[num_chunks - count :]:
            state = core.step(base, state, chunk)
        states.append(state)
    return states


def _teacher_loss(model, logits, ids, mask, labels, chunk_ids, chunk_mask) -> Tensor:
    """KL(teacher || student) over the predicted query tokens, nats per token."""
    queries = len(ids) // len(chunk_ids)
    room = model.window - ids.shape[1]
    context = chunk_ids.flatten(1)[:, -room:].repeat_interleave(queries, 0)  # (B * Q, R)
    context_mask = chunk_mask.flatten(1)[:, -room:].repeat_interleave(queries, 0)
    full_ids, full_mask = torch.cat([context, ids], 1), torch.cat([context_mask, mask], 1)
    base = model._base
    with torch.no_grad(), model._eval_mode(), base.lora(False):
        teacher = base.answer(base.no_prefix(len(ids)), full_ids, full_mask).logits[:, -ids.shape[1] :]
    scored = labels[:, 1:] != -100
    student, teacher = (x[:, :-1][scored].float().log_softmax(-1) for x in (logits, teacher))
    return kl_div(student, teacher, reduction="batchmean", log_target=True)
