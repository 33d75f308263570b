"""Sharing: adapters, task states and training runs through a Hub on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import GATED, Hub

START = """
import warnings; warnings.simplefilter("ignore")
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM
from tiny import chunks, ids, make_base, make_model
from hf_iai import IAITrainer, TaskState
import huggingface_hub
"""


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.shutdown()


@pytest.fixture
def run(hub, tmp_path):
    """Runs a script in a process whose Hub is ours: huggingface_hub reads its address when it is imported."""

    def run(script: str, **environment: str) -> str:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(
            [sys.executable, "-c", START + script],
            env=os.environ | own | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


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
import test_training as t
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


@pytest.mark.parametrize(
    ("repository", "offline", "error"),
    [
        ("tester/nowhere", "0", "RepositoryNotFoundError"),
        (GATED, "0", "GatedRepoError"),
        ("tester/nowhere", "1", "LocalEntryNotFoundError"),
    ],
)
def test_errors_are_those_of_the_hub(run, repository, offline, error):
    out = run(
        f"""
try:
    TaskState.from_pretrained("{repository}")
except Exception as error:
    print(type(error).__name__)
""",
        HF_HUB_OFFLINE=offline,
    )
    assert out.strip() == error
