"""Where a figure comes from."""

import subprocess
from pathlib import Path

import torch


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


COMMIT = _commit()  # when the run begins: a long run outlives edits


def provenance() -> dict[str, str | None]:
    """The versions to write beside a measured figure; `commit` ends in + where tracked files differ from it."""
    return {"commit": COMMIT, "torch": torch.__version__}
