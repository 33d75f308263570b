"""`hf-iai export`: writes a task state as a plain PEFT adapter."""

from pathlib import Path

from ..export.peft import export_to_peft
from ..state import TaskState
from .inputs import load_text_reader


def export(adapter: str, state: str, output: Path, peft_type: str | None = None) -> None:
    """Write a task state as a plain PEFT adapter.

    Args:
        adapter: published name, Hub id or folder of the adapter that made the state.
        state: Hub id or folder of the state.
        output: folder for the export.
        peft_type: see `export_to_peft`. None: the default for the state type.

    Raises:
        ValueError: if the state belongs to another adapter, or cannot become this type.
    """
    export_to_peft(load_text_reader(adapter), TaskState.from_pretrained(state), output, peft_type=peft_type)
