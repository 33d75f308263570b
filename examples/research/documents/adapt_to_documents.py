"""Train a base to read documents chunk by chunk, and measure the curve on a document that training has not seen.

    python -m examples.research.documents.adapt_to_documents --model BASE --data FOLDER_OF_TXT --held-out NAME.txt

Trains an explicit prefix adapter on all documents except the held-out one. For comparison it trains a static state: an
adapter of the same size that reads nothing. Then it writes the curve as a table, PNG and JSON. This takes a few minutes
for a small base on 2 cores. `--held-out all` holds out each document in turn and joins the curves. A single file is
treated as five documents, its consecutive fifths.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from examples.research.common.hardware import has_fast_bfloat16
from examples.research.common.provenance import provenance
from examples.research.common.training import train_adapter
from hf_iai import IAIConfig, episodes_from_documents
from hf_iai.evaluation import Curve, evaluate_curve


def train_reader(
    base: str,
    tokenizer,
    episodes: Dataset,
    output: Path,
    *,
    chunk_size: int,
    max_chunks: int,
    slots: int,
    kept: int,
    steps: int,
    batch_size: int = 8,
    lr: float = 3e-3,
    state_lr: float | None = None,
    kl_weight: float = 0.0,
    seed: int = 0,
) -> PeftModel:
    """Train and save one adapter, continuing from a checkpoint if there is one; `max_chunks=0`: a static state."""
    set_seed(seed)
    config = IAIConfig(
        task_type="CAUSAL_LM",
        num_state_tokens=slots,
        num_kept_tokens=kept,
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    return train_adapter(
        model,
        episodes,
        tokenizer,
        output,
        steps=steps,
        seed=seed,
        chunk_size=chunk_size,
        max_chunks=max_chunks,
        kl_weight=kl_weight,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        state_learning_rate=state_lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 10),
        bf16=has_fast_bfloat16(),
    )


def report(curve: Curve, output: Path, **recipe) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for from_token in (0, 32):
        print(f"\nquery tokens from {from_token} on, nats per token")
        curve.print(from_token=from_token)
        curve.plot(output / f"curve_from_{from_token}.png", from_token=from_token)
    steps = {f"steps_from_token_{k}": curve.steps(from_token=k) for k in (0, 32)}
    for step in (step for found in steps.values() for step in found):
        print(step)
    curve.to_json(output / "curve.json", recipe=recipe, **steps, **provenance())


def documents_of(path: Path, parts: int = 5) -> dict[str, str]:
    """Name -> text of every .txt file of a folder, or of the consecutive fifths of one file."""
    if path.is_dir():
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(path.glob("*.txt"))}
    text = path.read_text(encoding="utf-8")
    size = -(-len(text) // parts)
    return {f"{path.stem}-{i}": text[i * size : (i + 1) * size] for i in range(parts)}


def side_by_side(curves: list[Curve], groups: np.ndarray) -> Curve:
    """Join curves of different episodes; only what all of them measured is kept. `groups` are those of all episodes."""
    keys = set.intersection(*(set(curve.losses) for curve in curves))
    return Curve({key: np.concatenate([curve.losses[key] for curve in curves]) for key in sorted(keys)}, groups)


def main(
    model: Annotated[str, typer.Option(help="Hub id or folder of the base.")],
    data: Annotated[Path, typer.Option(help="Folder of .txt files, or one file.")],
    held_out: Annotated[
        str | None, typer.Option(help="The document to evaluate on, or all in turn; the last by name if not given.")
    ] = None,
    output: Path = Path("work/documents"),
    chunk_size: int = 64,
    max_chunks: int = 8,
    slots: int = 32,
    kept: int | None = None,  # 7 of 8 slots
    steps: int = 400,
    lr: float = 3e-3,
    seed: int = 0,
    num_eval: int = 200,
) -> None:
    texts = documents_of(data)
    held_out = held_out or max(texts, default=None)
    if held_out not in (*texts, "all"):
        raise typer.BadParameter(f"--held-out {held_out!r} is not in {data}: it holds {sorted(texts)}")
    recipe = {"chunk_size": chunk_size, "slots": slots, "steps": steps, "lr": lr, "seed": seed}
    recipe["kept"] = slots * 7 // 8 if kept is None else kept
    folds = list(texts) if held_out == "all" else [held_out]
    curves = {}
    for name in folds:
        folder = output / name if len(folds) > 1 else output
        curves[name] = curve_of(model, texts, name, folder, max_chunks=max_chunks, num_eval=num_eval, **recipe)
        report(curves[name], folder, model=Path(model).name, **recipe, held_out=name, windows=len(curves[name].groups))
    if len(folds) > 1:
        # The documents are the clusters of the intervals.
        of_document = np.repeat(folds, [len(curve.groups) for curve in curves.values()])
        curve = side_by_side(list(curves.values()), of_document)
        report(curve, output, model=Path(model).name, **recipe, held_out=held_out, windows=len(curve.groups))


def curve_of(
    model: str, texts: dict[str, str], held_out: str, output: Path, *, max_chunks: int, num_eval: int, **recipe
) -> Curve:
    """Train a reader and a static state on all texts but one; their losses on windows of that one."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chunk_size, seed = recipe["chunk_size"], recipe["seed"]
    build = lambda names, n: episodes_from_documents(  # noqa: E731
        ({"text": texts[name], "path": name} for name in names),
        tokenizer,
        chunk_size=chunk_size,
        num_chunks=n,
        seed=seed,
    )
    train = build([name for name in texts if name != held_out], max_chunks).shuffle(seed)
    counts = [n for n in (0, 1, 2, 4, 8, 16) if n <= 2 * max_chunks]
    test = build([held_out], counts[-1])
    # One book is one document: its windows, hundreds of tokens apart, are the clusters of the intervals.
    test = test.remove_columns("group").add_column("group", [str(i) for i in range(len(test))])
    test = test.shuffle(seed).select(range(min(num_eval, len(test))))
    reader, static = (
        train_reader(model, tokenizer, train, output / f"chunks-{n}", max_chunks=n, **recipe) for n in (max_chunks, 0)
    )
    return evaluate_curve(
        reader, test, counts, tokenizer=tokenizer, chunk_size=chunk_size, seed=seed, static_model=static
    )


if __name__ == "__main__":
    typer.run(main)
