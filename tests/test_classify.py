"""`hf-iai classify` and the accuracy curve of a linear state, on a tiny encoder."""

import copy
import csv
import json
import pickle

import numpy as np
import pytest
import torch
from samples import BYTES, ROWS, VERBS
from tiny import make_classifier, make_encoder
from transformers import pipeline
from typer.testing import CliRunner

from hf_iai import TaskState, chunk_examples, evaluate_curve
from hf_iai.classify import accuracy, classify, installed_encoder, load_reader, read_rows
from hf_iai.cli import app
from hf_iai.evaluation.accuracy import features_of
from hf_iai.evaluation.classifiers import CLASSIFIERS, nearest_class_mean

QUERY = [{"text": f"{verb} {i}", "label": name} for name, verb in VERBS.items() for i in (70, 80)]


def clusters(num=60, seed=0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(3, 8))
    labels = np.arange(num) % 3
    x = centres[labels] + 0.3 * generator.normal(size=(num, 8))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_baseline_learns_and_answers_with_labels_it_was_given(name):
    x, y = clusters()
    named = np.array([7, 2, 5])[y]
    found = CLASSIFIERS[name](x[:40], named[:40], x[40:])
    assert (found == named[40:]).mean() > 0.9
    assert set(CLASSIFIERS[name](x[:1], named[:1], x)) == {7}


def test_nearest_class_mean_is_by_distance():
    x, y = clusters()
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    by_distance = np.square(x[:, None] - means).sum(-1).argmin(1)
    assert (nearest_class_mean(x, y, x) == by_distance).all()


def test_the_curve_is_of_accuracy_and_starts_as_the_nearest_class_mean(tmp_path):
    model = make_classifier(trained=False)
    episodes = [{"support": ROWS[first:] + ROWS[:first], "query": QUERY} for first in (0, 7)]
    curve = evaluate_curve(
        model, episodes, (1, 2), list(CLASSIFIERS), tokenizer=BYTES, chunk_size=9, show_progress=False
    )
    assert curve.metric == "accuracy" and curve.methods == ["iai", *CLASSIFIERS]
    for n in (1, 2):
        assert (curve.losses["iai", n, 0] == curve.losses["nearest_class_mean", n, 0]).all()
    assert curve.mean("iai", 2)["mean"] > 0.5
    row = curve.rows()[0]
    assert row["method"] == "iai" and 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    curve.print()
    curve.plot(tmp_path / "curve.png")
    curve.to_json(tmp_path / "curve.json")
    assert set(json.loads((tmp_path / "curve.json").read_text())) == {"rows_from_token_0"}


