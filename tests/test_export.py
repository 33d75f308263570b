"""Exports: plain PEFT adapters that a process without hf_iai loads."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import card_rules
import pytest
import torch
from hub_server import Hub
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftType, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import ATTENTION_FAMILIES, REGIMES, chunks, disturb, ids, make_base, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconMambaConfig,
    Mamba2Config,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
)
from typer.testing import CliRunner

import hf_iai.export.peft
from hf_iai import IAIConfig, chunk_text, embedded_base, export_to_peft
from hf_iai.cli import app
from hf_iai.export.peft import _checked_type
from hf_iai.export.vllm import vllm_remarks
from hf_iai.files import MARK
from hf_iai.hub.published import published_adapter

FAMILIES, MORE_FAMILIES = ["llama", "gpt2"], ["qwen3", "gemma3"]
PROMPT, PREFIX, CARTRIDGE = TYPES = ["PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"]
KINDS = [("prompt", t) for t in TYPES] + [("prefix", t) for t in TYPES[1:]] + [("lora", "LORA")]
GRADIENTS = {"signal": "gradients", "state_r": 3, "state_target_modules": "all-linear"}
# A query longer than the sliding window, more slots than it has positions, kept, replaced and pinned tokens.
SPECIAL = {
    "long": ("gemma3", {"regime": "parametric"}, PREFIX),
    "many": ("gemma3", {"regime": "parametric", "num_state_tokens": 30}, CARTRIDGE),
    "many-prompt": ("gemma3", {"regime": "parametric", "num_state_tokens": 30, "state_type": "prompt"}, PROMPT),
    "kept": ("llama", {"num_kept_tokens": 2}, PREFIX),
    "delta": ("llama", {"delta_rule": True}, CARTRIDGE),
    "recent": ("llama", {"accumulation": "recent", "pin_bos": True, "regime": "parametric"}, PREFIX),
    "recent-prompt": ("gpt2", {"accumulation": "recent", "pin_bos": True, "state_type": "prompt"}, PROMPT),
    "some-modules": ("gpt2", {"state_type": "lora", **GRADIENTS, "state_target_modules": ["c_attn"]}, "LORA"),
    "other-modules": ("llama", {"state_type": "lora", **GRADIENTS, "target_modules": ["q_proj", "up_proj"]}, "LORA"),
    "hypernetwork": ("llama", {"state_type": "lora", "state_r": 2}, "LORA"),
    "both": ("gemma3", {"state_type": "lora", "state_r": 2, "signal": "both"}, "LORA"),
    "gradients": ("qwen3", {"state_type": "prompt", "signal": "gradients"}, PROMPT),
    "uncorrected": ("qwen3", {"correction": False, "state_type": "prompt"}, PREFIX),
}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

# Loads every folder named in answers.json and writes how far its answers are from those noted there.
PLAIN = """
import json, os, re, sys, warnings
warnings.simplefilter("ignore")
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.disable_progress_bar()

@torch.no_grad()
def compare(model, answers):
    query = answers["query"]
    logits = model.eval()(input_ids=query, attention_mask=torch.ones_like(query)).logits[:, -query.shape[1]:]
    out = model.generate(
        input_ids=query, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, -5:]
    return (logits - answers["logits"]).abs().max().item(), torch.equal(out, answers["new"])

found = {}
for name in sorted(os.listdir("answers")):
    folder = "exports/" + name.removesuffix(".safetensors").replace("@", "/")
    answers = load_file("answers/" + name)
    found[name.removesuffix(".safetensors")] = compare(AutoPeftModelForCausalLM.from_pretrained(folder), answers)

if not os.path.isdir("exports/batch"):  # of more families, and no more
    assert "hf_iai" not in sys.modules
    json.dump(found, open("found.json", "w"))
    sys.exit()

# What the README of an export says, from another folder than the one it was written to.
answers = load_file("answers/llama-explicit-prefix-PREFIX_TUNING.safetensors")
for name in ("llama-explicit-prefix-PREFIX_TUNING", "llama-parametric-prefix-PREFIX_TUNING"):
    os.makedirs("moved", exist_ok=True)
    os.rename("exports/" + name, "moved/" + name)
    code = re.search("```python\\n(.*?)```", open(f"moved/{name}/README.md").read(), re.DOTALL)[1]
    names, here = {}, os.getcwd()
    os.chdir("moved")
    exec(code, names)
    os.chdir(here)
    found["README of " + name] = compare(names["model"], load_file(f"answers/{name}.safetensors"))

