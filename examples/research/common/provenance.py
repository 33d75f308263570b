"""Where a figure comes from: the command, its settings, the commit and the version of torch."""

import json
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


def earlier(path: Path, **settings) -> dict:
    """What a run that was stopped has written to `path`, or nothing, if it was made with the same settings.

    Raises:
        ValueError: if it was made with others.
    """
    found = json.loads(path.read_text()) if path.exists() else {}
    made = found.get("recipe", {})
    for name, value in settings.items():
        if made.get(name, value) != value:
            raise ValueError(
                f"{path} was made with {name}={made[name]!r}, not {value!r}: give another folder as --work"
            )
    return found
