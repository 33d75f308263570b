"""Texts to read: windows of single files, and streams of the files of one package. Nothing was tuned on the packages.

Axes: n chunks of C tokens.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sklearn
from transformers import PreTrainedTokenizerBase

from hf_iai.embedded import library_documents
from hf_iai.embedded.library_code import HELD_OUT, MAX_BYTES, MIN_BYTES

SITE = Path(sklearn.__file__).parent.parent
INSTALLED = ("sklearn", "scipy", "matplotlib")  # in neither split of `library_documents`
NOT_THEIRS = {"tests", "externals", "_lib", "_external"}  # tests, and what the packages vendor
VALIDATION = ("pandas", "datasets", "peft", "fsspec", "sympy", "anyio", "typer", "pygments")


@dataclass(frozen=True)
class Text:
    """Token ids of n * C tokens, and the package or book that they are from."""

    ids: list[int]
    group: str


def packages(validation: bool) -> dict[str, list[str]]:
    """Name -> the source files of each package; large ones are cut into parts of other files, for more streams."""
    if validation:
        return {name: _texts(library_documents("train", packages=[name])) for name in VALIDATION}
    held_out = {name: _texts(library_documents("held_out", packages=[name])) for name in HELD_OUT}
    return held_out | {name: _texts(_files(name)) for name in INSTALLED}


def books(folder: Path) -> dict[str, list[str]]:
    """Name -> the text of each book in a folder of text files."""
    return {path.stem: [path.read_text(encoding="utf-8")] for path in sorted(folder.rglob("*.txt"))}


def windows(
    sources: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, size: int, num: int, seed: int = 0
) -> list[Text]:
    """Windows of `size` tokens, from one file each, of each source in turn."""
    drawn = [_windows_of(name, files, tokenizer, size, seed) for name, files in sorted(sources.items())]
    return _in_turn(drawn, num)


def streams(
    sources: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, size: int, num: int, seed: int = 0
) -> list[Text]:
    """Streams of `size` tokens: the files of a source one after the other, of each source in turn."""
    drawn = [_streams_of(name, files, tokenizer, size, seed) for name, files in sorted(sources.items())]
    return _in_turn(drawn, num)


def _windows_of(name: str, files: list[str], tokenizer, size: int, seed: int) -> Iterator[Text]:
    draw = random.Random(f"{name}{seed}")
    for text in draw.sample(files, len(files)):
        ids = tokenizer(text, verbose=False)["input_ids"]
        books = max(1, len(ids) // (10 * size))  # a book has several windows, a source file one
        for _ in range(books if len(ids) >= size else 0):
            start = draw.randrange(len(ids) - size + 1)
            yield Text(ids[start : start + size], name)


def _streams_of(name: str, files: list[str], tokenizer, size: int, seed: int) -> Iterator[Text]:
    ids: list[int] = []
    for text in random.Random(f"{name}{seed}").sample(files, len(files)):
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= size:
            yield Text(ids[:size], name)
            ids = []


def _in_turn(drawn: list[Iterator[Text]], num: int) -> list[Text]:
    found: list[Text] = []
    while drawn and len(found) < num:
        for texts in list(drawn):
            if (text := next(texts, None)) is None:
                drawn.remove(texts)
            else:
                found.append(text)
    return found[:num]


def _texts(documents) -> list[str]:
    return [document["text"] for document in documents]


def _files(package: str) -> Iterator[dict]:
    for path in sorted((SITE / package).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not NOT_THEIRS.intersection(path.relative_to(SITE).parts) and MIN_BYTES <= len(text) <= MAX_BYTES:
            yield {"text": text}
