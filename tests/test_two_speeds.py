"""The prefix+lora state and slots that hold tokens, each against a reference.

Axes: B tasks, L layers, H key/value heads, m slots, C tokens of a chunk.
"""

import asyncio
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import SLOTS, WINDOW, chunks, ids, largest_difference, make_base, make_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from examples.research.memory import methods
from examples.research.memory.attention_matching import attention_matching, compacted
from hf_iai import IAIConfig, TaskState, chunk_text, export_to_peft
from hf_iai.bases.base import Base
from hf_iai.bases.compat import AttentionReceived
from hf_iai.bases.compat.attention import EVERY
from hf_iai.heads import NormalizedStep
from hf_iai.heads.chosen import choose_tokens, with_later
from hf_iai.heads.kept import NEVER
from hf_iai.heads.novelty import unrepeated
from hf_iai.hub.published import published_adapter

SMOLLM2 = Path(__file__).parents[1] / ".bases" / "SmolLM2-135M-Instruct"
FEW = {"state_r": 2, "state_target_modules": ["v_proj", "down_proj"]}


def memory(base="llama", **values):
    return make_model(base, trained=False, state_type="prefix+lora", **(FEW | values))


def slots(base="llama", **values):
    return make_model(base, trained=False, state_type="prefix", **({"accumulation": "attention"} | values))


# ---------------------------------------------------------------- the configuration


