"""Every member once: kind of task x state type x signal x head x regime; a new member adds a tuple.

tests/test_contract.py runs what every member must satisfy. Kinds (kinds.py) differ in whether a task state is read
(`adapt`) or each query's prediction is refined (`refine`), and in what chunks and queries are. `Member` hides most of
that, so that the contract need not ask which kind it is. Axes: B tasks, N queries.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from kinds import (
    CLASSES_OF_GIVEN,
    CLASSES_OF_TEXTS,
    REFINED_TEXT,
    REFINED_VECTORS,
    TARGETS_OF_GIVEN,
    TARGETS_OF_TEXTS,
    TEXT,
    VECTORS,
    Inputs,
    Kind,
)
from tiny import OUTPUTS, REGIMES
from torch import Tensor
from transformers import PreTrainedModel

from hf_iai import TaskState

SIZES = (8, 5)  # tokens or examples of the chunks of a stream
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


@dataclass(frozen=True, eq=False)  # members are told apart by what they are, as keys of a cache
class Member:
    """A combination that an adapter can be configured as.

    Args:
        kind: of task.
        name: of the member within its kind.
        values: fields of `IAIConfig` beside those of the kind.
        family: of its base.
        slow: left to `make test-slow`.
        half: how far answers of a bfloat16 base may be from those of float32, in deviations of the answers.
        unreached: names of parameters that no loss reaches, as a regular expression.
    """

    kind: Kind
    name: str
    values: Mapping
    family: str = "llama"
    slow: bool = False
    half: float = 0.05
    unreached: str = "$^"

    @property
    def id(self) -> str:
        return f"{self.kind.name}-{self.name}".replace(" ", "-")

    @property
    def rounding(self) -> float:
        """How far results that are equal in exact arithmetic may differ, relative to their largest value or 1.

        Learned steps divide by gradients that are nearly 0, rounding and all; that differs between processors.
        """
        steps = self.values.get("signal") == "gradients"
        return 2e-4 if steps and self.values.get("head", HEADS[0]) == "learned_optimizer" else 1e-5

    @property
    def merges(self) -> bool:
        """Whether states that were read apart make one."""
        if self.kind.refines or self.values.get("state_type") == "prefix+lora":
            return False
        apart = self.values.get("accumulation", "average") == "average" or self.values.get("read_behind") == "start"
        return apart and self.values.get("signal", "observations") == "observations"

    @property
    def fits(self) -> bool:
        """Whether a chunk goes on with a fit, whose result depends a little on what was read before."""
        return self.kind.name == "classification"

    @property
    def has_order(self) -> bool:
        """Whether the order of the chunks counts before anything is learned."""
        return not (self.merges or self.kind.refines) or {"num_kept_tokens", "read_behind"} & self.values.keys()

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


def _text_member(state: str, signal: str, regime: str) -> Member:
    """Fast: each state with its default heads; the other heads are with the smallest state, an mlp of vectors."""
    values = {"state_type": state, "regime": regime} | _SIGNALS[signal] | (_LORA if state == "lora" else {})
    usual, observed = signal in ("observations", "learned_optimizer", "both"), signal == "observations"
    fast = usual if regime == "explicit" else observed and state != "lora"
    if signal in HEADS and state == "lora":
        values["num_state_tokens"] = None  # gradients need no slots to read out
    family = "llama" if regime == "explicit" else "gpt2" if state == "prompt" else "qwen3"
    return Member(TEXT, f"{state}-{signal}-{regime}", values, family, slow=not fast)


def _vector_member(name: str, values: Mapping, likelihood: str) -> Member:
    family = "llama" if likelihood == "softmax" else "gpt2"
    fast = likelihood == "softmax" or "head" not in values
    half = 0.3 if name == "mlp" else 0.05  # the weights that answer are what was rounded
    return Member(VECTORS[likelihood], f"{name}-{likelihood}", values, family, slow=not fast, half=half)


_TEXT = (  # name, values, family, slow
    ("kept", {"num_kept_tokens": 2}),
    ("kept-parametric", {"num_kept_tokens": 2, "regime": "parametric"}, "gpt2"),
    ("pinned", {"pin_bos": True}),
    ("pinned-kept", {"pin_bos": True, "num_kept_tokens": 2}, "qwen3", True),
    ("pinned-both", {"pin_bos": True, "signal": "both"}, "llama", True),
    ("delta", {"delta_rule": True}, "llama", True),
    ("delta-parametric", {"delta_rule": True, "regime": "parametric"}, "qwen3"),
    ("delta-both", {"delta_rule": True, "signal": "both"}, "llama", True),
    ("attention", {"accumulation": "attention"}),
    ("novelty", {"accumulation": "novelty", "num_state_tokens": 8}, "qwen3"),
    ("attention-start", {"accumulation": "attention", "read_behind": "start"}, "qwen3"),
    ("surprisal-start", {"accumulation": "surprisal", "read_behind": "start"}, "gpt2", True),
    ("memory", {"state_type": "prefix+lora", **_LORA}),
    ("memory-parametric", {"state_type": "prefix+lora", "regime": "parametric", **_LORA}, "qwen3"),
    ("memory-steps", {"state_type": "prefix+lora", "write_steps": 2, "accumulation": "surprisal", **_LORA}),
    (
        "memory-novelty",
        {"state_type": "prefix+lora", "accumulation": "novelty", "num_state_tokens": 8, **_LORA},
        "qwen3",
    ),
    ("memory-learned", {"state_type": "prefix+lora", "head": "learned_optimizer", **_RATE, **_LORA}, "llama", True),
    ("memory-gpt2", {"state_type": "prefix+lora", "accumulation": "recent", "state_r": 2}, "gpt2", True),
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
