"""Loss of the next tokens after steps of plain SGD on each type of state, by learning rate; nothing is trained.

python -m examples.research.gradients.gradient_rates    # a minute on one core; writes docs/gradient_rates.json
"""

import json
from itertools import islice
from pathlib import Path

import torch
import typer
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.research.common.files import replacing
from examples.research.common.rows import print_rows
from hf_iai import EpisodeCollator, IAIConfig, embedded_base
from hf_iai.data import episodes_from_documents
from hf_iai.embedded import library_documents
from hf_iai.trainer import last_chunks

RATES = {"prompt": (0.3, 1, 3, 10, 30), "prefix": (3, 10, 30, 100, 300), "lora": (0.1, 0.3, 1, 3, 10)}
COUNTS, CHUNK = (0, 1, 8), 64


def losses(batch: dict[str, torch.Tensor], state_type: str, rate: float) -> list[float]:
    torch.manual_seed(0)
    config = IAIConfig(
        task_type="CAUSAL_LM", regime="parametric", signal="gradients", head="sgd", state_type=state_type,
        initial_rate=rate,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(embedded_base()), config).eval()
    with torch.no_grad():
        return [round(model(**last_chunks(batch, n)).loss.item(), 3) for n in COUNTS]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    documents = library_documents("train", packages=["pandas"])
    episodes = episodes_from_documents(documents, tokenizer, chunk_size=CHUNK, num_chunks=max(COUNTS))
    batch = EpisodeCollator(tokenizer, CHUNK)(list(islice(episodes, 16)))
    rows = [
        {"state_type": state_type, "rate": rate} | {f"chunks_{n}": x for n, x in zip(COUNTS, found, strict=True)}
        for state_type, rates in RATES.items()
        for rate in rates
        if (found := losses(batch, state_type, rate))
    ]
    print_rows(rows)
    with replacing(Path(__file__).parents[3] / "docs" / "gradient_rates.json") as temporary:
        temporary.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")  # a row on each line


if __name__ == "__main__":
    typer.run(main)
