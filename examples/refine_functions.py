"""String functions and associative recall as text, by refinement (regime implicit), on the embedded base.

    python examples/refine_functions.py train --seed 0
    python examples/refine_functions.py evaluate --data FOLDER          # all seeds: refine_functions.json and .png

Tasks are those of examples/function_tasks.py; with `--data`, a folder with fv_tasks, real words too. "Full context" is
the bare base, which sees all chunks at once; "known" a perfect memory.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from datasets import IterableDataset
from function_tasks import CHUNK, CHUNK_OF_FUNCTIONS, LENGTH, cipher_episodes, function_episodes, real_episodes
from matplotlib.figure import Figure
from peft import AutoPeftModelForCausalLM, PeftModel
from provenance import provenance
from refine_recall import make_model, over_seeds
from tqdm import tqdm
from training import train_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_iai import embedded_base
from hf_iai.evaluation import bootstrap_mean

MOST_TRAINED, ASKED, WORK = 8, 16, Path("work/functions")
COUNTS = (0, 1, 2, 4, 8, 16, 28)  # the last two are more than training saw
WINDOW = 512  # tokens, of the embedded base

app = typer.Typer(help=__doc__)


@app.command()
def train(seed: int = 0, steps: int = 800, batch_size: int = 8, lr: float = 2e-3, work: Path = WORK) -> None:
    """Train one adapter on 1 to 8 chunks of ciphers, words of one and of four letters."""
    set_seed(seed)
    base = embedded_base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    output = work / f"refined-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    stream = {
        "lengths": (1, LENGTH),
        "num_letters": (4, 6, 10, 16, 26),  # few letters come again soon, and a chunk says much
        "num": steps * batch_size,
        "num_chunks": MOST_TRAINED,
        "num_asked": ASKED,
        "tokenizer": tokenizer,
        "seed": 1000 + seed,
    }
    train_adapter(
        make_model(base, "logits"),
        IterableDataset.from_generator(cipher_episodes, gen_kwargs=stream),
        tokenizer,
        output,
        steps=steps,
        seed=seed,
        chunk_size=CHUNK,
        max_chunks=MOST_TRAINED,
        halve_chunks=0.0,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        warmup_steps=30,
        adam_beta2=0.98,
    )


# ---------------------------------------------------------------- what is answered right after so many chunks

Found = dict[int, np.ndarray]  # number of chunks -> (E, Q), which queries are right


def prompts_and_answers(task: dict) -> tuple[list[list[int]], list[int]]:
    """Prompts of a task, and which token or label answers each."""
    if "labels" in task:
        return [query["input_ids"] for query in task["query"]], task["answers"]
    return [query["input_ids"][:-1] for query in task["query"]], [query["labels"][-1] for query in task["query"]]


def text_of(task: dict, num_chunks: int) -> list[int]:
    tokens = [token for line in task["support"] for token in line["input_ids"]]
    return tokens[: num_chunks * chunk_size(task)]


def chunk_size(task: dict) -> int:
    return CHUNK_OF_FUNCTIONS if "labels" in task else CHUNK


def by_refining(model: PeftModel, tasks: list[dict]) -> Found:
    found = defaultdict(list)
    for task in tqdm(tasks, leave=False):
        prompts, answers = prompts_and_answers(task)
        text = torch.tensor([text_of(task, max(COUNTS))])
        chunks = [{"input_ids": chunk} for chunk in text.split(chunk_size(task), 1)]
        query = {"input_ids": torch.tensor(prompts)}
        for n, logits in enumerate(model.refine(chunks, query, labels=task.get("labels"), with_start=True)):
            if n in COUNTS:
                found[n].append((logits.view(len(answers), -1).argmax(-1) == torch.tensor(answers)).tolist())
    return {n: np.array(right) for n, right in found.items()}


@torch.no_grad()
def in_full_context(base, tasks: list[dict]) -> Found:
    """The same of the bare base, which sees the first so many chunks at once, if they fit its window."""
    found = defaultdict(list)
    for task in tqdm(tasks, "full context", leave=False):
        prompts, answers = prompts_and_answers(task)
        longest = max(map(len, [*prompts, *task.get("labels", [])]))
        for n in COUNTS:
            if n * chunk_size(task) + 2 * longest <= WINDOW:
                said = [_best(base, text_of(task, n) + prompt, task.get("labels")) for prompt in prompts]
                found[n].append([best == answer for best, answer in zip(said, answers, strict=True)])
    return {n: np.array(right) for n, right in found.items()}


def _best(base, context: list[int], labels: list[list[int]] | None) -> int:
    """The token, or the number of the label, that the base finds most probable."""
    if labels is None:
        return base(torch.tensor([context])).logits[0, -1].argmax().item()
    length = max(map(len, labels))
    padded = torch.tensor([context + label + [0] * (length - len(label)) for label in labels])
    said = base(padded).logits[:, len(context) - 1 : -1].log_softmax(-1).gather(2, padded[:, len(context) :, None])
    real = torch.tensor([[i < len(label) for i in range(length)] for label in labels])
    return (said.squeeze(-1) * real).sum(1).argmax().item()


def known(tasks: list[dict]) -> Found:
    """Of a perfect memory that knows that the last letter counts: right where it was met."""
    after = np.array([[n or np.inf for n in task["known_after"]] for task in tasks])  # (E, Q)
    return {n: after <= n for n in COUNTS}


def rows_of(found: Found, **names) -> list[dict]:
    """Exact match, intervals over tasks."""
    rows = []
    for n, right in found.items():
        match, low, high = bootstrap_mean(right.astype(float), np.arange(len(right)))
        rows.append(names | {"asked": "all", "num_chunks": n, "exact_match": match, "low": low, "high": high})
    return rows


def test_tasks(data: Path | None, num: int, tokenizer) -> dict[str, list[dict]]:
    """Setting -> tasks."""
    shape = {"num_chunks": max(COUNTS), "tokenizer": tokenizer, "seed": 77}
    asked = shape | {"num_asked": ASKED}
    found = {
        "a letter (associative recall)": cipher_episodes((1,), (26,), num, **asked),
        "the last letter of a word": cipher_episodes((LENGTH,), (26,), num, **asked),
        "ten functions, untrained": function_episodes(num // 2, **shape),
    }
    if data is not None:
        found["the last letter of a real word"] = real_episodes(data, num, **asked)
    return {setting: list(tasks) for setting, tasks in found.items()}


@app.command()
def evaluate(
    data: Annotated[Path | None, typer.Option(help="folder of fv_tasks, for real words")] = None,
    num_tasks: int = 64,
    work: Path = WORK,
) -> None:
    """Every adapter under `work`, the same before training, and full context, on ciphers and words not in training."""
    base = embedded_base()
    bare, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    untrained, rows = make_model(base, "logits").eval(), []
    for setting, tasks in test_tasks(data, num_tasks, tokenizer).items():
        rows += rows_of(in_full_context(bare, tasks), setting=setting, method="full context", seed=0)
        rows += rows_of(by_refining(untrained, tasks), setting=setting, method="untrained", seed=0)
        if "labels" in tasks[0]:  # no adapter is trained on functions
            continue
        rows += rows_of(known(tasks), setting=setting, method="known", seed=0)
        for folder in sorted(work.glob("refined-*/adapter")):
            model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
            seed = int(folder.parent.name.split("-")[1])
            rows += rows_of(by_refining(model, tasks), setting=setting, method="refined", seed=seed)
    command = f"python examples/refine_functions.py evaluate --num-tasks {num_tasks}"
    command += " --data FOLDER" if data else ""
    report = {"recipe": {"command": command, **provenance()}, "rows": rows}
    (work / "refine_functions.tmp").write_text(json.dumps(report, indent=1) + "\n")
    (work / "refine_functions.tmp").replace(work / "refine_functions.json")
    print_table(rows)
    draw(rows, work / "refine_functions.png")


def print_table(rows: list[dict]) -> None:
    for setting in dict.fromkeys(row["setting"] for row in rows):
        print(f"\n{setting}, chunks: {COUNTS}")
        for method in dict.fromkeys(row["method"] for row in rows if row["setting"] == setting):
            found = over_seeds(rows, setting, method)
            print(f"  {method:16s}", *(f"{np.mean(found[n]):.3f}" if n in found else "     " for n in COUNTS))


def draw(rows: list[dict], path: Path) -> None:
    """Exact match against chunks read, mean over seeds and their range."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    styles = {"refined": "C0-o", "untrained": "C0:", "full context": "C7--", "known": "k:"}
    figure = Figure(figsize=(4 * len(settings), 4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), sharey=True), settings, strict=True):
        for method, style in styles.items():
            if found := over_seeds(rows, setting, method):
                axes.plot(list(found), [np.mean(v) for v in found.values()], style, label=method)
                low, high = ([pick(v) for v in found.values()] for pick in (min, max))
                axes.fill_between(list(found), low, high, color=style[:2] if style[0] == "C" else "k", alpha=0.15)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_title(setting, fontsize=9)
        axes.set(
            xlabel=f"chunks read, {CHUNK} or {CHUNK_OF_FUNCTIONS} tokens each", ylabel="exact match", ylim=(0, 1.02)
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    app()
