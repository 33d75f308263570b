"""`scored_states="next"`: the loss of each chunk as it is read, and its gradient.

With one layer, and fast weights that its keys and values do not depend on, slots really are constants. Then the
gradient of the losses of reading is exact, up to the gradients that the chunks are written by.
"""

import pytest
import torch
from peft import get_peft_model
from tiny import ids
from transformers import LlamaConfig, LlamaForCausalLM

from hf_iai import IAIConfig
from hf_iai.objectives import Objective
from hf_iai.signals.one_pass import losses_of_reading
from hf_iai.state import Identity

CHUNK, NEXT = 8, Objective(scored_states="next")


def make_model(**values) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=97, max_position_embeddings=64, **sizes))
    options = {"state_type": "prefix+lora", "regime": "parametric", "state_target_modules": ["o_proj", "down_proj"]}
    options |= {"num_state_tokens": CHUNK, "initial_rate": 0.3}
    model = get_peft_model(base, IAIConfig(task_type="CAUSAL_LM", **options | values))
    for name, parameter in model.named_parameters():
        if ".start." in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model


def in_training_mode(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        module.training = True
    return model


def episode(num_chunks: int) -> dict[str, torch.Tensor]:
    query = ids(2, 1, CHUNK, seed=1)
    return {"input_ids": query, "labels": query, "chunk_input_ids": ids(2, num_chunks, CHUNK)}


def total(model, num_chunks: int) -> torch.Tensor:
    """The losses of reading alone."""
    reader, chunks = model.base_model.reader, ids(2, num_chunks, CHUNK)
    everywhere = torch.ones_like(chunks)
    with losses_of_reading() as losses:
        reader.read_on(reader.core.initial_state(reader.base, 2, Identity("", "")), (chunks, everywhere, chunks))
    return sum(loss.total for loss in losses)


@pytest.mark.parametrize("values", [{}, {"write_steps": 2}, {"regime": "explicit", "target_modules": "all-linear"}])
def test_loss_is_that_of_reading_and_of_the_queries(values):
    model, inputs = in_training_mode(make_model(**values)), episode(3)
    found = model(**inputs, objective=NEXT).loss
    model.eval()
    expected = []
    for task in range(2):
        states = [*model.adapt_steps({"input_ids": inputs["chunk_input_ids"][[task], k]} for k in range(3))]
        expected += [float(state.tensors["loss"]) for state in states]
        expected.append(
            float(model(inputs["input_ids"][task], labels=inputs["labels"][task], task_state=states[-1]).loss)
        )
    assert float(found.detach()) == pytest.approx(sum(expected) / len(expected), abs=1e-5)


@pytest.mark.parametrize(("part", "rate"), [(".start.", 0.3), (".down.", 1e-6), ("log_rate", 0.3)])
def test_gradient_equals_finite_differences(part, rate):
    """Of 2 chunks: the first one is read without fast weights, so its gradient depends on A alone."""
    model, num_chunks = in_training_mode(make_model(initial_rate=rate)), 2
    found = total(model, num_chunks)
    found.backward()
    for name, parameter in model.named_parameters():
        if part not in name:
            continue
        direction, size = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), 1e-2
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * size * direction)
            values.append(float(total(model, num_chunks).detach()))
            with torch.no_grad():
                parameter.add_(-sign * size * direction)
        expected = (values[0] - values[1]) / (2 * size)
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=0.02, abs=2e-4), name
        assert abs(expected) > 1e-3, name


def test_other_states_are_refused():
    model = get_peft_model(make_model().unload(), IAIConfig(task_type="CAUSAL_LM", num_state_tokens=4))
    with pytest.raises(ValueError, match="use state_type='prefix\\+lora' and read_behind='state'"):
        in_training_mode(model)(**episode(2), objective=NEXT)
    with pytest.raises(ValueError, match="read_behind='state'"):
        in_training_mode(make_model(read_behind="start"))(**episode(2), objective=NEXT)


def test_queries_without_labels_are_refused():
    inputs = episode(2)
    del inputs["labels"]
    with pytest.raises(ValueError, match="give them labels"):
        in_training_mode(make_model())(**inputs, objective=NEXT)


def test_lora_of_the_reader_learns_from_reading():
    model = in_training_mode(make_model(regime="explicit", target_modules="all-linear", r=2))
    total(model, 2).backward()
    lora_b = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert lora_b and all(grad is not None and grad.abs().max() > 0 for grad in lora_b.values())


def test_chunks_of_padding_do_not_count():
    model, inputs = in_training_mode(make_model()), episode(3)
    mask = torch.ones_like(inputs["chunk_input_ids"])
    mask[1, 0] = 0  # the second task has two chunks
    found = model(**inputs, chunk_attention_mask=mask, objective=NEXT).loss
    losses = [
        model(**{n: t[[task]] for n, t in inputs.items() if n[:5] != "chunk"}, objective=NEXT,
              chunk_input_ids=inputs["chunk_input_ids"][[task], task:]).loss * (4 - task)
        for task in range(2)
    ]  # fmt: skip
    assert float(found.detach()) == pytest.approx(float(sum(losses).detach()) / 7, abs=1e-5)


def test_outside_of_training_the_queries_alone_are_scored():
    model, inputs = make_model().eval(), episode(2)
    assert model(**inputs, objective=NEXT).loss == model(**inputs).loss
