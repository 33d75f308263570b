"""Which tokens of a text are worth a slot? Nothing is trained; the bare base answers.

    python -m examples.research.documents.token_choice    # about 10 minutes on 2 cores; writes work/token_choice.json

1. The worth of a token is minus the derivative of a query's summed loss with respect to a bias on all attention to that
   token. Three chunks before the query are in view. Reported: the mean by surprisal and age, on training packages.
2. The worth of a selection rule: the loss of the query behind the 64, 96 or 128 tokens that the rule keeps of the last
   n chunks. The latest quarter is always kept. Measured on the validation packages.
"""

from itertools import product
from pathlib import Path

import torch
import typer
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.common.files import write_json
from examples.research.common.provenance import recipe
from examples.research.common.rows import print_rows
from examples.research.documents.code_curve import CHUNK, held_out_documents, windows
from hf_iai import embedded_base
from hf_iai.bases.base import Base
from hf_iai.bases.compat import PrefixCache
from hf_iai.bases.places import ages_of, positions_of
from hf_iai.embedded import library_documents
from hf_iai.heads import trace

SLOTS, BATCH = (64, 96, 128), 16
SURPRISALS = (-1, 0.5, 2, 4, 6, 8, 100)  # nats
AGES = (0, 16, 64, 128, 384)


class Text:
    """The last n chunks before each query; the bare base reads each chunk alone."""

    def __init__(self, model, chunks: Tensor) -> None:  # (N, n, C)
        base, ids = Base(model), chunks.flatten(0, 1)
        out = model(input_ids=ids, use_cache=True, output_attentions=True, output_hidden_states=True)
        mask = torch.ones_like(ids)
        surprisal = base.surprisal(out.hidden_states[-1], ids, mask)
        later = torch.arange(CHUNK, 0, -1)  # a token is seen by itself and all after it
        attention = torch.stack(out.attentions).sum((0, 2, 3)) / later  # (N * n, C)
        keys = torch.stack([layer.keys for layer in out.past_key_values.layers], 1)  # (N * n, L, H, C, D)
        values = torch.stack([layer.values for layer in out.past_key_values.layers], 1)
        join = lambda t: t.unflatten(0, chunks.shape[:2]).movedim(1, 3).flatten(3, 4)  # noqa: E731
        self.keys, self.values = join(base.rotate(keys, -positions_of(mask))), join(values)  # (N, L, H, n * C, D)
        columns = (surprisal, trace(surprisal), attention)
        self.surprisal, self.trace, self.attention = (t.unflatten(0, chunks.shape[:2]).flatten(1) for t in columns)
        self.age = ages_of(torch.ones_like(self.surprisal))  # (N, n * C)

    def prefix(self, base: Base, chosen: Tensor) -> list[tuple[Tensor, Tensor]]:  # (N, m)
        """Keys and values of the chosen tokens at positions 0..m-1, per layer."""
        index = chosen[:, None, None, :, None]
        keys, values = (t.take_along_dim(index, 3) for t in (self.keys, self.values))
        keys = base.rotate(keys, torch.arange(chosen.shape[1])[None])
        return list(zip(keys.unbind(1), values.unbind(1), strict=True))


def query_losses(logits: Tensor, query: Tensor) -> Tensor:  # (N, T, V), (N, T) -> (N, T - 1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), query[:, 1:], reduction="none")


def worth(model, text: Text, query: Tensor) -> Tensor:  # (N, n * C)
    """Minus the derivative of each query's loss with respect to a bias on the attention to each token."""
    (num, length), tokens = query.shape, text.keys.shape[3]
    prefix = text.prefix(Base(model), torch.arange(tokens).expand(num, -1))
    bias = torch.zeros(num, 1, 1, tokens, requires_grad=True)
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1).expand(num, 1, -1, -1)
    logits = model(
        input_ids=query,
        attention_mask=torch.cat([bias.expand(-1, -1, length, -1), causal], -1),
        position_ids=torch.arange(tokens, tokens + length)[None],
        past_key_values=PrefixCache(model.config, prefix),
        use_cache=False,
    ).logits
    return -torch.autograd.grad(query_losses(logits, query).sum(), bias)[0][:, 0, 0]


def worth_table(model, chunks: Tensor, query: Tensor) -> list[dict]:
    columns = []
    for rows in tqdm(torch.arange(len(query)).split(BATCH), desc="worth of a token"):
        with torch.no_grad():
            text = Text(model, chunks[rows])
        columns.append((worth(model, text, query[rows]), text.surprisal, text.age))
    value, surprisal, age = (torch.cat(t) for t in zip(*columns, strict=True))
    table = []
    for low, high in zip(SURPRISALS, SURPRISALS[1:], strict=False):
        for young, old in zip(AGES, AGES[1:], strict=False):
            cell = value[(surprisal > low) & (surprisal <= high) & (age >= young) & (age < old)]
            row = {"surprisal": (low, high), "age": (young, old), "millinats": 1000 * cell.mean().item()}
            table.append(row | {"standard_error": 1000 * cell.std().item() / len(cell) ** 0.5, "tokens": len(cell)})
    return table


@torch.no_grad()
def choice_table(model, chunks: Tensor, query: Tensor, num_chunks: int) -> list[dict]:
    base, losses = Base(model), {}
    for rows in tqdm(torch.arange(len(query)).split(BATCH), desc=f"choices of {num_chunks} chunks"):
        text = Text(model, chunks[rows, -num_chunks:])
        criteria = {
            "the latest": -text.age,
            "most attention received": text.attention,
            "surprisal": text.surprisal,
            "surprisal - 0.005 age": text.surprisal - 0.005 * text.age,
            "min(surprisal, 4) - 0.01 age": text.surprisal.clamp_max(4) - 0.01 * text.age,
            "trace": text.trace,
            "trace - 0.005 age": text.trace - 0.005 * text.age,
        }
        for (name, score), slots in product(criteria.items(), SLOTS):
            score = torch.where(text.age < slots / 4, torch.inf, score)
            prefix = text.prefix(base, score.topk(slots).indices.sort().values)
            answer = base.answer(prefix, query[rows], torch.ones_like(query[rows]))
            losses.setdefault((name, slots), []).append(query_losses(answer.logits, query[rows]))
    losses = {key: torch.cat(parts) for key, parts in losses.items()}
    return [
        {"keeps": name, "slots": slots, "num_chunks": num_chunks}
        | {"loss": t.mean().item(), "loss_32": t[:, 31:].mean().item()}
        for (name, slots), t in losses.items()
    ]


def tensors(episodes, num_chunks: int) -> tuple[Tensor, Tensor]:  # (N, n, C), (N, T)
    chunks = [[example["input_ids"] for example in e["support"]][-num_chunks:] for e in episodes]
    return torch.tensor(chunks), torch.tensor([e["query"][0]["input_ids"] for e in episodes])


def main(num: int = 96, output: Path = Path("work/token_choice.json")) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    model = AutoModelForCausalLM.from_pretrained(embedded_base(), attn_implementation="eager").requires_grad_(False)
    model.eval()
    table = worth_table(model, *tensors(windows(library_documents("train"), tokenizer, 3, 2 * num, 0), 3))
    validation = tensors(windows(held_out_documents(validation=True), tokenizer, 16, num, 0), 8)
    choices = [row for n in (1, 2, 4, 8) for row in choice_table(model, *validation, n)]
    print_rows(table)
    print_rows(choices)
    made = recipe(f"research.documents.token_choice --num {num}")
    write_json({"recipe": made, "worth": table, "choices": choices}, output)


if __name__ == "__main__":
    typer.run(main)
