"""A state type, a head and a kind of task that this file alone adds: each is trained, saved, loaded and evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from samples import arguments, tokenizer
from tiny import chunks, ids, make_base, make_model
from torch import Tensor, nn

from hf_iai import IAIConfig, IAITrainer, TaskState, evaluate_curve, export_to_peft
from hf_iai.bases.base import Base
from hf_iai.bases.prefixes import Prefix
from hf_iai.evaluation import EVALUATORS, Curve
from hf_iai.evaluation.loss_curve import loss_curve
from hf_iai.heads.classical import SGD, Tensors
from hf_iai.registry import HEADS, STATES, TASKS, Registry
from hf_iai.signals import Reading
from hf_iai.states import SlotState
from hf_iai.states.slots import check_slots, first_slots
from hf_iai.tasks import Inputs, Text


@STATES.register("one_vector")
class OneVector(SlotState):
    """State tensor `vector` (B, 1, 1, 1, d): one embedding that stands in all m places in front of a text."""

    fields = fingerprint = frozenset({"num_state_tokens"})
    packed_name = "vector"
    check = classmethod(lambda cls, config: check_slots(config))

    @classmethod
    def make(cls, base: Base, config: IAIConfig, *, reads: bool) -> "OneVector":
        return cls(base, first_slots(base, config))

    def __init__(self, base: Base, token_ids: Tensor) -> None:
        super().__init__()
        self.num_slots_in_front = len(token_ids)
        first = base.embed(token_ids[:1]).detach().float()
        self.start = nn.ParameterDict({"vector": nn.Parameter(first[None, None])})
        self.read_slots = nn.Parameter(first.clone())
        self.project = nn.Linear(first.shape[1], first.shape[1])

    @contextmanager
    def under(self, base: Base, tensors: dict[str, Tensor]) -> Iterator[Prefix]:
        yield base.encode(tensors["vector"][:, 0, 0].expand(-1, self.num_slots_in_front, -1))

    def read_out(self, base: Base, reading: Reading, rate: Tensor, *, writes: bool) -> tuple[dict[str, Tensor], Tensor]:
        mass = reading.mask.sum(1).clamp_min(1).float().view(-1, 1, 1, 1)
        return {"vector": self.project(reading.hidden)[:, None, None]}, mass


@HEADS.register("heavy_ball")
class HeavyBall(SGD):
    """theta' = theta - rate v, with v = 0.5 v + gradient."""

    def initial(self, theta: Tensors) -> Tensors:
        return {f"velocity_{name}": torch.zeros_like(t) for name, t in theta.items()}

    def forward(
        self, theta: Tensors, kept: Tensors, gradient: Tensors, step: Tensor, start: Tensors
    ) -> tuple[Tensors, Tensors]:
        velocity = {name: 0.5 * kept[f"velocity_{name}"] + g for name, g in gradient.items()}
        moved = {name: t - self.rate(name) * velocity[name] for name, t in theta.items()}
        return moved, {f"velocity_{name}": v for name, v in velocity.items()}


class BackwardsInputs(Inputs):
    """Chunks are read from their last token to the first."""

    def chunk(self, chunk):
        return tuple(t.flip(1) for t in super().chunk(chunk))

    def episode(self, queries, chunks, label_set):
        episode = super().episode(queries, chunks, label_set)
        return replace(episode, chunks=tuple(t.flip(2) for t in episode.chunks))


@TASKS.register("backwards")
class Backwards(Text):
    """Text that is read backwards, for `likelihood="backwards"`; its curve is of the worst token."""

    fields = Text.fields | {"likelihood"}
    fingerprint = frozenset({"likelihood"})
    likelihoods = ("backwards",)
    asked_for_by = "likelihood='backwards'"
    metric = "worst_loss"

    @classmethod
    def matches(cls, config: IAIConfig) -> bool:
        return config.likelihood == "backwards"

    def inputs(self, base, core) -> Inputs:
        return BackwardsInputs(base, core)


def worst_loss_curve(*args, **options) -> Curve:
    curve = loss_curve(*args, **options)
    return replace(curve, losses={key: x.max(1, keepdims=True) for key, x in curve.losses.items()}, metric="worst_loss")


EVALUATORS["worst_loss"] = worst_loss_curve
TOYS = {
    "state": {"state_type": "one_vector"},
    "head": {"signal": "gradients", "head": "heavy_ball", "state_type": "prompt"},
    "task": {"likelihood": "backwards"},
}


def episodes(num: int = 6) -> Dataset:
    rows = [
        {"support": [{"input_ids": row[:20].tolist()}], "query": [{"input_ids": row[20:].tolist()}]}
        for row in ids(num, 28, seed=5)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("values", TOYS.values(), ids=TOYS)
def test_a_new_part_is_trained_saved_loaded_and_evaluated(values, tmp_path):
    model, data = make_model(trained=False, **values), episodes()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    args = arguments(tmp_path, max_steps=3, learning_rate=1e-2, max_chunks=2, curriculum=0.0)
    IAITrainer(model, args, train_dataset=data, processing_class=tokenizer()).train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "adapter").eval()
    state, query = model.adapt(chunks(3)), ids(2, 6, seed=9)
    state.save_pretrained(tmp_path / "state")
    again = TaskState.from_pretrained(tmp_path / "state")
    with torch.no_grad():
        expected = model(input_ids=query, task_state=state).logits
        assert torch.equal(loaded(input_ids=query, task_state=again).logits, expected)
        assert not torch.equal(model(input_ids=query, task_state=model.initial_state()).logits, expected)
    curve = evaluate_curve(loaded, data, (0, 1, 2), chunk_size=10, show_progress=False)
    assert curve.counts("iai") == [0, 1, 2]
    assert curve.metric == ("worst_loss" if "likelihood" in values else "loss")


def test_what_a_new_part_does_not_say_is_refused_in_words(tmp_path):
    model = make_model(state_type="one_vector")
    with pytest.raises(ValueError, match="state_type='one_vector'.* cannot become a PEFT adapter"):
        export_to_peft(model, model.adapt(chunks(1)), tmp_path / "plain")
    backwards = make_model(likelihood="backwards")
    metric = EVALUATORS.pop("worst_loss")
    try:
        with pytest.raises(ValueError, match="no curve of the metric 'worst_loss'; EVALUATORS has"):
            evaluate_curve(backwards, episodes(), (0, 1), chunk_size=10)
    finally:
        EVALUATORS["worst_loss"] = metric


def test_a_toy_is_read_as_it_says():
    model, chunk = make_model(likelihood="backwards"), ids(1, 10)
    plain = make_model()
    backwards, flipped = model.adapt([{"input_ids": chunk}]), plain.adapt([{"input_ids": chunk.flip(1)}])
    assert all(torch.equal(t, flipped.tensors[name]) for name, t in backwards.tensors.items())
    assert backwards.identity != flipped.identity


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="state_type='prompt' is PromptState already: choose another name"):
        STATES.register("prompt")(OneVector)
    assert isinstance(HEADS, Registry)


def test_unknown_names_are_refused_with_those_that_are_registered():
    with pytest.raises(ValueError, match="state_type must be one of .*'one_vector'.* got 'nothing'"):
        IAIConfig(task_type="CAUSAL_LM", state_type="nothing")
    with pytest.raises(ValueError, match="has the heads .*'heavy_ball'.*got head='gated'"):
        IAIConfig(task_type="CAUSAL_LM", signal="gradients", head="gated")
