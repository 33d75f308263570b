"""Every member once: kind of task x state type x signal x head x regime; a new member adds a tuple.

tests/test_contract.py runs what every member must satisfy. Kinds differ in what a base, a chunk and a query are, and in
whether a task state is read (`adapt`) or each query's prediction is refined (`refine`). `Kind` says so, so that the
contract need not ask which kind it is. Axes: B tasks, N queries, n examples of a chunk, T tokens of a text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product, zip_longest

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from samples import vector_examples, vector_queries
from tiny import (
    CLASSES,
    OUTPUTS,
    REGIMES,
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

from hf_iai import TaskState, batch_chunks, export_classifier, export_to_peft, vector_base

SIZES = (8, 5)  # tokens or examples of the chunks of a stream
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


TEXT = Kind(
    "text", make_base, make_model, text_stream, text_queries, generates=True, export=export_to_peft,
    load_export=AutoPeftModelForCausalLM.from_pretrained,
)  # fmt: skip
REFINED_TEXT = Kind(
    "refined text", make_base, make_model, text_stream, text_questions, {"regime": "implicit"}, refines=True
)
CLASSES_OF_TEXTS, CLASSES_OF_GIVEN = _labelled("softmax", texts=True), _labelled("softmax", texts=False)
TARGETS_OF_TEXTS, TARGETS_OF_GIVEN = _labelled("gaussian", texts=True), _labelled("gaussian", texts=False)
VECTORS = {likelihood: _vectors(likelihood) for likelihood in OUTPUTS}
REFINED_VECTORS = {likelihood: _vectors(likelihood, regime="implicit") for likelihood in OUTPUTS}


# ---------------------------------------------------------------- members


@dataclass(frozen=True, eq=False)  # members are told apart by what they are, as keys of a cache
class Member:
    """A combination that an adapter can be configured as.

    Args:
        kind: of task.
        name: of the member within its kind.
        values: fields of `IAIConfig` beside those of the kind.
        family: of its base.
        slow: left to `make test-slow`.
        rounding: how far results that are equal in exact arithmetic may differ, relative to their largest value or 1.
        half: how far answers of a bfloat16 base may be from those of float32, in deviations of the answers.
        unreached: names of parameters that no loss reaches, as a regular expression.
    """

    kind: Kind
    name: str
    values: Mapping
    family: str = "llama"
    slow: bool = False
    rounding: float = 1e-5
    half: float = 0.05
    unreached: str = "$^"

    @property
    def id(self) -> str:
        return f"{self.kind.name}-{self.name}"

    @property
    def merges(self) -> bool:
        """Whether states that were read apart make one."""
        averages = self.values.get("accumulation", "average") == "average"
        return not self.kind.refines and averages and self.values.get("signal", "observations") == "observations"

    @property
    def has_order(self) -> bool:
        """Whether the order of the chunks counts before anything is learned."""
        return not (self.merges or self.kind.refines) or "num_kept_tokens" in self.values

    @property
    def exports(self) -> bool:
        """PEFT would generate wrongly behind virtual tokens on Mamba."""
        return self.kind.export is not None and self.family != "mamba"

    def base(self) -> PreTrainedModel:
        return self.kind.base(self.family)

    def model(self, base: PreTrainedModel | None = None, **values):
        """An adapter in eval mode. `trained=False`: at its start; else disturbed, so that all of it has an effect."""
        base = self.base() if base is None else base
        return self.kind.model(base, **(dict(self.kind.values) | dict(self.values) | values))

    def stream(self, seed: int = 0, sizes: Sequence[int] = SIZES) -> list[Inputs]:
        return self.kind.stream(seed, sizes)

    @property
    def per_task(self) -> int:
        """Queries of each task that the contract asks: those of a text are one for each task of a state."""
        return 1 if self.kind.generates else 2

    def queries(self, num_tasks: int = 1, seed: int = 0) -> Inputs:
        """`per_task` queries of each task, as `answers` takes them."""
        queries = self.kind.queries(self.per_task * num_tasks, seed)
        if not self.kind.refines:  # of refined ones the labels say where the answer begins
            del queries["labels"]
        return queries

    def answers(self, model, chunks: Iterable[Inputs], queries: Inputs) -> list[Tensor]:
        """`scores` before the first chunk and after each."""
        with torch.no_grad():
            if self.kind.refines:
                return [self.scores(logits) for logits in model.refine(chunks, queries, with_start=True)]
            chunks = list(chunks)
            states = [self._start(model, chunks), *model.adapt_steps(chunks)]
            return [self.answer_under(model, state, queries) for state in states]

    def answer(self, model, chunks: Iterable[Inputs], queries: Inputs) -> Tensor:
        """The last of `answers`."""
        if self.kind.refines:
            return self.answers(model, chunks, queries)[-1]
        chunks = list(chunks)
        return self.answer_under(model, model.adapt(chunks) if chunks else self._start(model, chunks), queries)

    def answer_under(self, model, state: TaskState, queries: Inputs) -> Tensor:
        with torch.no_grad():
            return self.scores(model(**queries, task_state=state).logits)

    def _start(self, model, chunks: list[Inputs]) -> TaskState:
        return model.initial_state(len(chunks[0]["labels"]) if chunks else 1)

    def scores(self, logits: Tensor) -> Tensor:
        """What is equal where answers are: refined logits are not normalised."""
        refined_classes = self.kind.refines and self.kind.values.get("likelihood") != "gaussian"
        return logits.log_softmax(-1) if refined_classes else logits

    def episode(self, num_chunks: int = 2, num_queries: int = 2) -> Inputs:
        """Two tasks, each of chunks of six tokens or examples."""
        streams = [self.stream(seed, (6,) * max(1, num_chunks)) for seed in (1, 2)]
        names = [name for name, t in streams[0][0].items() if isinstance(t, Tensor)]
        chunks = {name: torch.stack([torch.cat([c[name] for c in s]) for s in streams]) for name in names}
        queries = [self.kind.queries(num_queries, seed) for seed in (1, 2)]
        return {f"chunk_{name}": t[:, :num_chunks] for name, t in chunks.items()} | {
            name: torch.stack([q[name] for q in queries]) for name in queries[0]
        }


SLOT_STATES = ("prefix", "prompt", "lora")
HEADS = ("learned_optimizer", "sgd", "meta_sgd", "path_aware")
_LORA = {"state_r": 2, "state_target_modules": ["v_proj", "down_proj"]}
_RATE = {"initial_rate": 0.3}
_SIGNALS = {
    "observations": {},
    **{head: {"signal": "gradients", "head": head} | _RATE for head in HEADS},
    "both": {"signal": "both"},
}
_SIGNALS["path_aware"] |= {"path_window": 2}


def _text_member(state: str, signal: str, regime: str) -> Member:
    """Fast: each state with its default heads; the other heads are with the smallest state, an mlp of vectors."""
    values = {"state_type": state, "regime": regime} | _SIGNALS[signal] | (_LORA if state == "lora" else {})
    usual, observed = signal in ("observations", "learned_optimizer", "both"), signal == "observations"
    fast = usual if regime == "explicit" else observed and state != "lora"
    if signal in HEADS and state == "lora":
        values["num_state_tokens"] = None  # gradients need no slots to read out
    family = "llama" if regime == "explicit" else "gpt2" if state == "prompt" else "qwen3"
    # Learned steps divide by gradients that are nearly 0, rounding and all; that differs between processors.
    rounding = 2e-4 if signal == "learned_optimizer" else 1e-5
    return Member(TEXT, f"{state}-{signal}-{regime}", values, family, slow=not fast, rounding=rounding)


def _vector_member(name: str, values: Mapping, likelihood: str) -> Member:
    family = "llama" if likelihood == "softmax" else "gpt2"
    fast = likelihood == "softmax" or "head" not in values
    half = 0.3 if name == "mlp" else 0.05  # the weights that answer are what was rounded
    return Member(VECTORS[likelihood], f"{name}-{likelihood}", values, family, slow=not fast, half=half)


_TEXT = (  # name, values, family, slow
    ("kept", {"num_kept_tokens": 2}),
    ("kept-parametric", {"num_kept_tokens": 2, "regime": "parametric"}, "gpt2"),
    ("delta", {"delta_rule": True}, "llama", True),
    ("delta-parametric", {"delta_rule": True, "regime": "parametric"}, "qwen3"),
    ("delta-both", {"delta_rule": True, "signal": "both"}, "llama", True),
    ("recent", {"accumulation": "recent"}),
    ("recent-prompt", {"accumulation": "recent", "state_type": "prompt", "regime": "parametric"}),
    ("recent-bos", {"accumulation": "recent", "pin_bos": True}, "gpt2"),
    ("uncorrected-prompt", {"correction": False, "state_type": "prompt"}, "qwen3", True),
    ("uncorrected-lora", {"correction": False, "state_type": "lora", **_LORA}, "llama", True),
    ("second-order", {"signal": "gradients", "head": "sgd", "second_order": True, **_RATE}, "llama", True),
    ("second-order-both", {"signal": "both", "state_type": "prompt", "second_order": True}, "llama", True),
    ("recurrent", {"state_type": "prompt"}, "mamba"),
    (
        "hybrid-gradients",
        {"state_type": "lora", "signal": "gradients", "num_state_tokens": None, **_LORA},
        "jamba",
        True,
    ),
)
_REFINED_TEXT = (  # name, values, family, slow
    ("logits", {}),
    ("probabilities", {"prediction": "probabilities"}, "qwen3"),
    ("latent", {"prediction": "latent"}, "gpt2"),
)
_VECTORS = {
    "prefix": {"regime": "explicit", "state_type": "prefix"},
    "prompt": {"regime": "explicit", "state_type": "prompt"},
    "lora": {"regime": "explicit", "state_type": "lora"},
    "mlp": {"state_type": "mlp"},
    "mlp-gradients": {"state_type": "mlp", "signal": "gradients", **_RATE},
    **{f"mlp-{head}": {"state_type": "mlp", **_SIGNALS[head]} for head in HEADS[1:]},
}
MEMBERS = [
    *(_text_member(*case) for case in product(SLOT_STATES, _SIGNALS, REGIMES)),
    *(Member(TEXT, *member) for member in _TEXT),
    # Without precisions nothing is read of the last layer but its keys and values.
    Member(
        TEXT,
        "uncorrected",
        {"correction": False, "regime": "parametric"},
        "gpt2",
        unreached=r"\.h\.2\.(attn\.c_proj|mlp)",
    ),
    *(Member(REFINED_TEXT, *member) for member in _REFINED_TEXT),
    Member(CLASSES_OF_TEXTS, "parametric", {}, "bert"),
    Member(CLASSES_OF_TEXTS, "explicit", {"regime": "explicit", "pooling": "cls"}, "modernbert"),
    Member(CLASSES_OF_GIVEN, "given-vectors", {}),
    Member(TARGETS_OF_TEXTS, "parametric", {"pooling": "cls"}, "roberta", half=0.15),
    Member(TARGETS_OF_TEXTS, "explicit", {"regime": "explicit"}, "distilbert"),
    Member(TARGETS_OF_GIVEN, "given-vectors", {}),
    Member(TARGETS_OF_GIVEN, "given-vectors-no-intercept", {"fit_intercept": False}),
    *(_vector_member(*item, likelihood) for item, likelihood in product(_VECTORS.items(), OUTPUTS)),
    Member(REFINED_VECTORS["softmax"], "logits-softmax", {}),
    Member(REFINED_VECTORS["softmax"], "probabilities-softmax", {"prediction": "probabilities"}, "gpt2"),
    Member(REFINED_VECTORS["softmax"], "latent-softmax", {"prediction": "latent"}),
    Member(REFINED_VECTORS["gaussian"], "logits-gaussian", {}, "gpt2"),
]


def every(members: Iterable[Member]):
    """Run a test on each of them."""
    cases = [pytest.param(m, marks=[pytest.mark.slow] if m.slow else [], id=m.id) for m in members]
    return pytest.mark.parametrize("member", cases)


READING, REFINING = ([m for m in MEMBERS if m.kind.refines == refines] for refines in (False, True))
