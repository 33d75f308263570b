"""The kinds of tasks, as tests need them: what a base, a chunk and a query are, and what can be done with a model.

Axes: N queries, n examples of a chunk, T tokens of a text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from samples import vector_examples, vector_queries
from tiny import (
    CLASSES,
    OUTPUTS,
    SLOTS,
    VECTOR_WIDTH,
    ids,
    make_base,
    make_classifier,
    make_encoder,
    make_model,
    make_vector_base,
    make_vector_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from hf_iai import batch_chunks, export_classifier, export_to_peft, vector_base

LENGTH = 6  # tokens of a query or of a labelled text

Inputs = dict[str, Tensor]
Stream, Queries = Callable[[int, Sequence[int]], list[Inputs]], Callable[[int, int], Inputs]


# ---------------------------------------------------------------- chunks of one task, and queries


def text_stream(seed: int, sizes: Sequence[int]) -> list[Inputs]:
    """Every third token has no loss."""
    stream = []
    for number, size in enumerate(sizes):
        text = ids(1, size, seed=10 * seed + number)
        labels = text.clone()
        labels[:, ::3] = -100
        stream.append({"input_ids": text, "attention_mask": torch.ones_like(text), "labels": labels})
    return stream


def text_queries(num: int, seed: int) -> Inputs:
    text = ids(num, LENGTH, seed=100 + seed)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text}


def text_questions(num: int, seed: int) -> Inputs:
    """The last two tokens are the answer."""
    queries = text_queries(num, seed)
    return queries | {"labels": queries["labels"].index_fill(1, torch.arange(LENGTH - 2), -100)}


def _labelled_texts(num: int, seed: int) -> Inputs:
    """Texts (num, T) of different length."""
    text = torch.randint(5, 400, (num, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(LENGTH) < LENGTH - torch.arange(num).unsqueeze(1) % 3).long()
    return {"input_ids": text, "attention_mask": mask}


def _labels(likelihood: str, num: int, seed: int) -> Tensor:
    return vector_examples(num, likelihood, seed)[1].roll(seed, 0)


def _names(likelihood: str) -> dict[str, tuple[str, ...]]:
    return {} if likelihood == "gaussian" else {"label_names": tuple(f"class {c}" for c in range(CLASSES))}


def labelled_stream(likelihood: str) -> Stream:
    def stream(seed: int, sizes: Sequence[int]) -> list[Inputs]:
        texts = _labelled_texts(sum(sizes), seed) | {"labels": _labels(likelihood, sum(sizes), seed)}
        parts = zip(*(t.split(list(sizes)) for t in texts.values()), strict=True)
        return [{name: t[None] for name, t in zip(texts, part, strict=True)} | _names(likelihood) for part in parts]

    return stream


def labelled_queries(likelihood: str) -> Queries:
    return lambda num, seed: _labelled_texts(num, 100 + seed) | {"labels": _labels(likelihood, num, seed)}


def vector_stream(likelihood: str) -> Stream:
    def stream(seed: int, sizes: Sequence[int]) -> list[Inputs]:
        x, _ = vector_examples(sum(sizes), likelihood, seed)
        y = _labels(likelihood, sum(sizes), seed)
        mask = [torch.ones(1, size, dtype=torch.long) for size in sizes]
        parts = zip(x[None].split(list(sizes), 1), mask, y[None].split(list(sizes), 1), strict=True)
        return [dict(zip(("inputs_embeds", "attention_mask", "labels"), part, strict=True)) for part in parts]

    return stream


def vector_questions(likelihood: str) -> Queries:
    return lambda num, seed: vector_queries(num, 100 + seed) | {"labels": _labels(likelihood, num, seed)}


def batch_targets(streams: Iterable[Iterable[Inputs]]) -> Iterator[Inputs]:
    """`batch_chunks` of texts with real targets, which no other function makes chunks of."""
    for rows in zip_longest(*streams):
        shapes = [[t.shape for t in row.values()] for row in rows if row]
        most = [torch.tensor(sizes).amax(0).tolist() for sizes in zip(*shapes, strict=True)]
        batch = {}
        for name, shape in zip(next(row for row in rows if row), most, strict=True):
            batch[name] = torch.zeros(len(rows), *shape[1:], dtype=next(row[name].dtype for row in rows if row))
            for number, row in enumerate(rows):
                if row:
                    batch[name][number, : row[name].shape[1]] = row[name]
        yield batch


# ---------------------------------------------------------------- kinds of tasks


@dataclass(frozen=True)
class Kind:
    """What a task is, and what can be done with it.

    Args:
        name: as test ids show it.
        base: makes a base of a family.
        model: makes an adapter on such a base, from the fields of `IAIConfig`.
        stream: the chunks of one task, drawn from a seed, of so many tokens or examples each.
        queries: N queries with labels, drawn from a seed.
        values: fields of `IAIConfig` that all members of the kind have.
        batch: reads streams of several tasks side by side.
        refines: each query's prediction is refined, there is no task state.
        auto: loads a saved base.
        generates: answers can be generated.
        export: writes what transformers or PEFT alone answer with; None: there is no such thing.
        load_export: how they load it.
    """

    name: str
    base: Callable[..., PreTrainedModel]
    model: Callable
    stream: Stream
    queries: Queries
    values: Mapping = field(default_factory=dict)
    batch: Callable[[Iterable[Iterable[Inputs]]], Iterator[Inputs]] = batch_chunks
    refines: bool = False
    auto: type = AutoModelForCausalLM
    generates: bool = False
    export: Callable | None = None
    load_export: Callable | None = None


def _vectors(likelihood: str, **values) -> Kind:
    """Vectors that a base reads, with classes or real targets."""
    refines = values.get("regime") == "implicit"
    slots = {} if refines else {"num_state_tokens": SLOTS}
    return Kind(
        "refined vectors" if refines else "vectors",
        make_vector_base,
        make_vector_model,
        vector_stream(likelihood),
        vector_questions(likelihood),
        {"likelihood": likelihood} | slots | values,
        refines=refines,
    )


def _labelled(likelihood: str, *, texts: bool) -> Kind:
    """Texts, or vectors in their place, with classes or real targets: a linear state."""
    classes = likelihood == "softmax"
    return Kind(
        "classification" if classes else "regression",
        make_encoder if texts else lambda family: vector_base(VECTOR_WIDTH),
        make_classifier,
        (labelled_stream if texts else vector_stream)(likelihood),
        (labelled_queries if texts else vector_questions)(likelihood),
        {"likelihood": likelihood},
        batch=batch_targets if texts and not classes else batch_chunks,
        auto=AutoModelForSequenceClassification,
        export=export_classifier if classes and texts else None,
        load_export=AutoModelForSequenceClassification.from_pretrained,
    )


def load_peft(folder: Path) -> torch.nn.Module:
    """An export as its README loads it."""
    if not (folder / "lora").is_dir():
        return AutoPeftModelForCausalLM.from_pretrained(folder)
    base = AutoPeftModelForCausalLM.from_pretrained(folder / "lora").merge_and_unload()
    return PeftModel.from_pretrained(base, folder / "prefix")


TEXT = Kind(
    "text", make_base, make_model, text_stream, text_queries, generates=True, export=export_to_peft,
    load_export=load_peft,
)  # fmt: skip
REFINED_TEXT = Kind(
    "refined text", make_base, make_model, text_stream, text_questions, {"regime": "implicit"}, refines=True
)
CLASSES_OF_TEXTS, CLASSES_OF_GIVEN = _labelled("softmax", texts=True), _labelled("softmax", texts=False)
TARGETS_OF_TEXTS, TARGETS_OF_GIVEN = _labelled("gaussian", texts=True), _labelled("gaussian", texts=False)
VECTORS = {likelihood: _vectors(likelihood) for likelihood in OUTPUTS}
REFINED_VECTORS = {likelihood: _vectors(likelihood, regime="implicit") for likelihood in OUTPUTS}
