"""Python source code as a corpus, split by package into training and held-out text.

The corpus is the standard library and the installed dependencies, which every user of this package already has. Nothing
is shipped or downloaded. Packages that contain copies of others (pip, setuptools, multiprocess) are in neither split.
"""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_STDLIB = (
    "asyncio concurrent ctypes curses email html http importlib json logging multiprocessing sqlite3 tkinter "
    "unittest urllib wsgiref xml xmlrpc zoneinfo"
).split()
HELD_OUT_DEPENDENCIES = ["jinja2", "networkx", "rich"]
HELD_OUT = HELD_OUT_STDLIB + HELD_OUT_DEPENDENCIES

TRAIN_DEPENDENCIES = (
    "torch transformers datasets peft accelerate pandas numpy huggingface_hub tokenizers safetensors pyarrow sympy "
    "fsspec dill filelock tqdm click typer markdown_it pygments yaml packaging psutil regex mpmath xxhash "
    "anyio httpx2 dateutil narwhals pydantic"
).split()
_NEITHER = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "encodings", "__pycache__"}

MIN_BYTES, MAX_BYTES = 2_000, 200_000  # shorter files have too little context, longer ones are mostly tables
MAX_PACKAGE_BYTES = 3_000_000  # transformers alone would otherwise be a third of the corpus


def library_documents(split: str, *, packages: list[str] | None = None, seed: int = 0) -> Iterator[dict]:
    """Read source files as documents `{"text", "package", "path"}`. Their order depends only on `seed`.

    Args:
        split: `"train"` or `"held_out"`; no package is in both.
        packages: only these top-level packages; by default all of the split.
        seed: decides the order of files, and which files are taken of a package larger than `MAX_PACKAGE_BYTES`.

    Raises:
        ValueError: if the split is unknown, or does not contain one of the packages.

    Example:
        >>> from hf_iai.embedded import library_documents
        >>> next(library_documents("held_out", packages=["json"]))["package"]
        'json'
    """
    folders = _package_folders(split)
    unknown = set(packages or ()) - set(folders)
    if unknown:
        raise ValueError(f"packages {sorted(unknown)} are not in split {split!r}; it holds {sorted(folders)}")
    for package in sorted(packages or folders):
        yield from _package_documents(package, folders[package], seed)


def _package_folders(split: str) -> dict[str, Path]:
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    stdlib, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    folders = {path.parent.name: path.parent for path in stdlib.glob("*/__init__.py")}
    folders = {name: path for name, path in folders.items() if name not in _NEITHER}
    if split == "train":
        folders = {name: path for name, path in folders.items() if name not in HELD_OUT}
        folders["(modules)"] = stdlib
    else:
        folders = {name: path for name, path in folders.items() if name in HELD_OUT}
    dependencies = TRAIN_DEPENDENCIES if split == "train" else HELD_OUT_DEPENDENCIES
    return folders | {name: site / name for name in dependencies if (site / name).is_dir()}


def _package_documents(package: str, folder: Path, seed: int) -> Iterator[dict]:
    paths = sorted(folder.glob("*.py" if package == "(modules)" else "**/*.py"))
    paths = [p for p in paths if not _NEITHER.intersection(p.relative_to(folder).parts)]
    random.Random(f"{package}{seed}").shuffle(paths)
    total = 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if not MIN_BYTES <= len(text) <= MAX_BYTES:
            continue
        total += len(text)
        if total > MAX_PACKAGE_BYTES:
            return
        yield {"text": text, "package": package, "path": path.relative_to(folder.parent).as_posix()}
