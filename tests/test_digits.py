"""Given vectors on a base that hands them on: the base, the published adapter, the accuracy curve, the digits demo."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from typer.testing import CliRunner

from examples.research.classifiers.row_training import states, train_head
from examples.research.classifiers.vector_tasks import draw_population, training_tasks
from hf_iai import IAIConfig, chunk_vectors, evaluate_curve, vector_base
from hf_iai.cli import app
from hf_iai.commands import demo_digits
from hf_iai.commands.classify import load_reader
from hf_iai.commands.demo_digits import WIDTH, digit_episodes, load_published
from hf_iai.evaluation.accuracy import features_of
from hf_iai.evaluation.classifiers import CLASSIFIERS
from hf_iai.hub.published import published_adapter

CONFIG = {"task_type": "SEQ_CLS", "state_type": "linear"}


def test_the_base_hands_vectors_on_and_nothing_of_it_is_random():
    bases = [vector_base(5), vector_base(5)]
    x = torch.randn(7, 1, 5)
    for base in bases:
        torch.testing.assert_close(base.model(inputs_embeds=x).last_hidden_state, x, atol=1e-5, rtol=1e-5)
    tensors = [base.state_dict() for base in bases]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        vector_base(0)


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
def test_an_adapter_fits_any_such_base_and_names_no_path(likelihood, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(vector_base(5), IAIConfig(**CONFIG, likelihood=likelihood))
    model.save_pretrained("mine", save_embedding_layers=False)
    assert json.loads(Path("mine/adapter_config.json").read_text())["base_model_name_or_path"] == "hf_iai:vectors-5"
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(vector_base(5), "mine")
    assert loaded.identity == model.identity and loaded.identity.name.startswith("hf_iai:vectors-5")
    names = {}
    exec(re.search(r"```python\n(.*?)```", Path("mine/README.md").read_text(), re.DOTALL)[1], names)
    assert names["state"].num_tokens.item() == 100


def test_features_are_the_vectors_centred_and_of_unit_length():
    x = torch.rand(6, 5)
    found = features_of(get_peft_model(vector_base(5), IAIConfig(**CONFIG)), {"inputs_embeds": x})
    centred = (x - x.mean(1, keepdim=True)).numpy()
    np.testing.assert_allclose(found, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-5)


def test_the_curve_of_vectors_starts_between_its_two_parts():
    model = get_peft_model(vector_base(WIDTH), IAIConfig(**CONFIG))
    episodes = digit_episodes(2, 60, 40)
    curve = evaluate_curve(model, episodes, (1, 3), list(CLASSIFIERS), chunk_size=20, show_progress=False)
    assert curve.metric == "accuracy" and curve.losses["iai", 3, 0].shape == (2, 40)
    for n in (1, 3):
        ours, *others = (curve.losses[m, n, 0].mean() for m in ("iai", "nearest_class_mean", "logistic_regression"))
        assert min(others) - 0.05 < ours < max(others) + 0.05
    numbers = [
        {part: [row | {"label": int(row["label"])} for row in rows] for part, rows in e.items()} for e in episodes
    ]
    same = evaluate_curve(model, numbers, (1, 3), chunk_size=20, show_progress=False)
    assert (same.losses["iai", 3, 0] == curve.losses["iai", 3, 0]).all()
    with pytest.raises(ValueError, match="lora_fine_tuning trains the encoder on texts"):
        evaluate_curve(model, episodes, (1,), ["lora_fine_tuning"], chunk_size=20, show_progress=False)


def test_the_published_adapter_reads_digits_better_than_the_nearest_class_mean():
    episodes = digit_episodes(16, 200, 300, seed=5)
    curve = evaluate_curve(load_published(), episodes, (1, 5, 10), ("nearest_class_mean",), show_progress=False)
    gains = [curve.difference(("iai", n), ("nearest_class_mean", n)) for n in (1, 5, 10)]
    assert all(gain["low"] > 0 for gain in gains), gains


def test_it_is_no_classifier_of_texts():
    with pytest.raises(ValueError, match="vectors of 64 numbers, not texts"):
        load_reader(published_adapter("vectors-linear"))


def test_draws_share_no_digit_and_are_seeded():
    (episode,) = digit_episodes(1, 1200, 597)
    rows = [row for part in episode.values() for row in part]
    assert len(rows) == 1797 and len({id(row) for row in rows}) == 1797
    vectors = np.array([row["vector"] for row in rows])
    assert vectors.min() == 0 and vectors.max() == 1
    again, other = digit_episodes(1, 5, 5)[0], digit_episodes(1, 5, 5, seed=1)[0]
    first = [[row["label"] for row in e["support"] + e["query"]] for e in (digit_episodes(1, 5, 5)[0], again, other)]
    assert first[0] == first[1] != first[2]


def test_demo_digits_prints_and_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_digits, "DRAWS", 2)
    monkeypatch.setattr(demo_digits, "QUERIES", 30)
    monkeypatch.setattr(demo_digits, "COUNTS", (1, 2))
    result = CliRunner().invoke(app, ["demo", "--task", "digits", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert Path(published_adapter("vectors-linear"), "recipe.json").is_file()


def test_synthetic_tasks_are_as_the_state_sees_them_and_train_the_head():
    tasks = training_tasks(np.random.default_rng(0), 3, 2, 16)
    real = tasks.features.flatten(0, 1)
    torch.testing.assert_close(real.norm(dim=1), torch.ones(len(real)))
    torch.testing.assert_close(real.mean(1), torch.zeros(len(real)), atol=1e-6, rtol=0)
    assert tasks.labels.shape == (3, 40) and tasks.queries.shape[:2] == tasks.targets.shape
    assert int(tasks.targets.max()) == tasks.num_classes - 1 and int(tasks.labels.max()) < tasks.num_classes
    rng = np.random.default_rng(1)
    sample = draw_population(rng, 4, 16)
    assert sample(np.arange(4)).shape == (4, 16)
    head = get_peft_model(vector_base(16), IAIConfig(**CONFIG)).base_model.core.head
    before = [parameter.clone() for parameter in head.parameters()]
    train_head(head, lambda most: training_tasks(rng, 2, most, 16), rng, steps=3, lr=1e-2)
    assert all(not torch.equal(one, other) for one, other in zip(before, head.parameters(), strict=True))
    assert len(list(states(head, tasks))) == 2


def test_a_regression_on_the_base_is_linear_in_the_vector():
    x = torch.randn(60, 5)
    y = x @ torch.arange(5.0) + 1
    model = get_peft_model(vector_base(5), IAIConfig(**CONFIG, likelihood="gaussian"))
    state = model.adapt(chunk_vectors(x, y))
    torch.testing.assert_close(model(inputs_embeds=x, task_state=state).logits[:, 0], y, atol=0.05, rtol=0.01)
