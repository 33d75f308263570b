"""Many labelled examples read by a language model, which then chooses among the texts of 10 labels.

    B="--base .bases/SmolLM2-135M-Instruct --data DATA"
    python -m examples.research.memory.label_texts measure memory $B       # an hour on one core; so do the others:
    python -m examples.research.memory.label_texts report

    memory    a prefix+lora state, untrained or an adapter's      lora      a plain LoRA, a step on each chunk
    fewer     the latest m tokens in context                      minilm    `adapters/minilm-linear`
    full      all examples in context

DATA holds `clinc105` and `hwu64`. The 12 tasks have 10 labels each, of the topics utility and travel, which no adapter
was trained on. An example is "Text: wake me at six", "Intent: alarm set"; ten of them are a chunk. The answer is the
label whose log-probability gains most over texts that say nothing. `measure` goes on where it was stopped. `report`
takes LABEL_seed0, LABEL_seed1, ... as the seeds of one method, and the mean of their accuracies.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from examples.research.classifiers.intent_tasks import TOPICS, Corpus, evaluation_tasks, read_texts
from examples.research.common import plots
from examples.research.common.bases import SMOLLM2, BaseOption
from examples.research.common.files import seeds_of_methods, write_json
from examples.research.common.provenance import earlier, recipe
from examples.research.common.rows import print_rows, write_rows
from hf_iai import IAIConfig, chunk_examples
from hf_iai.classify import load_reader
from hf_iai.commands.inputs import adapter_folder
from hf_iai.data.examples import NO_LOSS, tokenize_example
from hf_iai.evaluation import bootstrap_mean

app = typer.Typer(no_args_is_help=True)
COUNTS = (20, 50, 100, 200, 400)
CHUNK, WAYS, TASKS_OF_A_CORPUS, QUERIES = 10, 10, 6, 5  # examples, labels, tasks, queries of each label
WORK = Path("work/memory/label_texts")
DTYPES = ("float32", "bfloat16")
NOTHING = ("N/A", "", "something")
Row = dict[str, str]  # text and label


class Method(Protocol):
    """Reads labelled examples, and answers in between."""

    def read(self, rows: list[Row]) -> None: ...

    def answers(self, texts: list[str], labels: list[str]) -> list[str]: ...


class LanguageModel:
    """Answers with the label whose text gains most from the query, over texts that say nothing.

    Source: contextual calibration, Zhao et al., arXiv 2102.09690; without it this base repeats the latest labels.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def tokens(self, row: Row) -> dict[str, list[int]]:
        """Ids of an example, and labels for the tokens of its label."""
        label = row["label"].replace("_", " ")
        example = {"prompt": f"Text: {row['text']}\nIntent:", "completion": f" {label}\n\n"}
        return tokenize_example(example, self.tokenizer)

    def log_probabilities(self, prompt: Tensor, completions: list[Tensor]) -> Tensor:  # (T,), L of (t,) -> (L,)
        """Of each completion behind the prompt."""
        raise NotImplementedError

    @torch.no_grad()
    def answers(self, texts: list[str], labels: list[str]) -> list[str]:
        before = torch.stack([self._scores(text, labels) for text in NOTHING]).logsumexp(0)
        return [labels[int((self._scores(text, labels) - before).argmax())] for text in texts]

    def _scores(self, text: str, labels: list[str]) -> Tensor:  # (L,)
        rows = [self.tokens({"text": text, "label": label}) for label in labels]
        start = rows[0]["labels"].count(NO_LOSS)
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        return self.log_probabilities(ids[0][:start], [row[start:] for row in ids])


