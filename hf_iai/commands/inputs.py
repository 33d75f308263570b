"""Loads what the options of the commands name: adapters, documents, examples."""

import json
from collections.abc import Iterator
from pathlib import Path

import typer
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel

from ..bases.vector_base import width_in_name
from ..hub.published import published_adapter, published_names


def adapter_folder(adapter: str) -> str:
    """The folder of a published adapter. Any other folder or Hub id is returned as it is.

    Raises:
        ValueError: if the name is neither published nor a folder nor a Hub id; the message lists the published names.

    Example:
        >>> from hf_iai.commands.inputs import adapter_folder
        >>> adapter_folder("me/my-adapter")
        'me/my-adapter'
    """
    if adapter in published_names():
        return published_adapter(adapter)
    if "/" not in adapter and not Path(adapter).is_dir():
        raise ValueError(
            f"{adapter!r} is no folder, no Hub id and no published adapter; published: {published_names()}"
        )
    return adapter


def load_text_reader(adapter: str) -> PeftModel:
    """Load an adapter that reads text, on its base.

    Args:
        adapter: published name, Hub id or folder.

    Raises:
        ValueError: if it is an adapter of another method, or it reads vectors or labelled texts.
    """
    folder = adapter_folder(adapter)
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != "IAI":
        method = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{adapter} is an adapter of the method {method}, not IAI: train one with `hf-iai train`")
    if config.vector_width is not None or width_in_name(config.base_model_name_or_path):
        raise ValueError(f"{adapter} reads vectors, which no file holds here: use model.adapt(chunk_vectors(...))")
    if config.task_type != "CAUSAL_LM":
        raise ValueError(f"{adapter} reads labelled texts, and makes a classifier of them: use `hf-iai classify`")
    return AutoPeftModelForCausalLM.from_pretrained(folder)


def documents(path: Path) -> Iterator[dict]:
    """Yield `{"text", "path"}` for every text file in a folder, or for every line of a JSON-lines file."""
    if path.is_file():
        yield from ({"path": f"{path.name}:{number}", **row} for number, row in enumerate(json_lines(path)))
        return
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            typer.echo(f"left out {file}: not UTF-8 text", err=True)
            continue
        yield {"text": text, "path": file.relative_to(path).as_posix()}


def json_lines(path: Path) -> Iterator[dict]:
    """Yield the object of every line that is not empty.

    Raises:
        ValueError: if a line is not a JSON object.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_object(line, f"line {number} of {path}")


def text_of(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: if the file is not UTF-8 text.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: convert it first") from error


def _json_object(line: str, place: str) -> dict:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON ({error}): write one object per line") from error
    if not isinstance(found, dict):
        raise ValueError(f'{place} holds a {type(found).__name__}, not an object such as {{"text": ...}}')
    return found
