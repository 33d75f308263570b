"""The file of a task state: one file decides, every field is checked, and the format before still loads."""

import json
import random
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from members import READING, every
from safetensors.torch import load_file, save_file
from samples import BYTES, ROWS
from tiny import chunks, make_classifier, make_model

from hf_iai import TaskState, chunk_examples
from hf_iai.state_file import CONFIG, FORMAT, FORMAT_1, WEIGHTS, read_notes


def text_state():
    return make_model().adapt(chunks(2))


def class_state():
    return make_classifier().adapt(chunk_examples(ROWS, BYTES, chunk_size=6))


def regression_state():
    rows = [{"inputs_embeds": torch.randn(1, 4, 32), "labels": torch.randn(1, 4, 2)}]
    return make_classifier(likelihood="gaussian").adapt(rows)


def as_format_1(folder, **changes):
    """Turn a saved state into one of the format before: no metadata but the format, and `config.json` decides."""
    fields = json.loads((folder / CONFIG).read_text())
    fields = {name: value for name, value in fields.items() if name not in ("checksum", "copy", "notes")}
    (folder / CONFIG).write_text(json.dumps(fields | {"format": FORMAT_1} | changes))
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": FORMAT_1})


def equal(a, b):
    same = a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)
    return same and torch.equal(a.step, b.step) and a.identity == b.identity and a.class_names == b.class_names


@every(READING)
def test_every_state_is_one_file_and_loads_in_both_formats(member, tmp_path):
    model = member.model()
    state = model.adapt(member.stream())
    state.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert equal(TaskState.from_pretrained(tmp_path), state)
    as_format_1(tmp_path)
    assert equal(TaskState.from_pretrained(tmp_path), state)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        TaskState.from_pretrained(tmp_path)


def test_a_state_in_one_line():
    """A count that differs between tasks is a range, with the smallest and the largest."""
    state = make_model().adapt(chunks(2, batch=3))
    assert f"({state.accumulation}, tasks=3, chunks=2, tokens=20, bytes={state.nbytes}, adapter=" in repr(state)
    found = repr(replace(state, step=torch.tensor([4, 2, 3]), num_tokens=torch.tensor([7, 7, 5])))
    assert "chunks=2..4, tokens=5..7" in found


def test_states_are_not_changed_in_place_and_are_compared_as_objects():
    state = text_state()
    with pytest.raises(FrozenInstanceError):
        state.step = state.step + 1
    assert state == state and state != replace(state)


def test_the_copy_may_be_missing_or_older_but_not_changed(tmp_path):
    old, new = class_state(), replace(class_state(), class_names=(("a", "b", "c", "d"),))
    old.save_pretrained(tmp_path)
    copy = (tmp_path / CONFIG).read_bytes()
    new.save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_bytes(copy)  # as a kill between the two leaves it
    assert TaskState.from_pretrained(tmp_path).class_names == new.class_names
    (tmp_path / CONFIG).write_text(copy.decode().replace("cat", "lion"))
    with pytest.raises(ValueError, match=r"config\.json was changed, which has no effect"):
        TaskState.from_pretrained(tmp_path)
    (tmp_path / CONFIG).unlink()
    assert equal(TaskState.from_pretrained(tmp_path), new)


def test_a_state_of_before_is_replaced_by_one_that_loads_whenever_it_is_killed(tmp_path):
    old, new = text_state(), make_model().adapt(chunks(3))
    old.save_pretrained(tmp_path)
    as_format_1(tmp_path)
    copy = (tmp_path / CONFIG).read_bytes()
    new.save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_bytes(copy)
    assert equal(TaskState.from_pretrained(tmp_path), new)


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "[]", "{", ""])
def test_the_config_of_something_else_is_not_replaced(tmp_path, content):
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(FileExistsError, match="is not of a task state"):
        text_state().save_pretrained(tmp_path)
    assert (tmp_path / CONFIG).read_text() == content and not (tmp_path / WEIGHTS).exists()


def test_notes_come_back(tmp_path):
    state = text_state()
    state.save_pretrained(tmp_path, notes={"read": [{"rows": 3}]})
    assert read_notes(tmp_path) == {"read": [{"rows": 3}]} and equal(TaskState.from_pretrained(tmp_path), state)
    state.save_pretrained(tmp_path)
    assert read_notes(tmp_path) == {}


