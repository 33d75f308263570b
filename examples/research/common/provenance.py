"""Where a figure comes from: the command, its settings, the commit and the version of torch."""

import subprocess
from pathlib import Path

import torch


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


COMMIT = _commit()  # when the run begins: files may be edited during a long run


def provenance() -> dict[str, str | None]:
    """The versions to write beside a measured figure; `commit` ends in + if tracked files differ from it."""
    return {"commit": COMMIT, "torch": torch.__version__}


def recipe(command: str, **settings) -> dict:
    """What a result file says about its own making.

    Args:
        command: after `python -m examples.`, with its options.
        settings: whatever else decides the figures.
    """
    return {"command": f"python -m examples.{command}", **settings, **provenance()}
