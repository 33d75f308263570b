"""Tasks of examples/refine_functions.py: string functions `w o r d -> q`, a letter of the word under a cipher.

A function is a place in the word and a cipher, a map from the 26 letters onto the small or the capital ones. Each task
draws its own of 2 * 26!, so that none is met twice; `REAL`, the functions that files of the data folder have, are never
drawn. Words of one letter are associative recall: the letter is the key. Words are spelled, since the base's tokens are
pieces of words and what letters these have is not known to it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH = 4  # letters of a word, or 1 for associative recall
CHUNK = 28  # tokens: 4 lines of 4 letters, or 7 of one, each with arrow, answer and the end of the line


class LetterFunction(NamedTuple):
    """word -> the cipher of its letter at `place`."""

    place: int
    cipher: str  # what each of LETTERS becomes

    def __call__(self, word: str) -> str:
        return self.cipher[LETTERS.index(word[self.place])]


REAL = {
    "capitalize_first_letter": LetterFunction(0, LETTERS.upper()),
    "capitalize_second_letter": LetterFunction(1, LETTERS.upper()),
    "capitalize_last_letter": LetterFunction(LENGTH - 1, LETTERS.upper()),
    "next_capital_letter": LetterFunction(0, (LETTERS[1:] + "a").upper()),
}


def draw_function(rng: np.random.Generator, length: int) -> LetterFunction:
    cipher = "".join(rng.permutation(list(LETTERS)))
    function = LetterFunction(int(rng.integers(length)), cipher if rng.random() < 0.5 else cipher.upper())
    return draw_function(rng, length) if function in REAL.values() else function


def lines_of(length: int) -> int:
    """Examples in a chunk, of words of so many letters."""
    return CHUNK // (length + 3)


def tokens_of(word: str, letter: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """` w o r d -> q` and the end of the line, with a label on the answer alone."""
    parts = ("".join(f" {c}" for c in word) + " ->", f" {letter}", "\n")
    prompt, answer, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in parts)
    return {"input_ids": prompt + answer + end, "labels": [-100] * len(prompt) + answer + [-100] * len(end)}


def episode(
    pairs: list[tuple[str, str]], function: LetterFunction, num_asked: int, tokenizer: PreTrainedTokenizerBase
) -> dict:
    """The first `num_asked` pairs are asked, the others are read.

    `known_after` says of each query after how many chunks its letter has been seen at the place that matters.
    """
    lines, length = [tokens_of(word, letter, tokenizer) for word, letter in pairs], len(pairs[0][0])
    if any(len(line["input_ids"]) != length + 3 for line in lines):
        raise ValueError(f"{pairs[0]} and the others need a tokenizer with a token for each letter")
    read = [word[function.place] for word, _ in pairs[num_asked:]]
    keys = [word[function.place] for word, _ in pairs[:num_asked]]
    return {
        "support": lines[num_asked:],
        "query": [{key: ids[:-1] for key, ids in line.items()} for line in lines[:num_asked]],  # ends with the answer
        "known_after": [read.index(key) // lines_of(length) + 1 if key in read else None for key in keys],
    }


def drawn_episodes(
    lengths: tuple[int, ...],
    num_letters: tuple[int, ...],
    num: int,
    num_chunks: int,
    num_asked: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Iterator[dict]:
    """`num` tasks of random words, each with its own function, a length of words and a part of the alphabet."""
    for i in range(num):
        rng = np.random.default_rng((seed, i))
        length, of_letters = int(rng.choice(lengths)), int(rng.choice(num_letters))
        function = draw_function(rng, length)
        letters = rng.permutation(list(LETTERS))[:of_letters]
        words = rng.choice(letters, size=(num_asked + lines_of(length) * num_chunks, length))
        yield episode([("".join(word), function(word)) for word in words], function, num_asked, tokenizer)


def real_episodes(
    folder: Path, each: int, num_chunks: int, num_asked: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[dict]:
    """`each` tasks of every file of `REAL`, with its own words of four letters and answers."""
    for name, function in REAL.items():
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        pairs = {row["input"].lower(): row["output"] for row in rows if len(row["input"]) == LENGTH}
        pairs = [(word, letter) for word, letter in pairs.items() if word.isascii() and word.isalpha()]
        for i in range(each):
            chosen = np.random.default_rng((seed, i)).permutation(len(pairs))
            chosen = chosen[: num_asked + lines_of(LENGTH) * num_chunks]
            yield episode([pairs[j] for j in chosen], function, num_asked, tokenizer)
