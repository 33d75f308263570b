"""Evaluation: the bootstrap against closed forms, baselines against the bare base, curves against direct loops."""

import doctest
import importlib
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_iai import IAIConfig
from hf_iai.evaluation import Curve, bare_base_losses, bootstrap_mean, evaluate_curve, token_losses
from hf_iai.evaluation.loss_curve import _full_context_counts

VOCAB, WINDOW, CHUNK, SLOTS, QUERY = 64, 48, 8, 4, 10


def tiny_base(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=WINDOW, n_embd=16, n_layer=2, n_head=2)).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=WINDOW, **sizes)).eval()


def perturbed(model: nn.Module, seed: int = 1) -> nn.Module:
    """With every adapter weight random, a baseline that reads through the adapter by mistake is seen."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return perturbed(get_peft_model(tiny_base(), IAIConfig(task_type="CAUSAL_LM", num_state_tokens=SLOTS)))


def random_episodes(count: int, num_chunks: int = 5, query: int = QUERY) -> list[dict]:
    rng = np.random.default_rng(0)
    draw = lambda length: {"input_ids": rng.integers(0, VOCAB, length).tolist()}  # noqa: E731
    return [
        {"support": [draw(CHUNK) for _ in range(num_chunks)], "query": [draw(query)], "group": f"file {i // 2}"}
        for i in range(count)
    ]


def reference_losses(base: nn.Module, context: list[int], query: list[int]) -> np.ndarray:
    """The bare base on context + query, one unpadded row, token by token."""
    with torch.no_grad():
        logits = base(torch.tensor([context + query])).logits[0]
    log_probs = logits.log_softmax(-1)
    start = len(context)
    return np.array([-log_probs[start + t - 1, query[t]].item() for t in range(1, len(query))])


# --- bootstrap ---


def test_bootstrap_matches_the_normal_interval():
    values = np.random.default_rng(1).normal(size=(400, 1))
    mean, low, high = bootstrap_mean(values, np.arange(400), num_resamples=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)


def test_bootstrap_counts_groups_not_rows():
    of_group = np.random.default_rng(2).normal(size=(100, 1))
    _, low, high = bootstrap_mean(of_group, np.arange(100))
    _, copied_low, copied_high = bootstrap_mean(of_group.repeat(9, axis=0), np.arange(100).repeat(9))
    assert (copied_low, copied_high) == pytest.approx((low, high))


def test_bootstrap_of_two_groups_is_exact():
    """Two groups of 1 and 3 tokens: a resample holds both, or one of them twice, and nothing else."""
    values = np.array([[0.0, np.nan, np.nan], [4.0, 4.0, 4.0]])
    assert bootstrap_mean(values, np.array(["a", "b"])) == (3.0, 0.0, 4.0)


def test_bootstrap_is_seeded():
    values, groups = np.random.default_rng(3).normal(size=(30, 4)), np.arange(30) // 3
    assert bootstrap_mean(values, groups) == bootstrap_mean(values, groups)
    assert bootstrap_mean(values, groups) != bootstrap_mean(values, groups, seed=1)


def test_bootstrap_covers_the_mean_95_times_in_100():
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(300):
        values = rng.normal(size=(40, 1)) + rng.normal(size=(40, 5))
        _, low, high = bootstrap_mean(values, np.arange(40), num_resamples=400)
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_one_group_has_no_interval():
    mean, low, high = bootstrap_mean(np.ones((3, 2)), np.array(["a"] * 3))
    assert mean == 1 and np.isnan(low) and np.isnan(high)


def test_bootstrap_errors():
    with pytest.raises(ValueError, match="3 rows of values but 2 groups"):
        bootstrap_mean(np.ones((3, 2)), np.arange(2))
    with pytest.raises(ValueError, match="none of the 4 tokens"):
        bootstrap_mean(np.full((2, 2), np.nan), np.arange(2))


# --- token losses and the bare base ---


def test_token_losses_sum_to_the_loss_of_transformers():
    base = tiny_base()
    ids = torch.randint(0, VOCAB, (3, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    labels[2, 9:] = -100
    with torch.no_grad():
        output = base(input_ids=ids, labels=labels)
    losses = token_losses(output.logits, labels)
    assert losses.shape == (3, 11)
    assert torch.equal(losses.isnan(), labels[:, 1:] == -100)
    assert losses.nanmean().item() == pytest.approx(output.loss.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("num_tokens", [0, 3, 8, 100])
def test_bare_base_equals_the_base_alone(kind, num_tokens):
    """Padded chunks and queries of different length, batched, against one unpadded row at a time."""
    base = tiny_base(kind)
    modules = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[kind]
    tuned = perturbed(get_peft_model(tiny_base(kind), LoraConfig(task_type="CAUSAL_LM", target_modules=modules)))
    torch.manual_seed(2)
    chunks, queries = torch.randint(0, VOCAB, (3, 2, CHUNK)), torch.randint(0, VOCAB, (3, 1, QUERY))
    chunk_mask, mask = torch.ones_like(chunks), torch.ones_like(queries)
    chunk_mask[1, 1, 5:] = 0
    chunk_mask[2, 0] = 0
    mask[0, 0, 6:] = 0
    labels = queries.masked_fill(mask == 0, -100)
    batch = {"chunk_input_ids": chunks, "chunk_attention_mask": chunk_mask, "chunk_labels": chunks}
    batch |= {"input_ids": queries, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        losses = bare_base_losses(tuned.eval(), batch, num_tokens).numpy()
    for i, found in enumerate(losses):
        read = chunks[i][chunk_mask[i].bool()].tolist()
        expected = reference_losses(base, read[max(len(read) - num_tokens, 0) :], queries[i][mask[i].bool()].tolist())
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-5)
        assert np.isnan(found[len(expected) :]).all()


@pytest.mark.parametrize(
    ("counts", "room", "expected"),
    [
        ([0, 1, 2, 4], 100, [0, 1, 2, 4]),
        ([0, 1, 2, 4, 8, 16], 24, [0, 1, 2, 3]),
        ([1, 2, 4, 8], 38, [0, 1, 2, 4, 4.75]),
        ([2, 4], 10, [0, 1.25]),
        ([4, 8], 32, [0, 4]),
        ([1, 2], 0, [0]),
    ],
)
def test_full_context_fills_the_window_once(counts, room, expected):
    assert _full_context_counts(counts, CHUNK, room) == expected


# --- the curve as a value ---


def synthetic_curve(seed: int = 0, method: str = "iai", slope: float = -0.1, episodes: int = 60) -> Curve:
    """A common part of each episode that pairing removes, a known slope, and 0.5 more before token 32."""
    rng = np.random.default_rng(0)
    common = rng.normal(3, 1, size=(episodes, 1)) + rng.normal(0, 0.01, size=(episodes, 47))
    early = np.where(np.arange(1, 48) < 32, 0.5, 0.0)
    losses = {(method, n, seed): common + early + slope * n + 0.01 * seed for n in (0, 1, 2, 4)}
    return Curve(losses | {("no_context", 0, seed): common + early}, np.arange(episodes) // 3)


def test_rows_hold_mean_interval_and_tokens():
    curve = synthetic_curve(seed=5)
    rows = curve.rows()
    assert len(rows) == 5
    losses = curve.losses["iai", 2, 5]
    row = next(r for r in rows if r["method"] == "iai" and r["num_chunks"] == 2)
    assert row["seed"] == 5 and row["num_tokens"] == losses.size
    assert row["loss"] == pytest.approx(losses.mean())
    assert row["low"] < row["loss"] < row["high"]


def test_from_token_counts_tokens_of_the_query():
    curve = synthetic_curve()
    late = {(r["method"], r["num_chunks"]): r for r in curve.rows(from_token=32)}
    assert late["iai", 0]["num_tokens"] == 60 * (48 - 32)
    assert late["iai", 0]["loss"] == pytest.approx(curve.losses["iai", 0, 0][:, 31:].mean())
    assert curve.rows(0) == curve.rows(1)
    for wrong in (-1, 48):
        with pytest.raises(ValueError, match=r"from_token must be in 0\.\.47"):
            curve.rows(wrong)


def test_steps_find_a_fall_that_unpaired_intervals_hide():
    curve = synthetic_curve()
    zero, one = curve.mean("iai", 0), curve.mean("iai", 1)
    assert zero["low"] < one["high"], "the intervals overlap: only pairing separates them"
    steps = curve.steps()
    assert [(s["from_chunks"], s["to_chunks"]) for s in steps] == [(0, 1), (1, 2), (2, 4)]
    np.testing.assert_allclose([s["mean"] for s in steps], [-0.1, -0.1, -0.2], atol=1e-9)
    assert all(s["high"] < 0 for s in steps)
    assert all(s["low"] > 0 for s in synthetic_curve(slope=0.1).steps())


def test_difference_against_a_baseline_of_noise_is_not_significant():
    rng = np.random.default_rng(6)
    losses = {(name, 1, 0): rng.normal(3, 0.1, size=(50, 8)) for name in ("a", "b")}
    gap = Curve(losses, np.arange(50)).difference(("a", 1), ("b", 1))
    assert gap["low"] < 0 < gap["high"]
    assert gap["mean"] == pytest.approx((losses["a", 1, 0] - losses["b", 1, 0]).mean())


def test_concat_joins_seeds_and_difference_averages_them():
    curve = Curve.concat([synthetic_curve(seed=s, slope=-0.1 * (s + 1)) for s in (0, 1, 2)])
    assert curve.seeds == [0, 1, 2] and len(curve.rows()) == 15
    assert curve.difference(("iai", 1), ("iai", 0))["mean"] == pytest.approx(-0.2)


def test_concat_joins_methods_that_share_a_baseline():
    curve = Curve.concat([synthetic_curve(), synthetic_curve(method="prefix tuning")])
    assert curve.methods == ["iai", "no_context", "prefix tuning"]


def test_concat_errors():
    with pytest.raises(ValueError, match="no curve given"):
        Curve.concat([])
    with pytest.raises(ValueError, match="different episodes"):
        Curve.concat([synthetic_curve(), synthetic_curve(seed=1, episodes=30)])
    with pytest.raises(ValueError, match=r"different losses of \('iai', 1, 0\)"):
        Curve.concat([synthetic_curve(), synthetic_curve(slope=-0.3)])


def test_curve_errors():
    good = np.ones((3, 4))
    holed = good.copy()
    holed[0, 0] = np.nan
    with pytest.raises(ValueError, match="at least one method"):
        Curve({}, np.arange(3))
    with pytest.raises(ValueError, match=r"expected \(2, T - 1\)"):
        Curve({("iai", 0, 0): good}, np.arange(2))
    for bad in (holed, np.ones((3, 5))):
        with pytest.raises(ValueError, match="score different tokens"):
            Curve({("iai", 0, 0): good, ("iai", 1, 0): bad}, np.arange(3))
    curve = synthetic_curve()
    with pytest.raises(ValueError, match=r"no method 'ia'.*'iai', 'no_context'"):
        curve.steps(method="ia")
    with pytest.raises(ValueError, match=r"'iai' was measured at \[0, 1, 2, 4\] chunks, not at 3"):
        curve.difference(("iai", 3), ("iai", 0))
    two = Curve(curve.losses | {("iai", 0, 1): curve.losses["iai", 0, 0]}, curve.groups)
    with pytest.raises(ValueError, match="cannot be paired"):
        two.difference(("iai", 0), ("iai", 1))


def test_print_shows_every_method_and_count(capsys):
    Curve.concat([synthetic_curve(), synthetic_curve(seed=1)]).print(from_token=32)
    printed = capsys.readouterr().out
    assert "query tokens 32+" in printed and "no_context" in printed
    assert f"{Curve.concat([synthetic_curve(), synthetic_curve(seed=1)]).mean('iai', 4, 32)['mean']:.4f}" in printed


def test_pandas_holds_the_rows():
    curve = synthetic_curve()
    assert curve.to_pandas(from_token=32).to_dict("records") == curve.rows(from_token=32)


def test_plot_writes_a_whole_png_and_nothing_else(tmp_path):
    synthetic_curve().plot(tmp_path / "curve.png", from_token=32)
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]
    data = (tmp_path / "curve.png").read_bytes()
    assert data.startswith(b"\x89PNG") and b"IEND" in data[-12:]


def test_json_holds_rows_and_extra(tmp_path):
    curve = synthetic_curve()
    curve.to_json(tmp_path / "curve.json", command="make curve", rate=0.1)
    saved = json.loads((tmp_path / "curve.json").read_text())
    assert saved["command"] == "make curve" and saved["rate"] == 0.1
    assert saved["rows_from_token_0"] == curve.rows() and saved["rows_from_token_32"] == curve.rows(32)
    assert [p.name for p in tmp_path.iterdir()] == ["curve.json"]


def test_json_of_short_queries_and_one_group(tmp_path):
    Curve({("iai", 0, 0): np.ones((2, 9))}, np.array(["a", "a"])).to_json(tmp_path / "curve.json")
    saved = json.loads((tmp_path / "curve.json").read_text())
    assert list(saved) == ["rows_from_token_0"] and saved["rows_from_token_0"][0]["low"] is None
    with pytest.raises(ValueError, match="rows_from_token_0"):
        synthetic_curve().to_json(tmp_path / "curve.json", rows_from_token_0=[])


@pytest.mark.parametrize(("package", "call"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_missing_extra_says_what_to_install(package, call, monkeypatch, tmp_path):
    real = importlib.import_module

    def without(name, *args):
        if name.startswith(package):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr("hf_iai.evaluation.extras.import_module", without)
    arguments = [tmp_path / "curve.png"] if call == "plot" else []
    with pytest.raises(ImportError, match=r"hf_iai\[plots\]"):
        getattr(synthetic_curve(), call)(*arguments)


# --- the whole evaluation ---


def test_every_method_equals_a_direct_loop(model):
    """7 episodes in batches of 3, against one episode at a time through the public calls and the untouched base."""
    episodes, base = random_episodes(7), tiny_base()
    curve = evaluate_curve(model, episodes, (4, 0, 1, 5), chunk_size=CHUNK, batch_size=3, seed=3, show_progress=False)
    room = WINDOW - QUERY
    assert curve.counts("full_context") == [0, 1, 4, room / CHUNK]
    model.eval()
    for i, episode in enumerate(episodes):
        support, query = [e["input_ids"] for e in episode["support"]], episode["query"][0]["input_ids"]
        tokens = [t for chunk in support for t in chunk]
        expected = {("no_context", 0): reference_losses(base, [], query)}
        expected["fewer_shots", 1] = reference_losses(base, tokens[-SLOTS:], query)
        for n in (0, 1, 4, room / CHUNK):
            expected["full_context", n] = reference_losses(base, tokens[len(tokens) - int(n * CHUNK) :], query)
        for n in (0, 1, 4, 5):
            chunks = [{"input_ids": torch.tensor([c])} for c in support[len(support) - n :]]
            state = model.adapt(chunks) if n else model.initial_state()
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([query]), task_state=state).logits
            expected["iai", n] = token_losses(logits, torch.tensor([query]))[0].numpy()
        expected["last_chunk", 1] = expected["iai", 1]
        assert {(*key, 3) for key in expected} == set(curve.losses)
        for key, losses in expected.items():
            np.testing.assert_allclose(curve.losses[*key, 3][i], losses, atol=1e-4, err_msg=str(key))
    assert curve.groups.tolist() == [f"file {i // 2}" for i in range(7)]


def test_batch_size_changes_nothing(model):
    episodes = random_episodes(5, query=7) + random_episodes(2)
    small, large = (
        evaluate_curve(model, episodes, (0, 2), chunk_size=CHUNK, batch_size=size, show_progress=False)
        for size in (2, 16)
    )
    assert set(small.losses) == set(large.losses)
    for key, losses in small.losses.items():
        np.testing.assert_allclose(losses, large.losses[key], atol=1e-4)
        assert np.isnan(losses[:5, 6:]).all() and not np.isnan(losses[5:]).any()


def test_dropout_is_off_even_in_training():
    config = IAIConfig(task_type="CAUSAL_LM", num_state_tokens=SLOTS, lora_dropout=0.5)
    model = perturbed(get_peft_model(tiny_base(), config)).train()
    first, second = (
        evaluate_curve(model, random_episodes(2), (0, 1), chunk_size=CHUNK, show_progress=False) for _ in range(2)
    )
    for key, losses in first.losses.items():
        np.testing.assert_array_equal(losses, second.losses[key])


def test_static_state_reads_nothing(model):
    config = IAIConfig(task_type="CAUSAL_LM", num_state_tokens=SLOTS)
    static = perturbed(get_peft_model(tiny_base(), config), seed=2)
    options = {"chunk_size": CHUNK, "show_progress": False}
    curve = evaluate_curve(model, random_episodes(2), (0, 1), ["no_context"], static_model=static, **options)
    alone = evaluate_curve(static, random_episodes(2), (0,), [], **options)
    assert set(curve.methods) == {"iai", "no_context", "static_state"}
    np.testing.assert_array_equal(curve.losses["static_state", 0, 0], alone.losses["iai", 0, 0])
    assert not np.allclose(curve.losses["static_state", 0, 0], curve.losses["iai", 0, 0], atol=1e-3)


def test_refined_predictions_equal_a_direct_loop():
    """Regime implicit: answers of one and of two tokens, prompts of several lengths, next to the untouched base."""
    config = IAIConfig(task_type="CAUSAL_LM", regime="implicit", target_modules="all-linear")
    model, base = perturbed(get_peft_model(tiny_base(), config)).eval(), tiny_base()
    episodes, lengths = random_episodes(5), ((4, 2), (3, 1), (5, 2), (2, 1), (4, 2))
    for episode, (prompt, answer) in zip(episodes, lengths, strict=True):
        ids = episode["query"][0]["input_ids"][: prompt + answer]
        episode["query"] = [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}]
    curve = evaluate_curve(model, episodes, (0, 1, 3), chunk_size=CHUNK, batch_size=2, show_progress=False)
    assert curve.methods == ["iai", "no_context", "last_chunk", "full_context"]
    for i, (episode, (prompt, answer)) in enumerate(zip(episodes, lengths, strict=True)):
        support, ids = [e["input_ids"] for e in episode["support"]], episode["query"][0]["input_ids"]
        for n in (0, 1, 3):
            chunks = [{"input_ids": torch.tensor([c])} for c in support[len(support) - n :]]
            asked = {"input_ids": torch.tensor([ids[:prompt]])}
            *_, logits = model.refine(chunks, asked, num_answer_tokens=answer, with_start=True)
            losses = -logits[0].log_softmax(-1)[range(answer), ids[prompt:]]
            found = curve.losses["iai", n, 0][i]
            np.testing.assert_allclose(found[~np.isnan(found)], losses, atol=1e-4)
            assert np.flatnonzero(~np.isnan(found)).tolist() == [*range(prompt - 1, prompt + answer - 1)]
        tokens = [t for chunk in support[-3:] for t in chunk]
        expected = reference_losses(base, tokens, ids)[prompt - 1 :]
        np.testing.assert_allclose(curve.losses["full_context", 3, 0][i, prompt - 1 :][:answer], expected, atol=1e-4)
    with pytest.raises(ValueError, match="leave out baseline 'fewer_shots'"):
        evaluate_curve(model, episodes, (0, 1), ["fewer_shots"], chunk_size=CHUNK)
    with pytest.raises(ValueError, match="a curve scores free answers: leave `labels` out"):
        evaluate_curve(model, [{**episodes[3], "labels": [[1], [2]]}], (0, 1), chunk_size=CHUNK)
    with pytest.raises(ValueError, match="leave out baseline 'fewer_shots' and static_model="):
        evaluate_curve(model, episodes, (0, 1), static_model=model, chunk_size=CHUNK)


def test_modes_and_gradients_are_left_as_they_were(model):
    model.train()
    model.base_model.eval()
    before = [module.training for module in model.modules()]
    evaluate_curve(model, random_episodes(1), (0, 1), chunk_size=CHUNK, show_progress=False)
    assert before == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_tokenizer_and_default_chunk_size(model):
    """Text is tokenised as everywhere else, and a chunk is as long as the window allows: 48 - 2 * 4 = 40 tokens."""
    letters = {chr(97 + i): i for i in range(26)}
    words = Tokenizer(WordLevel(letters))
    words.pre_tokenizer = WhitespaceSplit()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 26, 92)
    text = " ".join(chr(97 + i) for i in ids)
    episode = {"support": [{"text": text[:160]}], "query": [{"text": text[160:]}]}
    tokens = {"support": [{"input_ids": ids[:80].tolist()}], "query": [{"input_ids": ids[80:].tolist()}]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    from_text = evaluate_curve(model, [episode], (0, 2), tokenizer=tokenizer, show_progress=False)
    from_ids = evaluate_curve(model, [tokens], (0, 2), chunk_size=40, show_progress=False)
    for key, losses in from_ids.losses.items():
        np.testing.assert_array_equal(losses, from_text.losses[key])
    with pytest.raises(ValueError, match="fills 2 chunks, but 3"):
        evaluate_curve(model, [episode], (0, 3), tokenizer=tokenizer, show_progress=False)


def test_episodes_without_a_group_stand_alone(model):
    episodes = [{k: e[k] for k in ("support", "query")} for e in random_episodes(3)]
    curve = evaluate_curve(model, episodes, (0,), [], chunk_size=CHUNK, show_progress=False)
    assert len(set(curve.groups)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_chunks": ()}, "one or more counts"),
        ({"num_chunks": (-1, 2)}, r"at least 0, got \[-1, 2\]"),
        ({"baselines": ["full_contex"]}, r"unknown baselines \['full_contex'\]; use any of"),
        ({"baselines": ["static_state"]}, "needs static_model="),
        ({"method": "no_context"}, "name of a baseline"),
        ({"num_chunks": (0,)}, "read chunks, but num_chunks is only 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"episodes": []}, "no episode"),
        ({"episodes": [{"support": [{"text": "a"}], "query": [{"text": "b"}]}]}, "pass tokenizer="),
        ({"episodes": [{"support": [{"messages": []}], "query": [{"messages": []}]}]}, "pass tokenizer="),
        ({"episodes": [{"support": [{"input_ids": [7]}], "query": [{"input_ids": [7]}]}]}, r"tokens \[7\]"),
        ({"num_chunks": (0, 6)}, "the support of episode 0 fills 5 chunks, but 6 are needed"),
        ({"episodes": [{**random_episodes(1)[0], "query": [{"input_ids": [1, 2]}] * 2}]}, "2 queries, expected 1"),
    ],
)
def test_bad_input_is_a_clear_error(model, changes, message):
    arguments = {"episodes": random_episodes(2), "num_chunks": (0, 1), "chunk_size": CHUNK, "show_progress": False}
    with pytest.raises(ValueError, match=message):
        evaluate_curve(model, **(arguments | changes))


@pytest.mark.parametrize("name", ["bootstrap", "curve", "evaluate", "losses", "render"])
def test_examples_in_docstrings_run(name):
    failed, _ = doctest.testmod(importlib.import_module(f"hf_iai.evaluation.{name}"))
    assert failed == 0
