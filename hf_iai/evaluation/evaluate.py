"""evaluate_curve: quality against the number of chunks read, beside baselines.

The kind of task names the metric of its curve. `EVALUATORS` maps the metric to the function that measures it.
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
    """Measure the quality of a model after reading n chunks, for several n, beside baselines.

    What is measured depends on the kind of task:

        kind of task                        value per query                         default n
        text                                loss of each token, nats                0, 1, 2, 4, 8, 16
        regime implicit, text               loss of each token of the answer        0, 1, 2, 4, 8, 16
        classification, vectors (classes)   1 if answered right, else 0             1, 2, 5, 10, 20
        regression, vectors (targets)       squared error                           1, 2, 5, 10, 20

    For text, the model's value at n is its loss under the state that has read only the n chunks right before the query;
    at n = 0 that is `model.initial_state()`. All methods are scored on the same query tokens. The baselines are:

    - `no_context`: the bare base sees the query alone.
    - `fewer_shots`: the bare base also sees the m = `model.num_slots` tokens before the query.
    - `last_chunk`: the state that has read the last chunk only.
    - `full_context`: the bare base sees n chunks of real text. If n chunks do not fit its window, it sees as many
      tokens as fit. This row then has the number of chunks that it really sees, which may be a fraction.
    - `static_state`, with `static_model`: a trained initial state of the same size that reads nothing.

    In regime implicit the answer of a query are its labelled tokens. Each of several answer tokens is predicted given
    the *prediction* of the tokens before it, while the bare base sees these tokens themselves. There are no slots, so
    there is no `fewer_shots`. Episodes with a set of labels are refused.

    For labelled examples, n chunks are the first n chunks of `chunk_size` examples. The baselines are classifiers or
    regressions fitted to the same features of these examples; see `hf_iai.evaluation.accuracy` and
    `hf_iai.evaluation.squared_error`. Examples with real targets must be vectors.

    Args:
        model: a PeftModel with an IAI adapter.
        episodes: rows `{"support": [...], "query": [one example], optional "group": str}`. Labelled episodes may have
            several queries. The support must fill `max(num_chunks)` chunks. Confidence intervals are clustered by
            `group`; an episode without one is a group of its own.
        num_chunks: the values of n, in any order. None: the defaults above.
        baselines: names of baselines (`static_state` only needs `static_model`). None: the first four for text (no
            `fewer_shots` in regime implicit), `nearest_class_mean` and `logistic_regression` for classes, `ridge` for
            real targets.
        tokenizer: the base's tokenizer; not needed if the examples are tokenised (`{"input_ids"}`).
        chunk_size: tokens or examples per chunk. None: `model.usual_chunk_size`.
        batch_size: episodes per batch, for text. It changes only speed and memory. None: 16.
        seed: the training seed of `model`, which labels its rows. `Curve.concat` joins curves of several seeds.
        method: the name of the model's rows.
        static_model: another adapted model, trained to use only its initial state.
        show_progress: whether to show a progress bar.

    Returns:
        A `Curve`, which prints, plots and compares the methods.

    Raises:
        ValueError: if an option has no meaning for the model, a size is below 1, a baseline is unknown, a baseline
            reads chunks while `num_chunks` is only 0, `fewer_shots` is asked for in regime implicit, there is no
            episode, an episode has too few chunks or several queries of text, or there is text but no tokenizer. In
            regime implicit also if an episode has `labels`, or a labelled token of a query is not among its last ones.

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
    chunk_size = model.usual_chunk_size if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    options = {"tokenizer": tokenizer, "chunk_size": chunk_size, "batch_size": batch_size, "static_model": static_model}
    if task.metric not in EVALUATORS:
        raise ValueError(f"no curve of the metric {task.metric!r}; EVALUATORS has {list(EVALUATORS)}: add one")
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
