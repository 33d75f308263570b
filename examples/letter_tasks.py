"""Tasks of examples/refine_functions.py: string functions `w o r d s -> w`, most for training, the rest for tests.

A function is which letter of five, itself or its neighbours in the alphabet, small or capital: 30. The four that the
files of the data folder have (`REAL`), and every fourth of the others, are never trained on. Words are spelled, since
the base's tokens are pieces of words and what letters they have is not known to it.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH, LINES = 5, 4  # letters of a word, examples in a chunk
CHUNK = LINES * (LENGTH + 3)  # tokens: letters, arrow, answer and the end of the line


class Letter(NamedTuple):
    """One function: word -> a letter."""

    place: int
    shift: int = 0  # letters on in the alphabet, a behind z
    upper: bool = False

    def __call__(self, word: str) -> str:
        letter = LETTERS[(LETTERS.index(word[self.place]) + self.shift) % 26]
        return letter.upper() if self.upper else letter


REAL = {
    "capitalize_first_letter": Letter(0, upper=True),
    "capitalize_second_letter": Letter(1, upper=True),
    "capitalize_last_letter": Letter(LENGTH - 1, upper=True),
    "next_capital_letter": Letter(0, shift=1, upper=True),
}
ALL = [Letter(*choice) for choice in product(range(LENGTH), (0, 1, -1), (False, True))]
_OTHERS = [function for function in ALL if function not in REAL.values()]
# Tuples: datasets takes a list that a generator is given for shards, and would read one function after the other.
HELD_OUT = (*REAL.values(), *(_OTHERS[i] for i in np.random.default_rng(0).permutation(len(_OTHERS))[::4]))
TRAINED = tuple(function for function in ALL if function not in HELD_OUT)


def made_up_words(rng: np.random.Generator, num: int) -> list[str]:
    """`num` different words of random letters."""
    words: dict[str, None] = {}
    while len(words) < num:
        words["".join(rng.choice(list(LETTERS), size=LENGTH))] = None
    return list(words)


def tokens_of(word: str, letter: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """` w o r d s -> x` and the end of the line, with a label on the answer alone."""
    parts = ("".join(f" {c}" for c in word) + " ->", f" {letter}", "\n")
    prompt, answer, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in parts)
    return {"input_ids": prompt + answer + end, "labels": [-100] * len(prompt) + answer + [-100] * len(end)}


def episode(pairs: list[tuple[str, str]], num_asked: int, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The first `num_asked` pairs are asked, the others are read."""
    lines = [tokens_of(word, letter, tokenizer) for word, letter in pairs]
    if any(len(line["input_ids"]) * LINES != CHUNK for line in lines):
        raise ValueError(f"{pairs[0]} and the others need a tokenizer with a token for each letter")
    query = [{key: ids[:-1] for key, ids in line.items()} for line in lines[:num_asked]]  # ends with the answer
    return {"support": lines[num_asked:], "query": query}


def made_up_episodes(
    functions: tuple[Letter, ...],
    num: int,
    num_chunks: int,
    num_asked: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Iterator[dict]:
    """`num` episodes of made-up words: all functions in turn, in random order."""
    for i in range(num):
        round_, place = divmod(i, len(functions))
        function = functions[np.random.default_rng((seed, round_)).permutation(len(functions))[place]]
        words = made_up_words(np.random.default_rng((seed, round_, place)), num_asked + LINES * num_chunks)
        yield episode([(word, function(word)) for word in words], num_asked, tokenizer)


def real_episodes(
    folder: Path, each: int, num_chunks: int, num_asked: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[dict]:
    """`each` episodes of every file of `REAL`, with their own words of five letters and answers."""
    for name in REAL:
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        pairs = {row["input"].lower(): row["output"] for row in rows if len(row["input"]) == LENGTH}
        pairs = [(word, letter) for word, letter in pairs.items() if word.isascii() and word.isalpha()]
        for i in range(each):
            chosen = np.random.default_rng((seed, i)).permutation(len(pairs))[: num_asked + LINES * num_chunks]
            yield episode([pairs[j] for j in chosen], num_asked, tokenizer)
