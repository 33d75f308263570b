"""hf_iai.data: tokens and labels of every format, chunks of any stream, episodes, and their batches."""

import itertools
import logging
import random
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hf_iai.data import (
    EpisodeCollator,
    LabelledEpisodeCollator,
    VectorEpisodeCollator,
    batch_chunks,
    check_disjoint,
    chunk_examples,
    chunk_text,
    episodes_from_documents,
    episodes_from_labels,
    tokenize_example,
)

END = "<end>"
CORPUS = ["the cat sat on the mat and the dog ate the cat", "def add(a, b): return a + b", "user assistant yes no"]
TURN = "<turn>{{ m.role }}\n{{ m.content }}</turn>"
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
MARKING_TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</turn>"
    "{% endgeneration %}{% else %}{{ m.content }}</turn>{% endif %}{% endfor %}"
)
# Opens a thought for the model that a finished answer no longer shows.
THINKING_TEMPLATE = TEMPLATE.replace("<turn>assistant\n{% endif", "<turn>assistant\n<think>{% endif")


def make_tokenizer(end: str | None = END, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, "<turn>", "</turn>", "<begin>"]
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, model_max_length=16)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def learned(tokenizer, tokens: dict) -> str:
    """The text of the tokens with a loss."""
    return tokenizer.decode([label for label in tokens["labels"] if label != -100])


def joined(chunks, key: str = "input_ids") -> list[int]:
    return [value for chunk in chunks for value in chunk[key][0].tolist()]


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


# Examples


def test_text_has_a_loss_on_every_token_and_gets_no_special_token(tokenizer):
    tokens = tokenize_example({"text": "the cat", "path": "ignored"}, tokenizer)
    assert tokens["input_ids"] == encode(tokenizer, "the cat") == tokens["labels"]
    assert tokenizer.eos_token_id not in tokens["input_ids"]


def test_special_tokens_of_the_tokenizer_are_not_added():
    with_end = ByT5Tokenizer()
    assert with_end("a")["input_ids"] == [100, 1]
    assert tokenize_example({"text": "a"}, with_end) == {"input_ids": [100], "labels": [100]}


@pytest.mark.parametrize(
    "prompt, completion", [("the cat", " sat"), ("", "yes"), ("yes", ""), ("on the m", "at"), ("", "")]
)
def test_only_the_completion_has_a_loss(tokenizer, prompt, completion):
    tokens = tokenize_example({"prompt": prompt, "completion": completion}, tokenizer)
    given = encode(tokenizer, prompt)
    assert tokenizer.decode(tokens["input_ids"]) == prompt + completion
    assert tokens["input_ids"][: len(given)] == given, "the prompt is tokenised as it is when a model generates"
    assert tokens["labels"] == [-100] * len(given) + tokens["input_ids"][len(given) :]


def test_a_merge_across_the_boundary_is_not_made(tokenizer):
    whole = encode(tokenizer, " the")
    assert len(whole) == 1, "the case needs a token that spans the boundary"
    tokens = tokenize_example({"prompt": " t", "completion": "he"}, tokenizer)
    assert tokens["input_ids"] == encode(tokenizer, " t") + encode(tokenizer, "he")
    assert learned(tokenizer, tokens) == "he"


def test_tokens_without_such_a_merge_are_those_of_the_whole(tokenizer):
    tokens = tokenize_example({"prompt": "the", "completion": " cat sat"}, tokenizer)
    assert tokens["input_ids"] == encode(tokenizer, "the cat sat")


def test_conversational_completion(tokenizer):
    example = {"prompt": [user("the cat?")], "completion": [assistant("yes")]}
    tokens = tokenize_example(example, tokenizer)
    assert tokenizer.decode(tokens["input_ids"]) == "<turn>user\nthe cat?</turn><turn>assistant\nyes</turn>"
    assert learned(tokenizer, tokens) == "yes</turn>"
    generation_prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True)["input_ids"]
    assert tokens["input_ids"][: len(generation_prompt)] == generation_prompt


def test_a_prompt_that_ends_with_the_assistant_asks_for_no_further_turn(tokenizer):
    tokens = tokenize_example({"prompt": [assistant("yes")], "completion": [user("no")]}, tokenizer)
    assert learned(tokenizer, tokens) == "<turn>user\nno</turn>"


def test_a_template_that_renders_the_end_of_the_prompt_differently_once_answered():
    tokenizer = make_tokenizer(template=THINKING_TEMPLATE)
    tokens = tokenize_example({"prompt": [user("the cat?")], "completion": [assistant("yes")]}, tokenizer)
    assert tokenizer.decode(tokens["input_ids"]) == "<turn>user\nthe cat?</turn><turn>assistant\nyes</turn>"
    assert learned(tokenizer, tokens) == "yes</turn>"


