"""Model cards: the published ones, those that saving and training write, and what the Hub would refuse."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import card_rules
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from samples import CHUNKS, arguments, episodes, tokenizer
from tiny import make_base, make_model
from transformers import AutoModelForCausalLM

from examples.maintain import render_cards
from hf_iai import IAIConfig, IAITrainer, embedded_base
from hf_iai.bases.hub_ids import is_hub_id
from hf_iai.embedded import EMBEDDED_NAME
from hf_iai.hub.cards import RENDERED, CardFacts, Measurement, model_card

ROOT = Path(__file__).parent.parent

PUBLISHED = render_cards.published_names()


def base_of(name: str) -> str:
    return json.loads((ROOT / "adapters" / name / "adapter_config.json").read_text())["base_model_name_or_path"]


ON_EMBEDDED = [name for name in PUBLISHED if base_of(name) == EMBEDDED_NAME]  # other bases lie on the Hub


def card_of(folder: Path) -> ModelCard:
    """The card in a folder, which the Hub would take."""
    content = (folder / "README.md").read_text()
    assert card_rules.errors(content) == []
    return ModelCard(content)


# ---------------------------------------------------------------- published


def test_every_published_adapter_has_a_recipe():
    assert sorted(path.name for path in (ROOT / "adapters").iterdir()) == PUBLISHED
    assert {f"{name}.md" for name in PUBLISHED} | {"template.md"} == {p.name for p in (ROOT / "model_cards").iterdir()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_card_is_what_make_cards_renders(name):
    for path, content in render_cards.render(name).items():
        assert path.read_bytes() == content, f"{path} is stale: run `make cards`"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_card_says_what_was_measured(name):
    card, recipe = card_of(ROOT / "adapters" / name), json.loads((ROOT / "adapters" / name / "recipe.json").read_text())
    results = {(r.dataset_type, r.metric_type, r.metric_args["num_chunks"]): r for r in card.data.eval_results}
    for curve in recipe["curves"]:
        metric, own = curve["metric"], {}
        for row in json.loads((ROOT / curve["file"]).read_text())[curve["rows"]]:
            if row["method"] == curve.get("method", "iai") and curve.get("where", {}).items() <= row.items():
                own.setdefault(row["num_chunks"], []).append(row[metric])
        for num_chunks, values in own.items():
            mean = sum(values) / len(values)
            assert results.pop((curve["data_type"], metric, num_chunks)).metric_value == pytest.approx(mean, abs=5.1e-5)
            assert f" {mean:.3f} |" in card.text
    assert results == {}
    base = base_of(name)
    assert card.data.license == "apache-2.0" and "## Citation" in card.text
    assert card.data.to_dict().get("base_model") == (base if is_hub_id(base) else None)
    assert recipe["train"] in card.text and f"`{recipe['evaluate']}`" in card.text
    assert all(f"- {limit}\n" in card.text for limit in recipe["limits"]) and len(recipe["limits"]) > 0


def test_a_recipe_picks_rows_and_its_method(tmp_path, monkeypatch):
    row = lambda setting, method, value: {"setting": setting, "method": method, "num_chunks": 4, "exact_match": value}  # noqa: E731
    rows = [row("a", "delta", 0.75), row("b", "delta", 0.5), row("a", "average", 0.25)]
    made = {"command": "c", "commit": "abc1234", "torch": "2"}
    (tmp_path / "recall.json").write_text(json.dumps({"recipe": made, "rows": rows}))
    monkeypatch.setattr(render_cards, "ROOT", tmp_path)
    curve = {"file": "recall.json", "rows": "rows", "metric": "exact_match", "unit": "share", "method": "delta"}
    names = {"data_name": "pairs", "data_type": "pairs", "where": {"setting": "a"}}
    (measured,) = render_cards.measurements({"evaluate": "c", "curves": [curve | names]}, "curve.png")
    assert measured.curve() == {4: 0.75} and measured.measured_by == "`c` at commit abc1234"
    assert measured.table().endswith("| **this adapter** | 0.750 |\n| average | 0.250 |")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_card_shows_its_picture(name):
    for card in (ROOT / "adapters" / name / "README.md", ROOT / "model_cards" / f"{name}.md"):
        picture = re.search(r"!\[.*\]\((.*)\)", card.read_text())[1]
        assert (card.parent / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ON_EMBEDDED)
def test_published_example_runs(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", (ROOT / "model_cards" / f"{name}.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(compile(code, f"{name}.md", "exec"), names)
    assert names["state"].step.item() >= 1
    assert capsys.readouterr().out.startswith(names["prompt"])


def test_published_example_of_vectors_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", (ROOT / "model_cards" / "vectors-linear.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(compile(code, "vectors-linear.md", "exec"), names)
    assert names["state"].step.item() == 5 and names["state"].num_tokens.item() == 100
    printed = ast.literal_eval(capsys.readouterr().out)
    assert len(printed) == 3 and set(printed) <= {"left", "right"}


LOGITS = """
import sys, torch, hf_iai
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
adapter, output = sys.argv[1:]
print(hf_iai.__file__)
model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
ids = torch.arange(5, 133).reshape(2, 64)
state = model.adapt([{"input_ids": ids}, {"input_ids": ids + 100}])
save_file({"logits": model(input_ids=ids[:, :9], task_state=state).logits.contiguous()}, output)
"""


def test_code_prefix_loads_from_another_folder_and_another_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", str(ROOT / "adapters" / "code-prefix"), "here.safetensors"])
    exec(LOGITS, {})

    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "hf_iai", checkout / "hf_iai", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "adapters" / "code-prefix", checkout / "adapters" / "code-prefix")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        LOGITS,
        "adapters/code-prefix",
        str(tmp_path / "there.safetensors"),
    ]
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(checkout / "hf_iai" / "__init__.py")
    assert torch.equal(*(load_file(f"{place}.safetensors")["logits"] for place in ("here", "there")))


# ---------------------------------------------------------------- saved


def test_saving_writes_our_card_once(tmp_path):
    folder = tmp_path / "reader"
    model = make_model()
    model.save_pretrained(folder)
    card = card_of(folder)
    assert "import hf_iai" in card.text and 'from_pretrained("reader")' in card.text
    assert "prefix with 4 slots" in card.text and "Not measured" in card.text
    assert {"hf_iai", "transformers"} <= set(card.data.tags) and card.data.library_name == "peft"
    assert "license" not in card.data.to_dict() and "Not stated." in card.text
    content = (folder / "README.md").read_text()
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == content


def test_no_path_of_this_machine_is_in_a_card(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    for name, base in (("local", tmp_path / "base"), ("embedded", embedded_base())):
        config = IAIConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / name)
        card = card_of(tmp_path / name)
        assert "base_model" not in card.data.to_dict()
        assert str(base) not in str(card) and str(tmp_path) not in str(card)
        assert (EMBEDDED_NAME if name == "embedded" else "`base`, which is not on the Hub") in card.text


def test_a_base_of_the_hub_is_named(tmp_path):
    base = make_base()
    base.config._name_or_path = base.name_or_path = "someone/base"
    model = make_model(base)
    model.save_pretrained(tmp_path)
    assert card_of(tmp_path).data.base_model == "someone/base"
    assert "base_model:adapter:someone/base" in card_of(tmp_path).data.tags


def test_another_configuration_is_rendered_anew(tmp_path):
    make_model().save_pretrained(tmp_path)
    make_model(num_state_tokens=6).save_pretrained(tmp_path)
    assert "prefix with 6 slots" in card_of(tmp_path).text


@pytest.mark.parametrize("signal", ["observations", "gradients", "both"])
def test_a_card_says_whether_gradients_are_taken(signal):
    card = model_card(IAIConfig(task_type="CAUSAL_LM", signal=signal), CardFacts("reader"))
    assert ("No gradient is taken" in card.text) == (signal == "observations")


def test_edits_stay(tmp_path):
    readme = tmp_path / "README.md"
    make_model().save_pretrained(tmp_path)
    readme.write_text(readme.read_text() + "\nA note.\n")
    make_model().save_pretrained(tmp_path)
    assert "A note." in card_of(tmp_path).text
    readme.write_text(readme.read_text().replace(RENDERED, ""))
    make_model(num_state_tokens=6).save_pretrained(tmp_path)
    assert "A note." in card_of(tmp_path).text and "prefix with 4 slots" in card_of(tmp_path).text


def test_a_card_that_someone_wrote_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Reader\n\nBy hand.\n")
    make_base().save_pretrained(tmp_path / "base")
    make_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.text.lstrip().startswith("# Reader\n\nBy hand.") and card.data.license == "mit"
    assert "hf_iai" in card.data.tags and str(tmp_path) not in str(card)


def test_tags_of_the_base_are_carried(tmp_path):
    base = make_base()
    base.add_model_tags("reading")
    make_model(base).save_pretrained(tmp_path)
    assert card_of(tmp_path).data.tags.count("reading") == 1


def test_other_methods_keep_their_card(tmp_path):
    from peft import LoraConfig

    model = get_peft_model(make_base(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    assert type(model).__mro__[1] is PeftModel
    model.save_pretrained(tmp_path)
    assert "hf_iai" not in (tmp_path / "README.md").read_text()


# ---------------------------------------------------------------- trained


def trained(folder, **values) -> IAITrainer:
    data = episodes()
    args = arguments(folder / "run", max_steps=2, eval_chunks=(0, 1, CHUNKS), **values)
    trainer = IAITrainer(
        make_model(trained=False), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
    )
    trainer.train()
    return trainer


def test_card_of_a_run_carries_its_last_curve(tmp_path):
    trainer = trained(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.create_model_card(license="mit", dataset="words", dataset_tags="me/words", tags="small", language="en")
    card, logged = card_of(tmp_path / "run"), trainer.state.log_history
    last = [entry for entry in logged if "eval_loss_at_chunks_0" in entry][-1]
    found = {r.metric_args["num_chunks"]: r.metric_value for r in card.data.eval_results}
    assert found == {n: pytest.approx(last[f"eval_loss_at_chunks_{n}"], abs=5.1e-5) for n in (0, 1, CHUNKS)}
    assert {r.dataset_type for r in card.data.eval_results} == {"me/words"} and card.data.datasets == ["me/words"]
    assert (card.data.license, card.data.language) == ("mit", "en") and "small" in card.data.tags
    assert "`IAITrainer.evaluate` at step 2 of 2" in card.text and "words, 24 episodes" in card.text
    assert "- learning_rate: 0.01\n" in card.text and "- objective: unrolled\n" in card.text
    trainer.model.save_pretrained(tmp_path / "run")
    assert card_of(tmp_path / "run").text == card.text


def test_a_card_that_a_person_took_over_stays(tmp_path):
    trainer = trained(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.create_model_card()
    path = tmp_path / "run" / "README.md"
    path.write_text(path.read_text().replace(RENDERED, "") + "\nMy own words.\n")
    trainer.create_model_card()
    trainer.model.save_pretrained(tmp_path / "run")
    assert "My own words." in card_of(tmp_path / "run").text


def test_figures_of_other_weights_do_not_stay(tmp_path):
    trainer = trained(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.create_model_card()
    assert card_of(tmp_path / "run").data.eval_results
    with torch.no_grad():
        next(trainer.model.base_model.core.parameters()).add_(0.1)
    trainer.model.save_pretrained(tmp_path / "run")
    card = card_of(tmp_path / "run")
    assert "Not measured" in card.text and not card.data.eval_results


def test_an_adapter_saved_elsewhere_says_how_it_was_trained(tmp_path):
    """`save_pretrained` after `train`, as the guides do it; further training makes the record void."""
    trainer = trained(tmp_path)
    trainer.model.save_pretrained(tmp_path / "reader")
    text = card_of(tmp_path / "reader").text
    assert "# reader" in text and 'from_pretrained("reader")' in text.replace(str(tmp_path), "")
    assert "- learning_rate: 0.01\n" in text and "24 episodes" in text and "Not measured" in text
    trainer.evaluate()
    trainer.model.save_pretrained(tmp_path / "measured")
    assert "Measured by `IAITrainer.evaluate` at step 2 of 2" in card_of(tmp_path / "measured").text
    with torch.no_grad():
        next(trainer.model.base_model.core.parameters()).add_(0.1)
    trainer.model.save_pretrained(tmp_path / "changed")
    assert "Not recorded: the adapter was saved outside `IAITrainer`" in card_of(tmp_path / "changed").text


def test_card_of_a_run_takes_the_curve_of_the_weights_it_loaded(tmp_path):
    trainer = trained(
        tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, save_total_limit=2
    )
    trainer.state.best_global_step = 1
    trainer.create_model_card()
    assert "at step 1 of 2" in card_of(tmp_path / "run").text


def test_card_of_a_run_without_evaluation_says_so(tmp_path):
    trained(tmp_path).create_model_card()
    card = card_of(tmp_path / "run")
    assert "Not measured" in card.text and card.data.eval_results is None
    assert str(tmp_path) not in str(card)


def test_several_evaluation_sets_have_a_curve_each(tmp_path):
    data = episodes()
    args = arguments(tmp_path / "run", max_steps=1, eval_chunks=(0, 1))
    sets = {"near": data, "far": data.select(range(8))}
    trainer = IAITrainer(make_model(), args, train_dataset=data, eval_dataset=sets, processing_class=tokenizer())
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    assert {r.dataset_type for r in card_of(tmp_path / "run").data.eval_results} == {"eval_near", "eval_far"}


# ---------------------------------------------------------------- rendering


def test_another_metric_is_rendered_as_itself():
    rows = [{"method": m, "num_chunks": n, "seed": s, "accuracy": v + 0.1 * s}
            for m, n, v in (("iai", 0, 0.1), ("iai", 5, 0.8), ("random", 0, 0.05)) for s in (0, 1)]  # fmt: skip
    measured = Measurement(rows, "pairs", "pairs", "`x.py`", "accuracy", "exact match", labels={"random": "a guess"})
    card = model_card(IAIConfig(task_type="CAUSAL_LM"), CardFacts("recall", measurements=(measured,)))
    assert card_rules.errors(str(card)) == []
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("accuracy", 0.15), ("accuracy", 0.85)]
    assert "| a guess | 0.100 |  |" in card.text and "loss" not in str(card)
    assert "which differ by at most 0.100" in card.text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("base_model: hf_iai:embedded", "base_model"),
        ("base_model: /base", "base_model"),
        ("base_model: ''", "base_model"),
        ("license: mine", "license"),
        ("license: other", "license_name"),
        ("datasets: [a/b/c]", "datasets"),
        ("tags: [1]", "tags"),
        ("license: mit\nlicense: mit", "duplicated"),
        ("tags: [", "YAML"),
        ("model-index: [{name: a}]", "model-index"),
        ("model-index: [{name: a, results: [], note: b}]", "holds more"),
        ("model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: n}, metrics: [{type: loss, "
         "value: .nan}]}]}]", "value"),
        ("model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d}, metrics: [{type: loss, "
         "value: 1}]}]}]", "model-index"),
    ],
)  # fmt: skip
def test_rules_refuse(metadata, message):
    assert message in "\n".join(card_rules.errors(f"---\n{metadata}\n---\n\n# A card\n"))
