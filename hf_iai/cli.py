"""The `hf-iai` command: `demo`, `train`, `adapt`, `classify`, `export`."""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .config import IAIConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Task(StrEnum):
    """Of the demo."""

    code = "code"
    digits = "digits"


# The commands import what they need inside, so that `hf-iai --help` does not wait for torch.


@app.callback()
def main() -> None:
    """A pretrained model reads chunks, carries a task state, and gets better."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the plot, the trained adapter and the saved state.")] = Path(
        "demo_output"
    ),
    task: Annotated[Task, typer.Option(help="code: read a package; digits: read images of digits.")] = Task.code,
) -> None:
    """Train a small adapter, let the published one read a package, and measure what it gained; or read digits."""
    if task is Task.digits:
        from .commands.demo_digits import run
    else:
        from .commands.demo_code import run

    run(output)


@app.command()
def train(
    data: Annotated[Path, typer.Option(exists=True, help='Folder of text files, or JSON lines with "text".')],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of the base.")] = "hf_iai:embedded",
    num_state_tokens: Annotated[int, typer.Option(min=1, help="Size of the state, in tokens.")] = 16,
    num_kept_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="How many of them keep single tokens; 7 of 8 where a state can, if not given."),
    ] = None,
    state_type: Annotated[str, typer.Option(help="What the state is: prefix, prompt or lora.")] = "prefix",
    signal: Annotated[str, typer.Option(help="Learned from: observations, gradients or both.")] = "observations",
    head: Annotated[
        str | None,
        typer.Option(help="How gradients refine it: learned_optimizer (default), sgd, meta_sgd or path_aware."),
    ] = None,
    state_r: Annotated[int, typer.Option(min=1, help="Rank of a lora state.")] = 8,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens per chunk.")] = 128,
    max_chunks: Annotated[int, typer.Option(min=1, help="Most chunks read in a training step.")] = 4,
    max_steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Episodes per training step.")] = 8,
    seed: int = 0,
) -> None:
    """Train an adapter to read the documents in DATA."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import IAITrainer, IAITrainingArguments
    from .data import episodes_from_documents

    chosen = {"state_type": state_type, "signal": signal, "head": head, "state_r": state_r}
    config = _config(num_state_tokens, num_kept_tokens, **chosen)
    folder = _base_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments = IAITrainingArguments(
        output_dir=str(output),
        max_steps=max_steps,
        max_chunks=max_chunks,
        chunk_size=chunk_size,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        save_strategy="no",
        seed=seed,
    )
    trainer = IAITrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        peft_config=config,
        args=arguments,
        train_dataset=episodes_from_documents(
            _documents(data), tokenizer, chunk_size=chunk_size, num_chunks=max_chunks, seed=seed
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(output)
    trainer.create_model_card(dataset=data.name)
    typer.echo(f"adapter written to {output}")


@app.command()
def adapt(
    adapter: Annotated[str, typer.Option(help="Hub id or folder of a trained adapter.")],
    data: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="A text file, or JSON lines with one example each.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the task state.")],
    chunk_size: Annotated[int | None, typer.Option(min=1, help="Tokens per chunk; by default what fits.")] = None,
) -> None:
    """Let an adapter read DATA and save the task state."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from . import chunk_examples, chunk_text

    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    if model.active_peft_config.vector_width is not None:
        raise typer.BadParameter(
            "the adapter reads vectors, which DATA cannot hold: use model.adapt(chunk_vectors(...))"
        )
    tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)
    cut, source = (
        (chunk_examples, _json_lines(data)) if data.suffix == ".jsonl" else (chunk_text, data.read_text("utf-8"))
    )
    state = model.adapt(cut(source, tokenizer, chunk_size=chunk_size, model=model), show_progress=True)
    state.save_pretrained(output)
    typer.echo(f"read {int(state.num_tokens)} tokens in {int(state.step)} chunks; state written to {output}")


@app.command()
def classify(
    data: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Labelled texts: CSV, or JSON lines.")],
    output: Annotated[Path, typer.Option(help="Folder for the classifier and the state; read on if it is there.")],
    test: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Labelled texts to measure the accuracy on.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="Published adapter, Hub id or folder; its state is linear.")] = (
        "minilm-linear"
    ),
    encoder: Annotated[str | None, typer.Option(help="Hub id or folder of the encoder, if not the usual one.")] = None,
    text: Annotated[str, typer.Option(help="Name of the column that holds the texts.")] = "text",
    label: Annotated[str, typer.Option(help="Name of the column that holds the labels.")] = "label",
    chunk_size: Annotated[int, typer.Option(min=1, help="Examples per chunk.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the order in which the examples are read.")] = 0,
) -> None:
    """Make a classifier of the labelled texts in DATA: no training run; read more of them later."""
    from .commands.classify import classify as read
    from .commands.classify import load_reader, read_rows
    from .hub.published import published_adapter, published_names

    try:
        rows, asked = (None if path is None else read_rows(path, text, label) for path in (data, test))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    folder = published_adapter(adapter) if adapter in published_names() else adapter
    read(*load_reader(folder, encoder), rows, output, asked, chunk_size=chunk_size, seed=seed)
    typer.echo(f"classifier written to {output / 'classifier'}, state to {output / 'state'}")


@app.command()
def export(
    adapter: Annotated[str, typer.Option(help="Hub id or folder of the adapter that made the state.")],
    state: Annotated[str, typer.Option(help="Hub id or folder of the task state.")],
    output: Annotated[Path, typer.Option(help="Folder for the export.")],
    type: Annotated[
        str | None, typer.Option(help="PROMPT_TUNING, PREFIX_TUNING, CARTRIDGE or LORA; by default as the state is.")
    ] = None,
) -> None:
    """Write a task state as a plain PEFT adapter, which loads without hf_iai."""
    from peft import AutoPeftModelForCausalLM

    from . import TaskState, export_to_peft

    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    try:
        export_to_peft(model, TaskState.from_pretrained(state), output, peft_type=type)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"export written to {output}; its README.md says how to load it")


def _config(num_state_tokens: int, num_kept_tokens: int | None, **values) -> "IAIConfig":
    """What the options ask for; a combination that cannot work is a wrong option, not a crash."""
    from .config import IAIConfig

    if values["state_type"] in ("linear", "mlp"):
        kind = values["state_type"]
        raise typer.BadParameter(f"a state of type {kind!r} is not read from texts: train it with IAITrainer")
    if num_kept_tokens is None:
        keeps = (values["state_type"], values["signal"]) == ("prefix", "observations")
        num_kept_tokens = num_state_tokens * 7 // 8 if keeps else 0
    values |= {"num_state_tokens": num_state_tokens, "num_kept_tokens": num_kept_tokens}
    try:
        return IAIConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", **values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _base_folder(model: str) -> str:
    from .embedded import EMBEDDED_NAME, embedded_base

    return embedded_base() if model == EMBEDDED_NAME else model


def _documents(path: Path) -> Iterator[dict]:
    """`{"text", "path"}` of every text file in a folder, or of every line of a JSON-lines file."""
    if path.is_file():
        yield from ({"path": f"{path.name}:{number}", **row} for number, row in enumerate(_json_lines(path)))
        return
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            typer.echo(f"left out {file}: not UTF-8 text", err=True)
            continue
        yield {"text": text, "path": file.relative_to(path).as_posix()}


def _json_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())
