"""A model that is cast as a whole: the base takes the type, the adapter stays as precise as it was."""

import pytest
import torch
from members import READING, every
from samples import arguments, episodes, tokenizer
from tiny import make_model
from transformers import EvalPrediction

from hf_iai import IAITrainer

CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to": lambda model: model.to(torch.bfloat16),
    "to device and type": lambda model: model.to("cpu", torch.float16),
}


def learned(model):
    return {n: p.dtype for n, p in model.named_parameters() if "lora_" in n or ".iai." in n}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@every([m for m in READING if m.id in ("text-prefix-observations-explicit", "text-lora-both-explicit", "text-memory")])
def test_what_is_learned_stays_precise(member, cast):
    model = member.model()
    own, identity = learned(model), model.identity
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n in own}
    cast(model)
    assert learned(model) == own and model.get_input_embeddings().weight.dtype != torch.float32
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert model.identity == identity
    assert {b.dtype for b in model.base_model.iai.buffers() if b.is_floating_point()} <= {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "half"])
@every(READING)
def test_every_state_is_finite_and_answers_as_in_float32(member, dtype):
    model = member.model()
    expected = member.answer(model, member.stream(), member.queries())
    model.to(dtype)
    state = model.adapt(member.stream())
    assert all(t.isfinite().all() for t in state.tensors.values())
    found = member.answer_under(model, state, member.queries()).float()
    assert (found - expected).square().mean().sqrt() < max(0.2, 2 * member.half) * expected.std()


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_full_evaluation_in_low_precision(tmp_path, option):
    values = {"eval_chunks": (0, 2), "per_device_eval_batch_size": 4}
    losses = []
    for own in ({}, {option: True}):
        args = arguments(tmp_path, **values, **own)
        trainer = IAITrainer(make_model(), args, eval_dataset=episodes(8), processing_class=tokenizer())
        losses.append(trainer.evaluate())
    for name in ("eval_loss", "eval_loss_at_chunks_0", "eval_loss_at_chunks_2"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.02)
    assert losses[1]["eval_loss"] != losses[0]["eval_loss"]  # it was in low precision


def test_predictions_of_a_cast_model_are_arrays(tmp_path):
    seen = []
    args = arguments(tmp_path, per_device_eval_batch_size=4, bf16_full_eval=True)
    trainer = IAITrainer(
        make_model(), args, eval_dataset=episodes(8), processing_class=tokenizer(),
        compute_metrics=lambda found: seen.append(found) or {"rows": len(found.predictions)},
    )  # fmt: skip
    assert trainer.evaluate()["eval_rows"] == 8
    assert isinstance(seen[0], EvalPrediction) and seen[0].predictions.shape[:2] == (8, 1)