class Memory(LanguageModel):
    """A task state."""

    def __init__(self, base, tokenizer, slots: int, adapter: Path | None) -> None:
        super().__init__(tokenizer)
        config = IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora", num_state_tokens=slots)
        self.model = get_peft_model(base, config) if adapter is None else PeftModel.from_pretrained(base, adapter)
        self.model.eval()
        self.state = self.model.initial_state()

    def read(self, rows: list[Row]) -> None:
        examples = [self.tokens(row) for row in rows]
        chunks = chunk_examples(examples, self.tokenizer, chunk_size=self.model.max_chunk_size)
        self.state = self.model.adapt(chunks, state=self.state)

    def log_probabilities(self, prompt: Tensor, completions: list[Tensor]) -> Tensor:
        ids = pad_sequence([torch.cat([prompt, completion]) for completion in completions], True)  # (L, T)
        lengths = torch.tensor([len(prompt) + len(completion) for completion in completions])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = self.model(input_ids=ids, attention_mask=mask, task_state=self.state).logits[:, len(prompt) - 1 :]
        found = zip(logits, completions, strict=True)
        return torch.stack([_log_probability(row[: len(wanted)], wanted) for row, wanted in found])


class Plain(LanguageModel):
    """A model of transformers, behind the keys and values of `cache`."""

    def __init__(self, model, tokenizer) -> None:
        super().__init__(tokenizer)
        self.model, self.cache = model, DynamicCache()

    def log_probabilities(self, prompt: Tensor, completions: list[Tensor]) -> Tensor:
        """All in one pass: a completion attends to what is in the cache, to the prompt and to itself."""
        num_before, start = self.cache.get_seq_length(), len(prompt)
        ids = torch.cat([prompt, *completions])
        of = torch.cat([torch.full((len(part),), n) for n, part in enumerate([prompt, *completions])])  # (S,)
        place = torch.cat([torch.arange(start), *(start + torch.arange(len(part)) for part in completions)])
        sees = ((of[:, None] == of) | (of == 0)) & (place[:, None] >= place)  # (S, S)
        sees = torch.cat([sees.new_ones(len(ids), num_before), sees], 1)
        least = torch.finfo(self.model.dtype).min
        bias = torch.zeros(sees.shape, dtype=self.model.dtype).masked_fill(~sees, least)
        options = {"attention_mask": bias[None, None], "position_ids": place[None] + num_before}
        logits = self.model(input_ids=ids[None], past_key_values=self.cache, **options).logits[0]
        self.cache.crop(-len(ids))
        behind = [torch.cat([logits[start - 1 : start], logits[of == n][:-1]]) for n in range(1, len(completions) + 1)]
        found = zip(behind, completions, strict=True)
        return torch.stack([_log_probability(row, wanted) for row, wanted in found])


class Context(Plain):
    """The bare base with the latest tokens in context, or with all of them."""

    def __init__(self, base, tokenizer, most: int | None) -> None:
        super().__init__(base, tokenizer)
        self.most, self.ids = most, []

    @torch.no_grad()
    def read(self, rows: list[Row]) -> None:
        new = [i for row in rows for i in self.tokens(row)["input_ids"]]
        self.ids += new
        if self.most is not None:
            new, self.cache = self.ids[-self.most :], DynamicCache()
        self.model.base_model(torch.tensor([new]), past_key_values=self.cache)


class FineTuned(Plain):
    """A plain LoRA that takes one step of AdamW on each chunk, on the labels' tokens."""

    def __init__(self, base, tokenizer, rate: float, rank: int = 8) -> None:
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules="all-linear")
        super().__init__(get_peft_model(base, config), tokenizer)
        self.step = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], rate)

    def read(self, rows: list[Row]) -> None:
        tokens = [self.tokens(row) for row in rows]
        ids, labels = (
            pad_sequence([torch.tensor(row[name]) for row in tokens], True, fill)
            for name, fill in (("input_ids", 0), ("labels", NO_LOSS))
        )
        self.step.zero_grad()
        self.model(input_ids=ids, labels=labels).loss.backward()
        self.step.step()


def _log_probability(logits: Tensor, wanted: Tensor) -> Tensor:  # (t, V), (t,) -> ()
    return logits.float().log_softmax(-1).gather(1, wanted[:, None]).sum()