def test_lora_fine_tuning_is_a_baseline_and_leaves_the_model_as_it_is():
    model = make_classifier()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    episode = {"support": ROWS, "query": QUERY}
    baselines = ["lora_fine_tuning"]
    curve = evaluate_curve(model, [episode], (2,), baselines, tokenizer=BYTES, chunk_size=12, show_progress=False)
    assert curve.mean("lora_fine_tuning", 2)["mean"] > 0.5
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_query_of_a_class_not_met_yet_counts_as_wrong():
    model = make_classifier()
    support = [row for row in ROWS if row["label"] in ("cat", "dog")]
    curve = evaluate_curve(
        model, [{"support": support, "query": QUERY}], (1,), tokenizer=BYTES, chunk_size=10, show_progress=False
    )
    unknown = np.array([row["label"] not in ("cat", "dog") for row in QUERY])
    for right in curve.losses.values():
        assert not right[0, unknown].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_chunks": (0, 1)}, "at least 1"),
        ({"baselines": ["full_context"]}, "full_context.*nearest_class_mean"),
        ({"num_chunks": (9,)}, "9 chunks of 9 take 81"),
        ({"method": "sgd_rows"}, "name of a baseline"),
        ({"episodes": []}, "no episode"),
    ],
)
def test_what_an_accuracy_curve_refuses(values, message):
    values = {"episodes": [{"support": ROWS, "query": QUERY}]} | values
    with pytest.raises(ValueError, match=message):
        evaluate_curve(make_classifier(), tokenizer=BYTES, chunk_size=9, show_progress=False, **values)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A saved adapter and the encoder that it names, tokenizer included."""
    folder = tmp_path_factory.mktemp("adapter")
    make_encoder().save_pretrained(folder / "encoder")
    BYTES.save_pretrained(folder / "encoder")
    model = make_classifier()
    model.active_peft_config.base_model_name_or_path = str(folder / "encoder")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_classify_writes_a_classifier_and_reads_on(adapter, tmp_path):
    first = [row for row in ROWS if row["label"] != "cow"]
    data, test = write_csv(tmp_path / "data.csv", first), tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in QUERY))
    options = ["--output", str(tmp_path / "out"), "--adapter", str(adapter), "--chunk-size", "5"]
    result = CliRunner().invoke(app, ["classify", str(data), "--test", str(test), *options])
    assert result.exit_code == 0, result.output
    curve = json.loads((tmp_path / "out/accuracy.json").read_text())
    assert [row["examples"] for row in curve] == [5, 10, 18] and (tmp_path / "out/accuracy.png").stat().st_size > 1000
    model, tokenizer = load_reader(str(adapter))
    state = TaskState.from_pretrained(tmp_path / "out/state")
    assert curve[-1]["accuracy"] == accuracy(model, tokenizer, state, QUERY)
    assert sorted(state.label_names) == ["cat", "dog", "owl"]

    more = write_csv(tmp_path / "more.csv", [row for row in ROWS if row["label"] == "cow"])
    assert CliRunner().invoke(app, ["classify", str(more), *options]).exit_code == 0
    state = TaskState.from_pretrained(tmp_path / "out/state")
    assert sorted(state.label_names) == sorted(VERBS) and int(state.step) == 6
    answer = pipeline("text-classification", str(tmp_path / "out/classifier"))
    texts = [row["text"] for row in QUERY]
    query = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**query, task_state=state).logits.argmax(-1)
    assert [found["label"] for found in answer(texts)] == [state.label_names[c] for c in best]


def test_the_order_is_drawn_and_seeded(adapter, tmp_path):
    model, tokenizer = load_reader(str(adapter))
    totals = [
        classify(model, tokenizer, ROWS, tmp_path / str(i), chunk_size=5, seed=seed).tensors["fitted"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(totals[0], totals[1]) and not torch.equal(totals[0], totals[2])


def test_files_that_cannot_be_read(adapter, tmp_path):
    empty, lacking = tmp_path / "empty.jsonl", tmp_path / "lacking.jsonl"
    empty.write_text("\n")
    lacking.write_text('{"text": "a", "label": "x"}\n{"text": "b", "intent": "y"}\n')
    with pytest.raises(ValueError, match="no row"):
        read_rows(empty)
    with pytest.raises(ValueError, match="line 2 of .*: 'label' is None, expected"):
        read_rows(lacking)
    assert read_rows(write_csv(tmp_path / "d.csv", ROWS[:2])) == ROWS[:2]
    result = CliRunner().invoke(app, ["classify", str(lacking), "--output", str(tmp_path / "o")])
    assert result.exit_code == 2 and not (tmp_path / "o").exists()


def test_nothing_is_read_twice_and_a_file_that_grew_is_read_on(adapter, tmp_path):
    model, tokenizer = load_reader(str(adapter))
    out = tmp_path / "out"
    first = classify(model, tokenizer, ROWS[:10], out, chunk_size=5)
    again = classify(model, tokenizer, ROWS[:10], out, chunk_size=5)
    assert again.step == first.step == 2
    grown = classify(model, tokenizer, ROWS, out, chunk_size=5)
    assert grown.step == first.step + 3  # 14 more rows, 5 in a chunk
    assert classify(model, tokenizer, ROWS, out).step == grown.step
    other = classify(model, tokenizer, ROWS[:3], out)  # of a file that begins as the first one, but is shorter
    assert other.step == grown.step + 1


def test_a_number_is_one_class_however_it_is_written(adapter, tmp_path):
    reader = load_reader(str(adapter))
    rows = [
        {"text": f"{word} {i}", "label": label} for label, word in (("1", "purrs"), ("2", "barks")) for i in range(4)
    ]
    classify(*reader, rows, tmp_path)
    # With a label that is no number, the others of the file keep their ".0".
    written = [row | {"label": f"{row['label']}.0"} for row in rows] + [{"text": "moos", "label": "cow"}] * 2
    state = classify(*reader, written, tmp_path)
    assert sorted(state.label_names) == ["1", "2", "cow"] and state.step == 2
    assert accuracy(*reader, state, written[:8]) == accuracy(*reader, state, rows) > 0.5
    with pytest.raises(ValueError, match="no row to read"):
        classify(*reader, [], tmp_path / "new")


@pytest.mark.parametrize("name", ["classifier/thesis.py", "accuracy.json", "accuracy.png"])
def test_what_is_not_ours_is_kept(adapter, tmp_path, name):
    (tmp_path / "classifier").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=name.split("/")[-1]):
        classify(*load_reader(str(adapter)), ROWS, tmp_path)
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "state").exists()


def test_an_adapter_without_a_linear_state_is_refused():
    from hf_iai.hub.published import published_adapter

    with pytest.raises(ValueError, match="no adapter with a linear state"):
        load_reader(published_adapter("markov-prefix"))


def test_an_encoder_that_no_package_carries_is_named_as_it_is():
    assert installed_encoder("me/encoder") == "me/encoder"


def test_features_are_of_unit_length():
    model = make_classifier()
    x = features_of(model, BYTES(["a", "b c"], padding=True, return_tensors="pt"))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("copied", [False, True])
def test_a_pipeline_names_the_classes_of_the_state_in_use(copied):
    model = make_classifier()
    states = [model.adapt(chunk_examples(rows, BYTES, chunk_size=6)) for rows in (ROWS, ROWS[::-1])]
    model = copy.deepcopy(model) if copied else model
    own = dict(model.config.id2label)
    ask = pipeline("text-classification", model=model, tokenizer=BYTES)
    for state in states:
        with model.using(state):
            found = ask("moos 9", top_k=4)
            with torch.no_grad():
                logits = model(**BYTES("moos 9", return_tensors="pt"), task_state=state).logits[0]
        assert {answer["label"] for answer in found} == set(state.label_names)
        assert found[0]["label"] == state.label_names[logits.argmax()]
    assert dict(model.config.id2label) == own and copy.deepcopy(model.config).id2label == own
    assert model.config.id2label[0] == own[0] and pickle.loads(pickle.dumps(model.config)).id2label == own