def test_messages_learn_from_the_assistant_where_the_template_marks_it():
    tokenizer = make_tokenizer(template=MARKING_TEMPLATE)
    messages = [user("the cat?"), assistant("yes"), user("the dog?"), assistant("no")]
    tokens = tokenize_example({"messages": messages}, tokenizer)
    assert learned(tokenizer, tokens) == "yes</turn>no</turn>"
    assert len(tokens["labels"]) == len(tokens["input_ids"])
    assert not learned(tokenizer, tokenize_example({"messages": [user("the cat?")]}, tokenizer))


def test_messages_learn_from_all_tokens_otherwise(tokenizer):
    tokens = tokenize_example({"messages": [user("the cat?"), assistant("yes")]}, tokenizer)
    assert tokens["labels"] == tokens["input_ids"]
    assert tokenizer.decode(tokens["input_ids"]) == "<turn>user\nthe cat?</turn><turn>assistant\nyes</turn>"


def test_messages_learn_from_all_tokens_with_a_tokenizer_that_cannot_mark():
    slow = ByT5Tokenizer()
    slow.chat_template = MARKING_TEMPLATE
    tokens = tokenize_example({"messages": [user("a"), assistant("b")]}, slow)
    assert tokens["labels"] == tokens["input_ids"] and tokens["input_ids"]


@pytest.mark.parametrize("make", [list, torch.tensor], ids=["list", "tensor"])
def test_tokenised_examples_stay_as_they_are(tokenizer, make):
    assert tokenize_example({"input_ids": make([5, 6])}, tokenizer) == {"input_ids": [5, 6], "labels": [5, 6]}
    given = {"input_ids": make([5, 6, 7]), "labels": make([-100, 6, 9])}
    assert tokenize_example(given, tokenizer) == {"input_ids": [5, 6, 7], "labels": [-100, 6, 9]}


def test_masked_tokens_of_a_tokenised_example_are_left_out(tokenizer):
    example = {"input_ids": [0, 5, 6, 0], "labels": [-100, -100, 6, -100], "attention_mask": [0, 1, 1, 0]}
    assert tokenize_example(example, tokenizer) == {"input_ids": [5, 6], "labels": [-100, 6]}


def test_tokenised_text_may_keep_its_text(tokenizer):
    assert tokenize_example({"text": "the", "input_ids": [5]}, tokenizer)["input_ids"] == [5]


def test_rows_of_mixed_formats_come_back_from_arrow_with_none(tokenizer):
    examples = [{"text": "the cat"}, {"prompt": "the", "completion": " cat"}, {"input_ids": [5, 6]}]
    keys = {key for example in examples for key in example}
    padded = [{key: example.get(key) for key in keys} for example in examples]
    row = Dataset.from_list([{"support": padded}])[0]
    for example, stored in zip(examples, row["support"], strict=True):
        assert tokenize_example(stored, tokenizer) == tokenize_example(example, tokenizer)


@pytest.mark.parametrize(
    "example, message",
    [
        ({"path": "x"}, "exactly one of.*path"),
        ({}, "exactly one of"),
        ({"prompt": "the"}, "exactly one of.*prompt"),
        ({"prompt": "the", "completion": None}, "exactly one of.*prompt"),
        ({"text": "the", "messages": [user("the")]}, "exactly one of.*messages.*text"),
        ({"prompt": "the", "completion": [assistant("cat")]}, "both be strings or both be lists.*str and list"),
        ({"prompt": [], "completion": [assistant("cat")]}, "empty conversation"),
        ({"text": 3}, "text must be a string, got int 3"),
        ({"input_ids": [[1, 2]]}, r"one row of integers, got shape \(1, 2\)"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries for 2 input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask has 1 entries for 2 input_ids"),
        ("the cat", "must be a mapping, got str 'the cat'"),
    ],
)
def test_examples_that_cannot_be_read(tokenizer, example, message):
    with pytest.raises(ValueError, match=message):
        tokenize_example(example, tokenizer)


def test_messages_need_a_chat_template():
    with pytest.raises(ValueError, match="chat_template"):
        tokenize_example({"messages": [user("the")]}, make_tokenizer(template=None))


# Chunks


@pytest.mark.parametrize("text", ["t", "the cat", " ".join(CORPUS), "é ☃ 𝄞", " \n\t "])
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 1000])
def test_text_chunks_are_the_text(tokenizer, text, chunk_size):
    chunks = list(chunk_text(text, tokenizer, chunk_size=chunk_size))
    assert joined(chunks) == joined(chunks, "labels") == encode(tokenizer, text)
    *full, last = chunks
    assert all(chunk["input_ids"].shape == (1, chunk_size) for chunk in full)
    assert 1 <= last["input_ids"].shape[1] <= chunk_size
    for chunk in chunks:
        assert chunk.keys() == {"input_ids", "attention_mask", "labels"}
        assert all(value.dtype == torch.long and value.shape == chunk["input_ids"].shape for value in chunk.values())
        assert chunk["attention_mask"].all()


