"""Facts from early in a long conversation, asked at its end: a state of fixed size against a truncated window.

    python -m examples.research.recall.chat_memory train --seed 0          # the reader
    python -m examples.research.recall.chat_memory train-window --seed 0   # the baseline: LoRA on the truncated window
    python -m examples.research.recall.chat_memory evaluate --seeds 0      # writes work/chat/chat.json and chat.png
    python -m examples.research.recall.chat_memory talk --seed 0           # one conversation, turn by turn

The user tells 8 facts (`A b`: a letter and its meaning), all within the first quarter of the small talk. Two facts are
told again with another value. At the end every fact is asked (`A`). The embedded base reads the conversation as
`{"messages": ...}` in chunks of 16 tokens; its window holds 32 chunks. Every conversation is drawn anew, so nothing but
what was read can answer. The baseline has the same base and LoRA rank, was trained on the same conversations for 200
steps (to a loss of 0.03 nats per token), and sees the last 464 tokens themselves.
"""

import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import typer
from datasets import IterableDataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from examples.research.common.plots import draw_curve, finish, panels, save
from examples.research.common.rows import chosen, grouped, interval, with_range, write_rows
from examples.research.common.training import train_adapter
from hf_iai import IAIConfig, chunk_examples, embedded_base
from hf_iai.data import tokenize_example

FACTS, RETOLD, CHUNK, SLOTS = 8, 2, 16, 16
END = 464  # tokens of a conversation that fit the window with all questions and answers
FACTS_ALONE, MAX_CHUNKS, COUNTS = 2, 16, (2, 4, 8, 16, 24, 32, 48, 64, 96)
KEYS, VALUES = string.ascii_uppercase, string.ascii_lowercase
WORDS = "how are you today it is nice and warm here we had soup then went out to see the sea again maybe later".split()
# A user's line and the answer to it are one line of text, which is how the base writes what it recalls.
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ '\\n' if m['role'] == 'assistant' }}{% endfor %}"
WORK = Path("work/chat")

app = typer.Typer(help=__doc__)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def exchange(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def small_talk(rng: np.random.Generator) -> list[dict]:
    words = [WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(3, 7))]
    return exchange(" ".join(words[:-1]), f" {words[-1]}")


def conversation(rng: np.random.Generator, tokenizer, num_chunks: int) -> tuple[list[dict], dict[str, str]]:
    """Messages that fill `num_chunks` chunks, and the facts at the end: the newest value of every key."""
    length = lambda turn: len(tokenizer.apply_chat_template(turn)["input_ids"])  # noqa: E731
    keys = rng.permutation(list(KEYS))[:FACTS]
    told = [*rng.permutation(keys), *rng.permutation(keys)[:RETOLD]]
    facts, turns = {}, []
    for key in told:
        value = rng.choice([v for v in VALUES if v != facts.get(str(key))])
        facts[str(key)] = str(value)
        turns.append(exchange(str(key), f" {value}"))
    room = num_chunks * CHUNK - sum(map(length, turns))
    talk = []
    while (room := room - length(turn := small_talk(rng))) >= 0:
        talk.append(turn)
    early = max(1, len(talk) // 4)  # facts are spread over the first quarter of the small talk
    for place, turn in zip(np.sort(rng.integers(0, early + 1, len(turns)))[::-1], turns[::-1], strict=True):
        talk.insert(place, turn)
    return [message for turn in talk for message in turn], facts


def question(key: str, value: str) -> dict:
    user, assistant = exchange(key, f" {value}")
    return {"prompt": [user], "completion": [assistant]}


def conversations(num: int, seed: int) -> Iterator[dict]:
    """Episodes for training: facts alone at first, then more and more small talk between them."""
    tokenizer = chat_tokenizer()
    for i in range(num):
        rng = np.random.default_rng((seed, i))
        grown = np.clip((i / num - 0.4) / 0.35, 0, 1)
        longest = FACTS_ALONE + round(grown * (MAX_CHUNKS - FACTS_ALONE))
        messages, facts = conversation(rng, tokenizer, int(rng.integers(FACTS_ALONE, longest + 1)))
        yield {"support": [{"messages": messages}], "query": [question(*fact) for fact in facts.items()]}


@app.command()
def train(seed: int = 0, steps: int = 800, batch_size: int = 16, lr: float = 1e-3, work: Path = WORK) -> None:
    """Train an adapter that remembers what it was told."""
    set_seed(seed)
    config = IAIConfig(
        task_type="CAUSAL_LM", num_state_tokens=SLOTS, delta_rule=True, r=16, lora_alpha=32, target_modules="all-linear"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(embedded_base()), config)
    train_adapter(
        model,
        IterableDataset.from_generator(conversations, gen_kwargs={"num": steps * batch_size, "seed": 1000 + seed}),
        chat_tokenizer(),
        work / f"reader-{seed}",
        steps=steps,
        seed=seed,
        chunk_size=CHUNK,
        min_chunks=MAX_CHUNKS,  # a question may be about any chunk
        max_chunks=MAX_CHUNKS,
        halve_chunks=0.0,
        scored_states="last",
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=30,
    )


def end_of(messages: list[dict], tokenizer) -> list[int]:
    """The end of a conversation that fits the window together with a question."""
    return tokenizer.apply_chat_template(messages)["input_ids"][-END:]


def seen_ends(num: int, seed: int) -> Iterator[dict]:
    """The same conversations as text: the end of each, then all questions with answers; the answers have the loss."""
    tokenizer = chat_tokenizer()
    for episode in conversations(num, seed):
        row = {"input_ids": end_of(episode["support"][0]["messages"], tokenizer)}
        row["labels"] = [-100] * len(row["input_ids"])
        for asked in episode["query"]:
            for name, ids in tokenize_example(asked, tokenizer).items():
                row[name] = row[name] + ids
        yield row


@app.command()
def train_window(seed: int = 0, steps: int = 200, batch_size: int = 16, lr: float = 1e-3, work: Path = WORK) -> None:
    """Train plain LoRA to answer from the end of the conversation."""
    set_seed(seed)
    output = work / f"window-{seed}"
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(embedded_base()), config)
    args = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=25,
        save_strategy="no",
        seed=seed,
        report_to=[],
    )
    rows = IterableDataset.from_generator(seen_ends, gen_kwargs={"num": steps * batch_size, "seed": 1000 + seed})
    Trainer(model, args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(chat_tokenizer())).train()
    model.save_pretrained(output / "adapter")


