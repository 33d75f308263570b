"""Train a memory on many tasks of your own, and measure it on tasks it was not trained on.

    python train_on_tasks.py                     # styles of writing a word, the small base inside hf_iai
    python train_on_tasks.py my-tasks            # a file of JSON lines for each task; every fifth is for the test
    python train_on_tasks.py my-tasks --base HuggingFaceTB/SmolLM2-135M-Instruct --chunk-size 256    # wants a GPU

A line is `{"prompt": ..., "completion": ...}`, both strings or both lists of messages, or `{"messages": [...]}`.
Messages need a base with a chat template. Training changes where the memory starts, its rates, and LoRA layers. The two
tables, before and after it, have the loss of the completions against chunks read, next to the bare base that sees as
many of the latest tokens as the memory has slots ("fewer_shots"). 100 steps take a few minutes on a CPU.
"""

import json
import random
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_iai import IAIConfig, IAITrainer, IAITrainingArguments, embedded_base, evaluate_curve

Task = list[dict]  # its examples
WORDS = "name size path file line text code list item date hour user page word data test node tree root leaf".split()
STYLES = product(
    ("<", "# ", "get_", "is ", "self."), (">", "()", "!", ";", " = None"), (str.upper, str.title, str.lower)
)


def tasks_of(folder: Path | None) -> dict[str, Task]:
    """The tasks of a folder by name; without a folder, ways to write a word."""
    if folder is not None:
        files = sorted(folder.glob("*.jsonl"))
        return {file.stem: [json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files}
    write = lambda word, a, b, case: {"prompt": f"{word} ->", "completion": f" {a}{case(word)}{b}\n"}  # noqa: E731
    return {f"{a}{b}{case.__name__}": [write(word, a, b, case) for word in WORDS] for a, b, case in STYLES}


def episodes(tasks: dict[str, Task], num_draws: int) -> Dataset:
    """Each task some times: all examples but one to read, in random order, and that one to predict."""
    draw, drawn = random.Random(0), []
    for name, task in [item for item in tasks.items() for _ in range(num_draws)]:
        query, *support = draw.sample(task, len(task))
        drawn.append({"support": support, "query": [query], "group": name})
    return Dataset.from_list(drawn).shuffle(seed=0)


def main(
    folder: Annotated[Path | None, typer.Argument(help="Folder with a file of JSON lines for each task.")] = None,
    base: Annotated[str | None, typer.Option(help="Hub id or folder of the base.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the adapter and the curve.")] = Path("my-memory"),
    steps: int = 100,
    chunk_size: int = 32,
    max_chunks: int = 4,
) -> None:
    tasks = tasks_of(folder)
    names = random.Random(0).sample(sorted(tasks), len(tasks))
    if len(names) < 2:
        raise typer.BadParameter(
            f"{folder} has {len(names)} .jsonl files: give at least 2, one of them is for the test"
        )
    test, train = names[::5], [name for i, name in enumerate(names) if i % 5]

    base = base or embedded_base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    values = {"num_state_tokens": chunk_size, "target_modules": "all-linear"}
    config = IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora", **values)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)

    held_out = episodes({name: tasks[name] for name in test}, 4)
    counts = [n for n in (0, 1, 2, 4, 8, 16) if n <= max_chunks]
    evaluate_curve(model, held_out, counts, tokenizer=tokenizer, chunk_size=chunk_size).print()
    args = IAITrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        chunk_size=chunk_size,
        max_chunks=max_chunks,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    data = episodes({name: tasks[name] for name in train}, 40)
    IAITrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()
    model.save_pretrained(output)
    evaluate_curve(model, held_out, counts, tokenizer=tokenizer, chunk_size=chunk_size).print()
    print(f"adapter: {output}")


if __name__ == "__main__":
    typer.run(main)
