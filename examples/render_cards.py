"""Render the card of every published adapter from its recipe and its measured curve; `make cards` runs it.

    python examples/render_cards.py

`adapters/NAME/recipe.json` holds what a card says, and names the curve and the picture in `docs/`. Written are
`adapters/NAME/README.md` with its `curve.png`, as they lie on the Hub, and the same card as `model_cards/NAME.md`.
"""

import json
from pathlib import Path

from hf_iai import IAIConfig
from hf_iai.hub import CardFacts, Measurement, model_card

ROOT = Path(__file__).parent.parent
OF_CARD = ("chunk_size", "text", "prompt", "training_data", "limits", "license", "language", "datasets")


def published_names() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "adapters").glob("*/recipe.json"))


def render(name: str) -> dict[Path, bytes]:
    """What the files of the card of `adapters/NAME` must hold."""
    folder = ROOT / "adapters" / name
    recipe = json.loads((folder / "recipe.json").read_text())
    missing = {"train", "evaluate", "curve", "limits", "license"} - recipe.keys()
    if missing:
        raise ValueError(f"{folder / 'recipe.json'} lacks {sorted(missing)}: a card states them")
    picture = (ROOT / recipe["curve"]["picture"]).read_bytes()
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
        measurements=(measurement(recipe, picture),),
        versions={"PEFT": config.peft_version, "PyTorch": recipe["torch"]},
        **{key: recipe[key] for key in OF_CARD if key in recipe},
    )
    return f"{model_card(config, facts)}\n".encode()


def measurement(recipe: dict, picture: str) -> Measurement:
    """The curve that a recipe names."""
    curve = dict(recipe["curve"])
    measured = json.loads((ROOT / curve.pop("file")).read_text())
    curve |= {"rows": measured[curve["rows"]], "picture": picture}
    return Measurement(measured_by=f"`{recipe['evaluate']}` at commit {measured['commit']}", **curve)


def main() -> None:
    for name in published_names():
        for path, content in render(name).items():
            path.write_bytes(content)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
