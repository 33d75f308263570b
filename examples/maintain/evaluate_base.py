"""Measure the embedded base: loss against context length, headroom, accuracy against shots.

python -m examples.maintain.evaluate_base        # about a minute on 2 cores; writes docs/base.json
"""

import json
from pathlib import Path

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.common.files import write_json
from examples.research.documents.code_curve import CHUNK, windows
from hf_iai import embedded_base
from hf_iai.embedded import library_documents
from hf_iai.embedded.generated_tasks import STRING_FUNCTIONS, points, recall, string_function
from hf_iai.evaluation.losses import token_losses


@torch.no_grad()
def losses(model, ids: torch.Tensor, keep: int) -> torch.Tensor:  # (N, T) -> (N, keep)
    return torch.cat([token_losses(model(b).logits, b)[:, -keep:] for b in ids.split(16)])


def loss_against_context(model, tokenizer, num: int) -> list[dict]:
    test = windows(library_documents("held_out"), tokenizer, 3, num, seed=0)
    rows = [[t for e in (*r["support"], *r["query"]) for t in e["input_ids"]] for r in test]
    ids = torch.tensor(rows)  # (N, 4 * CHUNK)
    table = []
    for context in (0, 16, 32, 64, 128, 256, 384):
        loss = losses(model, ids[:, 3 * CHUNK - context :], CHUNK - 1)
        table.append({"context": context, "loss": loss.mean().item(), "loss_32": loss[:, 31:].mean().item()})
    return table


@torch.no_grad()
def accuracy_against_shots(model, tokenizer, num: int) -> list[dict]:
    """Share of answers of which every token is the most likely one, after n lines of the same task."""
    rng, table = np.random.default_rng(7), []
    kinds = {"points": (points, " "), "string_function": (string_function, " -> "), "recall": (recall, "?")}
    for kind, (make, mark) in kinds.items():
        for shots in (1, 4, 16):
            right = total = 0
            while total < num:
                lines = make(rng, shots + 1).split("\n")
                if mark not in lines[-1]:
                    continue  # recall ends on a write: nothing is asked
                head, answer = lines[-1].rsplit(mark, 1)
                prompt = tokenizer("\n".join([*lines[:-1], head + mark.rstrip()]))["input_ids"]
                whole = tokenizer("\n".join(lines) + "\n")["input_ids"]
                if whole[: len(prompt)] != prompt or len(whole) > model.config.max_position_embeddings or not answer:
                    continue
                predicted = model(torch.tensor([whole])).logits[0].argmax(-1)
                target = torch.tensor(whole)
                right += bool((predicted[len(prompt) - 1 : -1] == target[len(prompt) :]).all())
                total += 1
            table.append({"task": kind, "shots": shots, "accuracy": right / total, "num": total})
    return table


def main(num: int = 320, output: Path = Path("docs/base.json")) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    model = AutoModelForCausalLM.from_pretrained(embedded_base()).eval()
    context = loss_against_context(model, tokenizer, num)
    by_context = {row["context"]: row["loss_32"] for row in context}
    report = {
        "command": "python -m examples.maintain.evaluate_base",
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": json.loads(Path(embedded_base(), "recipe.json").read_text()),
        "loss_against_context": context,
        "headroom_1_to_3_chunks_tokens_32": by_context[128] - by_context[384],
        "accuracy_against_shots": accuracy_against_shots(model, tokenizer, num // 4),
        "string_functions": sorted(STRING_FUNCTIONS),
    }
    print(json.dumps(report, indent=1))
    write_json(report, output)


if __name__ == "__main__":
    typer.run(main)
