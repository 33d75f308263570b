"""Hostile files: a loader says what is wrong, or loads what is consistent. It neither hangs nor eats all memory."""

import json
import resource
import string
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from samples import BYTES, ROWS
from tiny import chunks, make_base, make_classifier, make_model
from transformers import AutoModelForCausalLM

from hf_iai import IAIConfig, TaskState, chunk_examples
from hf_iai.data.tables import labelled_rows
from hf_iai.state_file import CONFIG, FORMAT_1, WEIGHTS

EXAMPLES = 150  # of each test
HOSTILE = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
SECONDS, MEGABYTES = 20, 50
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def refused_or(load):
    """What is loaded; None if it was refused in words: ValueError or OSError, not what a library raised on the way."""
    started = time.monotonic()
    try:
        return load()
    except (ValueError, OSError) as error:
        assert type(error) in (ValueError, FileNotFoundError, FileExistsError), repr(error)
        assert len(str(error)) > 20
        return None
    finally:
        assert time.monotonic() - started < SECONDS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a state of text, one of classes, and an adapter with its base."""
    folder = tmp_path_factory.mktemp("hostile")
    make_base().save_pretrained(folder / "base")
    model = make_model(AutoModelForCausalLM.from_pretrained(folder / "base"))
    model.save_pretrained(folder / "adapter")
    model.adapt(chunks(2)).save_pretrained(folder / "text")
    make_classifier().adapt(chunk_examples(ROWS, BYTES, chunk_size=6)).save_pretrained(folder / "classes")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "classes"])
def test_states_with_flipped_bits_are_refused(saved, tmp_path, name):
    whole = (saved / name / WEIGHTS).read_bytes()
    TaskState.from_pretrained(saved / name)

    @HOSTILE
    @given(st.lists(st.integers(0, 8 * len(whole) - 1), min_size=1, max_size=3, unique=True))
    def check(bits):
        damaged = bytearray(whole)
        for bit in bits:
            damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / WEIGHTS).write_bytes(damaged)
        assert refused_or(lambda: TaskState.from_pretrained(tmp_path)) is None

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "classes"])
def test_states_with_other_fields_are_refused(saved, tmp_path, name):
    fields = json.loads((saved / name / CONFIG).read_text())
    fields = {key: value for key, value in fields.items() if key not in ("checksum", "copy")} | {"format": FORMAT_1}
    save_file(load_file(saved / name / WEIGHTS), tmp_path / WEIGHTS, metadata={"format": FORMAT_1})

    @HOSTILE
    @given(st.sampled_from(sorted(fields)), VALUES)
    def check(key, value):
        (tmp_path / CONFIG).write_text(json.dumps(fields | {key: value}))
        loaded = refused_or(lambda: TaskState.from_pretrained(tmp_path))
        free_text = key in ("fingerprint", "name") and isinstance(value, str) and value
        assert loaded is None or free_text or value == fields[key]

    check()


@pytest.mark.slow
def test_bytes_that_are_no_state_are_refused(saved, tmp_path):
    whole = (saved / "text" / WEIGHTS).read_bytes()

    @HOSTILE
    @given(st.binary(max_size=300) | st.integers(0, len(whole) - 1).map(lambda n: whole[:n]), st.integers(0, 2**64 - 1))
    def check(content, claimed):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for data in (content, claimed.to_bytes(8, "little") + content[8:]):
            (tmp_path / WEIGHTS).write_bytes(data)
            assert refused_or(lambda: TaskState.from_pretrained(tmp_path)) is None
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in kB
        assert grown < 2 * len(whole) / 1000 + 1000 * MEGABYTES

    check()


@pytest.mark.slow
def test_adapters_with_other_tensors_are_refused(saved, tmp_path):
    whole = load_file(saved / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter" / "adapter_config.json").read_bytes())
    changes = {
        "missing": lambda t: None,
        "nan": lambda t: t * float("nan"),
        "infinite": lambda t: t + float("inf"),
        "wider": lambda t: torch.cat([t, t], -1) if t.dim() else t[None],
        "empty": lambda t: t.flatten()[:0],
    }

    @settings(HOSTILE, max_examples=40)
    @given(st.sampled_from(sorted(whole)), st.sampled_from(sorted(changes)))
    def check(name, change):
        changed = changes[change](whole[name])
        tensors = {n: t.contiguous() for n, t in (whole | {name: changed}).items() if t is not None}
        save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        assert refused_or(lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path)) is None

    check()
    save_file(whole | {"base_model.iai.more": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert refused_or(lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path)) is None


OWN_FIELDS = sorted(set(IAIConfig.__annotations__))


@pytest.mark.slow
def test_configurations_with_other_values_are_refused_or_kept():
    @HOSTILE
    @given(st.sampled_from(OWN_FIELDS), VALUES)
    def check(name, value):
        config = refused_or(lambda: IAIConfig(task_type="CAUSAL_LM", **{name: value}))
        assert config is None or value is None or getattr(config, name) == value

    check()


@pytest.mark.slow
@pytest.mark.parametrize("end", [".csv", ".tsv", ".jsonl", ".json"])
def test_tables_of_any_bytes_are_read_or_refused(tmp_path, end):
    rows = st.lists(st.dictionaries(st.sampled_from(["text", "label", "x"]), VALUES, max_size=3), max_size=4)
    lines = rows.map(lambda found: "\n".join(map(json.dumps, found)))
    text = st.text(alphabet=string.printable + "é\x00\ufeff", max_size=80)
    files = (
        lines
        | rows.map(json.dumps)
        | text
        | text.map(lambda t: f"text,label\n{t}")
        | text.map("text\tlabel\n{}".format)
    )

    @HOSTILE
    @given(files.map(lambda t: t.encode("utf-8", "surrogatepass")) | st.binary(max_size=60))
    def check(content):
        path = tmp_path / f"a{end}"
        path.write_bytes(content)
        found = refused_or(lambda: labelled_rows(path))
        assert found is None or all(row["text"].strip() and row["label"].strip() for row in found)

    check()
