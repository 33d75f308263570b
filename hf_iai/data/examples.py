"""One example in any of TRL's formats, as token ids and labels. Also the types that this folder shares."""

import re
from collections.abc import Mapping
from itertools import compress, takewhile
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..tensors import NO_LOSS

Example = Mapping[str, Any]  # see `tokenize_example`
Episode = Mapping[str, Any]  # {"support": [example, ...], "query": [example, ...]}
Chunk = Mapping[str, Any]  # tensors: "input_ids" or "inputs_embeds", "attention_mask", "labels"; see `chunk_examples`
Tokens = dict[str, list[int]]  # "input_ids" and "labels", equally long

_KEYS_OF_FORMAT = {"prompt": ("prompt", "completion"), "text": ("text",), "messages": ("messages",)}


def tokenize_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Turn one example into token ids, and labels that are -100 where no loss is taken.

    | example                                             | tokens with a loss                                  |
    |-----------------------------------------------------|-----------------------------------------------------|
    | `{"prompt": str, "completion": str}`                | the completion                                      |
    | `{"prompt": [message...], "completion": [...]}`     | the completion, as the chat template renders it     |
    | `{"text": str}`                                     | all                                                 |
    | `{"messages": [message...]}`                        | the assistant's, if the template marks them with    |
    |                                                     | `{% generation %}`; else all                        |
    | `{"input_ids": [int...]}`, optionally `"labels"`    | as given; without labels, all                       |

    No special tokens are added, except those of the chat template. Other keys are ignored, and a key whose value is
    None counts as absent. If an example has `input_ids`, its other formats are ignored. Tokens whose `attention_mask`
    is 0 are left out.

    Args:
        example: a mapping in one of the formats above.
        tokenizer: needs a chat template if the example has messages.

    Returns:
        `{"input_ids": [...], "labels": [...]}`, two lists of equal length.

    Raises:
        ValueError: if the example has none or several of the formats, a value has the wrong type, ids and labels differ
            in length, or the tokenizer lacks a chat template.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from hf_iai.data import tokenize_example
        >>> tokenize_example({"prompt": "1+1=", "completion": "2"}, ByT5Tokenizer())
        {'input_ids': [52, 46, 52, 64, 53], 'labels': [-100, -100, -100, -100, 53]}

    Source: the formats are those of TRL, https://huggingface.co/docs/trl/dataset_formats
    """
    kind = format_of(example)
    if kind == "input_ids":
        return _given_tokens(example)
    if kind == "messages":
        return _message_tokens(example["messages"], tokenizer)
    if kind == "text":
        ids = text_ids(example["text"], tokenizer)
        return {"input_ids": ids, "labels": list(ids)}
    prompt, completion = example["prompt"], example["completion"]
    if not isinstance(prompt, str):
        prompt, completion = _render_messages(prompt, completion, tokenizer)
    return _completion_tokens(prompt, completion, tokenizer)


def with_end(tokens: Tokens, example: Example, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Add the end-of-sequence token if the example is plain text.

    It separates the examples of a stream, and from it a model learns where a completion stops. A chat template ends its
    own messages, and given ids stay as they are.

    Args:
        tokens: what `tokenize_example` returned.
        example: the example itself.
        tokenizer: may have no end-of-sequence token; then nothing is added.
    """
    ids, end = tokens["input_ids"], tokenizer.eos_token_id
    kind = format_of(example)
    is_text = kind == "text" or (kind == "prompt" and isinstance(example["prompt"], str))
    if not is_text or end is None or not ids or ids[-1] == end:
        return tokens
    return {"input_ids": [*ids, end], "labels": [*tokens["labels"], end]}


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise a text of any length without special tokens, truncation, or a warning about the model's window."""
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, got {type(text).__name__} {text!r:.80}")
    # For an empty text some tokenizers return floats.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def format_of(example: Example) -> str:
    """The key that tells the format of an example: "input_ids", "text", "messages" or "prompt".

    Raises:
        ValueError: if it has none of the formats of `tokenize_example`, or several.
    """
    if not isinstance(example, Mapping):
        raise ValueError(f"an example must be a mapping, got {type(example).__name__} {example!r:.80}")
    keys = {key for key, value in example.items() if value is not None}
    if "input_ids" in keys:
        return "input_ids"
    found = [kind for kind, needed in _KEYS_OF_FORMAT.items() if keys.intersection(needed)]
    if len(found) != 1 or not keys.issuperset(_KEYS_OF_FORMAT[found[0]]):
        raise ValueError(
            f"an example must have exactly one of prompt + completion, text, messages or input_ids; "
            f"got the keys {sorted(map(str, keys))}"
        )
    kinds = {isinstance(example[key], str) for key in ("prompt", "completion")} if found == ["prompt"] else set()
    if len(kinds) > 1:
        raise ValueError(
            f"prompt and completion must both be strings or both be lists of messages, got "
            f"{type(example['prompt']).__name__} and {type(example['completion']).__name__}"
        )
    return found[0]


def _given_tokens(example: Example) -> Tokens:
    ids = _row(example, "input_ids")
    labels = ids if example.get("labels") is None else _row(example, "labels")
    mask = [1] * len(ids) if example.get("attention_mask") is None else _row(example, "attention_mask")
    for key, row in (("labels", labels), ("attention_mask", mask)):
        if len(row) != len(ids):
            raise ValueError(f"{key} has {len(row)} entries for {len(ids)} input_ids; give one for each")
    return {"input_ids": list(compress(ids, mask)), "labels": list(compress(labels, mask))}


def _row(example: Example, key: str) -> list[int]:
    row = torch.as_tensor(example[key], dtype=torch.long)
    if row.ndim != 1:
        raise ValueError(f"{key} of an example must be one row of integers, got shape {tuple(row.shape)}")
    return row.tolist()


def _message_tokens(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    # The mask needs to know which characters a token covers, which only fast tokenizers do.
    marked = tokenizer.is_fast and re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template())
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=bool(marked))
    ids = rendered["input_ids"]
    learned = rendered["assistant_masks"] if marked else [1] * len(ids)
    return {"input_ids": ids, "labels": [i if keep else NO_LOSS for i, keep in zip(ids, learned, strict=True)]}


def _render_messages(prompt: list[dict], completion: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    # The prompt ends where generation would begin. Some templates write that place differently if an answer follows,
    # for example with an opening "think" tag. So the prompt is the beginning that the two renderings share.
    asks = bool(prompt) and prompt[-1]["role"] != "assistant"
    alone = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=asks)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False)))
    return whole[:shared], whole[shared:]


def _completion_tokens(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    # The prompt must have the same tokens as when a model generates from it. If tokenising the whole merges characters
    # across the boundary, the two parts are tokenised separately. Each token then belongs to one of the two.
    given, whole = text_ids(prompt, tokenizer), text_ids(prompt + completion, tokenizer)
    if whole[: len(given)] != given:
        whole = given + text_ids(completion, tokenizer)
    return {"input_ids": whole, "labels": [NO_LOSS] * len(given) + whole[len(given) :]}
