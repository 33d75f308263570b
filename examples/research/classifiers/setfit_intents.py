"""SetFit, which fine-tunes the encoder, next to the state: 10 intents of a corpus that training has not seen.

    pip install --no-deps setfit sentence-transformers evaluate
    python -m examples.research.classifiers.setfit_intents --data DATA      # 30 minutes on one core

Writes work/intents/setfit.json. The first tasks of `unseen_source`, and its readers. SetFit has its default settings
but for the 20 pairs of each kind for a text, as in its paper. Seconds are those of one thread, from texts to a
classifier; those of SetFit include that it loads the encoder and answers. Finished tasks are kept in
work/intents/setfit, so a killed run goes on.
"""

import json
from pathlib import Path
from time import process_time

import numpy as np
import torch
import typer
from datasets import Dataset
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from transformers import AutoTokenizer

from examples.research.classifiers.intent_tasks import Corpus, embed, load_corpora, read_texts
from examples.research.classifiers.meta_train_intents import DATA, ENCODER, WORK
from examples.research.classifiers.row_training import CHUNK
from examples.research.classifiers.unseen_source import WAYS, new_reader, of_head, stream_tasks, trained_head
from examples.research.common.files import write_json
from examples.research.common.rows import interval, print_rows, write_rows
from hf_iai.commands.classify import installed_encoder
from hf_iai.evaluation.classifiers import logistic_regression
from hf_iai.heads import ClassRows

COUNTS, PAIRS = (1, 5), 20  # chunks; pairs of each kind for a text


def by_setfit(encoder: str, texts: list[str], said: np.ndarray, asked: list[str]) -> np.ndarray:
    from setfit import SetFitModel, Trainer, TrainingArguments  # not installed with hf_iai

    model = SetFitModel.from_pretrained(encoder)
    arguments = TrainingArguments(num_iterations=PAIRS, seed=0, report_to="none", save_strategy="no")
    Trainer(model, arguments, Dataset.from_dict({"text": texts, "label": said.tolist()})).train()
    return np.array(model.predict(asked, show_progress_bar=False))


def by_heads(heads: list[ClassRows], corpus: Corpus, task: tuple[np.ndarray, ...]) -> float:
    """Mean accuracy."""
    return float(np.mean([of_head(head, corpus, task)[0] for head in heads])) / 100


def measure(corpus: Corpus, texts: list[str], task: tuple, heads: list[ClassRows], model, tokenizer, encoder: str):
    """method -> accuracy and seconds; those of the state are for one reader."""
    rows, said, asked, targets = task
    x, queries = corpus.features[rows].numpy(), corpus.features[asked].numpy()
    started = process_time()
    embed([texts[row] for row in rows], model, tokenizer)
    embedded = process_time()
    by_heads(heads[:1], corpus, task)
    read = process_time()
    by_regression = logistic_regression(x, said, queries)
    regressed = process_time()
    answers = by_setfit(encoder, [texts[row] for row in rows], said, [texts[row] for row in asked])
    answered = process_time()
    return {
        "iai": (by_heads(heads, corpus, task), read - started),
        "logistic_regression": (float((by_regression == targets).mean()), regressed - read + embedded - started),
        "setfit": (float((answers == targets).mean()), answered - regressed),
    }


def main(num: int = 3, num_seeds: int = 3, data: Path = DATA, encoder: str = ENCODER, work: Path = WORK) -> None:
    """Measure `num` tasks of each corpus after 20 and 100 examples."""
    torch.set_num_threads(1)
    name, ways = installed_encoder(encoder), WAYS["10 intents"]
    model, tokenizer = new_reader(name).eval(), AutoTokenizer.from_pretrained(name)
    corpora, texts, found = load_corpora(data, work, model, tokenizer), read_texts(data), {}
    for corpus, other in zip(corpora, reversed(corpora), strict=True):
        heads = [trained_head(name, other, seed, work) for seed in range(num_seeds)]
        of_corpus = [example["text"] for example in texts[corpus.name]]
        for number, (_, task) in enumerate(tqdm(stream_tasks(corpus, *ways)[:num], corpus.name)):
            for count in COUNTS:
                file = work / "setfit" / f"{corpus.name}-{number}-{count}.json"
                if not file.exists():
                    part = (*(values[: count * CHUNK] for values in task[:2]), *task[2:])
                    with threadpool_limits(1):
                        write_json(measure(corpus, of_corpus, part, heads, model, tokenizer, name), file)
                for method, values in json.loads(file.read_text()).items():
                    found.setdefault((method, count), []).append(values)
    rows = []
    for (method, count), values in found.items():
        accuracy, seconds = np.array(values).T  # (tasks,)
        gain = 100 * (np.array(found["iai", count])[:, 0] - accuracy)[:, None]
        rows.append({"method": method, "num_chunks": count, "accuracy": 100 * accuracy.mean(), "num_tasks": len(gain)})
        rows[-1] |= {"seconds": seconds.mean()} | interval(gain, "gain")
    write_rows(rows, work / "setfit.json", f"research.classifiers.setfit_intents --num {num} --num-seeds {num_seeds}")
    print_rows(rows)


if __name__ == "__main__":
    typer.run(main)
