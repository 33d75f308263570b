"""Episodes, the tasks a model is trained and evaluated on: `{"support": [example...], "query": [example...]}`.

`group` names the document or task that an episode comes from. Confidence intervals are taken over whole groups.
"""

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from .checks import PARTS, check_at_least, check_episode, check_iterable
from .examples import Episode, Tokens, text_ids, tokenize_example
from .tables import label_of

_ROWS_AT_ONCE = 256  # rows held as Python objects before they are written to Arrow, which is ten times smaller


def episodes_from_documents(
    documents: Iterable[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chunk_size: int,
    num_chunks: int,
    query_length: int | None = None,
    stride: int | None = None,
    max_per_document: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Cut documents into windows. Each is an episode: `num_chunks` chunks to read, and the next tokens to predict.

    A window is `num_chunks * chunk_size + query_length` tokens long. Documents that are shorter give no episode. A
    window whose query repeats one of its chunks word for word is left out too.

    Args:
        documents: strings, or mappings with `"text"` and optionally `"path"`, which names the document.
        tokenizer: the base model's tokenizer; no special tokens are added.
        chunk_size: tokens per chunk.
        num_chunks: chunks per episode; each one is a support example.
        query_length: tokens of the query; `chunk_size` by default.
        stride: tokens between the starts of two windows; by default a whole window, so windows do not overlap.
        max_per_document: draw at most this many windows of each document; all by default.
        seed: random seed of that draw.

    Returns:
        A dataset with the columns `support` (`num_chunks` examples `{"input_ids"}`), `query` (one such example) and
        `group` (the document's path, or its running number if it has none).

    Raises:
        ValueError: if a number is below 1, a document has no text, or there is no window.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from hf_iai.data import episodes_from_documents
        >>> episodes = episodes_from_documents(["abcdefg"], ByT5Tokenizer(), chunk_size=2, num_chunks=2)
        >>> episodes[0]["support"], episodes[0]["query"], episodes[0]["group"]
        ([{'input_ids': [100, 101]}, {'input_ids': [102, 103]}], [{'input_ids': [104, 105]}], '0')
    """
    check_iterable("documents", documents)
    query_length = chunk_size if query_length is None else query_length
    check_at_least(1, chunk_size=chunk_size, num_chunks=num_chunks, query_length=query_length)
    support_length = num_chunks * chunk_size
    window = support_length + query_length
    stride = window if stride is None else stride
    limit = math.inf if max_per_document is None else max_per_document
    check_at_least(1, stride=stride, max_per_document=limit)
    longest = 0

    def parts(ids: list[int], start: int) -> tuple[list[list[int]], list[int]]:
        end = start + support_length
        return [ids[i : i + chunk_size] for i in range(start, end, chunk_size)], ids[end : start + window]

    def rows() -> Iterator[Episode]:
        nonlocal longest
        for number, document in enumerate(documents):
            ids, group = text_ids(_text_of(document), tokenizer), _group_of(document, number)
            longest = max(longest, len(ids))
            windows = ((start, *parts(ids, start)) for start in range(0, len(ids) - window + 1, stride))
            starts = [start for start, chunks, query in windows if query not in chunks]
            drawn = random.Random(f"{seed} {number}").sample(starts, min(limit, len(starts)))
            for start in sorted(drawn):
                chunks, query = parts(ids, start)
                support = [{"input_ids": chunk} for chunk in chunks]
                yield {"support": support, "query": [{"input_ids": query}], "group": group}

    episodes = _dataset(rows(), {"input_ids": List(Value("int32"))})
    if episodes is None:
        raise ValueError(
            f"no document has a window of {window} tokens ({num_chunks} chunks of {chunk_size} and a query of "
            f"{query_length} that repeats none of them); the longest document has {longest} tokens. "
            "Give longer documents, or fewer or shorter chunks"
        )
    return episodes


def episodes_from_labels(
    rows: Iterable[Mapping[str, Any]],
    *,
    text_column: str = "text",
    label_column: str = "label",
    num_classes: int,
    num_support: int,
    num_queries: int,
    num_episodes: int,
    seed: int = 0,
    label_names: Sequence[str] | Mapping[Any, str] | None = None,
    template: str | None = "Input: {text}\nLabel:",
) -> Dataset:
    """Draw few-shot classification tasks from a labelled data set.

    Each episode draws `num_classes` labels, and then its support and its queries. The examples are spread over the
    labels as evenly as possible, in random order. No row is in both support and query. Rows whose texts differ only in
    case and white space count as one; the first one is kept.

    Args:
        rows: mappings with a text and a label; any finite iterable, such as a dataset of `datasets`.
        text_column: key of the text.
        label_column: key of the label.
        num_classes: labels per episode.
        num_support: support examples per episode, all classes together.
        num_queries: queries per episode, all classes together.
        num_episodes: number of episodes.
        seed: random seed of all draws.
        label_names: the text to write for each label. By default the names of a `ClassLabel` column, or what
            `tables.label_of` makes of the labels, such as "1" of 1.0 and "true" of True.
        template: the prompt, which contains `{text}`. The completion is a space and the label's name. None: examples
            are `{"text", "label"}`, for a linear state.

    Returns:
        A dataset with the columns `support` and `query` (examples `{"prompt", "completion"}`, or `{"text", "label"}`)
        and `group` (the episode's number).

    Raises:
        ValueError: if a number is below 1, a column or a label's name is missing, the template has no `{text}`, or
            fewer than `num_classes` labels have enough different texts.

    Example:
        >>> from hf_iai.data import episodes_from_labels
        >>> rows = [{"text": f"{kind} {i}", "label": kind} for kind in ("cat", "dog") for i in range(9)]
        >>> episodes = episodes_from_labels(rows, num_classes=2, num_support=6, num_queries=2, num_episodes=3)
        >>> sorted(example["completion"] for example in episodes[0]["support"])
        [' cat', ' cat', ' cat', ' dog', ' dog', ' dog']
    """
    check_iterable("rows", rows)
    check_at_least(1, num_classes=num_classes, num_support=num_support)
    check_at_least(1, num_queries=num_queries, num_episodes=num_episodes)
    if template is not None and "{text}" not in template:
        raise ValueError(f"template must contain {{text}}, got {template!r}")
    names = _class_names(rows, label_column) if label_names is None else label_names
    texts = _texts_by_name(rows, text_column, label_column, names)
    needed = math.ceil(num_support / num_classes) + math.ceil(num_queries / num_classes)
    rich = {name: pool for name, pool in sorted(texts.items()) if len(pool) >= needed}
    if len(rich) < num_classes:
        raise ValueError(
            f"num_classes={num_classes} labels with at least {needed} different texts each are needed; "
            f"{len(rich)} of the {len(texts)} labels have them ({sorted(rich)[:20]})"
        )

    def rows_of_examples() -> Iterator[Episode]:
        rng = random.Random(seed)
        for number in range(num_episodes):
            drawn = rng.sample(list(rich), num_classes)
            support, query = _evenly(rng, drawn, num_support), _evenly(rng, drawn, num_queries)
            pools = {name: iter(rng.sample(rich[name], (support + query).count(name))) for name in drawn}
            support, query = (
                [_labelled_example(next(pools[name]), name, template) for name in part] for part in (support, query)
            )
            yield {"support": support, "query": query, "group": str(number)}

    return _dataset(rows_of_examples(), {name: Value("string") for name in _labelled_example("", "", template)})


def check_disjoint(episode: Episode, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that no query of an episode is also in its support.

    Args:
        episode: a mapping with `support` and `query`, lists of examples.
        tokenizer: examples are the same if they have the same tokens.

    Raises:
        ValueError: if an example is in both (the message shows its text), or this is no episode.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from hf_iai.data import check_disjoint
        >>> episode = {"support": [{"text": "2"}], "query": [{"prompt": "", "completion": "2"}]}
        >>> check_disjoint(episode, ByT5Tokenizer())
        Traceback (most recent call last):
        ValueError: '2' is in the support and in the query of an episode; ...
    """
    check_episode(episode)
    support, query = ([tokenize_example(e, tokenizer) for e in episode[part]] for part in PARTS)
    check_disjoint_tokens(support, query, tokenizer)


def check_disjoint_tokens(support: list[Tokens], query: list[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
    """As `check_disjoint`, for examples that are already tokenised."""
    read = {tuple(tokens["input_ids"]) for tokens in support}
    for tokens in query:
        if tokens["input_ids"] and tuple(tokens["input_ids"]) in read:
            raise ValueError(
                f"{tokenizer.decode(tokens['input_ids'])!r:.120} is in the support and in the query of an episode; "
                "leave it out of one of them, or the model is scored on what it has just read"
            )


def _text_of(document: str | Mapping[str, Any]) -> str:
    if isinstance(document, str):
        return document
    if not isinstance(document, Mapping) or "text" not in document:
        raise ValueError(f"a document must be a string or a mapping with 'text', got {document!r:.120}")
    return document["text"]


def _group_of(document: str | Mapping[str, Any], number: int) -> str:
    return str(number if isinstance(document, str) else document.get("path", number))


def _class_names(rows: Iterable, label_column: str) -> list[str] | None:
    features = rows.features if isinstance(rows, Dataset | IterableDataset) else None
    feature = (features or {}).get(label_column)
    return feature.names if isinstance(feature, ClassLabel) else None


def _texts_by_name(
    rows: Iterable[Mapping[str, Any]],
    text_column: str,
    label_column: str,
    names: Sequence[str] | Mapping[Any, str] | None,
) -> dict[str, list[str]]:
    # As a dictionary: a sequence would give label -1, which means "unlabelled" in many data sets, its last name.
    names = dict(enumerate(names)) if isinstance(names, Sequence) else names
    texts: dict[str, list[str]] = {}
    seen = set()
    for number, row in enumerate(rows):
        for column in (text_column, label_column):
            if row.get(column) is None:
                raise ValueError(f"row {number} has no {column!r}; its columns are {sorted(row)}")
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str):
            raise ValueError(f"{text_column!r} of row {number} must be a string, got {text!r:.80}")
        name = _name_of(label, names, number)
        content = " ".join(text.split()).casefold()
        if content not in seen:
            seen.add(content)
            texts.setdefault(name, []).append(text)
    return texts


def _name_of(label: Any, names: Mapping[Any, str] | None, number: int) -> str:
    try:
        name = label_of(label)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    if names is not None and label not in names:
        raise ValueError(f"label {label!r} of row {number} has no name in label_names {list(names)[:20]}")
    return name if names is None else names[label]


def _labelled_example(text: str, name: str, template: str | None) -> dict[str, str]:
    if template is None:
        return {"text": text, "label": name}
    return {"prompt": template.replace("{text}", text), "completion": f" {name}"}


def _evenly(rng: random.Random, labels: list[str], count: int) -> list[str]:
    # If the numbers do not divide, some labels get one example more. Support and query each draw which ones.
    order = rng.sample(labels, len(labels))
    drawn = [order[i % len(order)] for i in range(count)]
    rng.shuffle(drawn)
    return drawn


def _dataset(rows: Iterator[Episode], example: dict[str, Any]) -> Dataset | None:
    features = Features({"support": List(example), "query": List(example), "group": Value("string")})
    batches = iter(lambda: list(islice(rows, _ROWS_AT_ONCE)), [])
    parts = [Dataset.from_list(batch, features=features) for batch in batches]
    return concatenate_datasets(parts) if parts else None
