"""Accuracy of a classifier against the number of chunks read, beside classifiers that keep all examples.

Axes: S examples read, Q queries, d features.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from ..data import chunk_examples, chunk_vectors, text_tokens
from ..label_names import are_numbers
from .classifiers import CLASSIFIERS
from .curve import Curve
from .fine_tuning import lora_fine_tuning
from .labelled_curve import Value, checked_counts, labelled_curve, logits_after_each

FINE_TUNED = "lora_fine_tuning"
KNOWN = (*CLASSIFIERS, FINE_TUNED)


def accuracy_curve(
    model,
    episodes: Iterable[dict],
    num_chunks: Sequence[int],
    baselines: Sequence[str],
    *,
    tokenizer,
    chunk_size: int,
    seed: int = 0,
    method: str = "iai",
    show_progress: bool = True,
) -> Curve:
    """`evaluate_curve` for classes: whether each query is answered right.

    At n, the model has read the first n chunks of examples. The baselines in `hf_iai.evaluation.classifiers`
    (`nearest_class_mean`, `nearest_neighbours`, `logistic_regression`, `kernel_discriminant`, `random_ridge`,
    `sgd_rows`, `adam_rows`) are fitted to the features of all examples in these chunks; with `vector_width`, to the
    vectors themselves. `lora_fine_tuning` trains the encoder on the texts of these examples, anew for each n, which
    takes about a minute.

    A query whose class has not been met yet counts as wrong. With `vector_width` and classes that are numbers below
    `num_outputs`, such a query may be right by chance.

    Args:
        model: a PeftModel with an IAI adapter.
        episodes: rows `{"support": [{"text", "label"}...], "query": [...], optional "group": str}`; for vectors
            `{"vector", "label"}`, without a tokenizer.
        num_chunks: the values of n, at least 1.
        baselines, tokenizer, chunk_size, seed, method, show_progress: see `evaluate_curve`.

    Raises:
        ValueError: if a count is below 1, a baseline is unknown, there is no episode, a support fills too few chunks,
            or `lora_fine_tuning` is asked for on vectors.
    """
    counts = checked_counts(num_chunks, baselines, method, KNOWN)
    found = partial(_of_episode, model, method=method, baselines=baselines, tokenizer=tokenizer, chunk_size=chunk_size)
    options = {"chunk_size": chunk_size, "seed": seed, "metric": "accuracy", "show_progress": show_progress}
    return labelled_curve(episodes, counts, (method, *baselines), found, **options)


def _of_episode(
    model, episode: dict, counts: list[int], *, method: str, baselines: Sequence[str], tokenizer, chunk_size: int
) -> Iterator[Value]:
    """For each method and count, whether each query was answered right."""
    if FINE_TUNED in baselines and _are_vectors(episode["query"]):
        raise ValueError(f"{FINE_TUNED} trains the encoder on texts, but an episode holds vectors: leave it out")
    wanted = np.array([str(row["label"]) for row in episode["query"]])
    query = _inputs(episode["query"], tokenizer)
    rows = episode["support"][: counts[-1] * chunk_size]
    labels = [str(row["label"]) for row in rows]
    fitted = [name for name in baselines if name in CLASSIFIERS]
    seen = features_of(model, _inputs(rows, tokenizer)) if fitted else None
    asked = features_of(model, query) if fitted else None
    chunks = list(_chunks(rows, tokenizer, chunk_size))
    for n, answered in enumerate(_answers(model, chunks, query), 1):
        if n not in counts:
            continue
        yield (method, n), answered == wanted
        read = n * chunk_size
        names, y = np.unique(labels[:read], return_inverse=True)
        for name in fitted:
            yield (name, n), names[CLASSIFIERS[name](seen[:read], y, asked)] == wanted
        if FINE_TUNED in baselines:
            answers, _ = lora_fine_tuning(model, _inputs(rows[:read], tokenizer), torch.from_numpy(y), query)
            yield (FINE_TUNED, n), names[answers] == wanted


def _answers(model, chunks: list[dict], query: dict[str, torch.Tensor]) -> Iterator[np.ndarray]:  # (Q,)
    """The class names that the model answers with, after each chunk."""
    numbered = model.base_model.task.reads_vectors
    for chunk, logits in zip(chunks, logits_after_each(model, chunks, query), strict=True):
        names = chunk["label_names"]
        if numbered and are_numbers(names):  # the model keeps such numbers and may answer with any of them
            names = [*map(str, range(logits.shape[-1]))]
        yield np.array(names)[logits[:, : len(names)].argmax(-1).cpu()]


def features_of(model, inputs: dict[str, torch.Tensor]) -> np.ndarray:  # (N, d)
    """The features that a linear state is computed from; with `vector_width` the vectors themselves.

    Args:
        model: a PeftModel with an IAI adapter.
        inputs: `input_ids` and `attention_mask` (N, T), or `inputs_embeds` (N, d).
    """
    tuner = model.base_model
    if tuner.task.reads_vectors:
        return inputs["inputs_embeds"].cpu().numpy()
    return tuner.reader.features(inputs).cpu().numpy()


def _are_vectors(rows: Sequence[dict]) -> bool:
    return "vector" in rows[0]


def _vectors(rows: Sequence[dict]) -> torch.Tensor:  # (N, d)
    return torch.tensor(np.asarray([row["vector"] for row in rows]), dtype=torch.float32)


def _chunks(rows: Sequence[dict], tokenizer, chunk_size: int) -> Iterator[dict]:
    if _are_vectors(rows):
        return chunk_vectors(_vectors(rows), [row["label"] for row in rows], chunk_size)
    return chunk_examples(rows, tokenizer, chunk_size=chunk_size)


def _inputs(rows: Sequence[dict], tokenizer) -> dict[str, torch.Tensor]:
    """The model inputs of queries: vectors (Q, d), or ids and mask (Q, T)."""
    if _are_vectors(rows):
        return {"inputs_embeds": _vectors(rows)}
    return text_tokens([row["text"] for row in rows], tokenizer)
