"""In-context models of linear regression: iterating over chunks, one pass over everything, or a pooled code.

The tasks are those of `linear_regression`: y = w x + 0.1 noise. A small transformer learns to predict y of a query from
examples, trained on up to `TRAINED` chunks:

    implicit            reads chunk after chunk; each refines the prediction of the query (regime "implicit")
    one pass            reads all examples at once, as one chunk: attention over n examples costs n^2
    last chunk alone    reads one chunk only
    neural process      averages a code of each example; a decoder reads the average and the query

All take the same number of training steps, on the same number of examples: one chunk in the first half, then up to
`TRAINED`; chunks have 2 to 16 examples. The table also has the training time in seconds, the time of a step on the most
examples, and the time to answer the queries of a task.

Axes: B tasks, N examples, d features, Q queries.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_iai import IAIConfig
from hf_iai.objectives import Objective

from .linear_regression import CHUNK, NOISE
from .refined import tensor, train

TRAINED, BATCH, QUERIES = 10, 32, 4  # chunks, tasks and queries of a training step
EXAMPLES = (10, 20, 50, 100, 200, 500, 1000, 5000)  # that a task is read with
DIMENSIONS = {"cpu": (2,), "gpu": (2, 16)}
STEPS, RATE = {"cpu": 2000, "gpu": 20000}, 3e-3
WIDTH, LAYERS, HEADS = 64, 2, 4
VALUE, SCALE, COUNTED = "excess squared error", "log", "examples"
Models = dict[str, Callable[[int], nn.Module]]  # name -> what makes one for d features
Tasks = tuple[Tensor, ...]  # x (B, N, d), y (B, N), queries (B, Q, d), what they are without noise (B, Q)


def draw_tasks(rng: np.random.Generator, num: int, num_examples: int, d: int, queries: int = QUERIES) -> Tasks:
    weight = rng.normal(size=(num, d)) / d**0.5  # targets of variance 1
    x, asked = rng.normal(size=(num, num_examples, d)), rng.normal(size=(num, queries, d))
    y = np.einsum("bnd,bd->bn", x, weight) + NOISE * rng.normal(size=x.shape[:2])
    found = x, y, asked, np.einsum("bqd,bd->bq", asked, weight)
    return tuple(tensor(a).float() for a in found)


# ---------------------------------------------------------------- models


def small_base() -> PreTrainedModel:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS, "max_position_embeddings": 2 * max(EXAMPLES)}
    # With initial weights of 0.02, as usual, hardly anything of an example gets through.
    sizes |= {"vocab_size": 1, "eos_token_id": None, "bos_token_id": None, "initializer_range": WIDTH**-0.5}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes))


class InContext(nn.Module):
    """Regime `implicit` of hf_iai on a small transformer; with `whole` all examples are one chunk."""

    def __init__(self, d: int, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        config = IAIConfig(
            task_type="CAUSAL_LM",
            regime="implicit",
            vector_width=d,
            num_outputs=1,
            likelihood="gaussian",
            r=WIDTH,
            lora_alpha=WIDTH,
            target_modules="all-linear",
        )
        self.model: PeftModel = get_peft_model(small_base(), config)
        self.model.base_model.objective = Objective(scored_states="last")

    def loss(self, tasks: Tasks, size: int) -> Tensor:
        """The mean negative log-likelihood before all chunks of `size` and after them."""
        x, y, queries, targets = tasks
        chunks, values = (torch.stack(self.chunks(t, size), 1) for t in (x, y.unsqueeze(-1)))
        episode = {"chunk_inputs_embeds": chunks, "chunk_labels": values}
        return self.model(**episode, inputs_embeds=queries, labels=targets.unsqueeze(-1)).loss

    def forward(self, tasks: Tasks, size: int) -> Tensor:  # (B, Q)
        x, y, queries, _ = tasks
        chunks = zip(self.chunks(x, size), self.chunks(y.unsqueeze(-1), size), strict=True)
        read = ({"inputs_embeds": c, "labels": v} for c, v in chunks)
        *_, means = self.model.refine(read, {"inputs_embeds": queries.flatten(0, 1)})
        return means.view(queries.shape[:2])

    def chunks(self, examples: Tensor, size: int) -> tuple[Tensor, ...]:  # (B, N, w)
        return (examples,) if self.whole else examples.split(size, 1)


class LastChunk(InContext):
    """Reads the last chunk alone."""

    def chunks(self, examples: Tensor, size: int) -> tuple[Tensor, ...]:
        return (examples[:, -size:],)


class NeuralProcess(nn.Module):
    """A decoder reads the mean of the examples' codes.

    Source: Garnelo et al., Conditional Neural Processes, arXiv 1807.01613.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        wide = 4 * WIDTH
        self.encode = nn.Sequential(
            nn.Linear(d + 1, wide), nn.GELU(), nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, wide)
        )
        self.decode = nn.Sequential(
            nn.Linear(wide + d, wide), nn.GELU(), nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, 2)
        )

    def loss(self, tasks: Tasks, size: int) -> Tensor:
        mean, log_variance = self._moments(tasks)
        return 0.5 * ((mean - tasks[3]).square() * (-log_variance).exp() + log_variance).mean()

    def forward(self, tasks: Tasks, size: int) -> Tensor:  # (B, Q)
        return self._moments(tasks)[0]

    def _moments(self, tasks: Tasks) -> tuple[Tensor, Tensor]:
        x, y, queries, _ = tasks
        code = self.encode(torch.cat([x, y.unsqueeze(-1)], -1)).mean(1, keepdim=True)
        mean, log_variance = self.decode(torch.cat([code.expand(-1, queries.shape[1], -1), queries], -1)).unbind(-1)
        return mean, log_variance.clamp(-14, 4)


