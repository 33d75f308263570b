"""Result files that are written whole or not at all."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SEED = re.compile(r"_seed\d+$")  # at the end of a method's name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; without an error it is renamed to `path` at the end. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(found: dict | list, path: Path, indent: int | None = 1) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=indent) + "\n")


def seeds_of_methods(folder: Path) -> dict[str, list[Path]]:
    """Method -> its file METHOD.json, or METHOD_seed0.json, METHOD_seed1.json, ..."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.json")):
        found.setdefault(SEED.sub("", path.stem), []).append(path)
    for name, paths in found.items():
        if len(paths) > 1 and folder / f"{name}.json" in paths:
            raise ValueError(f"{folder} has {name}.json and {paths[-1].name}: rename or remove one of them")
    return found
