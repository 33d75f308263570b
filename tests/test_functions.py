"""The tasks of the string functions: what an answer is, where lines end, and what can be known."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from examples.research.functions.function_tasks import (
    CHUNK,
    CHUNK_OF_FUNCTIONS,
    LENGTH,
    LETTERS,
    REAL,
    cipher_episodes,
    draw_cipher,
    function_episodes,
    lines_of,
    real_episodes,
)
from hf_iai import EpisodeCollator, embedded_base
from hf_iai.embedded.generated_tasks import STRING_FUNCTIONS

TOKENIZER = AutoTokenizer.from_pretrained(embedded_base())
SHAPE = (3, 5, TOKENIZER, 0)  # chunks, queries, tokenizer, seed


def pairs(examples: list[dict]) -> list[tuple[str, str]]:
    """Words and answers as they are written."""
    texts = [TOKENIZER.decode(example["input_ids"]).strip().replace(" ", "").split(":") for example in examples]
    return [(word, answer) for word, answer in texts]


@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("num_letters", [4, 26])
def test_the_last_letter_decides_and_lines_fill_chunks(length, num_letters):
    for task in cipher_episodes((length,), (num_letters,), 6, *SHAPE):
        read, asked = pairs(task["support"]), pairs(task["query"])
        assert len(read) == 3 * lines_of(length) and len(asked) == 5
        assert len({letter for word, _ in read + asked for letter in word}) <= num_letters
        cipher = {word[-1]: answer for word, answer in read + asked}
        assert all(cipher[word[-1]] == answer and len(word) == length for word, answer in read + asked)
        assert len(set(cipher.values())) == len(cipher)
        for example in task["query"]:
            assert example["labels"][-1] == example["input_ids"][-1]
            assert set(example["labels"][:-1]) == {-100}
        batch = EpisodeCollator(TOKENIZER, CHUNK)([task])
        assert batch["chunk_attention_mask"].all() and batch["chunk_input_ids"].shape == (1, 3, CHUNK)
        ends = {TOKENIZER.decode(chunk[-1]) for chunk in batch["chunk_input_ids"][0]}
        assert ends == {"\n"}, "a line goes on in the next chunk"


@pytest.mark.parametrize("length", [1, LENGTH])
def test_what_is_known_is_the_first_chunk_with_the_letter(length):
    size = lines_of(length)
    for task in cipher_episodes((length,), (26,), 6, *SHAPE):
        read = [word[-1] for word, _ in pairs(task["support"])]
        for (word, _), after in zip(pairs(task["query"]), task["known_after"], strict=True):
            chunks = [n for n in (1, 2, 3) if word[-1] in read[size * (n - 1) : size * n]]
            assert after == (chunks[0] if chunks else None)


def test_ciphers_are_drawn_anew_and_one_to_one():
    drawn = ["".join(draw_cipher(np.random.default_rng(seed)).values()) for seed in range(40)]
    assert len(set(drawn)) == 40 and LETTERS.upper() not in drawn
    assert {"".join(sorted(letters)) for letters in drawn} == {LETTERS, LETTERS.upper()}
    one, two = (next(cipher_episodes((LENGTH,), (26,), 1, *SHAPE)) for _ in range(2))
    assert one == two


def test_real_words_are_asked_or_read(tmp_path):
    words = [f"xy{a}{b}" for a in "abcdef" for b in "ghij"]
    rows = [{"input": word, "output": word[-1].upper()} for word in [*words, "longer"]]
    (tmp_path / f"{REAL}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for task in real_episodes(tmp_path, 3, *SHAPE):
        found = pairs(task["support"] + task["query"])
        assert all(answer == word[-1].upper() for word, answer in found)
        assert len({word for word, _ in found}) == len(found) == 3 * 4 + 5


def test_too_few_real_words_are_an_error(tmp_path):
    (tmp_path / f"{REAL}.jsonl").write_text(json.dumps({"input": "word", "output": "D"}), encoding="utf-8")
    with pytest.raises(ValueError, match="has 1 words of 4 letters, 17 are needed"):
        next(real_episodes(tmp_path, 1, *SHAPE))


def test_functions_answer_with_one_of_what_all_make_of_the_word():
    tasks = list(function_episodes(2, 3, TOKENIZER, 0))
    assert len(tasks) == 2 * len(STRING_FUNCTIONS)
    for task, name in zip(tasks, 2 * list(STRING_FUNCTIONS), strict=True):
        (read,), (query,) = task["support"], task["query"]
        assert len(read["input_ids"]) >= 3 * CHUNK_OF_FUNCTIONS
        lines = [line.split(" -> ") for line in TOKENIZER.decode(read["input_ids"]).splitlines()]
        assert all(answer == STRING_FUNCTIONS[name](word) for word, answer in lines)
        word = TOKENIZER.decode(query["input_ids"]).removesuffix(" ->")
        labels = [TOKENIZER.decode(label) for label in task["labels"]]
        assert len(set(labels)) == len(labels) > 3
        assert labels[task["answers"][0]] == f" {STRING_FUNCTIONS[name](word)}\n"
        assert word not in [word for word, _ in lines]


def test_a_tokenizer_without_letters_is_refused():
    with pytest.raises(ValueError, match="a token for each letter"):
        next(cipher_episodes((LENGTH,), (26,), 1, 3, 5, ByT5Tokenizer(), 0))
