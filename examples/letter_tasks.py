"""Tasks of examples/refine_functions.py: string functions `word -> letter`, most for training, the rest for tests.

A function is which letter of the word, how far on in the alphabet, in which case, of words in which case: 72 of them.
The six that the files of the data folder have (`REAL`), and every fourth of the others, are never trained on.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHUNK = 32  # tokens, of which an example has about 8: one may be cut by the end of a chunk
MADE_UP = (4, 8)  # letters of a word


class Letter(NamedTuple):
    """One function: word -> a letter."""

    place: int  # of the word, counted as Python does
    shift: int = 0  # letters on in the alphabet, z before a
    upper: bool = False  # the letter's case
    upper_words: bool = False  # the words' case

    def __call__(self, word: str) -> str:
        letter = LETTERS[(LETTERS.index(word.lower()[self.place]) + self.shift) % 26]
        return letter.upper() if self.upper else letter


REAL = {
    "capitalize_first_letter": Letter(0, upper=True),
    "capitalize_second_letter": Letter(1, upper=True),
    "capitalize_last_letter": Letter(-1, upper=True),
    "lowercase_first_letter": Letter(0, upper_words=True),
    "lowercase_last_letter": Letter(-1, upper_words=True),
    "next_capital_letter": Letter(0, shift=1, upper=True),
}
ALL = [Letter(*choice) for choice in product((0, 1, 2, -1, -2, -3), (0, 1, -1), (False, True), (False, True))]
_OTHERS = [function for function in ALL if function not in REAL.values()]
# Tuples: datasets takes a list that a generator is given for shards, and would read one function after the other.
HELD_OUT = (*REAL.values(), *(_OTHERS[i] for i in np.random.default_rng(0).permutation(len(_OTHERS))[::4]))
TRAINED = tuple(function for function in ALL if function not in HELD_OUT)


def made_up_words(rng: np.random.Generator, num: int) -> list[str]:
    """`num` different words, consonants and vowels in turn, which random letters break now and then."""
    words: dict[str, None] = {}
    while len(words) < num:
        turn, word = int(rng.integers(2)), ""
        for i in range(int(rng.integers(*MADE_UP))):
            kind = LETTERS if rng.random() < 0.3 else ("bcdfghjklmnpqrstvwxyz", "aeiou")[(i + turn) % 2]
            word += str(rng.choice(list(kind)))
        words[word] = None
    return list(words)


def tokens_of(word: str, letter: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """`word -> x` and the end of the line, with a label on the letter alone."""
    prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{word} ->", f" {letter}"))
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = prompt + answer + line_end
    return {"input_ids": ids, "labels": [-100] * len(prompt) + answer + [-100] * len(line_end)}


def episode(pairs: list[tuple[str, str]], num_asked: int, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> dict:
    """The first `num_asked` pairs are asked, the others are read, as far as `num_tokens` go."""
    lines = [tokens_of(word, letter, tokenizer) for word, letter in pairs]
    query = [{key: ids[:-1] for key, ids in line.items()} for line in lines[:num_asked]]  # ends with the answer
    read = lines[num_asked:]
    support = {key: [i for line in read for i in line[key]][:num_tokens] for key in ("input_ids", "labels")}
    if len(support["input_ids"]) < num_tokens:
        raise ValueError(f"{len(pairs)} pairs do not fill {num_tokens} tokens: pass more of them")
    return {"support": [support], "query": query}


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
        words = made_up_words(np.random.default_rng((seed, round_, place)), num_asked + 8 * num_chunks)
        words = [word.upper() if function.upper_words else word for word in words]
        yield episode([(word, function(word)) for word in words], num_asked, tokenizer, num_chunks * CHUNK)


def real_episodes(
    folder: Path, each: int, num_chunks: int, num_asked: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[dict]:
    """`each` episodes of every file of `REAL`, with their own words and answers."""
    for name in REAL:
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        pairs = [pair for pair in {row["input"]: row["output"] for row in rows}.items() if len(pair[1]) == 1]
        for i in range(each):
            chosen = np.random.default_rng((seed, i)).permutation(len(pairs))[: num_asked + 8 * num_chunks]
            yield episode([pairs[j] for j in chosen], num_asked, tokenizer, num_chunks * CHUNK)
