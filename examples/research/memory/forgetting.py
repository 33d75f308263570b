"""A text that changes its subject: does the memory follow, what does it forget, and what do its weights do elsewhere?

    python -m examples.research.memory.forgetting --base .bases/SmolLM2-135M-Instruct    # 10 minutes a stream, one core

Each stream is 64 chunks of one package, 16 chunks of a novel, then 8 more of the package. Writes
`work/memory/forgetting.json` after each stream, and goes on where it was stopped.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.common.bases import SMOLLM2, BaseOption
from examples.research.common.provenance import earlier
from examples.research.common.rows import print_rows, write_rows
from examples.research.memory import methods, texts
from hf_iai import TaskState

BEFORE, OTHER, AFTER = 64, 16, 8  # chunks


def losses(model, chunks, state: TaskState | None) -> tuple[list[float], TaskState]:
    """The loss of each chunk before it is learned from, and the state after all."""
    found = []
    for after in model.adapt_steps(({"input_ids": chunk} for chunk in chunks), state):
        found.append(float(after.tensors["loss"]))
    return found, after


def main(
    base: BaseOption = SMOLLM2,
    size: Annotated[int, typer.Option(help="C, tokens of a chunk, and m, slots of the state.")] = 256,
    streams: int = 1,
    data: Annotated[Path, typer.Option(help="Folder of books.")] = Path("../shared/data/text"),
    work: Path = Path("work/memory"),
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    code = texts.streams(texts.packages(False), tokenizer, (BEFORE + AFTER) * size, streams, seed=2)
    novels = texts.windows(texts.books(data), tokenizer, OTHER * size, streams, seed=2)
    _, model = methods.memory(AutoModelForCausalLM.from_pretrained(base).eval(), slots=size)
    path = work / "forgetting.json"
    settings = {"base": base, "size": size}
    rows = earlier(path, **settings).get("rows", [])
    for text, novel in tqdm(list(zip(code, novels, strict=True))[len(rows) :], disable=None):
        chunks = torch.tensor([text.ids]).split(size, 1)
        others = torch.tensor([novel.ids]).split(size, 1)
        _, state = losses(model, chunks[:BEFORE], None)
        row = {"package": text.group, "novel": novel.group, **elsewhere(model, state, others)}
        on_novel, later = losses(model, others, state)
        fresh, _ = losses(model, others, None)
        for name, part in {"1-4": slice(1, 5), "9-16": slice(8, 16)}.items():
            row[f"novel chunks {name}: less a fresh state"] = float(np.mean(on_novel[part]) - np.mean(fresh[part]))
        again, _ = losses(model, chunks[BEFORE:], later)
        straight, _ = losses(model, chunks[BEFORE:], state)
        for name, part in {"1": slice(0, 1), "2-8": slice(1, 8)}.items():
            row[f"package chunks {name} again: less without the novel"] = float(
                np.mean(again[part]) - np.mean(straight[part])
            )
        rows.append(row)
        write_rows(rows, path, "research.memory.forgetting", settings)
    print_rows([{"figure": name, **{str(n): row[name] for n, row in enumerate(rows)}} for name in rows[0]])


@torch.no_grad()
def elsewhere(model, state: TaskState, chunks) -> dict[str, float]:
    """The loss of other text under the fast weights alone, less that of the bare base."""
    empty = model.initial_state().tensors
    slots = {name: empty[name] for name in ("key", "value", "worth", "age")}
    weights = replace(state, tensors=state.tensors | slots)
    under = [float(model(input_ids=chunk, labels=chunk, task_state=weights).loss) for chunk in chunks]
    with model.disable_adapter():
        bare = [float(model(input_ids=chunk, labels=chunk).loss) for chunk in chunks]
    return {"novel under the package's fast weights, less without": float(np.mean(under) - np.mean(bare))}


if __name__ == "__main__":
    typer.run(main)
