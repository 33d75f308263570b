"""evaluate_curve: the loss of queries against the number of chunks read, next to baselines."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import EpisodeCollator
from .accuracy import accuracy_curve
from .bootstrap import groups_of
from .curve import Curve, NumChunks
from .losses import Batch, bare_base_losses, refined_losses, state_losses
from .squared_error import squared_error_curve

BASELINES = ("no_context", "fewer_shots", "last_chunk", "full_context")
_NEEDS_SLOTS = "fewer_shots"  # as many tokens as the state has slots
_NEED_CHUNKS = ("fewer_shots", "last_chunk", "full_context")

# (method, number of chunks) -> what turns a batch into its (B, T - 1) losses
Scorers = dict[tuple[str, NumChunks], Callable[[Batch], Tensor]]


def evaluate_curve(
    model,
    episodes: Iterable[dict],
    num_chunks: Sequence[int] | None = None,
    baselines: Sequence[str] | None = None,
    *,
    tokenizer=None,
    chunk_size: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    method: str = "iai",
    static_model=None,
    show_progress: bool = True,
) -> Curve:
    """Losses of each episode's query after the n chunks right before it, for every n.

    The method's value at n is the loss under the state that read these n chunks and nothing else; at 0 it is
    `model.initial_state()`. All methods are scored on the same query tokens. The baselines:

    - `no_context`: the bare base sees the query alone;
    - `fewer_shots`: the bare base sees the m = `model.num_slots` tokens before the query;
    - `last_chunk`: the state that read the last chunk only;
    - `full_context`: the bare base sees n chunks. Counts that do not fit its window are replaced by one that fills it,
      reported under the number of chunks that it really sees;
    - `static_state`, with `static_model`: a trained initial state of the same size that reads nothing.

    In regime implicit it is the loss of the query's answer, its labelled tokens, as the n chunks have refined it; token
    a of several is predicted behind the prediction of those before it, where the bare base sees the tokens themselves.
    There are no slots, and no `fewer_shots`; label sets of episodes are refused.

    For a model with a linear state, or of vectors in any regime, the curve is of accuracy or, of real targets, of the
    squared error, after the first n chunks of `chunk_size` labelled examples (20 by default): texts or given vectors,
    for real targets vectors alone. Classifiers and regressions of the same features stand beside it; see
    `hf_iai.evaluation.accuracy` and `squared_error`.

    Args:
        model: an adapted model (a PeftModel of IAI).
        episodes: rows `{"support": [...], "query": [one example], optional "group": str}`; the support fills at least
            `max(num_chunks)` chunks. Intervals are clustered by `group`, each episode its own where there is none.
        num_chunks: counts of chunks to evaluate at, in any order; None: 0, 1, 2, 4, 8, 16, or 1, 2, 5, 10, 20.
        baselines: names out of the list above (`static_state` follows from `static_model`); None: all four; nearest
            class mean and logistic regression; or ridge.
        tokenizer: needed unless the examples are tokenised (`{"input_ids"}`).
        chunk_size: C, tokens per chunk; `model.max_chunk_size` by default.
        batch_size: episodes read at once; changes speed and memory only.
        seed: the training seed of `model`, which labels its rows; `Curve.concat` joins several.
        method: name of the model's rows.
        static_model: another adapted model, trained to use its initial state alone.
        show_progress: show a progress bar, one step per batch.

    Raises:
        ValueError: for unknown baselines, one that reads while `num_chunks` is only 0, or one of slots in regime
            implicit, no episode, an episode with too few chunks, with several queries or, in regime implicit, with
            `labels` or a labelled token that is not among its query's last, or text without a tokenizer.

    Example:
        >>> from datasets import Dataset
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_iai import IAIConfig
        >>> from hf_iai.evaluation import evaluate_curve
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64))
        >>> model = get_peft_model(base, IAIConfig(task_type="CAUSAL_LM", num_state_tokens=4))
        >>> episode = {"support": [{"input_ids": list(range(16))}], "query": [{"input_ids": list(range(16, 24))}]}
        >>> episodes = Dataset.from_list([episode])
        >>> curve = evaluate_curve(model, episodes, (0, 1, 2), chunk_size=8, show_progress=False)
        >>> sorted(curve.losses)[0], curve.losses["iai", 2, 0].shape
        (('fewer_shots', 1, 0), (1, 7))
    """
    config = model.active_peft_config
    if config.state_type == "linear" or config.vector_width is not None:
        names = {"seed": seed, "method": method, "show_progress": show_progress}
        with _eval_mode([model]):
            return _curve_of_examples(model, episodes, num_chunks, baselines, tokenizer, chunk_size, **names)
    implicit = config.regime == "implicit"
    num_chunks = (0, 1, 2, 4, 8, 16) if num_chunks is None else num_chunks
    if baselines is None:
        baselines = [name for name in BASELINES if not (implicit and name == _NEEDS_SLOTS)]
    if implicit and (_NEEDS_SLOTS in baselines or static_model is not None):
        raise ValueError(
            f"a prediction of regime='implicit' has no slots: leave out baseline {_NEEDS_SLOTS!r} and static_model="
        )
    counts = _checked_counts(num_chunks, baselines, static_model, method)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    episodes = list(episodes)
    if not episodes:
        raise ValueError("there is no episode to evaluate on")
    chunk_size = model.max_chunk_size if chunk_size is None else chunk_size
    tokenizer = _NoTokenizer() if tokenizer is None else tokenizer
    collate = EpisodeCollator(tokenizer, chunk_size, max_chunks=counts[-1])
    device = next(model.parameters()).device
    batches = []
    for start in range(0, len(episodes), batch_size):
        batch = collate(episodes[start : start + batch_size])
        _check_batch(batch, start, counts[-1])
        batches.append(batch)
    room = model.window - max(batch["input_ids"].shape[-1] for batch in batches)

    losses = refined_losses if implicit else state_losses
    scorers: Scorers = {(method, n): partial(losses, model, num_chunks=n) for n in counts}
    scorers |= _baseline_scorers(model, losses, baselines, counts, chunk_size, room)
    if static_model is not None:
        scorers["static_state", 0] = partial(state_losses, static_model, num_chunks=0)
    models = [model] if static_model is None else [model, static_model]
    found: dict[tuple[str, NumChunks], list[Tensor]] = {key: [] for key in scorers}
    with _eval_mode(models), torch.no_grad():
        for batch in tqdm(batches, "evaluating", disable=not show_progress):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            for key, score in scorers.items():
                found[key].append(score(batch).cpu())
    return Curve({(*key, seed): _join(rows) for key, rows in found.items()}, groups_of(episodes))


def _curve_of_examples(
    model, episodes, num_chunks: Sequence[int] | None, baselines: Sequence[str] | None, tokenizer, chunk_size, **names
) -> Curve:
    num_chunks = (1, 2, 5, 10, 20) if num_chunks is None else num_chunks
    names["chunk_size"] = model.max_chunk_size if chunk_size is None else chunk_size
    if model.active_peft_config.likelihood == "gaussian":
        return squared_error_curve(model, episodes, num_chunks, ("ridge",) if baselines is None else baselines, **names)
    baselines = ("nearest_class_mean", "logistic_regression") if baselines is None else baselines
    return accuracy_curve(model, episodes, num_chunks, baselines, tokenizer=tokenizer, **names)


def _baseline_scorers(
    model, losses: Callable, baselines: Sequence[str], counts: list[int], chunk_size: int, room: int
) -> Scorers:
    """`losses(model, batch, num_chunks)` are those after reading."""
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
    """0, the counts that leave the query its place, and what fills the window if some do not."""
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
    """Stands in where all examples are tokenised; whatever only a tokenizer can do is then an error that says so."""

    eos_token_id, pad_token_id = None, 0

    def decode(self, ids: list[int]) -> str:
        return f"tokens {ids}"

    def __call__(self, *args, **kwargs):
        raise ValueError("the episodes hold text: pass tokenizer=, or examples that are tokenised already")

    def __getattr__(self, name: str):
        return self()


@contextmanager
def _eval_mode(models: list[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
