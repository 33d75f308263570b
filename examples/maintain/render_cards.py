"""Render the card of every published adapter from its recipe and its measured curve; `make cards` runs it.

    python -m examples.maintain.render_cards

`adapters/NAME/recipe.json` holds the text of a card and names the curves and the picture in `docs/`. The script writes
`adapters/NAME/README.md` and `curve.png`, as they lie on the Hub, and the same card as `model_cards/NAME.md`. A curve
is a list of rows in a JSON file, under the key `rows`; `where` selects the rows with the given values.
"""

import json
from pathlib import Path

import typer

from hf_iai import IAIConfig
from hf_iai.hub.cards import CardFacts, Measurement, model_card

ROOT = Path(__file__).parents[2]
OF_CARD = ("chunk_size", "text", "prompt", "training_data", "limits", "license", "language", "datasets")


def published_names() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "adapters").glob("*/recipe.json"))


def render(name: str) -> dict[Path, bytes]:
    """File -> content, for all files of the card of `adapters/NAME`."""
    folder = ROOT / "adapters" / name
    recipe = json.loads((folder / "recipe.json").read_text())
    missing = {"train", "evaluate", "curves", "picture", "limits", "license"} - recipe.keys()
    if missing:
        raise ValueError(f"{folder / 'recipe.json'} lacks {sorted(missing)}: a card states them")
    picture = (ROOT / recipe["picture"]).read_bytes()
    return {
        folder / "README.md": _card(name, recipe, "curve.png"),
        folder / "curve.png": picture,
        ROOT / "model_cards" / f"{name}.md": _card(name, recipe, f"../adapters/{name}/curve.png"),
    }


def _card(name: str, recipe: dict, picture: str) -> bytes:
    config = IAIConfig.from_pretrained(str(ROOT / "adapters" / name))
    facts = CardFacts(
        name=name,
        model_id=f"adapters/{name}",
        command=recipe["train"],
        measurements=tuple(measurements(recipe, picture)),
        versions={"PEFT": config.peft_version, "PyTorch": recipe["torch"]},
        **{key: recipe[key] for key in OF_CARD if key in recipe},
    )
    return f"{model_card(config, facts)}\n".encode()


def measurements(recipe: dict, picture: str) -> list[Measurement]:
    """The curves that a recipe names; the first one gets the picture."""
    found = []
    for curve in recipe["curves"]:
        values = dict(curve)
        measured, where = json.loads((ROOT / values.pop("file")).read_text()), values.pop("where", {})
        rows = [row for row in measured[values["rows"]] if where.items() <= row.items()]
        values |= {"rows": rows, "picture": None if found else picture}
        source = f"`{recipe['evaluate']}` at commit {origin(measured)['measured_at_commit']}"
        found.append(Measurement(measured_by=source, **values))
    return found


def origin(measured: dict) -> dict:
    """What a curve's file says about its own making, in the form of a recipe."""
    recipe = dict(measured["recipe"])  # newer files hold the versions in it, older ones beside it
    versions = {name: recipe.pop(name, None) or measured[name] for name in ("torch", "commit")}
    return {"measured": recipe, "torch": versions["torch"], "measured_at_commit": versions["commit"]}


def main() -> None:
    for name in published_names():
        for path, content in render(name).items():
            path.write_bytes(content)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    typer.run(main)
