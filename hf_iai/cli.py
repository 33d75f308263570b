"""The command `hf-iai`: `demo`, `train`, `adapt`, `classify`, `export`. What they do is in `hf_iai.commands`.

The console script loads this file without the package around it (see `launcher/`), so that `--help` is fast. Hence it
imports typer and the standard library alone; each command imports what it needs, by its full name.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

# Their notices speak to programmers: a deprecated name inside PEFT, a kernel that bitsandbytes lacks, or a classifier
# that is "newly initialized", although nothing reads it.
OTHERS = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "transformers")


class Task(StrEnum):
    """What the demo reads."""

    code = "code"
    digits = "digits"


@contextmanager
def session() -> Iterator[None]:
    """Run a command quietly; a value or file that cannot work is one line and exit code 2, not a traceback."""
    try:
        with quiet():
            yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what other packages have to say, from their import on: warnings, logs below errors, loading bars."""
    with ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        stack.enter_context(warnings.catch_warnings())
        for package in OTHERS:
            warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

        if is_progress_bar_enabled():
            stack.callback(enable_progress_bar)
            disable_progress_bar()  # hides the bars of downloads too, which are useful and only shown on a terminal
            enable_progress_bars()
        yield


def given(**options) -> dict:
    """The options that the user gave; the others keep the defaults of the code."""
    return {name: value for name, value in options.items() if value is not None}


@app.callback()
def main() -> None:
    """A pretrained model reads chunks, carries a task state, and gets better."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the plot, the trained adapter and the saved state.")] = Path(
        "demo_output"
    ),
    task: Annotated[Task, typer.Option(help="code: read a package; digits: read images of digits.")] = Task.code,
    base: Annotated[
        str | None, typer.Option(help="Hub id or folder of the base that reads the package.", show_default="embedded")
    ] = None,
) -> None:
    """Give a base a memory, let it read a package, measure what it gained, and train an adapter; or read digits."""
    with session():
        if task is Task.digits:
            if base is not None:
                raise ValueError(f"--task digits trains a base of its own, got --base {base}: leave it out")
            from hf_iai.commands.demo_digits import run
        else:
            from hf_iai.commands.demo_code import run

        run(output, **given(base=base))


# Options without a value are not passed on. The defaults in the help are those of IAIConfig and IAITrainingArguments;
# tests/test_cli.py compares them.
@app.command()
def train(
    data: Annotated[
        Path, typer.Option(exists=True, help='A folder of text files, one file, or a table (CSV, JSON) with "text".')
    ],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of the base.")] = "hf_iai:embedded",
    state_type: Annotated[
        str | None, typer.Option(help="What the state is: prefix, prefix+lora, prompt or lora.", show_default="prefix")
    ] = None,
    num_state_tokens: Annotated[
        int | None, typer.Option(min=1, help="Size of the state, in tokens.", show_default="16")
    ] = None,
    num_kept_tokens: Annotated[
        int | None, typer.Option(min=0, help="How many of them keep single tokens (prefix only).", show_default="0")
    ] = None,
    state_r: Annotated[int | None, typer.Option(min=1, help="Rank of a lora state.", show_default="8")] = None,
    signal: Annotated[
        str | None,
        typer.Option(help="What is learned from: observations, gradients or both.", show_default="observations"),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="How gradients refine the state: learned_optimizer, sgd, meta_sgd or path_aware.",
            show_default="learned_optimizer",
        ),
    ] = None,
    r: Annotated[int | None, typer.Option("--r", min=1, help="Rank of the adapter's LoRA.", show_default="8")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="Modules with LoRA: names with commas between them, or all-linear.",
            show_default="PEFT's choice for the base",
        ),
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens per chunk.", show_default="what the base can read at once")
    ] = None,
    max_chunks: Annotated[
        int | None, typer.Option(min=1, help="Most chunks read in a training step.", show_default="8")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps.", show_default="as many as the epochs have")
    ] = None,
    num_train_epochs: Annotated[
        float | None, typer.Option(min=0, help="Passes over the data.", show_default="3.0")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="0.001")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Episodes per training step and device.", show_default="8")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the training.", show_default="42")] = None,
) -> None:
    """Train an adapter to read the documents in DATA."""
    config = given(
        state_type=state_type,
        num_state_tokens=num_state_tokens,
        num_kept_tokens=num_kept_tokens,
        state_r=state_r,
        signal=signal,
        head=head,
        r=r,
        target_modules=target_modules,
    )
    arguments = given(
        chunk_size=chunk_size,
        max_chunks=max_chunks,
        max_steps=max_steps,
        num_train_epochs=num_train_epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        seed=seed,
    )
    with session():
        from hf_iai.commands.train import train

        train(data, output, model, config, arguments)
    typer.echo(f"adapter written to {output}")
    typer.echo(f"next: hf-iai adapt --adapter {output} --data FILE --output STATE")


@app.command()
def adapt(
    adapter: Annotated[str, typer.Option(help="Published name, Hub id or folder of a trained adapter.")],
    data: Annotated[
        Path,
        typer.Option(exists=True, help="A text file, a folder of them, or a table (CSV, JSON), an example a row."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the task state.")],
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens per chunk.", show_default="what the base can read at once")
    ] = None,
) -> None:
    """Let an adapter read DATA and save the task state."""
    with session():
        from hf_iai.commands.adapt import adapt

        state = adapt(adapter, data, output, chunk_size)
    typer.echo(f"read {int(state.num_tokens)} tokens in {int(state.step)} chunks; state written to {output}")
    typer.echo(f"next: hf-iai export --adapter {adapter} --state {output} --output FOLDER")


@app.command()
def classify(
    data: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Labelled texts: CSV, TSV or JSON.")],
    output: Annotated[Path, typer.Option(help="Folder for the classifier and the state; read on if it is there.")],
    test: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Labelled texts to measure the accuracy on.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="Published name, Hub id or folder; its state is linear.")] = (
        "minilm-linear"
    ),
    encoder: Annotated[str | None, typer.Option(help="Hub id or folder of the encoder, if not the usual one.")] = None,
    text: Annotated[str, typer.Option(help="Name of the column that holds the texts.")] = "text",
    label: Annotated[str, typer.Option(help="Name of the column that holds the labels.")] = "label",
    chunk_size: Annotated[int, typer.Option(min=1, help="Examples per chunk.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the order in which the examples are read.")] = 0,
) -> None:
    """Make a classifier of the labelled texts in DATA: no training run; read more of them later."""
    with session():
        from hf_iai.commands.classify import classify_files

        classify_files(data, output, test, adapter, encoder, text=text, label=label, chunk_size=chunk_size, seed=seed)
    typer.echo(f"classifier written to {output / 'classifier'}, state to {output / 'state'}")


@app.command()
def export(
    adapter: Annotated[str, typer.Option(help="Published name, Hub id or folder of the adapter that made the state.")],
    state: Annotated[str, typer.Option(help="Hub id or folder of the task state.")],
    output: Annotated[Path, typer.Option(help="Folder for the export.")],
    type: Annotated[
        str | None,
        typer.Option(
            help="PROMPT_TUNING, PREFIX_TUNING, CARTRIDGE or LORA.", show_default="the one that fits the state"
        ),
    ] = None,
) -> None:
    """Write a task state as a plain PEFT adapter, which loads without hf_iai."""
    with session():
        from hf_iai.commands.export import export

        export(adapter, state, output, type)
    typer.echo(f"export written to {output}; its README.md says how to load it")


if __name__ == "__main__":
    app()