AutoTokenizer.from_pretrained("exports/embedded/base")
HfApi().create_repo("tester/export")
HfApi().upload_folder(repo_id="tester/export", folder_path="exports/batch")
base = AutoModelForCausalLM.from_pretrained("tester/export", subfolder="base")
model = PeftModel.from_pretrained(base, "tester/export", subfolder="1")
found["Hub"] = compare(model, load_file("answers/batch@1.safetensors"))

assert "hf_iai" not in sys.modules
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hub):
    """`exports/NAME`, what the exporting model answers in `answers`, and what plain PEFT made of it in `found.json`."""
    folder = export_families(tmp_path_factory.mktemp("export"), FAMILIES)
    for family in {family for family, *_ in SPECIAL.values()} - set(FAMILIES):
        make_base(family).save_pretrained(folder / "bases" / family)
    for name, (family, values, kind) in SPECIAL.items():
        export(folder, name, model_of(folder, family, **values), kind, query_length=40 if name == "long" else 6)
    export(folder, "unnamed", make_model(regime="parametric"))
    export(folder, "batch", model_of(folder, "llama"), batch=2)
    export(folder, "batch-lora", model_of(folder, "llama", state_type="lora", **GRADIENTS), batch=2)
    export_embedded(folder)
    answer_with_plain_peft(folder, hub)
    return folder


@pytest.fixture(scope="module")
def folder_of_more_families(tmp_path_factory, hub):
    folder = export_families(tmp_path_factory.mktemp("more"), MORE_FAMILIES)
    answer_with_plain_peft(folder, hub)
    return folder


def export_families(folder: Path, families: list[str]) -> Path:
    (folder / "answers").mkdir()
    for family in families:
        make_base(family).save_pretrained(folder / "bases" / family)
    for family, regime, kind in product(families, REGIMES, KINDS):
        model = model_of(folder, family, regime=regime, state_type=kind[0], **(GRADIENTS if kind[0] == "lora" else {}))
        export(folder, case(family, regime, kind), model, kind[1])
    return folder


def answer_with_plain_peft(folder: Path, hub: Hub) -> None:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", PLAIN]
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def case(family: str, regime: str, kind: tuple[str, str]) -> str:
    return "-".join([family, regime, *kind])


def model_of(folder: Path, family: str, **config):
    return make_model(AutoModelForCausalLM.from_pretrained(folder / "bases" / family), **config)


def export(folder: Path, name: str, model, peft_type=None, *, query_length: int = 6, batch: int = 1) -> None:
    state, query = model.adapt(chunks(3, batch=batch)), ids(1, query_length, seed=1)
    export_to_peft(model, state, folder / "exports" / name, peft_type=peft_type)
    for task in range(batch):
        note(folder, name if batch == 1 else f"{name}@{task}", model, state.select(task), query)


def note(folder: Path, name: str, model, state, query) -> None:
    with torch.no_grad():
        answers = {"query": query, "logits": model(input_ids=query, task_state=state).logits}
    answers["new"] = model.generate(query, task_state=state, **GREEDY)[:, -5:]
    save_file({n: t.contiguous() for n, t in answers.items()}, folder / "answers" / f"{name}.safetensors")


