"""Adapters: names are names, files are checked, and bases that cannot work are refused."""

import pytest
import torch
from accelerate import cpu_offload
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import chunks, disturb, ids, make_base, make_model
from transformers import AutoModelForCausalLM, BertConfig, GPTNeoXConfig, RobertaConfig

from hf_iai import IAIConfig, TaskState

NAMES = ["iai", "state", "start", "0", "1", "q_proj", "mlp", "up", "default", "lora_A"]
FILE = "adapter_model.safetensors"
CONFIG = {"task_type": "CAUSAL_LM", "num_state_tokens": 4, "r": 2, "target_modules": "all-linear"}


@pytest.mark.parametrize("state_type", ["prefix", "lora"])
def test_adapters_of_any_names_beside_each_other(tmp_path, state_type):
    values = CONFIG | {"state_type": state_type, "signal": "gradients" if state_type == "lora" else "observations"}
    make_base().save_pretrained(tmp_path / "base")
    base = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # noqa: E731
    model = get_peft_model(base(), IAIConfig(**values)).eval()
    for name in NAMES:
        if name != "default":
            model.add_adapter(name, IAIConfig(**values))
    query, identities, states, answers = ids(2, 5), {}, {}, {}
    for name in NAMES:
        model.set_adapter(name)
        disturb(model)
        identities[name], states[name] = model.identity, model.adapt(chunks(1))
        answers[name] = model(input_ids=query, task_state=states[name]).logits.detach()
        states[name].save_pretrained(tmp_path / "states" / name)
    assert len({identity.fingerprint for identity in identities.values()}) == len(NAMES)
    model.save_pretrained(tmp_path / "adapters")
    folders = {name: tmp_path / "adapters" / ("" if name == "default" else name) for name in NAMES}
    sizes = {name: len(load_file(folder / FILE)) for name, folder in folders.items()}
    assert len(set(sizes.values())) == 1 and sizes["default"] > 20
    again = PeftModel.from_pretrained(base(), folders["iai"], adapter_name="iai")
    for name in NAMES[1:]:
        again.load_adapter(folders[name], name)
    again.eval()
    for name in NAMES:
        again.set_adapter(name)
        assert again.identity == identities[name]
        state = TaskState.from_pretrained(tmp_path / "states" / name)
        assert torch.equal(again(input_ids=query, task_state=state).logits, answers[name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_base().save_pretrained(folder / "base")
    make_model(AutoModelForCausalLM.from_pretrained(folder / "base")).save_pretrained(folder / "adapter")
    return folder


DAMAGE = {
    "no tensor": (lambda t: {}, "lacks .* tensors"),
    "no core": (lambda t: {n: x for n, x in t.items() if ".iai." not in n}, "lacks .* tensors"),
    "no LoRA": (lambda t: {n: x for n, x in t.items() if "lora_" not in n}, "lacks .* tensors"),
    "one missing": (lambda t: {n: x for n, x in t.items() if n != min(t)}, "lacks 1 tensors"),
    "one more": (lambda t: t | {"base_model.iai.more": torch.ones(1)}, "has 1 tensors too many"),
    "of another LoRA": (lambda t: t | {"base_model.model.x.lora_A.weight": torch.ones(1)}, "has 1 tensors too many"),
    "nan": (lambda t: t | {max(t): t[max(t)] * float("nan")}, "not finite"),
    "infinite": (lambda t: t | {min(t): t[min(t)] + float("inf")}, "not finite"),
    "another shape": (lambda t: t | {min(t): torch.ones(3, 3, 3)}, "has shape"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_files_of_adapters_are_checked(saved, tmp_path, damage, message):
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter" / "adapter_config.json").read_bytes())
    tensors = {n: t.contiguous() for n, t in damage(load_file(saved / "adapter" / FILE)).items()}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_files_of_other_methods_load_as_before(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    base = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # noqa: E731
    get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained(tmp_path / "a")
    assert PeftModel.from_pretrained(base(), tmp_path / "a").peft_config["default"].peft_type == "LORA"


def carrying_lora():
    return get_peft_model(make_base(), LoraConfig(task_type="CAUSAL_LM")).base_model.model


def offloaded():
    return cpu_offload(make_base(), execution_device=torch.device("cpu"))


def bidirectional(kind):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(kind(**sizes, num_attention_heads=4, max_position_embeddings=64)).eval()


BASES = {
    "BERT": (lambda: bidirectional(BertConfig), "tokens see those after them"),
    "RoBERTa": (lambda: bidirectional(RobertaConfig), "tokens see those after them"),
    "LoRA underneath": (carrying_lora, "carries an adapter of PEFT.*merge_and_unload"),
    "offloaded": (offloaded, "offloaded in part"),
}


@pytest.mark.parametrize(("make", "message"), BASES.values(), ids=BASES)
def test_bases_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make(), IAIConfig(**CONFIG))


@pytest.mark.parametrize("make", [lambda: bidirectional(GPTNeoXConfig), make_base], ids=["gpt_neox", "llama"])
def test_causal_bases_are_taken(make):
    assert get_peft_model(make(), IAIConfig(**CONFIG)).adapt(chunks(1)).batch_size == 2


def test_a_merged_lora_is_no_adapter():
    base = get_peft_model(make_base(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).merge_and_unload()
    assert get_peft_model(base, IAIConfig(**CONFIG)).adapt(chunks(1)).batch_size == 2


@pytest.mark.parametrize("values", [{}, {"signal": "gradients"}, {"state_type": "prefix+lora", "state_r": 2}])
def test_models_made_in_inference_mode(values):
    with torch.inference_mode():
        model = make_model(trained=False, **values)
    with torch.inference_mode():
        if values:
            with pytest.raises(ValueError, match=r"loaded inside torch\.inference_mode"):
                model.adapt(chunks(1))
        else:
            state = model.adapt(chunks(1))
            assert model(input_ids=ids(2, 4), task_state=state).logits.isfinite().all()
