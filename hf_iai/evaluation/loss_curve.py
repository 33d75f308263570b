"""Loss of every query token against the number of chunks read, beside the bare base."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import EpisodeCollator
from ..tensors import eval_mode
from .bootstrap import groups_of
from .curve import Curve, NumChunks
from .losses import Batch, bare_base_losses, refined_losses, state_losses

BASELINES = ("no_context", "fewer_shots", "last_chunk", "full_context")
_NEEDS_SLOTS = "fewer_shots"  # sees as many tokens as the state has slots
_NEED_CHUNKS = ("fewer_shots", "last_chunk", "full_context")

# (method, number of chunks) -> function that gives the losses (B, T - 1) of a batch
Scorers = dict[tuple[str, NumChunks], Callable[[Batch], Tensor]]


def loss_curve(
    model,
    episodes: Iterable[dict],
    num_chunks: Sequence[int] | None,
    baselines: Sequence[str] | None,
    *,
    tokenizer,
    chunk_size: int,
    batch_size: int | None,
    seed: int,
    method: str,
    static_model,
    show_progress: bool,
) -> Curve:
    """`evaluate_curve` for models that answer in tokens; see there."""
    has_slots = model.base_model.task.makes_states
    num_chunks = (0, 1, 2, 4, 8, 16) if num_chunks is None else num_chunks
    if baselines is None:
        baselines = [name for name in BASELINES if has_slots or name != _NEEDS_SLOTS]
    if not has_slots and (_NEEDS_SLOTS in baselines or static_model is not None):
        raise ValueError(
            f"a prediction of regime='implicit' has no slots: leave out baseline {_NEEDS_SLOTS!r} and static_model="
        )
    counts = _checked_counts(num_chunks, baselines, static_model, method)
    batch_size = 16 if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    episodes = list(episodes)
    if not episodes:
        raise ValueError("there is no episode to evaluate on")
    batches = _batches(episodes, tokenizer, chunk_size, batch_size, counts[-1])
    room = model.window - max(batch["input_ids"].shape[-1] for batch in batches)

    losses = state_losses if has_slots else refined_losses
    scorers: Scorers = {(method, n): partial(losses, model, num_chunks=n) for n in counts}
    scorers |= _baseline_scorers(model, losses, baselines, counts, chunk_size, room)
    if static_model is not None:
        scorers["static_state", 0] = partial(state_losses, static_model, num_chunks=0)
    found: dict[tuple[str, NumChunks], list[Tensor]] = {key: [] for key in scorers}
    device = next(model.parameters()).device
    with eval_mode(model, *([] if static_model is None else [static_model])), torch.no_grad():
        for batch in tqdm(batches, "evaluating", disable=None if show_progress else True):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            for key, score in scorers.items():
                found[key].append(score(batch).cpu())
    return Curve({(*key, seed): _join(rows) for key, rows in found.items()}, groups_of(episodes))


def _batches(episodes: list[dict], tokenizer, chunk_size: int, batch_size: int, most_chunks: int) -> list[Batch]:
    collate = EpisodeCollator(_NoTokenizer() if tokenizer is None else tokenizer, chunk_size, max_chunks=most_chunks)
    batches = []
    for start in range(0, len(episodes), batch_size):
        batch = collate(episodes[start : start + batch_size])
        _check_batch(batch, start, most_chunks)
        batches.append(batch)
    return batches


def _baseline_scorers(
    model, losses: Callable, baselines: Sequence[str], counts: list[int], chunk_size: int, room: int
) -> Scorers:
    """The scorers of the baselines. `losses(model, batch, num_chunks)` gives the losses after reading chunks."""
    scorers: Scorers = {}
    if "no_context" in baselines:
        scorers["no_context", 0] = partial(bare_base_losses, model, num_tokens=0)
    if "fewer_shots" in baselines:
        scorers["fewer_shots", 1] = partial(bare_base_losses, model, num_tokens=model.num_slots)
    if "last_chunk" in baselines:
        scorers["last_chunk", 1] = partial(losses, model, num_chunks=1)
    if "full_context" in baselines:
        for n in _full_context_counts(counts, chunk_size, room):
            scorers["full_context", n] = partial(bare_base_losses, model, num_tokens=round(n * chunk_size))
    return scorers


def _full_context_counts(counts: list[int], chunk_size: int, room: int) -> list[NumChunks]:
    """0, the counts that fit the window with the query, and what fills it exactly if some count does not fit."""
    fitting: list[NumChunks] = sorted({0, *(n for n in counts if n * chunk_size <= room)})
    filled = room // chunk_size if room % chunk_size == 0 else room / chunk_size
    return [*fitting, filled] if counts[-1] > filled > fitting[-1] else fitting


def _checked_counts(num_chunks: Sequence[int], baselines: Sequence[str], static_model, method: str) -> list[int]:
    counts = sorted(set(num_chunks))
    if not counts or counts[0] < 0:
        raise ValueError(f"num_chunks must be one or more counts of at least 0, got {list(num_chunks)}")
    if "static_state" in baselines and static_model is None:
        raise ValueError("baseline 'static_state' needs static_model=, a model trained to use its initial state alone")
    known = (*BASELINES, "static_state")
    unknown = [name for name in baselines if name not in known]
    if unknown:
        raise ValueError(f"unknown baselines {unknown}; use any of {list(known)}")
    if method in known:
        raise ValueError(f"method={method!r} is the name of a baseline: choose another")
    reading = [name for name in baselines if name in _NEED_CHUNKS]
    if reading and counts[-1] == 0:
        raise ValueError(f"baselines {reading} read chunks, but num_chunks is only 0: leave them out or add a count")
    return counts


def _check_batch(batch: Batch, start: int, needed: int) -> None:
    real = batch["chunk_attention_mask"].any(-1).sum(1)  # (B,)
    if (real < needed).any():
        row = int((real < needed).nonzero()[0])
        raise ValueError(
            f"the support of episode {start + row} fills {int(real[row])} chunks, but {needed} are needed: "
            "use longer episodes, a smaller chunk_size or fewer num_chunks"
        )
    if "label_input_ids" in batch:
        raise ValueError(
            "episodes have labels to choose among, and a curve scores free answers: leave `labels` out, or see the "
            "losses that IAITrainer.evaluate logs"
        )
    if batch["input_ids"].shape[1] != 1:
        raise ValueError(
            f"an episode among {start}..{start + len(real) - 1} has {batch['input_ids'].shape[1]} queries, expected 1: "
            "make an episode of each query"
        )


def _join(batches: list[Tensor]) -> np.ndarray:  # (E, T - 1), NaN after the end of shorter queries
    longest = max(losses.shape[1] for losses in batches)
    padded = [nn.functional.pad(losses, (0, longest - losses.shape[1]), value=float("nan")) for losses in batches]
    return torch.cat(padded).numpy()


class _NoTokenizer:
    """Takes the place of a tokenizer if all examples are tokenised. Any call that needs a real one is an error."""

    eos_token_id, pad_token_id = None, 0

    def decode(self, ids: list[int]) -> str:
        return f"tokens {ids}"

    def __call__(self, *args, **kwargs):
        raise ValueError("the episodes hold text: pass tokenizer=, or examples that are tokenised already")

    def __getattr__(self, name: str):
        return self()
