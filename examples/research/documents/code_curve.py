"""The main curve: source code of packages that neither the base nor the adapter was trained on.

    python -m examples.research.documents.code_curve train --seed 0       # 17 minutes on a core with bfloat16
    python -m examples.research.documents.code_curve evaluate --seeds 0,1,2

`train` trains the adapter and a static state. `evaluate` joins the seeds and writes `work/code/curve.json` and two
pictures. Chunks have 128 tokens and the state has 128 slots, 127 of them for single tokens. A test window has 16 chunks
and a query; windows do not overlap. Intervals are bootstrapped over files. Settings were chosen on three of the
held-out packages (`evaluate --validation`); the test is on the others.
"""

from pathlib import Path

import typer
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from examples.research.documents.adapt_to_documents import report, train_reader
from hf_iai import embedded_base, episodes_from_documents
from hf_iai.embedded import library_documents
from hf_iai.evaluation import Curve, evaluate_curve

CHUNK, SLOTS, KEPT, MAX_CHUNKS = 128, 128, 127, 8
VALIDATION = ["asyncio", "email", "rich"]
COUNTS = (0, 1, 2, 4, 8, 16)
WORK = Path("work/code")

app = typer.Typer(help=__doc__)


def held_out_documents(validation: bool = False):
    """Documents of the held-out packages: with `validation` those that settings were chosen on, else all others."""
    return (d for d in library_documents("held_out") if (d["package"] in VALIDATION) == validation)


def unread_documents():
    """Files of the training packages that the base was not trained on: it saw only 3 MB of the largest packages."""
    read = {d["path"] for d in library_documents("train")}
    found = {d["path"]: d for seed in (1, 2, 3) for d in library_documents("train", seed=seed)}
    return (document for path, document in found.items() if path not in read)


def windows(documents, tokenizer, num_chunks: int, num: int, seed: int, per_file: int = 3):
    """`num` windows of documents, at most `per_file` of each."""
    episodes = episodes_from_documents(
        documents, tokenizer, chunk_size=CHUNK, num_chunks=num_chunks, max_per_document=per_file, seed=seed
    )
    return episodes.shuffle(seed).select(range(min(num, len(episodes))))


@app.command()
def train(seed: int = 0, steps: int = 600, batch_size: int = 8, lr: float = 3e-4, work: Path = WORK) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    episodes = windows(unread_documents(), tokenizer, MAX_CHUNKS, steps * batch_size, seed, per_file=8)
    common = {"chunk_size": CHUNK, "slots": SLOTS, "kept": KEPT, "steps": steps, "batch_size": batch_size}
    common |= {"lr": lr, "state_lr": 10 * lr, "seed": seed, "kl_weight": 1.0}
    for name, max_chunks in (("reader", MAX_CHUNKS), ("static", 0)):
        output = work / f"{name}-{seed}"
        train_reader(embedded_base(), tokenizer, episodes, output, max_chunks=max_chunks, **common)


@app.command()
def evaluate(seeds: str = "0,1,2", num: int = 320, validation: bool = False, work: Path = WORK) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    test = windows(held_out_documents(validation), tokenizer, max(COUNTS), num, seed=0)
    curves = []
    for seed in map(int, seeds.split(",")):
        reader, static = (
            AutoPeftModelForCausalLM.from_pretrained(work / f"{name}-{seed}" / "adapter").eval()
            for name in ("reader", "static")
        )
        curves.append(
            evaluate_curve(reader, test, COUNTS, tokenizer=tokenizer, chunk_size=CHUNK, seed=seed, static_model=static)
        )
    report(
        Curve.concat(curves),
        work / "validation" if validation else work,
        command=f"python -m examples.research.documents.code_curve evaluate --seeds {seeds}"
        + " --validation" * validation,
        windows=len(test),
        files=len(set(test["group"])),
        max_windows=num,
    )


if __name__ == "__main__":
    app()
