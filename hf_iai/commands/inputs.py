"""Loads what the options of the commands name: adapters, documents, examples."""

from collections.abc import Iterator
from pathlib import Path

import typer
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..bases.vector_base import width_in_name
from ..data.examples import format_of
from ..data.tables import is_table, table_rows, text_of
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


def loaded_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base.

    Raises:
        ValueError: if there is none in the folder or on the Hub; the message names the base.
    """
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"{base!r} is no folder or Hub id of a model with a tokenizer: {error}") from error


def documents(path: Path) -> Iterator[dict]:
    """Yield `{"text", "path"}` for every text file in a folder, every row of a table, or a single text file.

    Raises:
        ValueError: if a row has no text, or a single file is not UTF-8 text.
    """
    if is_table(path) and path.is_file():
        yield from (_document(place, row, path) for place, row in table_rows(path))
    elif path.is_file():
        yield {"text": text_of(path), "path": path.name}
    else:
        yield from _documents_in(path)


def _document(place: str, row: dict, path: Path) -> dict:
    if not isinstance(row.get("text"), str):
        raise ValueError(f"{place}: 'text' is {row.get('text')!r:.80}, expected a text; its columns are {sorted(row)}")
    return {"path": f"{path.name}:{place.split()[1]}", **row}


def _documents_in(folder: Path) -> Iterator[dict]:
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            text = file.read_text("utf-8-sig")
        except UnicodeDecodeError:
            typer.echo(f"left out {file}: not UTF-8 text", err=True)
            continue
        yield {"text": text, "path": file.relative_to(folder).as_posix()}


def examples(path: Path) -> Iterator[dict]:
    """Yield every row of a table as an example, in one of the formats of `tokenize_example`.

    Raises:
        ValueError: if a row has none of the formats; the message names it.
    """
    for place, row in table_rows(path):
        try:
            format_of(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        yield row
