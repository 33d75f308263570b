"""Sharing: adapters, task states and training runs through a Hub on this machine."""

from pathlib import Path

import pytest
from hub_process import HubProcess
from hub_server import GATED
from huggingface_hub import ModelCard


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where downloads go."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def process(hub, home):
    process = HubProcess(hub.url, home)
    yield process
    process.close()


@pytest.fixture
def run(process, tmp_path):
    return lambda script: process.run(script, tmp_path)


def test_adapter_and_state_come_back_bitwise(hub, run):
    run("""
make_base().push_to_hub("tester/base")
model = make_model(AutoModelForCausalLM.from_pretrained("tester/base"), num_state_tokens=8, num_kept_tokens=4).eval()
model.push_to_hub("tester/adapter")
state = model.adapt(chunks(3))
assert state.push_to_hub("tester/state", commit_message="after 3 chunks").startswith(huggingface_hub.constants.ENDPOINT)
expected = model(input_ids=ids(2, 5), task_state=state).logits

again = AutoPeftModelForCausalLM.from_pretrained("tester/adapter").eval()
loaded = TaskState.from_pretrained("tester/state")
assert all(torch.equal(loaded.tensors[name], t) for name, t in state.tensors.items())
assert torch.equal(again(input_ids=ids(2, 5), task_state=loaded).logits, expected)

model.adapt(chunks(1, seed=4), state=state).push_to_hub("tester/state")  # the repository is there already
assert TaskState.from_pretrained("tester/state").step.tolist() == [4, 4]
""")
    assert set(hub.files("tester/state")) == {"config.json", "task_state.safetensors"}
    assert "adapter_model.safetensors" in hub.files("tester/adapter")
    revision = hub.commits["tester/state"][1][0]
    assert (
        run(f"print(TaskState.from_pretrained('tester/state', revision='{revision}').step.tolist())").strip()
        == "[3, 3]"
    )


def test_trainer_pushes_at_every_save(hub, run):
    run("""
import samples as t
make_base().push_to_hub("tester/base")
model = make_model(AutoModelForCausalLM.from_pretrained("tester/base"), trained=False)
args = t.arguments("run", push_to_hub=True, hub_model_id="tester/run", hub_strategy="every_save", hub_always_push=True)
trainer = IAITrainer(model, args, train_dataset=t.episodes(), processing_class=t.tokenizer())
trainer.train()
trainer.push_to_hub()
again = AutoPeftModelForCausalLM.from_pretrained("tester/run").eval()
answers = [m(input_ids=ids(2, 5), task_state=m.adapt(chunks(2))).logits for m in (model.eval(), again)]
assert torch.equal(*answers)
""")
    pushes = [
        files["adapter_model.safetensors"]
        for _, files in hub.commits["tester/run"]
        if "adapter_model.safetensors" in files
    ]
    assert len(pushes) >= 2 and pushes[0] != pushes[-1]


def test_learned_optimizer_comes_from_the_hub(hub, run):
    """Of the revision that is asked for, and no file beside the two that it needs."""
    made = """
from peft import LoraConfig
from hf_iai import LearnedOptimizer

def made(hidden):
    values = {"state_type": "lora", "signal": "gradients", "learned_optimizer": {"hidden": hidden}}
    return make_model(**values)

"""
    run(made + """for hidden in (8, 16): made(hidden).push_to_hub("tester/optimizer")""")
    first = next(name for name, files in hub.commits["tester/optimizer"] if files)
    hub.served.clear()
    run(f"""{made}
plain = get_peft_model(make_base(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
for revision, hidden in (("{first}", 8), (None, 16)):
    net, head = LearnedOptimizer(plain, "tester/optimizer", revision=revision).net, made(hidden).core.head
    assert net.settings == head.settings
    assert all(torch.equal(t, head.state_dict()[name]) for name, t in net.state_dict().items())
""")
    assert set(hub.served) == {"adapter_config.json", "adapter_model.safetensors"}


def test_pushed_adapters_carry_our_card(hub, run):
    run("""
import samples as t
from huggingface_hub import ModelCard
from hf_iai import IAIConfig, embedded_base

make_base().push_to_hub("tester/base")
model = make_model(AutoModelForCausalLM.from_pretrained("tester/base"))
model.push_to_hub("tester/carded", tags=["small"])
card = ModelCard.load("tester/carded")
card.text += "\\nA note.\\n"
card.push_to_hub("tester/carded")
model.push_to_hub("tester/carded")

config = IAIConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
get_peft_model(AutoModelForCausalLM.from_pretrained(embedded_base()), config).push_to_hub("tester/embedded")

args = t.arguments("run", hub_model_id="tester/evaluated", eval_chunks=(0, 2))
trainer = IAITrainer(model, args, train_dataset=t.episodes(), eval_dataset=t.episodes(), processing_class=t.tokenizer())
trainer.evaluate()
trainer.push_to_hub(license="mit")
""")
    first, *_, last = (ModelCard(files["README.md"].decode()) for _, files in hub.commits["tester/carded"][1:])
    assert "import hf_iai" in first.text and 'from_pretrained("tester/carded")' in first.text
    assert first.data.base_model == "tester/base" and {"hf_iai", "small"} <= set(first.data.tags)
    assert first.data.library_name == "peft" and last.text == first.text + "\nA note.\n"
    embedded = ModelCard(hub.files("tester/embedded")["README.md"].decode())
    assert "base_model" not in embedded.data.to_dict() and "`hf_iai:embedded`" in embedded.text
    evaluated = ModelCard(hub.files("tester/evaluated")["README.md"].decode())
    assert [result.metric_args["num_chunks"] for result in evaluated.data.eval_results] == [0, 2]
    assert evaluated.data.license == "mit" and 'from_pretrained("tester/evaluated")' in evaluated.text


def test_published_cards_validate(run):
    root = Path(__file__).parent.parent
    out = run(f"""
from pathlib import Path
from huggingface_hub import ModelCard
root = Path({str(root)!r})
for path in [*root.glob("adapters/*/README.md"), *root.glob("model_cards/*-*.md")]:
    ModelCard.load(path).validate()
    print(path.relative_to(root))
wrong = ModelCard.load(path)
wrong.data.base_model = "hf_iai:embedded"
try:
    wrong.validate()
except ValueError as error:
    print("refused" if "base_model" in str(error) else error)
""")
    adapters = [path.name for path in (root / "adapters").iterdir()]
    cards = {f"adapters/{name}/README.md" for name in adapters} | {f"model_cards/{name}.md" for name in adapters}
    assert set(out.split()) == cards | {"refused"}


@pytest.mark.parametrize(
    ("repository", "offline", "error"),
    [
        ("tester/nowhere", False, "RepositoryNotFoundError"),
        (GATED, False, "GatedRepoError"),
        ("tester/nowhere", True, "LocalEntryNotFoundError"),
    ],
)
def test_errors_are_those_of_the_hub(run, repository, offline, error):
    out = run(f"""
huggingface_hub.constants.HF_HUB_OFFLINE = {offline}
try:
    TaskState.from_pretrained("{repository}")
except Exception as error:
    print(type(error).__name__)
""")
    assert out.strip() == error
