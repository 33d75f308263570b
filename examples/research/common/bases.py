"""The bases that examples and research scripts read with, and the option that names one."""

from pathlib import Path
from typing import Annotated

import typer

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_FOLDER = Path(".bases/SmolLM2-135M-Instruct")  # `make smollm2` writes it
BaseOption = Annotated[str, typer.Option(help="Hub id or folder of the base; `make smollm2` makes a folder.")]
