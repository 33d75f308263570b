"""The embedded base model, a small pretrained language model, and the text it was trained on."""

import os
from pathlib import Path

from .generated_tasks import generate_task_text
from .library_code import HELD_OUT, library_documents

EMBEDDED_NAME = "hf_iai:embedded"


def embedded_base() -> str:
    """The folder of the embedded base model and its tokenizer.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from hf_iai import embedded_base
        >>> len(AutoTokenizer.from_pretrained(embedded_base()))
        1024
    """
    return str(Path(__file__).parent / "base")


def is_embedded_base(path: str | None) -> bool:
    """Whether a path leads to the embedded base."""
    return bool(path) and os.path.realpath(path) == os.path.realpath(embedded_base())


__all__ = [
    "EMBEDDED_NAME",
    "HELD_OUT",
    "embedded_base",
    "generate_task_text",
    "is_embedded_base",
    "library_documents",
]
