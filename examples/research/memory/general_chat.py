"""50 general questions to an instruct model: its answers under an empty state, and under one that has read code.

    python -m examples.research.memory.general_chat --base .bases/SmolLM2-135M-Instruct [--adapter FOLDER]

The first 16 tokens of each answer, the most likely one each time, beside those of the bare base. The code is the first
stream of `curve measure memory --text streams`. Writes `work/memory/general_chat.json`, with every answer that differs.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.common.bases import SMOLLM2, BaseOption
from examples.research.common.rows import print_rows, write_rows
from examples.research.memory import texts
from hf_iai import IAIConfig, TaskState

NEW = 16  # tokens of an answer
WHAT_IS = "photosynthesis;gravity;a volcano;inflation;a haiku;democracy;an atom;the water cycle;a fossil;an eclipse"
NAME = "three fruits;two oceans;a mammal that flies;a famous painter;the largest planet;four colours;a metal;a season"
HOW = (
    "boil an egg;fall asleep faster;plant a tree;clean a window;save money;learn a language;make tea;tie a knot;"
    "write a letter;stay healthy;fix a flat tyre;choose a book"
)
WHY = (
    "is the sky blue;do leaves fall;do we dream;is the sea salty;do cats purr;do birds sing;is exercise good;do we yawn"
)
WRITE = (
    "a joke;a short poem about rain;a greeting for a friend;a slogan for a bakery;a story about a fox;a shopping list"
)
FACTS = (
    "What is the capital of France?;How many days has a leap year?;Who wrote Hamlet?;What is 7 times 8?;"
    "Which language is spoken in Brazil?;At what temperature does water boil?"
)
FORMS = {"What is {}?": WHAT_IS, "Name {}.": NAME, "How do I {}?": HOW, "Why {}?": WHY, "Write {}.": WRITE, "{}": FACTS}
QUESTIONS = [form.format(part) for form, parts in FORMS.items() for part in parts.split(";")]


def main(
    base: BaseOption = SMOLLM2,
    adapter: Annotated[Path | None, typer.Option(help="A memory that was trained; else an untrained one.")] = None,
    size: Annotated[int, typer.Option(help="C, tokens of a chunk, and m, slots of the state.")] = 256,
    chunks: Annotated[int, typer.Option(help="Chunks of code.")] = 64,
    num: Annotated[int, typer.Option(help="How many of the questions.")] = len(QUESTIONS),
    work: Path = Path("work/memory"),
) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    config = IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora", num_state_tokens=size)
    model = (get_peft_model(model, config) if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
    code = texts.streams(texts.packages(validation=False), tokenizer, chunks * size, 1)[0]
    pieces = [{"input_ids": piece} for piece in torch.tensor([code.ids]).split(size, 1)]
    states = {"empty": model.initial_state(), f"after {chunks} chunks of code": model.adapt(tqdm(pieces, disable=None))}
    rows = []
    for question in tqdm(QUESTIONS[:num], disable=None):
        bare = answer(model, tokenizer, question, None)
        for name, state in states.items():
            rows.append({"state": name, "question": question, "bare": bare})
            rows[-1]["answer"] = answer(model, tokenizer, question, state)
    same = [
        {
            "state": name,
            "questions": num,
            "same answer": sum(r["bare"] == r["answer"] for r in rows if r["state"] == name),
        }
        for name in states
    ]
    print_rows(same)
    differing = [row for row in rows if row["bare"] != row["answer"]]
    settings = {"base": base, "adapter": adapter and str(adapter), "size": size, "chunks": chunks, "code": code.group}
    command = "research.memory.general_chat"
    write_rows(same, work / "general_chat.json", command, settings, differing=differing)


def answer(model, tokenizer, question: str, state: TaskState | None) -> str:
    """The first tokens of the answer to a question, under a state or by the bare base."""
    message = [{"role": "user", "content": question}]
    query = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    under = {} if state is None else {"task_state": state}
    ids = model.generate(**query, **under, max_new_tokens=NEW, do_sample=False)[0, query["input_ids"].shape[1] :]
    return tokenizer.decode(ids)


if __name__ == "__main__":
    typer.run(main)
