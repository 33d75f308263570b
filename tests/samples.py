"""Small data for the tests: a tokenizer, episodes, training arguments, labelled texts, and vectors."""

import torch
from datasets import Dataset
from tiny import CLASSES, TARGETS, VECTOR_WIDTH, ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hf_iai import IAITrainingArguments, chunk_vectors

# ---------------------------------------------------------------- texts, and training on them

CHUNK, CHUNKS = 8, 4  # tokens of a chunk, and chunks of an episode


def tokenizer() -> PreTrainedTokenizerFast:
    """Of words: `w10` is token 10."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 97)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def episodes(num: int = 24) -> Dataset:
    rows = ids(num, (CHUNKS + 1) * CHUNK)
    support = [[{"input_ids": row[: CHUNKS * CHUNK].tolist()}] for row in rows]
    return Dataset.from_dict({"support": support, "query": [[{"input_ids": row[-CHUNK:].tolist()}] for row in rows]})


def arguments(folder, **values) -> IAITrainingArguments:
    defaults = {
        "output_dir": str(folder), "chunk_size": CHUNK, "max_chunks": CHUNKS, "max_steps": 6, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 3, "report_to": [], "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    return IAITrainingArguments(**(defaults | values))


# ---------------------------------------------------------------- labelled texts

BYTES = ByT5Tokenizer()  # of the encoders in `tiny`
VERBS = {"cat": "purrs", "dog": "barks", "owl": "hoots", "cow": "moos"}
ROWS = [{"text": f"{verb} " * (1 + i % 3) + str(i), "label": name} for i in range(6) for name, verb in VERBS.items()]
QUERIES = BYTES([f"{verb} 77" for verb in VERBS.values()] + ["hoots"], padding=True, return_tensors="pt")

# ---------------------------------------------------------------- vectors


def vector_examples(num: int, likelihood: str, seed: int = 0):
    """Vectors (num, w), and classes (num,) or real targets (num, o)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, VECTOR_WIDTH, generator=generator)
    labels = torch.arange(num) % CLASSES  # so that the first three are of class 0, 1 and 2
    return x, labels if likelihood == "softmax" else torch.randn(num, TARGETS, generator=generator)


def vector_stream(likelihood: str, seed: int = 0, num: int = 14, chunk_size: int = 6) -> list[dict]:
    return list(chunk_vectors(*vector_examples(num, likelihood, seed), chunk_size=chunk_size))


def vector_queries(num: int = 4, seed: int = 9) -> dict[str, torch.Tensor]:
    return {"inputs_embeds": torch.randn(num, VECTOR_WIDTH, generator=torch.Generator().manual_seed(seed))}