def answers(model, tokenizer, keys: list[str], context: Sequence[int] = (), **under) -> list[str]:
    """Generate one token after each question, greedily: a value has one token."""
    asked = [[*context, *tokenizer(key)["input_ids"]] for key in keys]
    asked = torch.tensor(asked)  # (Q, T): a key is one token
    tokens = model.generate(input_ids=asked, max_new_tokens=1, do_sample=False, **under)
    return [text.strip() for text in tokenizer.batch_decode(tokens[:, asked.shape[1] :])]


def right_answers(
    reader: PeftModel, window: PeftModel, tokenizer, messages: list[dict], facts: dict[str, str]
) -> dict[str, list[bool]]:
    """For each method, which facts it answers right; also, which facts are still in the window."""
    keys, end = list(facts), end_of(messages, tokenizer)
    state = reader.adapt(chunk_examples([{"messages": messages}], tokenizer, chunk_size=CHUNK), parallel=16)
    found = {
        "state": answers(reader, tokenizer, keys, task_state=state),
        "truncated_window": answers(window, tokenizer, keys, context=end),
    }
    with window.disable_adapter():
        found["truncated_window_untrained"] = answers(window, tokenizer, keys, context=end)
    right = {name: [a == v for a, v in zip(given, facts.values(), strict=True)] for name, given in found.items()}
    text = tokenizer.decode(end)
    return right | {"in_the_window": [f"{key} {value}\n" in text for key, value in facts.items()]}


@app.command()
def evaluate(seeds: str = "0", num: int = 50, work: Path = WORK) -> None:
    """Measure the exact match of all facts against the length of the conversation."""
    tokenizer, rows = chat_tokenizer(), []
    for seed in map(int, seeds.split(",")):
        reader, window = (
            AutoPeftModelForCausalLM.from_pretrained(work / f"{name}-{seed}" / "adapter").eval()
            for name in ("reader", "window")
        )
        for n in COUNTS:
            right = [
                right_answers(reader, window, tokenizer, *conversation(np.random.default_rng((77, n, i)), tokenizer, n))
                for i in tqdm(range(num), f"{n} chunks")
            ]
            for method in right[0]:
                values = np.array([r[method] for r in right], dtype=float)
                row = {"method": method, "num_chunks": n, "seed": seed}
                rows.append(row | interval(values, "exact_match"))
                print(rows[-1])
    command = f"research.recall.chat_memory evaluate --seeds {seeds}"
    write_rows(rows, work / "chat.json", command, {"num": num})
    draw(rows, work / "chat.png")


def draw(rows: list[dict], path: Path) -> None:
    figure, (axes,) = panels([""], size=(6, 4.2))
    for color, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        at, mean, *_ = with_range(grouped(chosen(rows, method=method), "exact_match"))
        draw_curve(axes, at, mean, color=f"C{color}", marker="o", label=method.replace("_", " "))
    axes.axvline(MAX_CHUNKS, color="grey", linewidth=0.5, label="longest in training")
    xlabel = f"length of the conversation, chunks of {CHUNK} tokens"
    finish(axes, fontsize=10, xlabel=xlabel, ylabel="facts answered right", ylim=(0, 1.02))
    save(figure, path, dpi=130)


@app.command()
def talk(seed: int = 0, num_chunks: int = 24, work: Path = WORK) -> None:
    """Show one conversation: after every 8 chunks, ask for every fact."""
    tokenizer = chat_tokenizer()
    model = AutoPeftModelForCausalLM.from_pretrained(work / f"reader-{seed}" / "adapter").eval()
    messages, facts = conversation(np.random.default_rng(5), tokenizer, num_chunks)
    chunks = chunk_examples([{"messages": messages}], tokenizer, chunk_size=CHUNK)
    for number, state in enumerate(model.adapt_steps(chunks), 1):
        if number % 8 == 0:
            given = answers(model, tokenizer, list(facts), task_state=state)
            print(f"after {number} chunks:", " ".join(f"{k} {a}" for k, a in zip(facts, given, strict=True)))
    print("told:           ", " ".join(f"{k} {v}" for k, v in facts.items()))


if __name__ == "__main__":
    app()
