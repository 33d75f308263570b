"""What the memory of a real base costs: reading a chunk, answering under a state, bytes of its parts.

    python -m examples.benchmarks.memory --base .bases/SmolLM2-135M-Instruct    # 3 minutes; work/memory/cost.json

All times are taken in turn in one run, and every ratio is the median over the turns.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from examples.research.common.bases import SMOLLM2, BaseOption
from examples.research.common.rows import print_rows, write_rows
from examples.research.memory.methods import state_bytes
from hf_iai import IAIConfig

QUERY = 64  # tokens


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main(
    base: BaseOption = SMOLLM2,
    size: Annotated[int, typer.Option(help="C, tokens of a chunk, and m, slots of the state.")] = 256,
    turns: int = 7,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; by default as many as it takes.")] = None,
    work: Path = Path("work/memory"),
) -> None:
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    model = get_peft_model(
        model, IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora", num_state_tokens=size)
    ).eval()
    text = torch.randint(model.base_model.reader.base.vocab_size, (3, 1, size))
    state = model.adapt([{"input_ids": chunk} for chunk in text[:2]])
    chunk, query = {"input_ids": text[2]}, {"input_ids": text[2, :, :QUERY]}
    reader, fewer = model.base_model.reader, {}
    with (
        torch.no_grad(),
        reader.core.state.slots.under(
            reader.base, reader.core.state.slots.visible(reader.base, state.tensors)
        ) as prefix,
    ):
        mask = torch.ones_like(chunk["input_ids"])
        fewer["plain"] = lambda: reader.base.answer(prefix, chunk["input_ids"], mask)
        jobs = {
            "plain forward of a chunk behind the slots": fewer["plain"],
            "reading a chunk": lambda: model.adapt([chunk], state=state),
            "query of 64 tokens, no state": lambda: model(**query),
            "query of 64 tokens, state": lambda: model(**query, task_state=state),
        }
        for job in jobs.values():
            job()
        times = [{name: seconds(job) for name, job in jobs.items()} for _ in range(turns)]
    rows = [{"figure": f"seconds: {name}", "value": median(t[name] for t in times)} for name in jobs]
    names = list(jobs)
    for title, over, under in (("reading over plain forward", 1, 0), ("query with state over without", 3, 2)):
        rows.append({"figure": title, "value": median(t[names[over]] / t[names[under]] for t in times)})
    rows += [{"figure": f"bytes, at two a number: {n}", "value": b} for n, b in state_bytes(model).items()]
    print_rows(rows)
    settings = {"base": base, "size": size, "turns": turns, "threads": torch.get_num_threads()}
    write_rows(rows, work / "cost.json", "benchmarks.memory", settings)


if __name__ == "__main__":
    typer.run(main)
