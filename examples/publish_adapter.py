"""Copy a trained adapter to `adapters/NAME` in Hub layout: weights, config, recipe, curve and a rendered card.

    python examples/publish_adapter.py --name markov-prefix --adapter work/markov/reader-0/adapter \\
        --curve docs/markov_curve.json --description "random 8-state Markov chains" \\
        --train "python examples/markov_curve.py --seed 0" --evaluate "python examples/markov_curve.py join"
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from jinja2 import Template

from hf_iai import IAIConfig

FILES = ("adapter_config.json", "adapter_model.safetensors")
LIMITS = (
    "A small base on a narrow kind of text: it shows what reading does to a curve, not what a large model can do. "
    "PEFT loads it only after `import hf_iai`."
)


def curve_table(curve: dict, from_token: int = 0) -> str:
    """A markdown table, one line per method: loss at each number of chunks, mean over seeds."""
    rows = curve[f"rows_from_token_{from_token}"]
    counts = sorted({row["num_chunks"] for row in rows})
    lines = ["| chunks read | " + " | ".join(f"{n:g}" for n in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for n in counts:
            losses = [row["loss"] for row in rows if (row["method"], row["num_chunks"]) == (method, n)]
            cells.append(f"{sum(losses) / len(losses):.3f}" if losses else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    name: Annotated[str, typer.Option()],
    adapter: Annotated[Path, typer.Option()],
    curve: Annotated[Path, typer.Option()],
    description: Annotated[str, typer.Option()],
    train: Annotated[str, typer.Option()],
    evaluate: Annotated[str, typer.Option()],
    chunk_size: Annotated[int, typer.Option()],
) -> None:
    folder = Path("adapters") / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(adapter / file, folder / f"{file}.tmp")
        (folder / f"{file}.tmp").replace(folder / file)
    config = IAIConfig.from_pretrained(str(folder))
    measured = json.loads(curve.read_text())
    values = config.to_dict() | {
        "base_model": config.to_dict()["base_model_name_or_path"],
        "license": "apache-2.0",
        "name": name,
        "model_id": f"adapters/{name}",
        "training_data": description,
        "training_command": train,
        "evaluation_command": evaluate,
        "chunk_size": chunk_size,
        "curve": curve_table(measured),
        "limits": LIMITS,
    }
    card = Template(Path("model_cards/template.md").read_text()).render(values) + "\n"
    for path in (folder / "README.md", Path("model_cards") / f"{name}.md"):
        path.write_text(card)
    recipe = {"train": train, "evaluate": evaluate, "measured": measured.get("recipe"), "torch": measured.get("torch")}
    recipe |= {"measured_at_commit": measured.get("commit")}
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
