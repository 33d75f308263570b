"""`LearnedOptimizer`: a trained head as an ordinary optimizer, and the constants it was trained with."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import chunks, gradient_model, ids, largest_difference, make_base, make_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_iai import LearnedOptimizer
from hf_iai.heads import LearnedStep, LearnedStepSettings

CAUSAL = {"task_type": "CAUSAL_LM"}
LORA = {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"}
# Constants unlike the defaults, with other numbers of averages and times.
OTHER = {
    "momentum_decays": [0.2, 0.8], "second_decays": [0.5], "factored_decay": 0.7, "times": [2, 5], "hidden": 8,
    "step_size": 0.05, "smallest_rms": 0.2, "most_log_magnitude": 1.0, "largest_precondition": 10.0,
    "largest_surprise": 1.5, "length_decay": 0.5, "doubt": 0.5, "log_scale": 5.0,
}  # fmt: skip
DECAYS = {"momentum_decays": [0.1, 0.7], "second_decays": [0.3], "factored_decay": 0.6}


@pytest.fixture
def weights(tmp_path):
    """Adapters whose heads were disturbed, so that the network has a part in the steps."""

    def save(state_type: str, settings: dict | None = None) -> str:
        rate = 0.1 if state_type == "lora" else None
        values = {"initial_rate": rate, "learned_optimizer": settings}
        model = gradient_model(state_type=state_type, regime="parametric", **values)
        model.save_pretrained(tmp_path / state_type)
        return str(tmp_path / state_type)

    return save


def tuned(**values):
    torch.manual_seed(2)
    return get_peft_model(make_base(), LoraConfig(**CAUSAL, **LORA, **values))


class Texts(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        row = ids(8, seed=index)
        return {"input_ids": row, "labels": row}


@pytest.mark.parametrize("settings", [None, OTHER], ids=["defaults", "other"])
def test_steps_are_those_of_the_states(weights, settings):
    """A LoRA that starts as theta(0) takes, text by text, the steps that reading them would."""
    folder = weights("lora", settings)
    model = gradient_model(state_type="lora", regime="parametric", initial_rate=0.1, learned_optimizer=settings)
    plain, support = tuned(), chunks(3, batch=1)
    start = model.core.state.update(model.initial_state().tensors)
    layers = {path: plain.base_model.model.get_submodule(path) for path in start}
    with torch.no_grad():
        for path, (down, up) in start.items():
            layers[path].lora_A["default"].weight.copy_(down[0])
            layers[path].lora_B["default"].weight.copy_(up[0])
    optimizer = LearnedOptimizer(plain, folder)
    for chunk in support:
        optimizer.zero_grad()
        plain(input_ids=chunk["input_ids"], labels=chunk["input_ids"]).loss.backward()
        optimizer.step()
    expected = model.core.state.update(model.adapt(support).tensors)
    moved = max((expected[p][1] - start[p][1]).abs().max() for p in start)
    for path, (down, up) in expected.items():
        assert (layers[path].lora_A["default"].weight - down[0]).abs().max() < 1e-4 * moved
        assert (layers[path].lora_B["default"].weight - up[0]).abs().max() < 1e-4 * moved
    # Without names, which tell A from B, both take the mean rate.
    other = LearnedOptimizer([p for p in plain.parameters() if p.requires_grad], folder)
    assert all(not group.get("param_names") for group in other.param_groups)


def test_a_surprising_gradient_is_clipped():
    """Untrained, so that a step is a rate of 0.1 times the gradient: to 2.5 times the mean length of those before."""
    step = LearnedStep({"a": "a", "b": "b"}, 0.1, LearnedStepSettings())
    theta = {"a": torch.ones(2, 3, 4), "b": torch.ones(2, 5)[..., None]}
    kept = step.initial(theta)
    lengths = torch.tensor([[1.0, 2.0], [1.0, 2.0], [8.0, 3.0], [0.0, 0.0], [1.0, 2.0]])  # (steps, B)
    moved = []
    for count, length in enumerate(lengths):
        unit = {name: torch.ones_like(t) / 17**0.5 for name, t in theta.items()}  # 17 coordinates
        gradient = {name: t * length.view(-1, 1, 1) for name, t in unit.items()}
        after, kept = step(theta, kept, gradient, torch.full((2,), count), theta)
        moved.append(torch.stack([(after[n] - theta[n]).flatten(1).square().sum(1) for n in theta]).sum(0).sqrt() / 0.1)
    expected = lengths.clone()
    expected[2, 0] = 2.5
    torch.testing.assert_close(torch.stack(moved).detach(), expected, atol=1e-5, rtol=1e-5)
    # Clipped ones count as they were taken, and none at all does not.
    torch.testing.assert_close(kept["gradient_length"], torch.tensor([1 + 0.015 * 0.99, 2 + 0.01 * 0.99]))


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_has_an_effect(name):
    usual = getattr(LearnedStepSettings(), name)
    half = usual // 2 if name == "hidden" else usual / 2 if isinstance(usual, float) else [v / 2 for v in usual]
    found = []
    for settings in (LearnedStepSettings(), LearnedStepSettings.from_dict({name: half})):
        step = LearnedStep({"theta": "theta"}, 0.1, settings)
        generator = torch.Generator().manual_seed(4)
        for parameter in step.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        generator = torch.Generator().manual_seed(5)
        theta = {"theta": 0.05 * torch.randn(1, 4, 32, generator=generator)}
        start, kept = theta, step.initial(theta)
        for count in range(12):
            gradient = {"theta": 3 ** (count % 4) * torch.randn(1, 4, 32, generator=generator) ** 3}
            gradient["theta"] += theta["theta"].detach() - start["theta"]  # as if the way led uphill
            theta, kept = step(theta, kept, gradient, torch.tensor([count]), start)
        found.append(theta["theta"])
    assert (found[0] - found[1]).abs().max() > 1e-6


def test_harm_is_taken_back():
    """After a long first step task 0 is told by every chunk to come back, task 1 to go on, task 2 nothing."""
    step = LearnedStep({"a": "a"}, 0.1, LearnedStepSettings())
    start = {"a": torch.ones(3, 3, 4)}
    theta, kept = step(start, step.initial(start), {"a": torch.ones(3, 3, 4)}, torch.zeros(3), start)
    trust, way = [], []
    for count in range(1, 12):
        gradient = {"a": torch.tensor([-1e-3, 1e-3, 0]).view(3, 1, 1).expand(3, 3, 4)}
        theta, kept = step(theta, kept, gradient, torch.full((3,), count), start)
        trust.append(kept["trust"])
        way.append((start["a"] - theta["a"]).mean((1, 2)))
    trust, way = torch.stack(trust, 1), torch.stack(way, 1)  # (3, 11) each
    # Two slopes of one sign are 1.38 standard errors, three are 1.65: from then on, 0.8 each time.
    torch.testing.assert_close(trust[0], 0.8 ** torch.arange(-1.0, 10).clamp_min(0))
    torch.testing.assert_close(way[0, 2], 0.8 * way[0, 1] - 0.8 * 1e-4, atol=1e-6, rtol=0)
    assert way[0, -1] < 0.2 * way[0, 0]
    assert (trust[1:] == 1).all() and (way[1].diff() > 0).all() and (way[2] == way[2, 0]).all()
    assert kept["slope"][2] == 0


def test_settings_travel_with_the_weights(tmp_path):
    model = gradient_model(state_type="prompt", learned_optimizer=OTHER)
    state = model.adapt(chunks(3))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["learned_optimizer"] == OTHER
    again = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert largest_difference(again.adapt(chunks(3)), state) == 0
    assert again.identity == state.identity
    # The network would fit, but not to these constants: its states are others.
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"learned_optimizer": OTHER | DECAYS}))
    changed = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert largest_difference(changed.adapt(chunks(3)), state) > 1e-5
    assert changed.identity != state.identity


def test_adapters_without_settings_have_the_defaults(tmp_path):
    model = gradient_model(state_type="prompt")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.pop("learned_optimizer") == LearnedStepSettings().to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert largest_difference(again.adapt(chunks(2)), model.adapt(chunks(2))) == 0
    assert LearnedOptimizer(tuned(), tmp_path).net.settings == LearnedStepSettings()


@pytest.mark.parametrize(
    ("state_type", "config"),
    [
        ("prompt", PromptTuningConfig(**CAUSAL, num_virtual_tokens=4)),
        ("prefix", PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4)),
        ("lora", LoraConfig(**CAUSAL, **LORA)),
    ],
    ids=["prompt", "prefix", "lora"],
)
def test_it_trains_plain_adapters(weights, state_type, config):
    torch.manual_seed(2)
    model, text = get_peft_model(make_base(), config), ids(4, 12)
    optimizer = LearnedOptimizer(model, weights(state_type))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def test_closure_and_rate(weights):
    weights, text = weights("lora"), ids(2, 8)
    after = {}
    for lr in (0.0, 0.5, 1.0):
        model = tuned()
        optimizer = LearnedOptimizer(model, weights, lr=lr)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(input_ids=text, labels=text).loss
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == pytest.approx(tuned()(input_ids=text, labels=text).loss.item())
        assert optimizer.step() is None
        after[lr] = [p.detach() for p in model.parameters() if p.requires_grad]
    start = [p.detach() for p in tuned().parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(after[0.0], start, strict=True))
    distances = [sum((a - b).norm() for a, b in zip(after[lr], start, strict=True)) for lr in (0.5, 1.0)]
    assert 0 < distances[0] < distances[1]


def test_trainer_resumes_bitwise(weights, tmp_path):
    """Even when the adapter that the network came from has changed since, its constants too."""
    weights = weights("lora", OTHER)

    def run(folder, resume=None):
        model = tuned()
        args = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, use_cpu=True,
            report_to=[], disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        kinds = (LearnedOptimizer, {"model": model, "weights": weights})
        trainer = Trainer(model, args, train_dataset=Texts(), optimizer_cls_and_kwargs=kinds)
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    whole = run("whole")
    other = gradient_model(state_type="lora", regime="parametric", initial_rate=0.1, trained=False)
    other.save_pretrained(weights)
    resumed = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, run("other"), strict=True))


def test_state_follows_the_parameters(weights):
    weights, text = weights("lora"), ids(2, 8)

    def stepped(model, state=None):
        optimizer = LearnedOptimizer(model, weights)
        if state is not None:
            optimizer.load_state_dict(state)
        model(input_ids=text, labels=text).loss.backward()
        optimizer.step()
        return optimizer

    state = stepped(tuned()).state_dict()
    model = tuned().to(torch.bfloat16)
    optimizer = stepped(model, state)
    kept = [t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
    assert {t.dtype for t in kept} == {torch.bfloat16}
    assert {values["step"] for values in optimizer.state.values()} == {2}


def test_errors(weights, tmp_path):
    model, folder = tuned(), weights("lora")
    with pytest.raises(FileNotFoundError, match="holds no adapter: adapter_config.json is missing"):
        LearnedOptimizer(model, tmp_path)
    make_model().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained with signal and head \('observations', 'gated'\)"):
        LearnedOptimizer(model, tmp_path / "other")
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        LearnedOptimizer(model, folder, lr=-1)
    with pytest.raises(ValueError, match="weight_decay=0.1 cannot be combined"):
        LearnedOptimizer([{"params": list(model.parameters()), "weight_decay": 0.1}], folder)


@pytest.mark.parametrize("state_type", ["prompt", "lora"])
def test_a_saved_optimizer_goes_on_bitwise(weights, tmp_path, state_type):
    folder, text = weights(state_type), ids(2, 8)

    def stepped(model, optimizer, num):
        for _ in range(num):
            optimizer.zero_grad()
            model(input_ids=text, labels=text).loss.backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters() if p.requires_grad]

    model = tuned()
    optimizer = LearnedOptimizer(model, folder)
    stepped(model, optimizer, 2)
    optimizer.save_pretrained(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["learned_optimizer.safetensors"]
    other = copy.deepcopy(model)
    resumed = LearnedOptimizer.from_pretrained(tmp_path / "run", other)
    for a, b in zip(stepped(model, optimizer, 2), stepped(other, resumed, 2), strict=True):
        assert torch.equal(a, b)


def test_files_of_no_optimizer_are_refused(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no learned optimizer"):
        LearnedOptimizer.from_pretrained(tmp_path, tuned())
    model = tuned()
    LearnedOptimizer(model, weights("lora")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of .* parameters, got 1: pass the same"):
        LearnedOptimizer.from_pretrained(tmp_path, list(model.parameters())[:1])
    path = tmp_path / "learned_optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="learned_optimizer.safetensors is damaged"):
        LearnedOptimizer.from_pretrained(tmp_path, model)