MODELS: Models = {
    "implicit": lambda d: InContext(d, whole=False),
    "one pass": lambda d: InContext(d, whole=True),
    "in context, the last chunk alone": lambda d: LastChunk(d, whole=False),
    "neural process": NeuralProcess,
}


def ridge(tasks: Tasks, size: int) -> Tensor:  # (B, Q)
    """Ridge regression with the true noise, for weights of variance 1 / d."""
    x, y, queries, _ = tasks
    d = x.shape[-1]
    moment = x.mT.double() @ x.double() + d * NOISE**2 * torch.eye(d, dtype=torch.float64)
    weight = torch.linalg.solve(moment, x.mT.double() @ y.double().unsqueeze(-1))
    return (queries.double() @ weight).squeeze(-1).float()


# ---------------------------------------------------------------- training and the table


def trained(models: Models, name: str, d: int, seed: int, steps: int) -> tuple[nn.Module, dict[str, float]]:
    """A trained model, the seconds of its training, and the median seconds of a step on the most examples."""
    torch.manual_seed(seed)
    model, rng, taken = models[name](d).train(), np.random.default_rng([1, seed]), iter(range(steps))

    def loss() -> Tensor:
        chunks = 1 if next(taken) < steps // 2 else int(np.exp(rng.uniform(0, np.log(TRAINED + 0.99))))
        size = int(rng.integers(2, CHUNK[d] + 1))
        return model.loss(draw_tasks(rng, BATCH, chunks * size, d), size)

    start = time.perf_counter()
    train(model, loss, steps=steps, lr=RATE, title=f"{name}, d = {d}, seed {seed}")
    training_seconds = time.perf_counter() - start
    tasks, seconds = draw_tasks(rng, BATCH, TRAINED * CHUNK[d], d), []
    for _ in range(5):
        start = time.perf_counter()
        model.loss(tasks, CHUNK[d]).backward()
        if torch.accelerator.is_available():  # which goes on when Python has given it all of its work
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return model.eval(), {"training_seconds": training_seconds, "step_seconds": float(np.median(seconds))}


@torch.no_grad()
def answered(model: Callable[[Tasks, int], Tensor], tasks: Tasks, size: int) -> tuple[float, float]:
    """The mean squared error, and seconds for a task. Four tasks at a time: 5000 examples at once have to fit."""
    start, errors = time.perf_counter(), []
    for part in zip(*(t.split(4) for t in tasks), strict=True):
        errors.append((model(part, size) - part[3]).square().mean(1))
    return torch.cat(errors).mean().item(), (time.perf_counter() - start) / len(tasks[0])


def table(tier: str, seeds: int, data: Path, output: Path, num: int = 64, models: Models = MODELS) -> list[dict]:
    """The error at each number of examples, and its ratio to the error of ridge regression.

    `num_chunks` is the number of examples; `data` and `output` are not used.
    """
    rows = []
    for d in DIMENSIONS[tier]:
        found = {name: [trained(models, name, d, seed, STEPS[tier]) for seed in range(seeds)] for name in models}
        found["ridge, true noise"] = [(ridge, {})]
        x, y, *asked = draw_tasks(np.random.default_rng([2, d]), num, max(EXAMPLES), d, queries=16)
        for count in tqdm(EXAMPLES, f"d = {d}", leave=False):
            tasks = (x[:, :count], y[:, :count], *asked)
            reference, _ = answered(ridge, tasks, CHUNK[d])
            for name, of_seeds in found.items():
                for seed, (model, times) in enumerate(of_seeds):
                    error, seconds = answered(model, tasks, CHUNK[d])
                    row = {"setting": f"d = {d}", "method": name, "seed": seed, "num_chunks": count, "value": error}
                    rows.append(row | {"ratio": error / reference, "seconds": seconds} | times)
    return rows
