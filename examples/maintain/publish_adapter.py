"""Copy a trained adapter to `adapters/NAME` in Hub layout, complete its recipe, and render its card.

    python -m examples.maintain.publish_adapter --name markov-prefix --adapter work/markov/reader-0/adapter

Write `adapters/NAME/recipe.json` by hand first: the commands that train and evaluate, the data, the curves and the
picture in `docs/`, the measured limits. The existing recipes show the form. The script copies into it how the file of
the first curve was made.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from examples.maintain.render_cards import ROOT, origin
from examples.maintain.render_cards import main as render_cards
from examples.research.common.files import replacing

FILES = ("adapter_config.json", "adapter_model.safetensors")


def main(name: Annotated[str, typer.Option()], adapter: Annotated[Path, typer.Option()]) -> None:
    folder = ROOT / "adapters" / name
    path = folder / "recipe.json"
    if not path.is_file():
        raise typer.BadParameter(f"{path} is missing: write it first, like the recipes of the other adapters")
    for file in FILES:
        with replacing(folder / file) as temporary:
            shutil.copyfile(adapter / file, temporary)
    recipe = json.loads(path.read_text())
    recipe |= origin(json.loads((ROOT / recipe["curves"][0]["file"]).read_text()))
    path.write_text(json.dumps(recipe, indent=1, ensure_ascii=False) + "\n")
    render_cards()


if __name__ == "__main__":
    typer.run(main)
