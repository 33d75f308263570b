"""The embedded base, its corpus, and the published adapters."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_iai import IAIConfig, chunk_text, embedded_base
from hf_iai.embedded import EMBEDDED_NAME, library_code, library_documents
from hf_iai.evaluation import evaluate_curve
from hf_iai.hub.published import published_adapter

ADAPTERS = ["code-prefix", "markov-prefix"]


def test_base_is_small_and_plain():
    folder = Path(embedded_base())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) <= 16_000_000
    assert model.config.max_position_embeddings == 512
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return 'h\u00e9llo \u2603'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert all(len(tokenizer(f" {letter}")["input_ids"]) == 1 for letter in "abcdefgh")


def test_splits_share_no_package():
    train, held_out = (set(library_code._package_folders(split)) for split in ("train", "held_out"))
    assert not train & held_out
    assert {"email", "asyncio", "xml", "http", "unittest", "json", "logging"} <= held_out
    assert len(held_out & set(library_code.HELD_OUT_STDLIB)) >= 17 - 2  # two may be missing from a slim interpreter
    assert set(library_code.HELD_OUT_DEPENDENCIES) <= held_out
    with pytest.raises(ValueError, match=r"\['torch'\] are not in split 'held_out'"):
        list(library_documents("held_out", packages=["torch"]))
    with pytest.raises(ValueError, match="'test'"):
        list(library_documents("test"))


def test_adapter_of_the_embedded_base_names_it_not_a_folder(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(embedded_base())
    model = get_peft_model(base, IAIConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == EMBEDDED_NAME
    assert embedded_base() not in (tmp_path / "adapter_config.json").read_text()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.identity == model.identity
    assert loaded.identity.name.startswith(EMBEDDED_NAME)


@pytest.mark.parametrize("name", ADAPTERS)
def test_published_adapters_load_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(published_adapter(name))
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    state = model.adapt(chunk_text(" a b c d" * 40, tokenizer, chunk_size=64))
    effect = model.state_effect(state, tokenizer(" a b c d" * 8, return_tensors="pt"))
    assert effect["kl"] > 0.01
    files = {path.name for path in Path(published_adapter(name)).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.json"} <= files


def test_pipeline_answers_under_a_state():
    model = AutoPeftModelForCausalLM.from_pretrained(published_adapter("markov-prefix")).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    state = model.adapt(chunk_text(" a b c" * 60, tokenizer, chunk_size=64))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with model.using(state):
        text = write(" b c a", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    query = tokenizer(" b c a", return_tensors="pt")
    tokens = model.generate(**query, task_state=state, max_new_tokens=6, do_sample=False)
    assert text == tokenizer.decode(tokens[0])


def test_markov_adapter_keeps_improving_with_chunks():
    """The published adapter on 48 fresh chains: lower after 8 chunks than after 1, lower there than with none."""
    import numpy as np

    from hf_iai import episodes_from_documents
    from hf_iai.embedded.generated_tasks import markov_chain, markov_symbols, symbols_to_text

    rng = np.random.default_rng(123)
    texts = [symbols_to_text(markov_symbols(rng, markov_chain(rng, 8), 9 * 64)) for _ in range(48)]
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    episodes = episodes_from_documents(texts, tokenizer, chunk_size=64, num_chunks=8)
    model = AutoPeftModelForCausalLM.from_pretrained(published_adapter("markov-prefix")).eval()
    curve = evaluate_curve(
        model, episodes, (0, 1, 8), ("fewer_shots",), tokenizer=tokenizer, chunk_size=64, show_progress=False
    )
    assert curve.difference(("iai", 1), ("iai", 0))["high"] < 0
    assert curve.difference(("iai", 8), ("iai", 1))["high"] < 0
    assert curve.difference(("iai", 1), ("fewer_shots", 1))["high"] < 0
