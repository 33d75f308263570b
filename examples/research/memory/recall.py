"""Facts told in ordinary sentences, and asked for after more and more chunks of other sentences.

    python -m examples.research.memory.recall --base .bases/SmolLM2-135M-Instruct [--adapter FOLDER]   # an hour
    python -m examples.research.memory.recall --before 5 --most 16 --work work/memory/later            # told later

Every stream tells facts, such as "The name of the baker is Martin.", and goes on with the weather of invented places;
with `--before` it also begins with that. Trades and names are drawn anew for each stream. A question is the beginning
of a fact after an empty line; an answer is right if the base, which picks the most likely token each time, continues
it with the name. Writes `work/memory/recall.json`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import PeftModel, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.common.bases import SMOLLM2, BaseOption
from examples.research.common.provenance import earlier
from examples.research.common.rows import print_rows, write_rows
from hf_iai import IAIConfig, TaskState

TRADES = "baker mayor doctor teacher smith miller judge painter sailor tailor farmer hunter".split()
NAMES = (
    "Martin Alice Peter Julia Thomas Clara Robert Emma Walter Sophie Henry Laura Oscar Maria Victor Helen Simon Diana "
    "Felix Irene Arthur Monica Daniel Rosa Leonard Grace Hugo Nora Philip Ruth Edgar Vera"
).split()
WEATHER = "rain snow fog hail wind sunshine".split()
TIMES = ["in the morning", "at noon", "in the evening", "at night", "all day", "now and then"]
COUNTS = (1, 4, 16, 64)
STATES = {
    "slots alone (H2O)": {"state_type": "prefix", "accumulation": "attention"},
    "fast weights alone": {
        "state_type": "lora", "signal": "gradients", "head": "normalized", "state_target_modules": "all-linear"
    },
    "both": {"state_type": "prefix+lora"},
    "slots alone, by novelty": {"state_type": "prefix", "accumulation": "novelty"},
    "both, by novelty": {"state_type": "prefix+lora", "accumulation": "novelty"},
}  # fmt: skip
RULES_OF_ADAPTER = {"both": "attention", "both, by novelty": "novelty"}
CONTEXT = "full context"


def place(draw: random.Random) -> str:
    """The name of a place that no text has."""
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)).capitalize()


def stream(seed: int, num_facts: int, num_chars: int, num_before: int) -> tuple[str, str, str, list[tuple[str, str]]]:
    """`num_before` characters of sentences, the facts, `num_chars` of sentences; and the questions with answers."""
    draw = random.Random(seed)
    people = zip(draw.sample(TRADES, num_facts), draw.sample(NAMES, num_facts), strict=True)
    facts = [(f"The name of the {trade} is", name) for trade, name in people]
    told = " ".join(f"{question} {name}." for question, name in facts)
    later = weather(draw, num_chars)
    before = weather(draw, num_before).strip()
    return before, f" {told}" if before else told, later, facts


def weather(draw: random.Random, num_chars: int) -> str:
    """Sentences of at least so many characters."""
    told = ""
    while len(told) < num_chars:
        told += f" In {place(draw)} there is {draw.choice(WEATHER)} {draw.choice(TIMES)}."
    return told


def right(generate: Callable[[Tensor], Tensor], facts: list[tuple[str, str]], tokenizer) -> int:
    """How many questions are answered with the right name."""
    found = 0
    for question, name in facts:
        ids = tokenizer("\n\n" + question, return_tensors="pt")["input_ids"]
        found += tokenizer.decode(generate(ids)[0]).strip().startswith(name)
    return found


def main(
    base: BaseOption = SMOLLM2,
    size: Annotated[int, typer.Option(help="C, tokens of a chunk, and m, slots of the state.")] = 128,
    num_facts: int = 6,
    streams: int = 2,
    most: Annotated[int, typer.Option(help="Chunks after the facts, at most.")] = 64,
    before: Annotated[int, typer.Option(help="Chunks before the facts, about.")] = 0,
    adapter: Annotated[Path | None, typer.Option(help="A memory that was trained, next to the untrained ones.")] = None,
    work: Path = Path("work/memory"),
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    counts = [n for n in COUNTS if n <= most]
    methods = (*STATES, *(f"{name}, {adapter}" for name in RULES_OF_ADAPTER if adapter), CONTEXT)
    scores: dict[str, dict[int, list[int]]] = {name: {n: [] for n in counts} for name in methods}
    path = work / "recall.json"
    settings = {"base": base, "size": size, "num_facts": num_facts, "most": most, "before": before}
    right_so_far = earlier(path, **settings).get("right", {})  # goes on where it was stopped
    scores |= {name: {int(n): s for n, s in at.items()} for name, at in right_so_far.items() if name in methods}
    settings["streams"] = streams
    for method in methods:
        done = len(scores[method][counts[0]])
        model = reader(base, method, size, adapter) if done < streams else None
        for seed in tqdm(range(done, streams), method, disable=None):
            start, told, later, facts = stream(seed, num_facts, 6 * size * (most + 1), 7 * size * before // 2)
            first = (len(tokenizer(start + told)["input_ids"]) - 1) // size  # the chunk in which the last fact ends
            ids = tokenizer(start + told + later, return_tensors="pt")["input_ids"]
            chunks, state = ids.split(size, 1)[: first + most + 1], None
            for number, chunk in enumerate(chunks):
                if method != CONTEXT:
                    state = model.adapt([{"input_ids": chunk}], state=state)
                fits = method != CONTEXT or (number + 2) * size <= model.config.max_position_embeddings
                if number - first in counts and fits:
                    shown = chunks[: number + 1] if method == CONTEXT else ()
                    scores[method][number - first].append(right(partial(said, model, state, shown), facts, tokenizer))
            write_rows(shares(scores, num_facts), path, "research.memory.recall", settings, right=scores)
    print_rows(shares(scores, num_facts))


def reader(base: str, method: str, size: int, adapter: Path | None):
    """The bare base for full context, or an adapter with `size` slots."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if method == CONTEXT:
        return model
    if method not in STATES:
        rule = RULES_OF_ADAPTER[method.removesuffix(f", {adapter}")]
        # Slots have no weights of their own, whatever they are chosen by.
        config = replace(IAIConfig.from_pretrained(adapter), num_state_tokens=size, accumulation=rule)
        return PeftModel.from_pretrained(model, adapter, config=config).eval()
    slots = {} if STATES[method]["state_type"] == "lora" else {"num_state_tokens": size}
    return get_peft_model(model, IAIConfig(task_type="CAUSAL_LM", **STATES[method], **slots)).eval()


def said(model, state: TaskState | None, before: Sequence[Tensor], query: Tensor) -> Tensor:  # (1, T) -> (1, new)
    """The tokens that follow a question, under a state or after all of the text."""
    text = torch.cat([*before, query], 1)
    under = {} if state is None else {"task_state": state}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": model.config.eos_token_id}
    return model.generate(text, attention_mask=torch.ones_like(text), **under, **options)[:, text.shape[1] :]


def shares(scores: dict[str, dict[int, list[int]]], num_facts: int) -> list[dict]:
    """The share of right answers of each method that was asked, after each number of chunks."""
    return [
        {"method": name, **{f"after {n}": sum(s) / (num_facts * len(s)) if s else None for n, s in at.items()}}
        for name, at in scores.items()
    ]


if __name__ == "__main__":
    typer.run(main)