FIELDS = [
    (text_state, "fingerprint", None),
    (text_state, "fingerprint", []),
    (text_state, "fingerprint", ""),
    (text_state, "name", {"a": 1}),
    (text_state, "accumulation", None),
    (text_state, "accumulation", "nonsense"),
    (text_state, "tensors", {}),
    (text_state, "tensors", None),
    (text_state, "label_names", [["a"], ["b"]]),
    (regression_state, "label_names", [["a", "b"]]),
    *((class_state, "label_names", names) for names in (
        None, 4, "abc", [], {"a": 1}, ["abcd"], [[]], [["cat", "dog"]], [["a", "b", "c", "d", "e"]],
        [["a", "a", "b", "c"]], [[1, 2, 3, 4]], [["a", None, "b", "c"]], [["a", "b", "c", "d"]] * 2,
    )),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name", "value"), FIELDS)
def test_fields_that_no_state_has_are_refused(tmp_path, make, name, value):
    make().save_pretrained(tmp_path)
    as_format_1(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=rf"(config\.json|task_state).*{name.removesuffix('_names')}"):
        TaskState.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["fingerprint", "name", "accumulation", "tensors"])
def test_fields_that_are_missing_are_refused(tmp_path, name):
    text_state().save_pretrained(tmp_path)
    as_format_1(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({key: value for key, value in fields.items() if key != name}))
    with pytest.raises(ValueError, match=rf"config\.json.*{name}|{name}.*config\.json"):
        TaskState.from_pretrained(tmp_path)


TENSORS = {
    "negative count": lambda t: {"step": -t["step"]},
    "negative tokens": lambda t: {"num_tokens": t["num_tokens"] - 10**6},
    "negative precision": lambda t: {"precision": -t["precision"] - 1},
    "precision just below 0": lambda t: {"precision": t["precision"] * 0 - 0.01},
    "floating count": lambda t: {"step": t["step"].float() + 0.5},
    "huge": lambda t: {"key": t["key"] * 0 + 3e38},
    "huge and negative": lambda t: {"key": t["key"] * 0 - 3e38},
    "infinite": lambda t: {"key": t["key"] * float("inf")},
    "nan": lambda t: {"value": t["value"] * float("nan")},
    "another batch": lambda t: {"key": t["key"][:1]},
    "no task axis": lambda t: {"key": t["key"].sum()},
    "truth values": lambda t: {"key": t["key"] > 0},
    "counts of another batch": lambda t: {"step": t["step"][:1]},
    "two axes of counts": lambda t: {"step": t["step"][:, None]},
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_tensors_that_no_state_has_are_neither_loaded_nor_saved(tmp_path, change):
    state = text_state()
    state.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    changed = tensors | change(tensors)
    save_file(changed, tmp_path / WEIGHTS, metadata={"format": FORMAT_1})
    fields = json.loads((tmp_path / CONFIG).read_text())
    shapes = {name: list(t.shape) for name, t in changed.items()}
    (tmp_path / CONFIG).write_text(json.dumps(fields | {"format": FORMAT_1, "tensors": shapes}))
    with pytest.raises(ValueError, match=WEIGHTS):
        TaskState.from_pretrained(tmp_path)
    step, num_tokens = changed.pop("step"), changed.pop("num_tokens")
    with pytest.raises(ValueError, match=WEIGHTS):
        replace(state, tensors=changed, step=step, num_tokens=num_tokens).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"\0" * 5, "damaged"),
        (b"\xff" * 200, "damaged"),
        (b"\x02\0\0\0\0\0\0\0{}", "format None"),
        (b"[" * 200_000, "damaged"),
    ],
)
def test_files_that_are_no_state(tmp_path, content, message):
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TaskState.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b'{"a": "\xff"}', b"[" * 200_000, b"\0" * 9])
@pytest.mark.parametrize("old", [True, False], ids=["format 1", "format 2"])
def test_a_damaged_config_is_named(tmp_path, content, old):
    text_state().save_pretrained(tmp_path)
    if old:
        as_format_1(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        TaskState.from_pretrained(tmp_path)


def test_any_flipped_bit_is_found(tmp_path):
    """A sample of all bits here; tests/test_hostile.py flips more."""
    state = text_state()
    state.save_pretrained(tmp_path)
    (tmp_path / CONFIG).unlink()
    whole, draw = (tmp_path / WEIGHTS).read_bytes(), random.Random(0)
    assert json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["format"] == FORMAT
    for _ in range(200):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        (tmp_path / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=WEIGHTS):
            TaskState.from_pretrained(tmp_path)
