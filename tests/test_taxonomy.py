"""The rows of the table in docs/gradients.md: known methods as configurations, each of which learns."""

import gc
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from samples import CHUNK, arguments, tokenizer
from tiny import ids, make_base, make_model

from hf_iai import IAIConfig, IAITrainer
from hf_iai.objectives import Objective

DOCS = (Path(__file__).parent.parent / "docs" / "gradients.md").read_text()
ROWS = dict(re.findall(r"^\| ([^|`]+) \| `([^`]+)` \|", DOCS, re.MULTILINE))


def values_of(row: str) -> dict:
    return eval(f"dict({ROWS[row]})")  # noqa: S307, our own document


def rows_of_few_tokens(num: int = 32, length: int = 3 * CHUNK, seed: int = 3) -> torch.Tensor:
    """Text of 8 of the 97 tokens: there is something to learn."""
    return torch.randint(5, 13, (num, length), generator=torch.Generator().manual_seed(seed))


def test_the_table_has_its_rows():
    for name in ("MAML", "Meta-SGD", "Path-aware", "Learned optimizer", "Hypernetwork", "Prompt tuning", "In-context"):
        assert any(row.startswith(name) for row in ROWS), name
    assert len(ROWS) >= 9


@pytest.mark.parametrize("row", ROWS)
def test_a_row_trains(row, tmp_path):
    """Few steps lower the loss under what was read; every parameter moves."""
    data = [[[{"input_ids": t.tolist()}] for t in text.split([2 * CHUNK, CHUNK])] for text in rows_of_few_tokens()]
    data = Dataset.from_list([{"support": support, "query": query} for support, query in data])
    few, values = data.select(range(8)), values_of(row)
    model = make_model(trained=False, **values)
    rate = 3e-2 if values.get("state_type") != "lora" else 1e-2
    steps = {"max_steps": 25, "learning_rate": rate, "max_chunks": 2, "curriculum": 0.0, "eval_chunks": (0, 2)}
    trainer = IAITrainer(
        model, arguments(tmp_path, **steps), train_dataset=data, eval_dataset=few, processing_class=tokenizer()
    )
    parameters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    before = trainer.evaluate()["eval_loss_at_chunks_2"]
    trainer.train()
    after = trainer.evaluate()["eval_loss_at_chunks_2"]
    assert after < before - 0.05
    # The path-aware head skips after every fifth chunk, and here are at most four.
    exempt = r"\.skip\." if values.get("head") == "path_aware" else r"$^"
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, parameters[n])]
    assert [name for name in still if not re.search(exempt, name)] == []


@pytest.mark.parametrize("signal", ["gradients", pytest.param("both", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True], ids=["adapt", "greedy"])
def test_no_graph_is_kept_alive(signal, training):
    """As many tensors are alive after 60 updates as after 20."""
    model = make_model(signal=signal, state_type="lora", state_r=1, state_target_modules=["v_proj"])

    def alive() -> int:
        gc.collect()
        return sum(torch.is_tensor(value) for value in gc.get_objects())

    counts, state = [], None
    if training:
        model.train()
        query, objective = ids(1, 1, 6), Objective("greedy")
        for step in range(60 // 5):
            chunk_ids = ids(1, 5, 6, seed=step)
            model(input_ids=query, labels=query, chunk_input_ids=chunk_ids, objective=objective).loss.backward()
            model.zero_grad(set_to_none=True)
            counts += [alive()] if step in (3, 11) else []
    else:
        for step in range(60):
            state = model.adapt([{"input_ids": ids(1, 6, seed=step)}], state=state)
            assert not any(t.requires_grad or t.grad_fn is not None for t in state.tensors.values())
            counts += [alive()] if step in (19, 59) else []
    assert counts[0] == counts[1]


def test_configurations_are_told_apart():
    """The head decides what a state means; a state of one is not taken by another."""
    names = {
        make_model(signal="gradients", head=h, state_type="prompt", trained=False).identity for h in ("sgd", "meta_sgd")
    }
    assert len(names) == 2
    assert IAIConfig(task_type="CAUSAL_LM", signal="gradients").head == "learned_optimizer"
    assert IAIConfig(task_type="CAUSAL_LM").head == "gated"
    config = IAIConfig(task_type="CAUSAL_LM", signal="gradients", regime="parametric")
    assert not config.uses_reader
    with pytest.raises(ValueError, match="names no module"):
        make_model(make_base(), signal="gradients", state_type="lora", state_target_modules=["nothing"])
    with pytest.raises(ValueError, match="'model.norm', a LlamaRMSNorm"):
        make_model(make_base(), signal="gradients", state_type="lora", state_target_modules=["norm"])
    base = make_base()
    model = make_model(base, signal="gradients", state_type="lora")
    assert model.active_peft_config.state_target_modules == ["q_proj", "v_proj"], "PEFT's own choice for Llama"


def test_second_order_is_refused_where_it_cannot_be():
    model = make_model(signal="gradients", second_order=True).train()
    query, chunk = ids(1, 1, 6), ids(1, 1, 6)
    model.base_model.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' cannot: load the base with attn_implementation='sdpa'"):
        model(input_ids=query, labels=query, chunk_input_ids=chunk)
