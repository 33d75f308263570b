"""Tasks of `refine_functions`, as text for the embedded base: ` w o r d: q` and `word -> Word`.

*Ciphers* map a word's last letter to a letter: a permutation of the alphabet onto small or capital letters. Each task
draws its own of 2 * 26! ciphers, so none occurs twice. With words of one letter this is associative recall: the letter
is the key. Words are spelled, because the base's tokens are pieces of words and it does not know their letters.

*Functions* are the ten string functions in the base's pretraining text, on other words. The answer is one of the
results of all ten functions on the query's word.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_iai.embedded.generated_tasks import LETTERS, STRING_FUNCTIONS

LENGTH = 4  # letters of a word, or 1
CHUNK = 28  # tokens: 4 lines of 4 letters, or 7 of one, each with colon, answer and the end of the line
CHUNK_OF_FUNCTIONS = 16  # tokens: one to two lines
REAL = "capitalize_last_letter"  # the file of the data folder that has a cipher of last letters; never drawn

Cipher = dict[str, str]


def encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def draw_cipher(rng: np.random.Generator) -> Cipher:
    letters = "".join(rng.permutation(list(LETTERS)))
    cipher = dict(zip(LETTERS, letters if rng.random() < 0.5 else letters.upper(), strict=True))
    return draw_cipher(rng) if all(a.upper() == b for a, b in cipher.items()) else cipher


def lines_of(length: int) -> int:
    """Number of examples in a chunk, for words of `length` letters."""
    return CHUNK // (length + 3)


def line(word: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokens of ` w o r d: q` and the end of the line; only the answer has a label."""
    parts = ("".join(f" {c}" for c in word) + ":", f" {answer}", "\n")
    prompt, said, end = (encoded(text, tokenizer) for text in parts)
    return {"input_ids": prompt + said + end, "labels": [-100] * len(prompt) + said + [-100] * len(end)}


def cipher_episode(pairs: list[tuple[str, str]], num_asked: int, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The first `num_asked` pairs are asked, the others are read.

    `known_after`: for each query, the number of chunks after which its last letter has occurred as a last letter.
    """
    lines, length = [line(word, answer, tokenizer) for word, answer in pairs], len(pairs[0][0])
    if any(len(some["input_ids"]) != length + 3 for some in lines):
        raise ValueError(f"{pairs[0]} and the others need a tokenizer with a token for each letter")
    keys = [word[-1] for word, _ in pairs]
    first = {key: n // lines_of(length) + 1 for n, key in reversed(list(enumerate(keys[num_asked:])))}
    return {
        "support": lines[num_asked:],
        "query": [{name: ids[:-1] for name, ids in some.items()} for some in lines[:num_asked]],  # ends with the answer
        "known_after": [first.get(key) for key in keys[:num_asked]],
    }


def cipher_episodes(
    lengths: tuple[int, ...],
    num_letters: tuple[int, ...],
    num: int,
    num_chunks: int,
    num_asked: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Iterator[dict]:
    """`num` tasks of random words, each with its own cipher, word length and part of the alphabet."""
    for i in range(num):
        rng = np.random.default_rng((seed, i))
        length, of_letters, cipher = int(rng.choice(lengths)), int(rng.choice(num_letters)), draw_cipher(rng)
        letters = rng.permutation(list(LETTERS))[:of_letters]
        words = rng.choice(letters, size=(num_asked + lines_of(length) * num_chunks, length))
        yield cipher_episode([("".join(word), cipher[word[-1]]) for word in words], num_asked, tokenizer)


def real_episodes(
    folder: Path, num: int, num_chunks: int, num_asked: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Iterator[dict]:
    """`num` tasks of the file `REAL`, with its own words of four letters and answers."""
    rows = [json.loads(text) for text in (folder / f"{REAL}.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = {row["input"].lower(): row["output"] for row in rows if len(row["input"]) == LENGTH}
    pairs = [(word, answer) for word, answer in pairs.items() if word.isascii() and word.isalpha()]
    needed = num_asked + lines_of(LENGTH) * num_chunks
    if len(pairs) < needed:
        raise ValueError(f"{folder / REAL}.jsonl has {len(pairs)} words of {LENGTH} letters, {needed} are needed")
    for i in range(num):
        chosen = np.random.default_rng((seed, i)).permutation(len(pairs))
        yield cipher_episode([pairs[j] for j in chosen[:needed]], num_asked, tokenizer)


def function_episodes(each: int, num_chunks: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[dict]:
    """`each` tasks of every function, with one query; `labels` are the different results of all ten on its word."""
    for i in range(each * len(STRING_FUNCTIONS)):
        rng, name = np.random.default_rng((seed, i)), list(STRING_FUNCTIONS)[i % len(STRING_FUNCTIONS)]
        words: dict[str, None] = {}
        while len(words) <= num_chunks * CHUNK_OF_FUNCTIONS // 4:  # no line has fewer than four tokens
            words["".join(rng.choice(list(LETTERS), size=rng.integers(2, 6)))] = None
        query, *read = words
        labels = dict.fromkeys(function(query) for function in STRING_FUNCTIONS.values())
        text = "".join(f"{word} -> {STRING_FUNCTIONS[name](word)}\n" for word in read)
        yield {
            "support": [{"input_ids": encoded(text, tokenizer)}],
            "query": [{"input_ids": encoded(f"{query} ->", tokenizer)}],
            "labels": [encoded(f" {label}\n", tokenizer) for label in labels],
            "answers": [list(labels).index(STRING_FUNCTIONS[name](query))],
        }
