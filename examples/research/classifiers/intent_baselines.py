"""Baselines of `meta_train_intents`, refitted on all examples so far; the accuracies of each task are kept on disk."""

import json
from pathlib import Path

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from examples.research.classifiers.row_training import CHUNK
from examples.research.common.files import write_json
from hf_iai.evaluation.classifiers import CLASSIFIERS


def baseline_accuracies(tasks: list[tuple], counts: list[int], file: Path) -> dict[str, list[list[float]]]:
    """method -> accuracies (tasks, counts); read from `file` if it exists."""
    if not file.exists():
        with threadpool_limits(1):  # fits are small: more threads wait for each other
            rows = [_of_task(*task, counts) for task in tqdm(tasks, file.stem)]
        found = {method: [row[method] for row in rows] for method in CLASSIFIERS}
        write_json(found, file, indent=None)
    return json.loads(file.read_text())


def _of_task(corpus, task: tuple, counts: list[int]) -> dict[str, list[float]]:
    rows, said, asked, targets = task
    x, queries = corpus.features[rows].numpy(), corpus.features[asked].numpy()
    sizes = [n * CHUNK for n in counts]
    return {
        method: [float((predict(x[:s], said[:s], queries) == targets).mean()) for s in sizes]
        for method, predict in CLASSIFIERS.items()
    }
