"""`hf-iai adapt`: an adapter reads a text, several texts or examples, and the task state is saved."""

import sys
from collections.abc import Iterator
from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data import chunk_examples, chunk_text
from ..data.chunks import Chunk
from ..data.tables import is_table, text_of
from ..state import TaskState
from .inputs import documents, examples, load_text_reader


def adapt(adapter: str, data: Path, output: Path, chunk_size: int | None = None) -> TaskState:
    """Let an adapter read `data`, and write the task state to `output`.

    Args:
        adapter: published name, Hub id or folder.
        data: a text file, a folder of text files, or a table with one example a row (CSV, JSON lines).
        output: folder for the task state.
        chunk_size: tokens per chunk. None: as many as the base can read.

    Raises:
        ValueError: if the adapter does not read texts, or there is no text in the data.
    """
    model = load_text_reader(adapter)
    tokenizer = AutoTokenizer.from_pretrained(model.active_peft_config.base_model_name_or_path)
    state = model.adapt(chunks_of(data, tokenizer, chunk_size, model), show_progress=sys.stderr.isatty())
    state.save_pretrained(output)
    return state


def chunks_of(
    data: Path, tokenizer: PreTrainedTokenizerBase, chunk_size: int | None, model: PeftModel
) -> Iterator[Chunk]:
    """Chunks of one text, or of examples. A file of a folder is an example and ends with the end-of-sequence token."""
    if data.is_dir():
        texts = ({"text": document["text"]} for document in documents(data))
        return chunk_examples(texts, tokenizer, chunk_size=chunk_size, model=model)
    if is_table(data):
        return chunk_examples(examples(data), tokenizer, chunk_size=chunk_size, model=model)
    return chunk_text(text_of(data), tokenizer, chunk_size=chunk_size, model=model)
