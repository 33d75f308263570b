"""evaluate_curve: quality against the number of chunks read, next to baselines.

The kind of task says which metric its curve has, and `EVALUATORS` which function measures it.
"""

from collections.abc import Callable, Iterable, Sequence

from ..tensors import eval_mode
from .accuracy import accuracy_curve
from .curve import Curve
from .loss_curve import loss_curve
from .squared_error import squared_error_curve


def evaluate_curve(
    model,
    episodes: Iterable[dict],
    num_chunks: Sequence[int] | None = None,
    baselines: Sequence[str] | None = None,
    *,
    tokenizer=None,
    chunk_size: int | None = None,
    batch_size: int | None = None,
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
        batch_size: episodes read at once, 16 by default; changes speed and memory only. Not for labelled examples,
            which are read episode by episode.
        seed: the training seed of `model`, which labels its rows; `Curve.concat` joins several.
        method: name of the model's rows.
        static_model: another adapted model, trained to use its initial state alone.
        show_progress: show a progress bar, one step per batch.

    Raises:
        ValueError: for an option that has no meaning for the model, a size below 1, unknown baselines, a baseline that
            reads while `num_chunks` is only 0, a baseline of slots in regime implicit, no episode, an episode with too
            few chunks, with several queries, or text without a tokenizer. In regime implicit also for an episode with
            `labels`, or with a labelled token that is not among the last ones of its query.

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
    task = model.base_model.task
    chunk_size = model.max_chunk_size if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    options = {"tokenizer": tokenizer, "chunk_size": chunk_size, "batch_size": batch_size, "static_model": static_model}
    with eval_mode(model):
        return EVALUATORS[task.metric](
            model, episodes, num_chunks, baselines, **options, seed=seed, method=method, show_progress=show_progress
        )


def _curve_of_accuracy(model, episodes, num_chunks, baselines, *, batch_size, static_model, **options) -> Curve:
    _refuse(batch_size=batch_size, static_model=static_model)
    if model.base_model.task.reads_vectors:
        _refuse(tokenizer=options["tokenizer"])
    num_chunks = COUNTS_OF_EXAMPLES if num_chunks is None else num_chunks
    baselines = ("nearest_class_mean", "logistic_regression") if baselines is None else baselines
    return accuracy_curve(model, episodes, num_chunks, baselines, **options)


def _curve_of_squared_error(
    model, episodes, num_chunks, baselines, *, batch_size, static_model, tokenizer, **options
) -> Curve:
    _refuse(batch_size=batch_size, static_model=static_model, tokenizer=tokenizer)
    num_chunks = COUNTS_OF_EXAMPLES if num_chunks is None else num_chunks
    return squared_error_curve(model, episodes, num_chunks, ("ridge",) if baselines is None else baselines, **options)


def _refuse(**options) -> None:
    for name, given in options.items():
        if given is not None:
            raise ValueError(f"{name}={given!r:.60} has no meaning for this model's curve: leave it out")


COUNTS_OF_EXAMPLES = (1, 2, 5, 10, 20)
EVALUATORS: dict[str, Callable[..., Curve]] = {
    "loss": loss_curve,
    "accuracy": _curve_of_accuracy,
    "squared_error": _curve_of_squared_error,
}
