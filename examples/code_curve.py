"""The real curve: source code of packages that neither the base nor the adapter was trained on.

    python examples/code_curve.py train --seed 0       # trains adapter and static state, about 20 minutes on 2 cores
    python examples/code_curve.py evaluate --seeds 0,1,2

Chunks of 128 tokens, m = 64 slots, 48 of them for the last tokens; windows of 16 chunks and a query, not overlapping;
intervals are bootstrapped over files. `evaluate` joins the seeds and writes `work/code/curve.json` and two pictures.
"""

from pathlib import Path

import typer
from adapt_to_documents import report, train_reader
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from hf_iai import embedded_base, episodes_from_documents
from hf_iai.embedded import library_documents
from hf_iai.evaluation import Curve, evaluate_curve

CHUNK, SLOTS, RECENT, MAX_CHUNKS = 128, 64, 48, 8
COUNTS = (0, 1, 2, 4, 8, 16)
WORK = Path("work/code")

app = typer.Typer(help=__doc__)


def windows(split: str, tokenizer, num_chunks: int, num: int, seed: int):
    """`num` windows of a split, at most three a file."""
    episodes = episodes_from_documents(
        library_documents(split), tokenizer, chunk_size=CHUNK, num_chunks=num_chunks, max_per_document=3, seed=seed
    )
    return episodes.shuffle(seed).select(range(min(num, len(episodes))))


@app.command()
def train(seed: int = 0, steps: int = 800, batch_size: int = 8, lr: float = 3e-3, work: Path = WORK) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    episodes = windows("train", tokenizer, MAX_CHUNKS, steps * batch_size, seed)
    common = {"chunk_size": CHUNK, "slots": SLOTS, "recent": RECENT, "steps": steps, "batch_size": batch_size}
    common |= {"lr": lr, "seed": seed, "kl_weight": 1.0}
    for name, max_chunks in (("reader", MAX_CHUNKS), ("static", 0)):
        output = work / f"{name}-{seed}"
        train_reader(embedded_base(), tokenizer, episodes, output, max_chunks=max_chunks, **common)


@app.command()
def evaluate(seeds: str = "0,1,2", num: int = 320, work: Path = WORK) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    test = windows("held_out", tokenizer, max(COUNTS), num, seed=0)
    curves = []
    for seed in map(int, seeds.split(",")):
        reader, static = (
            AutoPeftModelForCausalLM.from_pretrained(work / f"{name}-{seed}" / "adapter").eval()
            for name in ("reader", "static")
        )
        curves.append(
            evaluate_curve(reader, test, COUNTS, tokenizer=tokenizer, chunk_size=CHUNK, seed=seed, static_model=static)
        )
    files = len(set(test["group"]))
    report(
        Curve.concat(curves), work, command=f"code_curve.py evaluate --seeds {seeds}", windows=len(test), files=files
    )


if __name__ == "__main__":
    app()