def export_embedded(folder: Path) -> None:
    """A published adapter, and a fresh one that leaves the base as it is."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    base = AutoModelForCausalLM.from_pretrained(embedded_base())
    fresh = get_peft_model(base, IAIConfig(task_type="CAUSAL_LM", regime="parametric", target_modules="all-linear"))
    published = AutoPeftModelForCausalLM.from_pretrained(published_adapter("markov-prefix"))
    for name, model in (("embedded", fresh.eval()), ("published", published.eval())):
        state = model.adapt(chunk_text(" a b c d" * 40, tokenizer, chunk_size=64))
        export_to_peft(model, state, folder / "exports" / name)
        note(folder, name, model, state, tokenizer(" a b c d a b", return_tensors="pt")["input_ids"])


def found(folder: Path, name: str) -> tuple[float, bool]:
    return json.loads((folder / "found.json").read_text())[name]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_gives_the_same_answers(folder, family, regime, kind):
    difference, same_tokens = found(folder, case(family, regime, kind))
    assert difference < 1e-6 and same_tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_plain_peft_gives_the_same_answers_on_more_families(folder_of_more_families, family, regime, kind):
    difference, same_tokens = found(folder_of_more_families, case(family, regime, kind))
    assert difference < 1e-6 and same_tokens


@pytest.mark.parametrize("name", [*SPECIAL, "unnamed", "batch@0", "batch@1", "batch-lora@0", "batch-lora@1"])
def test_special_states(folder, name):
    difference, same_tokens = found(folder, name)
    assert difference < 1e-6 and same_tokens


@pytest.mark.parametrize("name", ["embedded", "published"])
def test_embedded_base_is_written_beside(folder, name):
    difference, same_tokens = found(folder, name)
    assert difference < 1e-5 and same_tokens  # logits up to 20
    assert "hf_iai:embedded" not in (folder / "exports" / name / "adapter_config.json").read_text()


@pytest.mark.parametrize("regime", REGIMES)
def test_readme_loads_a_moved_export(folder, regime):
    difference, same_tokens = found(folder, f"README of llama-{regime}-prefix-PREFIX_TUNING")
    assert difference < 1e-6 and same_tokens


def test_export_loads_from_the_hub(folder):
    difference, same_tokens = found(folder, "Hub")
    assert difference < 1e-6 and same_tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids="-".join)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_every_family(family, regime, kind, tmp_path):
    """As above, in this process, with a query longer than the sliding windows."""
    model = make_model(family, regime=regime, state_type=kind[0])
    state, query = model.adapt(chunks(3, batch=1)), ids(2, 40, seed=1)
    export_to_peft(model, state, tmp_path / "export", peft_type=kind[1])
    attention = model.base_model.model.config._attn_implementation
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation=attention).eval()
    with torch.no_grad():
        expected = model(input_ids=query, task_state=state).logits
        logits = plain(input_ids=query, attention_mask=torch.ones_like(query)).logits[:, -40:]
    assert (logits - expected).abs().max() < 5e-6
    tokens = plain.generate(input_ids=query, attention_mask=torch.ones_like(query), **GREEDY)[:, -5:]
    assert torch.equal(tokens, model.generate(query, task_state=state, **GREEDY)[:, -5:])


def test_files(folder):
    exports = folder / "exports"
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", MARK}
    names = lambda folder: {path.name for path in folder.iterdir()}  # noqa: E731
    named, written = exports / "gpt2-parametric-prefix-CARTRIDGE", exports / "gpt2-explicit-prefix-CARTRIDGE"
    assert names(named) == adapter and names(written) == adapter | {"base"}
    assert names(exports / "batch") == {"README.md", "base", "0", "1", MARK}
    bases = [json.loads((f / "adapter_config.json").read_text())["base_model_name_or_path"] for f in (named, written)]
    assert bases == [str(folder / "bases" / "gpt2"), str(written / "base")]
    cards = [path.read_text() for path in exports.glob("*/README.md")]
    assert len(cards) > 30 and not any(card_rules.errors(card) for card in cards)
    assert not any(str(folder) in card for card in cards)


def test_card_says_what_it_is(tmp_path):
    model = make_model(state_type="prompt")
    model.active_peft_config.base_model_name_or_path = "Qwen/Qwen3-0.6B"
    state = model.adapt(chunks(3))
    export_to_peft(model, state, tmp_path / "my-task")
    card = (tmp_path / "my-task" / "README.md").read_text()
    for words in (
        "base_model: Qwen/Qwen3-0.6B",
        "PROMPT_TUNING, 4 virtual tokens, float32; one adapter per task, in `0` to `1`",
        state.identity.name,
        state.identity.fingerprint,
        "30 tokens in 3 chunks",
        'PeftModel.from_pretrained(base, "my-task/0")',
        "cannot read any further",
        "padded on the left",
    ):
        assert words in card
    assert not card_rules.errors(card)


@pytest.mark.parametrize(
    ("values", "remarks"),
    [
        ({"r": 3}, ["rank 3 fits its default `--max-lora-rank 16`"]),
        ({"r": 16}, ["rank 16 fits its default"]),
        ({"r": 17}, ["rank 17 needs `--max-lora-rank 32`; the default is 16"]),
        ({"r": 4, "rank_pattern": {"q_proj": 257}}, ["rank 257 needs `--max-lora-rank 320`"]),
        ({"r": 513}, ["rank 513 is above 512"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["rank 8", "`lm_head`, which this adapter changes"]),
        ({"target_modules": ["embed_out"], "fan_in_fan_out": True}, ["rank 8", "`embed_out`", "are `Conv1D`"]),
        ({"use_dora": True, "bias": "all"}, ["rank 8", "bias is refused", "DoRA is refused"]),
        ({"modules_to_save": ["lm_head"]}, ["rank 8", "modules_to_save is refused"]),
    ],
)
def test_remarks_on_vllm(values, remarks):
    found = vllm_remarks(LoraConfig(**({"target_modules": ["q_proj"]} | values)))
    assert len(found) == len(remarks)
    assert all(expected in remark for expected, remark in zip(remarks, found, strict=True))


def test_card_of_plain_lora_says_whether_vllm_can_serve_it(tmp_path):
    for family, remarks in (("llama", 1), ("gpt2", 2)):
        model = make_model(
            family, state_type="lora", state_r=20, signal="gradients"
        )  # r = 2 of the predictor beside it
        export_to_peft(model, model.initial_state(), tmp_path / family)
        card = (tmp_path / family / "README.md").read_text()
        assert card.count("- vLLM: ") == remarks and "- vLLM: rank 22 needs `--max-lora-rank 32`" in card


def test_defaults_and_type_as_an_enum_member(tmp_path):
    for state_type, peft_type, expected in (
        ("prompt", None, PROMPT),
        ("prefix", None, PREFIX),
        ("prompt", PeftType.CARTRIDGE, CARTRIDGE),
    ):
        model = make_model(state_type=state_type)
        export_to_peft(model, model.initial_state(), tmp_path / expected, peft_type=peft_type)
        assert json.loads((tmp_path / expected / "adapter_config.json").read_text())["peft_type"] == expected


def test_values_are_of_the_type_of_the_base(tmp_path):
    """They are cast to it where they are read, so this loses nothing: a prefix gives the very same answers."""
    make_base().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # noqa: E731
    query = ids(2, 7)
    for regime in REGIMES:
        model = make_model(load(), regime=regime)
        state = model.adapt(chunks(2, batch=1))
        export_to_peft(model, state, tmp_path / regime)
        table = load_file(tmp_path / regime / "adapter_model.safetensors")["prompt_embeddings"]
        assert table.dtype == torch.bfloat16
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / regime).eval()
        with torch.no_grad():
            difference = (again(input_ids=query).logits - model(input_ids=query, task_state=state).logits).abs().max()
        assert difference == 0 if regime == "parametric" else difference < 0.05
        assert ("Merging rounded" in (tmp_path / regime / "README.md").read_text()) == (regime == "explicit")


def test_model_stays_as_it_was(tmp_path):
    model = make_model(state_type="prompt").train()
    state, query = model.adapt(chunks(2)), ids(2, 7)
    identity, expected = model.identity, model(input_ids=query, task_state=state).logits
    needs = [p.requires_grad for p in model.parameters()]
    export_to_peft(model, state, tmp_path / "export")
    assert model.identity == identity and model.training
    assert needs == [p.requires_grad for p in model.parameters()]
    assert torch.equal(model(input_ids=query, task_state=state).logits, expected)


def test_active_adapter_alone_is_merged(tmp_path):
    model = make_model()
    export_to_peft(model, model.initial_state(), tmp_path / "one")
    model.save_pretrained(tmp_path / "adapter")
    disturb(model)
    model.load_adapter(tmp_path / "adapter", adapter_name="second")
    model.set_adapter("second")
    export_to_peft(model, model.initial_state(), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "base" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_state_of_another_adapter_is_refused(tmp_path):
    model, other = make_model(), make_model(num_state_tokens=5)
    with pytest.raises(ValueError) as error:
        export_to_peft(model, other.initial_state(), tmp_path / "export")
    assert model.identity.name in str(error.value) and other.identity.name in str(error.value)
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        export_to_peft(model, model.initial_state(), tmp_path / "export")
    with pytest.raises(ValueError, match="needs an IAI model, got LlamaForCausalLM"):
        export_to_peft(make_base(), model.initial_state(), tmp_path / "export")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("state_type", "peft_type", "message"),
    [
        ("prefix", PROMPT, r"prefix state of 'llama' cannot become 'PROMPT_TUNING'.*\['PREFIX_TUNING', 'CARTRIDGE'\]"),
        ("prefix", "LORA", "cannot become 'LORA', since 'LORA' needs a lora state: pass one of"),
        ("lora", PREFIX, r"lora state of 'llama' cannot become 'PREFIX_TUNING': pass one of \['LORA'\]"),
        ("prompt", "IA3", r"'IA3': pass one of \['PROMPT_TUNING', 'PREFIX_TUNING', 'CARTRIDGE'\]"),
    ],
)
def test_impossible_types(tmp_path, state_type, peft_type, message):
    model = make_model(state_type=state_type)
    with pytest.raises(ValueError, match=message):
        export_to_peft(model, model.initial_state(), tmp_path / "export", peft_type=peft_type)


def test_bases_without_keys_and_values_everywhere():
    """There is no cache that all of a prefix could lie in, and of a Mamba's cache PEFT's generate knows nothing."""
    hybrid, prompt = Qwen3NextConfig(), IAIConfig(task_type="CAUSAL_LM", state_type="prompt")
    assert _checked_type(None, prompt, hybrid) == PROMPT
    with pytest.raises(ValueError, match=r"'qwen3_next' cannot become 'CARTRIDGE': pass one of \['PROMPT_TUNING'\]"):
        _checked_type(CARTRIDGE, prompt, hybrid)
    for config in (MambaConfig(), Mamba2Config(), FalconMambaConfig()):
        with pytest.raises(ValueError, match=f"generates wrongly .* on '{config.model_type}'"):
            _checked_type(None, prompt, config)


def test_peft_still_generates_wrongly_on_mamba():
    torch.manual_seed(0)
    base = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=2))
    for parameter in base.parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=1)
    model = get_peft_model(base, config).eval()
    cached, plain = (model.generate(input_ids=ids(2, 9), use_cache=cache, **GREEDY) for cache in (True, False))
    assert not torch.equal(cached, plain), "PEFT can do Mamba now: see WRONG_IN_PEFT in hf_iai/export/peft.py"


def test_bases_that_cannot_be_written(tmp_path):
    model = make_model("llama_tied", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head.*that the base ties to its input"):
        export_to_peft(model, model.initial_state(), tmp_path / "export")
    model = make_model()
    state = model.initial_state()
    model.base_model.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="this one is quantized: load it without quantization_config"):
        export_to_peft(model, state, tmp_path / "export")


def test_what_lies_there_is_kept(tmp_path):
    model = make_model()
    one = model.initial_state()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("mine")
    export_to_peft(model, one, tmp_path / "export")
    (tmp_path / "export" / "notes.txt").write_text("mine")
    for name, found in {"file": "is a file", "folder": "holds 'README.md'", "export": "holds 'notes.txt'"}.items():
        with pytest.raises(FileExistsError, match=f"{name} {found}"):
            export_to_peft(model, one, tmp_path / name)
    assert (tmp_path / "export" / "notes.txt").read_text() == "mine"


def test_export_replaces_an_earlier_one_when_it_is_whole(tmp_path, monkeypatch):
    model = make_model()
    path, two = tmp_path / "parent" / "export", model.initial_state(2)
    export_to_peft(model, two, path)
    export_to_peft(model, two.select(0), path)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "base", MARK}
    assert {p.name for p in path.iterdir()} == files

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(hf_iai.export.peft, "save_file", full)
    for target in (path, tmp_path / "parent" / "new"):
        with pytest.raises(OSError, match="no space left"):
            export_to_peft(model, two, target)
    assert [p.name for p in path.parent.iterdir()] == ["export"]
    assert (path / "adapter_model.safetensors").is_file()


def test_command(tmp_path):
    base = tmp_path / "base"
    make_base().save_pretrained(base)
    model = make_model(AutoModelForCausalLM.from_pretrained(base), state_type="prompt", regime="parametric")
    model.save_pretrained(tmp_path / "adapter")
    model.adapt(chunks(2, batch=1)).save_pretrained(tmp_path / "state")
    options = ["--adapter", "adapter", "--state", "state", "--output", "plain", "--type", CARTRIDGE]
    options = [str(tmp_path / o) if re.fullmatch("adapter|state|plain", o) else o for o in options]
    result = CliRunner().invoke(app, ["export", *options])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["peft_type"] == CARTRIDGE
