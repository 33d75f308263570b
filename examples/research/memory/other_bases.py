"""The memory before training on small bases, less the latest m tokens, after up to 64 chunks.

    python -m examples.research.memory.other_bases     # 20 minutes on one core; work/memory/small_bases.json

Two models of children's stories read novels and plays, the embedded base reads code. A chunk has m tokens, a quarter of
the window. CHECKPOINTS holds the folders `stories260K` and `babyllama_tok361`. It goes on where it was stopped.
"""

from pathlib import Path

import typer

from examples.research.common.files import write_json
from examples.research.common.provenance import recipe
from examples.research.memory.curve import CHUNKS, Kind, blocks_of, differences, load, measure
from hf_iai import embedded_base

NUM = 24  # texts


def main(
    checkpoints: Path = Path("../shared/data/checkpoints"),
    data: Path = Path("../shared/data/text"),
    work: Path = Path("work/memory"),
) -> None:
    bases = {
        "stories260K on books (window 512, m = 128)": (str(checkpoints / "stories260K"), Kind.books, 128),
        "babyllama_tok361 on books (window 256, m = 64)": (str(checkpoints / "babyllama_tok361"), Kind.books, 64),
        "embedded base on code (window 512, m = 128)": (embedded_base(), Kind.streams, 128),
    }
    found = {}
    for name, (base, text, size) in bases.items():
        folder = work / name.split()[0]
        for method in ("memory", "fewer"):
            settings = {"size": size, "num": NUM, "chunks": CHUNKS[Kind.streams], "data": data, "work": folder}
            measure(method, text, base, **settings)
        (ours, groups), (fewer, _) = (load(folder / text / f"{method}.json") for method in ("memory", "fewer"))
        found[name] = differences(ours, groups, fewer, blocks_of(ours.shape[1]))
        write_json({"recipe": recipe("research.memory.other_bases"), **found}, work / "small_bases.json")


if __name__ == "__main__":
    typer.run(main)