class Encoder:
    """The published classifier by reading."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_reader(adapter_folder("minilm-linear"))
        self.state = None

    def read(self, rows: list[Row]) -> None:
        self.state = self.model.adapt(chunk_examples(rows, self.tokenizer, model=self.model), state=self.state)

    @torch.no_grad()
    def answers(self, texts: list[str], labels: list[str]) -> list[str]:
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        names = self.state.class_names[0]
        return [names[i] for i in self.model(**inputs, task_state=self.state).logits.argmax(-1)]


def method_of(name: str, base: str, slots: int, adapter: Path | None, rate: float, dtype: str) -> Method:
    """A method that has read nothing."""
    if name == "minilm":
        return Encoder()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    if name == "memory":
        return Memory(model, tokenizer, slots, adapter)
    if name == "lora":
        return FineTuned(model, tokenizer, rate)
    if name in ("fewer", "full"):
        return Context(model, tokenizer, slots if name == "fewer" else None)
    raise typer.BadParameter(f"unknown method {name!r}; use memory, fewer, full, lora or minilm")


def tasks(data: Path) -> list[tuple[str, list[Row], list[Row]]]:
    """Name of the corpus, examples in reading order and queries, of each task."""
    topic_of, texts, corpora = {d: t for t, ds in TOPICS.items() for d in ds.split()}, read_texts(data), []
    for name, rows in texts.items():
        labels = np.array([row["label"] for row in rows])
        topics = {row["label"]: topic_of[row.get("domain") or row["label"].split("_")[0]] for row in rows}
        places = {label: np.flatnonzero(labels == label) for label in topics}
        corpora.append(Corpus(name, torch.zeros(0), places, topics))
    drawn = evaluation_tasks(corpora, 0, WAYS, TASKS_OF_A_CORPUS, num_queries=QUERIES)
    taken = [(corpus.name, *([texts[corpus.name][i] for i in task[at]] for at in (0, 2))) for corpus, task in drawn]
    return [task for pair in zip(taken[:TASKS_OF_A_CORPUS], taken[TASKS_OF_A_CORPUS:], strict=True) for task in pair]


def accuracies(method: Method, examples: Sequence[Row], queries: Sequence[Row], counts: Sequence[int]) -> list[float]:
    """The share of right answers after each count; the labels are those of the queries."""
    labels, found = sorted({row["label"] for row in queries}), []
    for start in range(0, max(counts), CHUNK):
        method.read(list(examples[start : start + CHUNK]))
        if start + CHUNK in counts:
            answers = method.answers([row["text"] for row in queries], labels)
            right = [answer == row["label"] for answer, row in zip(answers, queries, strict=True)]
            found.append(sum(right) / len(right))
    return found


@app.command()
def measure(
    method: str,
    base: BaseOption = SMOLLM2,
    data: Annotated[Path, typer.Option(help="Folder of clinc105 and hwu64.")] = Path("../shared/data"),
    slots: Annotated[int, typer.Option(help="m, slots of an untrained memory, and tokens that fewer sees.")] = 256,
    adapter: Annotated[Path | None, typer.Option(help="A memory that was trained.")] = None,
    rate: Annotated[float, typer.Option(help="Rate of lora.")] = 3e-3,
    dtype: Annotated[str, typer.Option(help="Of the base; bfloat16 is slow where the CPU has none.")] = "float32",
    seed: Annotated[int, typer.Option(help="Draws A of a memory that is not trained, and the start of lora.")] = 0,
    num: Annotated[int, typer.Option(help="How many of the 12 tasks, the two corpora in turn.")] = 12,
    counts: Annotated[str, typer.Option(help="Numbers of examples.")] = ",".join(map(str, COUNTS)),
    label: Annotated[str | None, typer.Option(help="Name of the result; by default that of the method.")] = None,
    work: Path = WORK,
) -> None:
    """Measure one method."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: use {' or '.join(DTYPES)}")
    path, asked = work / f"{label or method}.json", sorted({int(n) for n in counts.split(",")})
    if wrong := [n for n in asked if n % CHUNK or not 0 < n <= COUNTS[-1]]:
        raise typer.BadParameter(f"--counts {wrong}: use multiples of {CHUNK} up to {COUNTS[-1]}")
    settings = {
        "method": method,
        "seed": seed,
        "base": base,
        "slots": slots,
        "adapter": adapter and str(adapter),
        "dtype": dtype,
        "counts": asked,
    } | ({"rate": rate} if method == "lora" else {})
    done = {name: earlier(path, **settings).get(name, []) for name in ("accuracy", "corpus")}
    for corpus, examples, queries in tqdm(tasks(data)[len(done["corpus"]) : num], method, disable=None):
        torch.manual_seed(seed)
        reader = method_of(method, base, slots, adapter, rate, dtype)
        done["accuracy"].append(accuracies(reader, examples, queries, asked))
        done["corpus"].append(corpus)
        write_json({"recipe": recipe(f"research.memory.label_texts measure {method}", **settings), **done}, path)


