"""Quality against bytes: variants of the memory on packages for choosing settings, less the latest m tokens in context.

    python -m examples.research.memory.table                                                    # 15 minutes on one core
    python -m examples.research.memory.table --base .bases/SmolLM2-135M-Instruct --size 256 --num 4 --chunks 9

Writes `work/memory/table_NAME.json`. Bytes are those of all tensors of a saved state, at two a number.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.common.rows import print_rows, write_rows
from examples.research.memory import methods, texts
from hf_iai import embedded_base
from hf_iai.embedded import EMBEDDED_NAME
from hf_iai.evaluation import bootstrap_mean

SLOTS_ALONE = {"state_type": "prefix", "accumulation": "attention"}
VARIANTS = {
    "default": {},
    "rate 3e-3": {"initial_rate": 3e-3},
    "rate 1.2e-2": {"initial_rate": 1.2e-2},
    "rank 2": {"state_r": 2},
    "rank 4": {"state_r": 4},
    "rank 16": {"state_r": 16},
    "down_proj alone": {"state_target_modules": ["down_proj"]},
    "two steps a chunk": {"write_steps": 2},
    "two steps of half the rate": {"write_steps": 2, "initial_rate": 3e-3},
    "read behind nothing": {"read_behind": "start"},
    "slots by surprisal": {"accumulation": "surprisal"},
    "slots: the latest tokens": {"accumulation": "recent"},
    "sgd, rate 1": {"head": "sgd", "initial_rate": 1.0},
    "slots alone: by attention": SLOTS_ALONE,
    "slots alone: read behind nothing": SLOTS_ALONE | {"read_behind": "start"},
}
BLOCKS = {"1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5-8": (5, 8), "9-16": (9, 16)}


def main(
    base: Annotated[str, typer.Option(help="Hub id or folder of the base.")] = EMBEDDED_NAME,
    size: Annotated[int, typer.Option(help="C, tokens of a chunk, and m, slots of the state.")] = 128,
    num: Annotated[int, typer.Option(help="Windows of single files.")] = 24,
    chunks: Annotated[int, typer.Option(help="Chunks of each window.")] = 17,
    only: Annotated[str, typer.Option(help="Names of variants with commas between them; all by default.")] = "",
    work: Path = Path("work/memory"),
) -> None:
    folder = embedded_base() if base == EMBEDDED_NAME else base
    tokenizer = AutoTokenizer.from_pretrained(folder)
    drawn = texts.windows(texts.packages(validation=True), tokenizer, chunks * size, num)
    groups, windows = np.array([text.group for text in drawn]), [torch.tensor([text.ids]) for text in drawn]
    bare = AutoModelForCausalLM.from_pretrained(folder).eval()
    fewer = np.array([methods.context(bare, size, begin=False)(ids, size) for ids in windows])
    rows = []
    for name in tqdm([name for name in VARIANTS if not only or name in only.split(",")], disable=None):
        read, model = methods.memory(AutoModelForCausalLM.from_pretrained(folder).eval(), slots=size, **VARIANTS[name])
        paired = np.array([read(ids, size) for ids in windows]) - fewer  # (N, n)
        row = {"variant": name, "bytes": methods.state_bytes(model)["all"]}
        for at, (first, last) in BLOCKS.items():
            if first < chunks:
                row[at] = float(paired[:, first : last + 1].mean())
        mean, low, high = bootstrap_mean(paired[:, 1:], groups)
        rows.append(row | {"all": mean, "low": low, "high": high})
        settings = {"base": base, "size": size, "num": num, "chunks": chunks}
        name = "embedded" if base == EMBEDDED_NAME else Path(base).name
        write_rows(rows, work / f"table_{name}.json", "research.memory.table", settings)
    print_rows(rows)


if __name__ == "__main__":
    typer.run(main)