def test_unset_fields():
    config = IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora")
    expected = {"regime": "explicit", "signal": "both", "accumulation": "attention", "head": "normalized"}
    expected |= {"state_r": 8, "state_target_modules": "all-linear", "write_steps": 1, "read_behind": "state"}
    assert {name: getattr(config, name) for name in expected} == expected
    model = make_model("llama", trained=False, state_type="prefix+lora", num_state_tokens=None)
    config = model.active_peft_config
    assert (config.num_state_tokens, config.state_target_modules) == (32, "all-linear")  # a quarter of the window
    assert config.initial_rate == 6e-3
    assert model.usual_chunk_size == 32 and model.max_chunk_size == 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"signal": "observations"}, "state_type='prefix\\+lora' needs signal='both', got 'observations'"),
        ({"accumulation": "average"}, "keeps tokens, got accumulation='average': use 'attention'"),
        ({"write_steps": 0}, "write_steps must be at least 1, got 0"),
        ({"num_state_tokens": 1}, "num_state_tokens must be at least 2"),
        ({"head": "gated"}, "has the heads"),
        ({"second_order": True}, "second_order"),
        ({"state_type": "prefix", "read_behind": "start"}, "read_behind='start' needs accumulation"),
        ({"state_type": "prefix", "write_steps": 2}, "write_steps=2 has no meaning"),
        ({"state_type": "lora", "accumulation": "attention"}, "accumulation"),
        ({"read_behind": "nothing"}, "read_behind must be one of"),
        ({"accumulation": "novelty", "read_behind": "start"}, "accumulation='novelty' .* needs read_behind='state'"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        IAIConfig(**({"task_type": "CAUSAL_LM", "state_type": "prefix+lora"} | values))


# ---------------------------------------------------------------- slots


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_attention_received_is_that_of_the_weights(family, attention):
    base, text = make_base(family, attention), ids(2, 16)
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    heads = getattr(base.config, "num_key_value_heads", base.config.num_attention_heads)
    with AttentionReceived(mask, heads) as recording:
        base(input_ids=text, attention_mask=mask)
    found = recording.check_complete(base.config.num_hidden_layers, attention)
    plain = make_base(family, "eager")
    weights = plain(input_ids=text, attention_mask=mask, output_attentions=True).attentions
    for row, first in ((0, 4), (1, 0)):
        asked = [w[row, :, first + EVERY - 1 :: EVERY].sum(1) * EVERY for w in weights]  # (G, S)
        expected = torch.stack(asked).unflatten(1, (heads, -1)).mean(2)
        assert (found[row] - expected).abs().max() < 1e-4


def test_attention_that_no_kernel_shows_is_refused():
    recording = AttentionReceived(torch.ones(1, 4), 1)
    with pytest.raises(ValueError, match="saw the attention of 0 of 3 layers.*'flash_attention_2'.*'recent'"):
        recording.check_complete(3, "flash_attention_2")


def test_as_many_slots_as_tokens_are_the_full_context():
    model, text, query = slots(num_state_tokens=24), ids(2, 20), ids(2, 6, seed=1)
    for sizes in ([20], [8, 12], [3, 3, 14]):
        state = model.adapt([{"input_ids": part} for part in text.split(sizes, 1)])
        with model.disable_adapter():
            expected = model(input_ids=torch.cat([text, query], 1)).logits[:, -6:]
        assert (model(input_ids=query, task_state=state).logits - expected).abs().max() < 1e-4


def test_a_state_that_has_read_nothing_is_no_state():
    for model in (memory(), slots(), memory("gpt2", state_target_modules="all-linear")):
        query = ids(2, 6)
        found = model(input_ids=query, task_state=model.initial_state()).logits
        assert (found - model(input_ids=query).logits).abs().max() < 1e-5


def test_a_trained_memory_that_has_read_nothing_is_no_state():
    """The learned start of the fast weights comes in with the first chunk, and with a cache."""
    model, query = memory(), ids(2, 9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".start." in name:
                parameter.normal_()
    start = dict(model.base_model.core.state.start.items())
    empty = model.initial_state()
    torch.testing.assert_close(model(query, task_state=empty).logits, model(query).logits, rtol=0, atol=1e-6)
    read = model.adapt(chunks(1, batch=1))
    cached = model.state_of_cache(model.model(ids(1, SLOTS)).past_key_values)
    for name, tensor in start.items():
        moved = (read.tensors[name] - tensor).abs().max()
        assert 0 < moved <= 0.1 and torch.equal(cached.tensors[name][0], tensor)


def test_empty_slots_hold_zeros():
    """Padding has keys and values, too, which must not be stored."""
    model, text = memory(), ids(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    tensors = model.adapt([{"input_ids": text, "attention_mask": mask}]).tensors
    empty = (tensors["age"] == NEVER).expand_as(tensors["key"])
    assert empty[1].any() and not empty.all()
    for name in ("key", "value"):
        assert not tensors[name][empty].any() and tensors[name][~empty].all()


def tokens(worth: list[float], ages: list[int]) -> dict:
    """One head; a key says which token it is."""
    shape = (1, 1, 1, len(worth), 1)
    age = torch.tensor(ages).view(shape)
    key = torch.arange(len(worth)).float().view(shape)
    return {"key": key, "value": key, "worth": torch.tensor(worth).view(shape), "age": age}


def test_what_is_kept():
    """The first token, the latest half, and what was attended to most, on average over the tokens after it."""
    text = tokens([0.0, 5, 9, 4, 2, 0, 0, 0], list(range(7, -1, -1)))
    assert choose_tokens(text, 4, "attention")["key"].flatten().tolist() == [0, 2, 6, 7]
    assert choose_tokens(text, 4, "recent")["key"].flatten().tolist() == [0, 5, 6, 7]
    assert choose_tokens(text, 5, "attention")["key"].flatten().tolist() == [0, 2, 5, 6, 7]
    empty = tokens([0.0, 0, 3], [NEVER, NEVER, 0])
    assert choose_tokens(empty, 2, "attention")["age"].flatten().tolist() == [NEVER, 0]
    later = with_later(empty, tokens([1.0, 1], [1, 0]), torch.tensor([2]), "attention")
    assert later["age"].flatten().tolist() == [2, 1, 0]


def test_each_head_keeps_its_own_tokens():
    state = slots(num_state_tokens=8).adapt([{"input_ids": text} for text in ids(1, 60).split(12, 1)])
    ages = state.tensors["age"][0, :, :, :, 0].flatten(0, 1)  # (L * H, m)
    assert len({tuple(row.tolist()) for row in ages}) > 2
    assert (ages[:, 0] == 59).all() and all(set(range(4)) <= set(row.tolist()) for row in ages)


@pytest.mark.parametrize("seed", range(8))
def test_what_nothing_repeats_against_a_loop_over_tokens(seed):
    """Two layers and heads that hold different tokens, empty slots and padding among them."""
    generator, num, least = torch.Generator().manual_seed(seed), 5, 12
    age = torch.arange(29, -1, -1).expand(2, 2, 2, 30).clone()
    age[1, :, :, :4], age[0, 1, 0, 7], age[0, 1, 1, 8] = NEVER, 40, NEVER  # token 7 and 8 are not held by all heads
    key = 1 + torch.randn(2, 2, 2, 30, 4, generator=generator)
    found = unrepeated({"key": key, "age": age[..., None]}, num, least)[..., 0]
    for task in range(2):
        shared = [a for a in range(30) if all((age[task, h // 2, h % 2] == a).any() for h in range(4))][:-1]
        repeated = dict.fromkeys(shared, 0.0)
        for layer in range(2):
            for head in range(2):
                of_age = {int(a): k for a, k in zip(age[task, layer, head], key[task, layer, head], strict=True)}
                mean = torch.stack([of_age[a] for a in shared]).mean(0)
                for a in shared:
                    far = [of_age[b] - mean for b in shared if b < a - least / 2]
                    most = max((float(torch.cosine_similarity(of_age[a] - mean, k, dim=0)) for k in far), default=-1)
                    repeated[a] += most / 4
        near = {a: [repeated[b] for b in shared if abs(a - b) <= 4] for a in shared}
        old = sorted((a for a in shared if a >= least), key=lambda a: sum(near[a]) / len(near[a]))
        for head in range(4):
            assert set(age[task, head // 2, head % 2][found[task, head // 2, head % 2]].tolist()) == set(old[:num])


def test_what_is_said_once_outlives_what_is_said_again_and_again():
    """A sentence of four tokens at the start, then four others over and over, which get more attention."""
    said = torch.tensor([0, 1, 2, 3, 4, *[5, 6, 7, 8] * 15])
    text = tokens([0.0] * 5 + [9.0] * 60, list(range(64, -1, -1)))
    text["key"] = text["value"] = torch.eye(9)[said].view(1, 1, 1, 65, 9)
    kept = {
        rule: set((64 - choose_tokens(text, 20, rule)["age"]).flatten().tolist()) for rule in ("attention", "novelty")
    }
    assert not {1, 2, 3, 4} & kept["attention"]
    assert {0, 1, 2, 3, 4} <= kept["novelty"] and set(range(55, 65)) <= kept["novelty"]


def test_all_heads_hold_what_nothing_repeats():
    """A quarter of the slots and the first token, besides the latest half; the others differ between heads."""
    generator = torch.Generator().manual_seed(0)
    age = torch.arange(99, -1, -1).expand(1, 2, 3, 100)[..., None]
    key, worth = (torch.rand(1, 2, 3, 100, n, generator=generator) for n in (4, 1))
    kept = choose_tokens({"key": key, "value": key, "worth": worth, "age": age}, 16, "novelty")["age"]
    old = [{a for a in row.tolist() if a >= 8} for row in kept[0, ..., 0].flatten(0, 1)]  # of each head
    assert len(set.intersection(*old)) == 5 and len(set.union(*old)) > 8


def test_worth_is_a_sum_behind_the_state_and_a_mean_behind_the_start():
    """Of the first chunk both are read behind nothing; later chunks do not see it, so it is final."""
    text = [{"input_ids": ids(1, 20)}]
    behind, apart = (slots(num_state_tokens=24, read_behind=b).adapt(text).tensors for b in ("state", "start"))
    assert torch.equal(behind["age"], apart["age"]) and behind["worth"].any()
    assert torch.allclose(apart["worth"], behind["worth"] / (behind["age"] + 1), atol=1e-6)


def test_slots_read_from_the_start_merge_exactly():
    model, stream = slots(read_behind="start"), chunks(4)
    halves = [model.adapt(stream[:2]), model.adapt(stream[2:])]
    merged, whole = TaskState.merge(halves), model.adapt(stream)
    assert torch.equal(merged.tensors["age"], whole.tensors["age"])
    assert largest_difference(merged, whole) < 1e-5


# ---------------------------------------------------------------- fast weights


def test_one_pass_is_the_gradient_of_the_loss_behind_the_slots():
    """The first step against autograd through a plain forward of the full text, which the slots all hold."""
    model = memory(num_state_tokens=24, head="sgd", initial_rate=0.5)
    first, second = ids(1, 8), ids(1, 9, seed=1)
    before = model.adapt([{"input_ids": first}])
    after = model.adapt([{"input_ids": second}], state=before)
    core, reader = model.base_model.core, model.base_model.reader
    theta = {n: before.tensors[n].clone().requires_grad_() for n in core.state.start}
    seen = core.state.visible(reader.base, before.tensors | theta)
    with core.state.under(reader.base, seen) as prefix:
        logits = reader.base.answer(prefix, second, torch.ones_like(second)).logits
    loss = cross_entropy(logits[0, :-1], second[0, 1:])
    gradient = torch.autograd.grad(loss, list(theta.values()))
    assert abs(float(after.tensors["loss"]) - float(loss)) < 1e-5
    for (name, t), g in zip(theta.items(), gradient, strict=True):
        assert (after.tensors[name] - (t - 0.5 * g)).abs().max() < 1e-5
    assert any(g.abs().max() > 1e-4 for g in gradient)


def test_states_that_have_read_nothing_merge():
    model = memory(read_behind="start")
    nothing, read = model.initial_state(), model.adapt(chunks(2, batch=1))
    for states, expected in (([nothing, nothing], nothing), ([read, nothing], read), ([nothing, read], read)):
        merged = TaskState.merge(states)
        assert largest_difference(merged, expected) < 1e-6 and merged.step.equal(expected.step)
        assert torch.equal(merged.tensors["loss"], expected.tensors["loss"])
        assert all(t.isfinite().all() for t in merged.tensors.values())


def test_what_is_kept_of_a_chunk_depends_on_the_rates_before_it():
    """Keys and values of a chunk are read under fast weights, so training sees through them."""
    model = memory().train()
    reader, text = model.base_model.reader, ids(1, 2, 8)
    start = reader.core.initial_state(reader.base, 1, model.identity)
    for num_chunks, learns in ((1, False), (2, True)):
        part = text[:, :num_chunks]
        state = reader.read_on(start, (part, torch.ones_like(part), part))
        rates = list(reader.core.head.log_rate.values())
        found = torch.autograd.grad(state.tensors["value"].square().sum(), rates, allow_unused=True)
        assert any(g is not None and g.any() for g in found) == learns


def test_labels_say_what_is_written():
    model, text = memory(), ids(1, 8)
    state = model.adapt([{"input_ids": text, "labels": torch.full_like(text, -100)}])
    assert all(not state.tensors[name].any() for name in model.base_model.core.state.start)
    assert (state.tensors["age"] != NEVER).any()


def test_more_steps_lower_the_loss_of_the_chunk_more():
    losses = []
    for steps in (1, 4):
        model = memory(write_steps=steps, initial_rate=0.01)
        chunk = {"input_ids": ids(1, 30)}
        losses.append(float(model(**chunk, labels=chunk["input_ids"], task_state=model.adapt([chunk])).loss))
    assert losses[1] < losses[0]


def test_normalized_step_does_not_depend_on_the_size_of_the_gradient():
    head, start = NormalizedStep({"x": torch.zeros(3, 2)}, 0.1), {"x": torch.zeros(3, 2)}
    theta = {"x": torch.zeros(2, 3, 2)}
    gradient = torch.tensor([[[1.0, 2], [3, 4], [5, 6]]])
    both = {"x": torch.cat([gradient, 1000 * gradient])}
    after, kept = head(theta, head.initial(theta), both, torch.zeros(2), start)
    assert torch.allclose(after["x"][0], after["x"][1], rtol=1e-4)
    square = gradient[0].square()
    second = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
    u = gradient[0] / second.sqrt()
    assert torch.allclose(after["x"][0], -0.1 * u / max(1.0, u.square().mean().sqrt().item()), rtol=1e-4)
    none, _ = head(after, kept, {"x": 0 * gradient.expand(2, 3, 2)}, torch.ones(2), start)
    assert torch.equal(none["x"], after["x"])


def test_the_guard_takes_back_steps_that_hurt():
    """The loss of every new chunk rises in the direction that the steps have taken."""
    head, start = NormalizedStep({"x": torch.zeros(4, 3)}, 0.01), {"x": torch.zeros(4, 3)}
    theta = {"x": torch.ones(1, 4, 3)}
    kept = head.initial(theta)
    for number in range(8):
        theta, kept = head(theta, kept, {"x": theta["x"]}, torch.tensor([number]), start)
    assert float(kept["trust"]) < 0.5 and theta["x"].abs().max() < 0.5  # the steps alone lead to 0.92


def test_fast_weights_of_merged_states_are_the_mean_over_chunks():
    model, stream = memory(read_behind="start"), chunks(3)
    one, two = model.adapt(stream[:1]), model.adapt(stream[1:])
    merged = TaskState.merge([one, two])
    assert merged.step.tolist() == [3, 3] and merged.num_tokens.tolist() == [30, 30]
    for name in model.base_model.core.state.start:
        expected = (one.tensors[name] + 2 * two.tensors[name]) / 3
        assert (merged.tensors[name] - expected).abs().max() < 1e-6
    assert model(input_ids=ids(2, 5), task_state=merged).logits.isfinite().all()
    with pytest.raises(ValueError, match="got 'memory': it was read behind earlier chunks; set read_behind='start'"):
        TaskState.merge([memory().adapt(stream), memory().adapt(stream)])


# ---------------------------------------------------------------- a state from a cache


def test_a_whole_cache_is_the_full_context():
    base, text, query = make_base(), ids(2, 20), ids(2, 6, seed=1)
    cache = base(text, use_cache=True).past_key_values
    expected = base(torch.cat([text, query], 1)).logits[:, -6:]
    state = TaskState.from_past_key_values(cache, memory(base, num_state_tokens=20))
    model = memory(num_state_tokens=20)
    assert state.num_tokens.tolist() == [20, 20]
    assert (model(input_ids=query, task_state=state).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("rule", ["attention", "novelty"])
def test_a_compacted_cache_has_our_own_slots(rule):
    base, text = make_base("llama", "eager"), ids(2, 40)
    out = base(text, use_cache=True, output_attentions=True)
    model = memory(num_state_tokens=8, accumulation=rule)
    found = TaskState.from_past_key_values(out.past_key_values, model, attentions=out.attentions)
    expected = model.adapt([{"input_ids": text}])
    for name in ("key", "value", "worth", "age"):
        assert (found.tensors[name] - expected.tensors[name]).abs().max() < 1e-5
    recent = memory(num_state_tokens=8, accumulation="recent")
    found = TaskState.from_past_key_values(out.past_key_values, recent)
    assert torch.equal(found.tensors["age"], recent.adapt([{"input_ids": text}]).tensors["age"])


def test_caches_that_do_not_fit_are_refused():
    base, text = make_base(), ids(1, 20)
    cache = base(text, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="20 tokens do not fit 4 slots.*pass attentions="):
        TaskState.from_past_key_values(cache, memory())
    with pytest.raises(ValueError, match="keeps no tokens: use state_type='prefix\\+lora'"):
        TaskState.from_past_key_values(cache, make_model(trained=False))
    with pytest.raises(ValueError, match="attention_mask has shape \\(1, 3\\), and the cache \\(1, 20\\)"):
        TaskState.from_past_key_values(cache, memory(num_state_tokens=SLOTS), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="and the base"):
        TaskState.from_past_key_values(make_base("qwen3")(text, use_cache=True).past_key_values, memory())
    sliding = make_base("gemma3")(ids(1, 60), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="sliding-window layers forget"):
        TaskState.from_past_key_values(sliding, memory("gemma3", state_target_modules="all-linear"))


# ---------------------------------------------------------------- export


def test_the_readme_of_an_export_loads_both_parts(tmp_path, monkeypatch):
    make_base().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model, query = memory(base, accumulation="recent", num_state_tokens=12), ids(1, 6)
    states = [model.adapt([{"input_ids": ids(1, size, seed=size)}]) for size in (8, 30)]  # one has empty slots
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # an earlier export is replaced
        export_to_peft(model, TaskState.stack(states), tmp_path / "both")
    export_to_peft(model, states[0], tmp_path / "one", peft_type="CARTRIDGE")
    for name, state in (("both", states[0]), ("one", states[0])):
        readme = (tmp_path / name / "README.md").read_text()
        found = {}
        exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1), found)
        with torch.no_grad():
            logits = found["model"].eval()(input_ids=query).logits[:, -6:]
            assert (logits - model(input_ids=query, task_state=state).logits).abs().max() < 1e-4
        assert "vLLM serves the LoRA alone" in readme
    assert {p.name for p in (tmp_path / "both/prefix").iterdir()} == {"0", "1"}
    with pytest.raises(ValueError, match="has read nothing, so none of its slots can be exported"):
        export_to_peft(model, model.initial_state(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot become 'LORA'.*'PREFIX_TUNING', 'CARTRIDGE'"):
        export_to_peft(model, states[0], tmp_path / "lora", peft_type="LORA")


# ---------------------------------------------------------------- any base


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3", "mistral", "phi3", "smollm3"])
def test_families_read_and_answer(family):
    model = memory(family, state_target_modules="all-linear", num_state_tokens=8)
    state = model.adapt(chunks(3, size=12))
    query = ids(2, 6)
    answer = model(input_ids=query, task_state=state).logits
    assert answer.isfinite().all()
    expected = query
    for _ in range(2):
        logits = model(input_ids=expected, task_state=state).logits[:, -1:]
        expected = torch.cat([expected, logits.argmax(-1)], 1)
    few = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(query, task_state=state, **few), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3"])
def test_states_stay_finite_for_512_chunks(family):
    model, state = memory(family, state_target_modules="all-linear", num_state_tokens=8), None
    draw = torch.Generator().manual_seed(0)
    for number in range(512):
        text = torch.randint(5, 97, (1, 16), generator=draw) if number % 2 else torch.full((1, 16), number % 90 + 5)
        state = model.adapt([{"input_ids": text}], state=state)
    assert all(t.isfinite().all() for t in state.tensors.values())
    assert model(input_ids=ids(1, 6), task_state=state).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases_stay_finite_for_512_chunks(bits, tmp_path):
    make_base("llama_64").save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, device_map="cpu").eval()
    model, state = memory(base, num_state_tokens=8), None
    for number in range(512):
        state = model.adapt([{"input_ids": ids(1, 16, seed=number)}], state=state)
    assert all(t.isfinite().all() for t in state.tensors.values())


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="make smollm2 makes the base")
def test_a_real_base_remembers_untrained():
    """After six chunks the next one is predicted better than with the latest tokens in context."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    base = AutoModelForCausalLM.from_pretrained(SMOLLM2).eval()
    text = Path(torch.nn.functional.__file__).read_text()
    model = get_peft_model(base, IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora", num_state_tokens=64)).eval()
    *read, query = list(chunk_text(text, tokenizer, chunk_size=64))[:7]
    state = model.adapt(read)
    under = float(model(**query, task_state=state).loss)
    with model.disable_adapter(), torch.no_grad():
        both = torch.cat([read[-1]["input_ids"], query["input_ids"]], 1)
        logits = model(input_ids=both).logits[0, 64:-1]
    assert under < float(cross_entropy(logits, query["input_ids"][0, 1:]))


# ---------------------------------------------------------------- bases that need an attention sink


def test_an_averaged_prefix_gets_the_first_token_that_its_base_needs(monkeypatch, tmp_path):
    base = make_base().train()
    base.get_input_embeddings().eval()
    modes = [module.training for module in base.modules()]
    assert not Base(base).needs_sink() and modes == [module.training for module in base.modules()]
    assert make_model("llama", trained=False).active_peft_config.pin_bos is False
    monkeypatch.setattr(Base, "needs_sink", lambda self: True)
    model, query = make_model("llama", trained=False), ids(2, 6)
    assert model.active_peft_config.pin_bos is True and model.max_chunk_size == WINDOW - 2 * SLOTS - 1
    start = model(input_ids=query, task_state=model.initial_state()).logits
    assert (start - model(input_ids=query).logits).abs().max() < 1e-5
    state, base = model.adapt(chunks(2)), model.base_model.reader.base
    with torch.no_grad(), model.base_model.core.under(base, state) as prefix:
        first = base.first_token()
        assert base.num_slots(prefix) == SLOTS + 1
        assert all(torch.equal(k[:1, :, :1], f) for (k, _), (f, _) in zip(prefix, first, strict=True))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(Base, "needs_sink", lambda self: False)  # what was found out is saved
    assert PeftModel.from_pretrained(make_base(), tmp_path).active_peft_config.pin_bos is True


@pytest.mark.parametrize("num_read", [0, 3, 9])
def test_recent_tokens_hide_empty_slots_where_they_would_harm(monkeypatch, num_read):
    monkeypatch.setattr(Base, "needs_sink", lambda self: True)
    model, text, query = make_model("llama", trained=False, accumulation="recent"), ids(2, 9), ids(2, 6, seed=1)
    state = model.adapt([{"input_ids": text[:, :num_read]}]) if num_read else model.initial_state(2)
    with model.disable_adapter():
        seen = torch.cat([text[:, max(0, num_read - SLOTS) : num_read], query], 1)
        expected = model(input_ids=seen).logits[:, -6:]
    assert (model(input_ids=query, task_state=state).logits - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="make smollm2 makes the base")
def test_the_published_memory_of_a_real_base():
    """Empty it is the base; after four chunks of a file that nobody trained on it is ahead of the untrained memory."""
    tokenizer, text = AutoTokenizer.from_pretrained(SMOLLM2), Path(asyncio.tasks.__file__).read_text()
    *read, query = list(chunk_text(text, tokenizer, chunk_size=256))[:5]
    load = partial(AutoModelForCausalLM.from_pretrained, SMOLLM2)
    config = IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora", num_state_tokens=256)
    untrained = get_peft_model(load(), config).eval()
    trained = PeftModel.from_pretrained(load(), published_adapter("smollm2-memory")).eval()
    with torch.no_grad():
        empty = trained(**query, task_state=trained.initial_state()).loss
        torch.testing.assert_close(empty, trained(**query).loss)
        before, after = (float(m(**query, task_state=m.adapt(read)).loss) for m in (untrained, trained))
    assert after < before < float(empty)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="make smollm2 makes the base")
def test_a_chat_turn_under_a_memory():
    """An instruct model answers from what was just read; a state that has read nothing changes no answer."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    config = IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(SMOLLM2), config)
    text = (
        "The harbour of Lindby lies on the north coast of the island. Its lighthouse was built in 1887 by the engineer "
        "Ada Holm. The lighthouse is 31 metres high and painted green. Every spring the town holds a festival of lamps."
    )
    state = model.adapt(chunk_text(text, tokenizer, model=model))

    def answer(question: str, state: TaskState | None) -> str:
        messages = [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": question}]
        query = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**query, task_state=state, max_new_tokens=24, do_sample=False)
        return tokenizer.decode(tokens[0, query["input_ids"].shape[1] :])

    asked = "Who built the lighthouse of Lindby?"
    assert "Ada Holm" in answer(asked, state) and "Ada Holm" not in answer(asked, None)
    for question in (asked, "Name three fruits.", "What is the capital of France?"):
        assert answer(question, model.initial_state()) == answer(question, None)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="make smollm2 makes the base")
def test_a_real_base_needs_a_sink():
    assert Base(AutoModelForCausalLM.from_pretrained(SMOLLM2)).needs_sink()


# ---------------------------------------------------------------- baselines of the curve


def test_attention_matching_with_room_for_all_is_full_context():
    text = ids(1, 6 * 8)
    full = methods.context(make_base("llama"), None, begin=True)(text, 8)
    assert attention_matching(make_base("llama"), 100)(text, 8) == pytest.approx(full, abs=1e-4)


def test_attention_matching_fits_what_it_drops():
    torch.manual_seed(0)
    queries, keys, values, bias = torch.randn(3, 200, 16), *torch.randn(2, 3, 128, 16), torch.zeros(3, 128)

    def answer(keys, values, bias):
        return (queries @ keys.mT / 4 + bias[:, None]).softmax(-1) @ values

    whole, kept = answer(keys, values, bias), compacted(queries, keys, values, bias, 64)
    unfitted = compacted(queries, keys, values, bias, 64)[0]
    same = (keys[:, :, None] == unfitted[:, None]).all(-1).int().argmax(1)  # (H, m), where the kept keys stood
    dropped = answer(unfitted, values.take_along_dim(same[..., None], 1), torch.zeros(3, 64))
    assert (answer(*kept) - whole).square().mean() < 0.1 * (dropped - whole).square().mean()