@app.command()
def report(
    method: Annotated[str, typer.Option(help="The method that is compared with all others.")] = "memory",
    work: Path = WORK,
    output: Annotated[Path, typer.Option(help="Folder for memory_label_texts.json and .png.")] = WORK.parent,
) -> None:
    """Accuracy of each method after each count, in percent, and the paired difference of `method` to it."""
    paths = seeds_of_methods(work)
    found = {name: [json.loads(path.read_text()) for path in of_seeds] for name, of_seeds in paths.items()}
    rows = [
        {
            "method": name,
            "seeds": len(seeds),
            "tasks": len(_accuracy(seeds)),
            **_line(seeds),
            **_line(seeds, found[method]),
        }
        for name, seeds in found.items()
    ]
    print_rows(rows)
    pairs = (pair for name, seeds in found.items() for pair in zip(paths[name], seeds, strict=True))
    made = {path.stem: values["recipe"] for path, values in pairs}
    command = f"research.memory.label_texts report --method {method}"
    write_rows(rows, output / "memory_label_texts.json", command, measured=made)
    draw(found, output / "memory_label_texts.png")


def _accuracy(seeds: list[dict]) -> np.ndarray:  # (N, counts)
    """In percent, the mean over seeds, on the tasks that all of them have read."""
    num, counts = min(len(values["accuracy"]) for values in seeds), [values["recipe"]["counts"] for values in seeds]
    if any(other != counts[0] for other in counts) or not num:
        raise typer.BadParameter(f"seeds of one method have read {num} tasks together, at {counts}: measure them anew")
    return 100 * np.mean([values["accuracy"][:num] for values in seeds], 0)


def _line(seeds: list[dict], ours: list[dict] | None = None) -> dict[str, str]:
    accuracy, counts = _accuracy(seeds), seeds[0]["recipe"]["counts"]
    if ours is None:
        line = {f"{n}": f"{mean:.1f}" for n, mean in zip(counts, accuracy.mean(0), strict=True)}
        if len(seeds) < 2:
            return line
        deviations = np.std([_accuracy([values])[: len(accuracy)].mean(0) for values in seeds], 0, ddof=1)
        return line | {f"deviation, {n}": f"{d:.1f}" for n, d in zip(counts, deviations, strict=True)}
    if counts != (others := ours[0]["recipe"]["counts"]):
        raise typer.BadParameter(f"counts {counts} and {others} cannot be paired: measure one anew")
    num = min(len(accuracy), len(_accuracy(ours)))
    paired = _accuracy(ours)[:num] - accuracy[:num]  # (N, counts)
    intervals = [bootstrap_mean(paired[:, [i]], np.arange(num)) for i in range(len(counts))]
    return {f"less it, {n}": "{:+.1f} ({:+.1f}, {:+.1f})".format(*i) for n, i in zip(counts, intervals, strict=True)}


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """Accuracy against examples read; the mean over tasks and seeds."""
    figure, (axes,) = plots.panels(["10 labels, which a language model chooses by their texts"], size=(6, 4.5))
    for number, (name, seeds) in enumerate(found.items()):
        counts, accuracy = seeds[0]["recipe"]["counts"], _accuracy(seeds).mean(0)
        plots.draw_curve(axes, counts, accuracy, color=f"C{number}", marker="o", label=name)
    plots.doubling_axis(axes, counts)
    plots.finish(axes, xlabel="examples read", ylabel="accuracy, %")
    plots.save(figure, path)


if __name__ == "__main__":
    app()
