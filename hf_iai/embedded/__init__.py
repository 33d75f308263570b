"""The embedded base model, a small pretrained language model, and the text it was trained on."""

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


__all__ = ["EMBEDDED_NAME", "HELD_OUT", "embedded_base", "generate_task_text", "library_documents"]
