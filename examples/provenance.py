"""Where a figure comes from."""

import subprocess
from pathlib import Path

import torch


def provenance() -> dict[str, str | None]:
    """The versions to write beside a measured figure; `commit` ends in + where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    found = subprocess.run(git, capture_output=True, text=True)
    return {"commit": found.stdout.strip() or None, "torch": torch.__version__}