@pytest.mark.parametrize("text", ["", [], [""], iter(["", ""])], ids=["empty", "none", "one_empty", "two_empty"])
def test_empty_text_yields_nothing(tokenizer, text):
    assert list(chunk_text(text, tokenizer, chunk_size=4)) == []
    assert list(chunk_examples([{"text": ""}], tokenizer, chunk_size=4)) == []


def test_pieces_of_a_text_follow_each_other_directly(tokenizer):
    chunks = chunk_text(["the cat", "", " sat"], tokenizer, chunk_size=3)
    assert joined(chunks) == encode(tokenizer, "the cat") + encode(tokenizer, " sat")


def test_long_text_gives_no_warning_about_the_window(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = make_tokenizer()
    assert len(list(chunk_text("the cat " * 100, tokenizer, chunk_size=8))) > 16 // 8
    assert not caplog.records
    tokenizer("the cat " * 100)
    assert "longer than the specified maximum" in caplog.text, "such a tokenizer does warn"


@pytest.mark.parametrize(
    "chunks_of",
    [
        lambda pieces, t: chunk_text(pieces, t, chunk_size=4),
        lambda pieces, t: chunk_examples(({"text": piece} for piece in pieces), t, chunk_size=4),
    ],
    ids=["text", "examples"],
)
def test_endless_streams_are_read_lazily(chunks_of):
    read = []
    pieces = (read.append(i) or "ab" for i in itertools.count())
    chunks = chunks_of(pieces, ByT5Tokenizer())
    assert read == [], "nothing is read before it is asked for"
    assert [next(chunks)["input_ids"].shape for _ in range(3)] == [(1, 4)] * 3
    assert len(read) <= 6, "12 tokens are in hand after six pieces of two"


def test_streaming_datasets(tokenizer):
    rows = Dataset.from_list([{"text": text} for text in CORPUS])
    stream = rows.to_iterable_dataset()
    expected = joined(chunk_examples(rows, tokenizer, chunk_size=5))
    assert joined(chunk_examples(stream, tokenizer, chunk_size=5)) == expected
    assert joined(chunk_text((row["text"] for row in stream), tokenizer, chunk_size=5)) == [
        i for i in expected if i != tokenizer.eos_token_id
    ]


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
def test_examples_cross_chunks_with_their_labels(tokenizer, chunk_size):
    examples = [
        {"prompt": "the cat", "completion": " sat"},
        {"text": "yes"},
        {"input_ids": [9, 8], "labels": [-100, 8]},
    ]
    chunks = list(chunk_examples(examples, tokenizer, chunk_size=chunk_size))
    end = tokenizer.eos_token_id
    given, told, text = (encode(tokenizer, part) for part in ("the cat", " sat", "yes"))
    assert joined(chunks) == [*given, *told, end, *text, end, 9, 8]
    assert joined(chunks, "labels") == [*[-100] * len(given), *told, end, *text, end, -100, 8]


def test_the_end_stands_after_plain_examples_only(tokenizer):
    chat = {"prompt": [user("the")], "completion": [assistant("cat")]}
    talk = {"messages": [user("the"), assistant("cat")]}
    for example in (chat, talk, {"input_ids": [7]}):
        assert (
            joined(chunk_examples([example], tokenizer, chunk_size=50))
            == tokenize_example(example, tokenizer)["input_ids"]
        )


def test_an_end_that_is_there_already_is_not_doubled(tokenizer):
    ids = joined(
        chunk_examples([{"text": "the" + END}, {"prompt": "a", "completion": "b" + END}], tokenizer, chunk_size=50)
    )
    assert ids.count(tokenizer.eos_token_id) == 2


def test_a_tokenizer_without_an_end_adds_none():
    tokenizer = make_tokenizer(end=None)
    ids = joined(chunk_examples([{"text": "the cat"}] * 2, tokenizer, chunk_size=50))
    assert ids == encode(tokenizer, "the cat") * 2


@pytest.mark.parametrize(
    "chunks_of",
    [
        lambda *a, **k: chunk_text("the cat " * 9, *a, **k),
        lambda *a, **k: chunk_examples([{"text": "the " * 9}], *a, **k),
    ],
)
def test_the_length_of_a_chunk(tokenizer, chunks_of):
    model = SimpleNamespace(usual_chunk_size=5)
    assert next(chunks_of(tokenizer, model=model))["input_ids"].shape == (1, 5)
    assert next(chunks_of(tokenizer, model=model, chunk_size=3))["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="give chunk_size"):
        chunks_of(tokenizer)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"chunk_size must be at least 1, got {size}"):
            chunks_of(tokenizer, chunk_size=size)


def test_a_single_example_is_no_stream(tokenizer):
    with pytest.raises(ValueError, match="examples must be an iterable, got a single dict"):
        chunk_examples({"text": "the"}, tokenizer, chunk_size=4)
    with pytest.raises(ValueError, match="examples must be an iterable, got a single str"):
        chunk_examples("the", tokenizer, chunk_size=4)
    with pytest.raises(ValueError, match="see chunk_examples"):
        chunk_text({"text": "the"}, tokenizer, chunk_size=4)
    with pytest.raises(ValueError, match="must be a string, got dict"):
        list(chunk_text([{"text": "the"}], tokenizer, chunk_size=4))


def row(*ids: int) -> dict:
    return {"input_ids": torch.tensor([ids])}


def test_streams_are_read_side_by_side():
    first, second = [row(1, 2, 3), row(4)], [row(5, 6)]
    a, b = batch_chunks([first, second], pad_token_id=9)
    assert a["input_ids"].tolist() == [[1, 2, 3], [5, 6, 9]]
    assert a["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert a["labels"].tolist() == [[1, 2, 3], [5, 6, -100]]
    assert b["input_ids"].tolist() == [[4], [9]]
    assert b["attention_mask"].tolist() == [[1], [0]]
    assert b["labels"].tolist() == [[4], [-100]]


@pytest.mark.parametrize("lengths", [[3], [0, 4], [5, 0, 1, 12], [0, 0], [7, 7]])
def test_every_row_of_a_batch_is_its_stream(tokenizer, lengths):
    texts = ["abcdefghijkl"[:length] for length in lengths]
    chunks = list(batch_chunks(chunk_text(text, ByT5Tokenizer(), chunk_size=3) for text in texts))
    assert len(chunks) == max(-(-length // 3) for length in lengths)
    for b, text in enumerate(texts):
        kept = [chunk["input_ids"][b][chunk["attention_mask"][b].bool()].tolist() for chunk in chunks]
        assert [i for ids in kept for i in ids] == encode(ByT5Tokenizer(), text)
        for chunk in chunks:
            assert (chunk["labels"][b][chunk["attention_mask"][b] == 0] == -100).all()
            assert all(value.shape == (len(texts), chunk["input_ids"].shape[1]) for value in chunk.values())


def test_masks_and_labels_of_a_stream_are_kept():
    masked = row(1, 2, 3) | {"attention_mask": torch.tensor([[0, 1, 1]])}
    labelled = row(4, 5) | {"labels": torch.tensor([[-100, 7]])}
    (chunk,) = batch_chunks([[masked], [labelled]])
    assert chunk["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 0]]
    assert chunk["labels"].tolist() == [[-100, 2, 3], [-100, 7, -100]]


def test_endless_streams_batch():
    endless = ([row(i, i)][0] for i in itertools.count())
    batch = batch_chunks([endless, [row(7)]])
    assert [next(batch)["attention_mask"].tolist() for _ in range(3)] == [
        [[1, 1], [1, 0]],
        [[1, 1], [0, 0]],
        [[1, 1], [0, 0]],
    ]


def test_streams_that_cannot_be_batched():
    with pytest.raises(ValueError, match="at least one stream"):
        batch_chunks([])
    for ids in (torch.ones(2, 3, dtype=torch.long), torch.ones(3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"shape \(1, C\), got input_ids of shape"):
            list(batch_chunks([[{"input_ids": ids}]]))


# Episodes from documents


def distinct_text(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=length))


def episode_ids(episode: dict) -> list[int]:
    return [i for example in episode["support"] + episode["query"] for i in example["input_ids"]]


@pytest.mark.parametrize("chunk_size, num_chunks, query_length", [(4, 3, None), (1, 2, 3), (5, 1, 9), (3, 4, 1)])
def test_windows_of_documents(chunk_size, num_chunks, query_length):
    tokenizer, lengths = ByT5Tokenizer(), [100, 3, 16, 47]
    documents = [{"text": distinct_text(n, seed=n), "path": f"{n}.txt"} for n in lengths]
    sizes = {"chunk_size": chunk_size, "num_chunks": num_chunks, "query_length": query_length}
    episodes = episodes_from_documents(documents, tokenizer, **sizes)
    assert episodes.column_names == ["support", "query", "group"]
    query_length = query_length or chunk_size
    for episode in episodes:
        assert [len(example["input_ids"]) for example in episode["support"]] == [chunk_size] * num_chunks
        assert [len(example["input_ids"]) for example in episode["query"]] == [query_length]
    window = num_chunks * chunk_size + query_length
    for document, length in zip(documents, lengths, strict=True):
        read = [i for episode in episodes if episode["group"] == document["path"] for i in episode_ids(episode)]
        whole = encode(tokenizer, document["text"])
        assert read == whole[: length // window * window], "windows follow each other without gap or overlap"


def test_stride(tokenizer):
    text = distinct_text(20)
    episodes = episodes_from_documents([text], ByT5Tokenizer(), chunk_size=4, num_chunks=2, stride=3)
    ids = encode(ByT5Tokenizer(), text)
    assert [episode_ids(episode) for episode in episodes] == [ids[s : s + 12] for s in (0, 3, 6)]


def test_documents_are_numbered_where_they_have_no_path():
    documents = [
        distinct_text(9, 1),
        {"text": "short"},
        {"text": distinct_text(9, 2)},
        {"text": distinct_text(9), "path": "p"},
    ]
    episodes = episodes_from_documents(iter(documents), ByT5Tokenizer(), chunk_size=3, num_chunks=2)
    assert list(episodes["group"]) == ["0", "2", "p"]


def test_drawing_windows_depends_on_the_seed_alone():
    documents = [distinct_text(400, seed) for seed in range(4)]

    def drawn(seed, documents=documents):
        sizes = {"chunk_size": 4, "num_chunks": 2, "max_per_document": 3}
        return episodes_from_documents(documents, ByT5Tokenizer(), seed=seed, **sizes).to_list()

    everything = episodes_from_documents(documents, ByT5Tokenizer(), chunk_size=4, num_chunks=2).to_list()
    assert drawn(0) == drawn(0) != drawn(1)
    assert len(drawn(0)) == 12 and all(episode in everything for episode in drawn(0))
    assert drawn(0, documents[:2]) == drawn(0)[:6], "later documents change nothing"
    positions = [everything.index(episode) for episode in drawn(0)]
    assert positions == sorted(set(positions)), "in the order of the text, none twice"
    assert len({tuple(p % 33 for p in positions[i : i + 3]) for i in range(0, 12, 3)}) > 1, "each document has its draw"


def test_more_windows_than_a_document_has():
    episodes = episodes_from_documents(
        [distinct_text(30)], ByT5Tokenizer(), chunk_size=5, num_chunks=1, max_per_document=99
    )
    assert len(episodes) == 3


def test_a_query_that_repeats_a_chunk_is_left_out():
    episodes = episodes_from_documents(["abcdefabc" + "abcdefghi"], ByT5Tokenizer(), chunk_size=3, num_chunks=2)
    assert [ByT5Tokenizer().decode(episode_ids(episode)) for episode in episodes] == ["abcdefghi"]
    EpisodeCollator(ByT5Tokenizer(), chunk_size=3)(episodes.to_list())
    with pytest.raises(ValueError, match="repeats none of them"):
        episodes_from_documents(["abc" * 6], ByT5Tokenizer(), chunk_size=3, num_chunks=2)


def test_many_windows_are_kept_in_order():
    text = distinct_text(4000)
    episodes = episodes_from_documents([text], ByT5Tokenizer(), chunk_size=3, num_chunks=1)
    assert [i for episode in episodes for i in episode_ids(episode)] == encode(ByT5Tokenizer(), text)[:3996]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"num_chunks": 0}, "num_chunks must be at least 1, got 0"),
        ({"query_length": 0}, "query_length must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"max_per_document": 0}, "max_per_document must be at least 1, got 0"),
        ({"documents": "abc"}, "documents must be an iterable, got a single str"),
        ({"documents": {"train": []}}, "documents must be an iterable, got a single dict"),
        ({"documents": [{"content": "abc"}]}, "mapping with 'text', got {'content': 'abc'}"),
        ({"documents": [{"text": None}]}, "text must be a string, got NoneType"),
        ({"documents": []}, "longest document has 0 tokens"),
        ({"documents": ["abc", "abcdefg", "a"]}, "window of 12 tokens .*longest document has 7 tokens"),
    ],
)
def test_documents_that_give_no_episode(changed, message):
    arguments = {"documents": [distinct_text(50)], "chunk_size": 4, "num_chunks": 2} | changed
    with pytest.raises(ValueError, match=message):
        episodes_from_documents(tokenizer=ByT5Tokenizer(), **arguments)


# Episodes from labelled rows


def labelled_rows(num_labels: int = 4, per_label: int = 30) -> list[dict]:
    return [{"text": f"text {i} of {label}", "label": label} for label in range(num_labels) for i in range(per_label)]


SIZES = {"num_classes": 3, "num_support": 6, "num_queries": 3, "num_episodes": 20}


def test_labelled_episodes():
    rows = labelled_rows()
    episodes = episodes_from_labels(rows, **SIZES)
    assert len(episodes) == 20 and list(episodes["group"]) == [str(i) for i in range(20)]
    truth = {f"Input: {row['text']}\nLabel:": f" {row['label']}" for row in rows}
    for episode in episodes:
        support, query = episode["support"], episode["query"]
        assert all(truth[example["prompt"]] == example["completion"] for example in support + query)
        assert len({example["prompt"] for example in support + query}) == 9, "no row twice"
        labels = [example["completion"] for example in support]
        assert len(set(labels)) == 3 and all(labels.count(label) == 2 for label in labels)
        assert {example["completion"] for example in query} == set(labels)
        check_disjoint(episode, ByT5Tokenizer())
    drawn = [frozenset(example["completion"] for example in episode["support"]) for episode in episodes]
    assert len(set(drawn)) > 1, "episodes differ in their labels"
    orders = [[example["completion"] for example in episode["support"]] for episode in episodes]
    assert any(order[0] == order[3] for order in orders) and any(order[0] != order[3] for order in orders), "shuffled"


def test_labelled_episodes_depend_on_the_seed_alone():
    first, again, other = (episodes_from_labels(labelled_rows(), seed=s, **SIZES).to_list() for s in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("num_support, num_queries", [(7, 1), (1, 1), (2, 5), (3, 4)])
def test_numbers_that_the_classes_do_not_divide(num_support, num_queries):
    sizes = SIZES | {"num_support": num_support, "num_queries": num_queries, "num_episodes": 200}
    episodes = episodes_from_labels(labelled_rows(3), **sizes)
    asked = []
    for episode in episodes:
        assert (len(episode["support"]), len(episode["query"])) == (num_support, num_queries)
        counts = [[e["completion"] for e in episode["support"]].count(f" {label}") for label in range(3)]
        assert max(counts) - min(counts) <= 1
        asked += [(example["completion"], counts) for example in episode["query"]]
    shares = [sum(label == f" {i}" for label, _ in asked) / len(asked) for i in range(3)]
    assert all(abs(share - 1 / 3) < 0.12 for share in shares), "no label is asked more often than another"
    shown = sum(counts[int(label)] for label, counts in asked) / len(asked)
    assert abs(shown - num_support / 3) < 0.12, "a label that is shown more often is not asked more often"


def test_names_of_labels():
    rows, names = labelled_rows(2), ["bad", "good"]
    sizes = SIZES | {"num_classes": 2}
    by_list = episodes_from_labels(rows, label_names=names, **sizes).to_list()
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    dataset = Dataset.from_list(rows, features=features)
    assert {example["completion"] for example in by_list[0]["support"]} == {" bad", " good"}
    assert by_list == episodes_from_labels(rows, label_names={0: "bad", 1: "good"}, **sizes).to_list()
    assert by_list == episodes_from_labels(dataset, **sizes).to_list()
    assert by_list == episodes_from_labels(dataset.to_iterable_dataset(), **sizes).to_list()


def test_columns_and_template():
    rows = [{"sentence": row["text"] + " {x}", "class": row["label"]} for row in labelled_rows()]
    columns = {"text_column": "sentence", "label_column": "class"}
    episode = episodes_from_labels(rows, template='{"q": "{text}"} ->', **columns, **SIZES)[0]
    assert episode["query"][0]["prompt"].startswith('{"q": "text ') and episode["query"][0]["prompt"].endswith(
        '{x}"} ->'
    )


def test_equal_texts_count_once():
    rows = [{"text": text, "label": "a"} for text in ["one two", "One  two", " one two\n", "three"]] + [
        {"text": "one two", "label": "b"},
        {"text": "five", "label": "b"},
        {"text": "six", "label": "b"},
    ]
    sizes = {"num_classes": 2, "num_support": 2, "num_queries": 2, "num_episodes": 30}
    for episode in episodes_from_labels(rows, template="{text}", **sizes):
        prompts = sorted(example["prompt"] for example in episode["support"] + episode["query"])
        assert prompts == ["five", "one two", "six", "three"]
    with pytest.raises(ValueError, match="1 of the 2 labels"):
        episodes_from_labels(rows[:-1], **sizes)


def test_labels_with_too_few_texts_are_never_drawn():
    rows = labelled_rows(3) + [{"text": "alone", "label": "rare"}]
    completions = {
        e["completion"] for row in episodes_from_labels(rows, **SIZES) for e in row["support"] + row["query"]
    }
    assert completions == {" 0", " 1", " 2"}


def test_ten_thousand_rows():
    rows = ({"text": f"text number {i}", "label": i % 77} for i in range(10_000))
    episodes = episodes_from_labels(rows, num_classes=5, num_support=20, num_queries=5, num_episodes=600)
    assert len(episodes) == 600 and len(episodes[599]["support"]) == 20


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_support": 0}, "num_support must be at least 1, got 0"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"num_episodes": 0}, "num_episodes must be at least 1, got 0"),
        ({"num_classes": 5}, "num_classes=5 labels with at least 3 different texts .* 4 of the 4"),
        ({"num_support": 100}, "labels with at least 35 different texts .* 0 of the 4"),
        ({"rows": []}, "0 of the 0 labels"),
        ({"rows": {"train": []}}, "rows must be an iterable, got a single dict"),
        ({"text_column": "sentence"}, "row 0 has no 'sentence'; its columns are \\['label', 'text'\\]"),
        ({"label_column": "class"}, "row 0 has no 'class'"),
        ({"rows": [{"text": 3, "label": 0}]}, "'text' of row 0 must be a string, got 3"),
        ({"rows": [{"text": "a", "label": -1}], "label_names": ["x", "y"]}, "label -1 of row 0 has no name"),
        ({"label_names": ["x", "y"]}, "label 2 of row 60 has no name"),
        ({"template": "Label:"}, "template must contain {text}, got 'Label:'"),
    ],
)
def test_labelled_sets_that_give_no_episode(changed, message):
    with pytest.raises(ValueError, match=message):
        episodes_from_labels(**({"rows": labelled_rows()} | SIZES | changed))


# Support and query


@pytest.mark.parametrize(
    "support, query",
    [
        ({"text": "the cat"}, {"text": "the cat"}),
        ({"text": "the cat"}, {"prompt": "the", "completion": " cat"}),
        ({"messages": [user("the")]}, {"messages": [user("the")]}),
        ({"text": "<turn>user\nthe</turn>"}, {"messages": [user("the")]}),
    ],
)
def test_shared_content_is_refused(tokenizer, support, query):
    episode = {"support": [{"text": "other"}, support], "query": [{"text": "new"}, query]}
    for check in (lambda: check_disjoint(episode, tokenizer), lambda: EpisodeCollator(tokenizer, 4)([episode])):
        with pytest.raises(ValueError, match="'.*the.*' is in the support and in the query"):
            check()


def test_shared_ids_are_refused(tokenizer):
    ids = encode(tokenizer, "the cat")
    with pytest.raises(ValueError, match="'the cat' is in the support"):
        check_disjoint(
            {"support": [{"text": "the cat"}], "query": [{"input_ids": ids, "labels": [-100] * len(ids)}]}, tokenizer
        )


def test_different_content_passes(tokenizer):
    asked_again = {"prompt": "the", "completion": " cat"}, {"prompt": "the", "completion": " dog"}
    check_disjoint({"support": [asked_again[0]], "query": [asked_again[1]]}, tokenizer)
    check_disjoint({"support": [{"text": "the cat"}], "query": [{"text": "the cat "}]}, tokenizer)
    check_disjoint(
        {"support": [{"text": "the"}, {"text": "the"}], "query": [{"text": "cat"}, {"text": "cat"}]}, tokenizer
    )
    check_disjoint({"support": [{"text": ""}], "query": [{"text": ""}]}, tokenizer)


# Collator


def labelled_episode(number: int, num_support: int, num_queries: int = 1) -> dict:
    examples = [
        {"prompt": f"{number} {i} the", "completion": " cat" * (i + 1)} for i in range(num_support + num_queries)
    ]
    return {"support": examples[:num_support], "query": examples[num_support:], "group": str(number)}


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
@pytest.mark.parametrize("max_chunks", [None, 0, 1, 2, 1000])
@pytest.mark.parametrize("num_support", [(3,), (2, 5), (4, 0, 1), (0, 0)])
def test_the_collator_reads_what_chunk_examples_reads(tokenizer, chunk_size, max_chunks, num_support):
    episodes = [labelled_episode(number, count) for number, count in enumerate(num_support)]
    batch = EpisodeCollator(tokenizer, chunk_size, max_chunks)(episodes)
    assert list(batch) == [
        *("chunk_input_ids", "chunk_attention_mask", "chunk_labels"),
        *("input_ids", "attention_mask", "labels"),
    ]
    expected = [list(chunk_examples(episode["support"], tokenizer, chunk_size=chunk_size)) for episode in episodes]
    expected = [
        chunks if max_chunks is None else chunks[len(chunks) - min(max_chunks, len(chunks)) :] for chunks in expected
    ]
    shape = (len(episodes), max(map(len, expected)), chunk_size)
    ids, mask, labels = (batch[f"chunk_{key}"] for key in ("input_ids", "attention_mask", "labels"))
    assert ids.shape == mask.shape == labels.shape == shape
    assert ids.dtype == mask.dtype == labels.dtype == torch.long
    assert (labels[mask == 0] == -100).all()
    for b, chunks in enumerate(expected):
        missing = shape[1] - len(chunks)
        assert not mask[b, :missing].any(), "missing chunks stand in front, masked"
        for k, chunk in enumerate(chunks, start=missing):
            width = chunk["input_ids"].shape[1]
            assert mask[b, k].tolist() == [1] * width + [0] * (chunk_size - width)
            assert torch.equal(ids[b, k, :width], chunk["input_ids"][0])
            assert torch.equal(labels[b, k, :width], chunk["labels"][0])


def test_queries_stand_alone_padded_on_the_right(tokenizer):
    episodes = [labelled_episode(0, 1, num_queries=1), labelled_episode(1, 0, num_queries=3)]
    batch = EpisodeCollator(tokenizer, chunk_size=4)(episodes)
    assert batch["input_ids"].shape[:2] == (2, 3)
    longest = 0
    for b, episode in enumerate(episodes):
        for q, query in enumerate(episode["query"]):
            ids = encode(tokenizer, query["prompt"] + query["completion"]) + [tokenizer.eos_token_id]
            kept = batch["attention_mask"][b, q].bool()
            longest = max(longest, len(ids))
            assert kept.tolist() == [True] * len(ids) + [False] * (kept.numel() - len(ids))
            assert batch["input_ids"][b, q][kept].tolist() == ids
            learned_ids = batch["labels"][b, q]
            assert tokenizer.decode(learned_ids[learned_ids != -100]) == query["completion"] + END
    assert batch["input_ids"].shape[2] == longest
    assert not batch["attention_mask"][0, 1:].any() and (batch["labels"][0, 1:] == -100).all()


def test_tokenised_support_is_cut_back_into_its_chunks():
    text = distinct_text(60)
    episodes = episodes_from_documents([text], ByT5Tokenizer(), chunk_size=4, num_chunks=3, query_length=8)
    batch = EpisodeCollator(ByT5Tokenizer(), chunk_size=4, max_chunks=2)(episodes.to_list())
    ids = torch.tensor(encode(ByT5Tokenizer(), text)).view(3, 20)
    assert torch.equal(batch["chunk_input_ids"], ids[:, 4:12].reshape(3, 2, 4)), "the last chunks before the query"
    assert torch.equal(batch["input_ids"], ids[:, None, 12:]), "a given query is not closed by an end"
    assert batch["chunk_attention_mask"].all() and batch["attention_mask"].all()
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_an_episode_is_the_same_alone_and_in_a_batch(tokenizer):
    episodes = [labelled_episode(0, 6), labelled_episode(1, 2, 2)]
    collate = EpisodeCollator(tokenizer, chunk_size=5)
    batch, alone = collate(episodes), collate(episodes[1:])
    for key, value in alone.items():
        _, rows, width = value.shape
        # Missing chunks stand in front, missing queries at the end.
        same = batch[key][1:, -rows:] if key.startswith("chunk_") else batch[key][1:, :rows]
        assert torch.equal(same[..., :width], value)
    assert batch["attention_mask"][1].sum() == alone["attention_mask"].sum()
    assert batch["chunk_attention_mask"][1].sum() == alone["chunk_attention_mask"].sum()


def test_the_padding_token_fills_masked_places():
    tokenizer = make_tokenizer()
    episode = labelled_episode(0, 1)
    batch = EpisodeCollator(tokenizer, chunk_size=64)([episode])
    assert (batch["chunk_input_ids"][batch["chunk_attention_mask"] == 0] == 0).all(), "0 where there is no such token"
    tokenizer.pad_token = "<begin>"
    batch = EpisodeCollator(tokenizer, chunk_size=64)([episode])
    assert (batch["chunk_input_ids"][batch["chunk_attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert tokenizer.pad_token_id != 0


def test_the_collator_serves_a_data_loader():
    episodes = episodes_from_documents([distinct_text(200)], ByT5Tokenizer(), chunk_size=4, num_chunks=3)
    loader = torch.utils.data.DataLoader(episodes, batch_size=5, collate_fn=EpisodeCollator(ByT5Tokenizer(), 4))
    assert [len(batch["input_ids"]) for batch in loader] == [5, 5, 2]


@pytest.mark.parametrize(
    "episodes, message",
    [
        ([], "at least one episode"),
        ([{"support": [{"text": "the"}], "query": []}], "at least one query"),
        ([{"support": [], "query": [{"text": "the"}, {"text": ""}]}], "query 1 of an episode has no tokens"),
        ([{"support": [{"txt": "the"}], "query": [{"text": "cat"}]}], "exactly one of"),
    ],
)
def test_batches_that_cannot_be_made(tokenizer, episodes, message):
    with pytest.raises(ValueError, match=message):
        EpisodeCollator(tokenizer, chunk_size=4)(episodes)


@pytest.mark.parametrize(
    "row, found",
    [
        ({"prompt": "1+1=", "completion": "2"}, "a row with the keys ['completion', 'prompt']"),
        ({"text": "the cat"}, "a row with the keys ['text']"),
        ({"text": "the cat", "label": "animal"}, "a row with the keys ['label', 'text']"),
        ({"support": [{"text": "the cat"}]}, "a row with the keys ['support']"),
        ({"support": None, "query": [{"text": "the cat"}]}, "a row with the keys ['query']"),
        ({"support": {"text": ["the cat"]}, "query": [{"text": "the"}]}, "'support' of type dict"),
        ({"support": [], "query": "the cat"}, "'query' of type str"),
        ("the cat", "a row of type str"),
    ],
)
def test_rows_that_are_no_episodes_are_told_the_format(tokenizer, row, found):
    collators = EpisodeCollator(tokenizer, 4), LabelledEpisodeCollator(tokenizer, 4), VectorEpisodeCollator(4)
    good = {"support": [], "query": [{"text": "the"}]}
    checks = [lambda c=collate: c([good, row]) for collate in collators]
    for check in [*checks, lambda: check_disjoint(row, tokenizer)]:
        with pytest.raises(ValueError) as error:
            check()
        expected = f'an episode is {{"support": [example, ...], "query": [example, ...]}}, got {found}: build'
        assert str(error.value).startswith(expected)
        assert "episodes_from_documents or episodes_from_labels" in str(error.value)


def test_sizes_that_no_collator_has(tokenizer):
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        EpisodeCollator(tokenizer, chunk_size=0)
    with pytest.raises(ValueError, match="max_chunks must be at least 0, got -1"):
        EpisodeCollator(tokenizer, chunk_size=4, max_chunks=-1)
