"""Writers are killed, at any call that touches a file and at random moments: nothing is torn, lost or read twice."""

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from samples import BYTES, ROWS
from tiny import chunks, ids, make_classifier, make_model
from transformers import AutoModelForSequenceClassification

from hf_iai import LearnedOptimizer, TaskState, chunk_examples, export_classifier, export_to_peft
from hf_iai.classify import classify
from hf_iai.files import TEMPORARY

KILLS = 50  # of each writer
TOUCHING = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.replace", "shutil.rmtree", "ctypes.dlopen"}


@dataclass
class Writer:
    """Something that writes one of two versions to a folder, and tells which one lies there."""

    write: object  # (folder, 0 or 1)
    read: object  # folder -> 0 or 1; it fails, or gives something else, if neither lies there as a whole

    def version(self, folder: Path) -> int:
        found = self.read(folder)
        assert found in (0, 1), f"neither version: {found!r}"
        return found


def of_states() -> Writer:
    model = make_model()
    states = [model.adapt(chunks(n, seed=n)) for n in (1, 3)]

    def read(folder):
        found = TaskState.from_pretrained(folder / "state")
        return next(
            v for v, s in enumerate(states) if all(torch.equal(found.tensors[n], s.tensors[n]) for n in s.tensors)
        )

    return Writer(lambda folder, version: states[version].save_pretrained(folder / "state"), read)


def of_exports() -> Writer:
    model = make_model(state_type="prompt", regime="explicit")  # the base is written beside the adapter
    states = [model.adapt(chunks(n, batch=1, seed=n)) for n in (1, 3)]

    def write(folder, version):
        export_to_peft(model, states[version], folder / "export")

    def read(folder):
        table = load_file(folder / "export" / "adapter_model.safetensors")["prompt_embeddings"]
        base = AutoPeftModelForCausalLM.from_pretrained(folder / "export")
        assert base(ids(1, 3)).logits.isfinite().all()
        expected = [model.base_model.core.corrected(model.base_model.reader.base, s)["prompt"][0, 0, 0] for s in states]
        return next(v for v, t in enumerate(expected) if torch.allclose(t.detach(), table, atol=1e-6))

    return Writer(write, read)


def of_classifiers() -> Writer:
    model = make_classifier()
    states = [model.adapt(chunk_examples(rows, BYTES, chunk_size=6)) for rows in (ROWS[:6], ROWS)]

    def write(folder, version):
        export_classifier(model, states[version], folder / "plain", tokenizer=BYTES)

    def read(folder):
        found = AutoModelForSequenceClassification.from_pretrained(folder / "plain")
        query = BYTES("moos", return_tensors="pt")
        with torch.no_grad():
            logits = [model(**query, task_state=state).logits for state in states]
            return next(v for v, x in enumerate(logits) if torch.allclose(found(**query).logits, x, atol=2e-4))

    return Writer(write, read)


def of_optimizers(folder: Path) -> Writer:
    model = make_model(signal="gradients", state_type="prompt", regime="parametric")
    model.save_pretrained(folder / "adapter")
    values = [torch.nn.Parameter(torch.full((2, 3), float(version))) for version in (0, 1)]
    optimizers = [LearnedOptimizer([p], folder / "adapter") for p in values]
    for p, optimizer in zip(values, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()

    def read(folder):
        start = LearnedOptimizer.from_pretrained(folder / "run", [values[0]]).state[values[0]]["start"]
        return int(start[0, 0])

    return Writer(lambda folder, version: optimizers[version].save_pretrained(folder / "run"), read)


def in_child(work, moment: float | None = None, call: int | None = None) -> int:
    """Run in a child; kill it after so many seconds, or at its n-th call that touches a file. The number of calls."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        count = [0]

        def hook(event, arguments):
            if event in TOUCHING:
                count[0] += 1
                if count[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os.write(writer, str(count[0]).encode())
            os._exit(0)
    os.close(writer)
    if moment is not None:
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with os.fdopen(reader) as pipe:
        return int(pipe.read() or 0)


def litter(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(f"{TEMPORARY}*")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["states", "exports", "classifiers", "optimizers"])
def test_a_killed_writer_leaves_one_whole_version(tmp_path, name):
    makers = {"states": of_states, "exports": of_exports, "classifiers": of_classifiers}
    writer = of_optimizers(tmp_path) if name == "optimizers" else makers[name]()
    folder, draw = tmp_path / "x", random.Random(0)
    folder.mkdir()
    writer.write(folder, 0)
    started = time.monotonic()
    calls = in_child(lambda: writer.write(folder, 1))
    seconds = time.monotonic() - started
    assert writer.version(folder) == 1 and calls > 3
    versions = []
    for number in range(KILLS):
        earlier, version = writer.version(folder), number % 2
        if number % 2 or number < KILLS // 2:
            in_child(lambda v=version: writer.write(folder, v), call=draw.randint(1, calls))
        else:
            in_child(lambda v=version: writer.write(folder, v), moment=draw.uniform(0, seconds))
        versions.append(writer.version(folder))
        assert versions[-1] in (earlier, version)
    assert {0, 1} == set(versions)
    writer.write(folder, 0)
    assert writer.version(folder) == 0 and not litter(folder)


@pytest.mark.slow
def test_a_killed_classify_reads_nothing_twice(tmp_path):
    model, draw = make_classifier(), random.Random(1)

    def run(folder):
        return classify(model, BYTES, ROWS, folder, chunk_size=6)

    expected = run(tmp_path / "expected")
    calls = in_child(lambda: run(tmp_path / "counted"))
    for number in range(KILLS):
        folder = tmp_path / str(number)
        for _ in range(draw.randint(1, 2)):
            in_child(lambda f=folder: run(f), call=draw.randint(1, calls))
        state = run(folder)
        assert state.step == expected.step and all(
            torch.equal(state.tensors[n], t) for n, t in expected.tensors.items()
        )
        assert AutoModelForSequenceClassification.from_pretrained(folder / "classifier").config.num_labels == 4
        assert not litter(folder)
