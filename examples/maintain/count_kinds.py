"""Count the places of the package that ask which kind of task, state or signal a configuration describes.

    python -m examples.maintain.count_kinds                     # of this tree
    python -m examples.maintain.count_kinds --package FOLDER/hf_iai

A place is a line of code that reads one of the fields that tell kinds apart from a configuration, or that compares
something with the name of a kind. Docstrings, declarations and `tasks/`, where these questions belong, do not count.
"""

import ast
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

FIELDS = {"state_type", "regime", "likelihood", "vector_width", "task_type", "signal"}
KINDS = {
    *("prefix", "prompt", "lora", "linear", "mlp"),
    *("parametric", "explicit", "implicit"),
    *("observations", "gradients", "both"),
    *("softmax", "gaussian"),
    *("SEQ_CLS", "CAUSAL_LM"),
}


def places(tree: ast.AST) -> set[int]:
    """Numbers of the lines that ask."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _is_field(node):
            lines.add(node.lineno)
        if isinstance(node, ast.Compare) and any(_names_a_kind(part) for part in (node.left, *node.comparators)):
            lines.add(node.lineno)
    return lines


def _is_field(node: ast.Attribute) -> bool:
    """Whether an attribute is such a field; what a configuration is called tells its attributes from others."""
    owner = node.value
    name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
    of_config = "config" in name or (name in ("self", "args") and node.attr != "likelihood")
    return node.attr in FIELDS and of_config


def _names_a_kind(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Constant) and part.value in KINDS for part in ast.walk(node))


def main(package: Annotated[Path, typer.Option(help="Folder of the package.")] = Path("hf_iai")) -> None:
    counts, longest = Counter(), Counter()
    for path in sorted(package.rglob("*.py")):
        text, name = path.read_text(), path.relative_to(package).as_posix()
        longest[name] = len(text.splitlines())
        if not name.startswith("tasks/"):
            counts[name] = len(places(ast.parse(text)))
    table = Table("file", "places that ask which kind")
    for name, count in counts.most_common():
        if count:
            table.add_row(name, str(count))
    console = Console()
    console.print(table)
    found = sum(1 for count in counts.values() if count)
    (name, lines), *_ = longest.most_common(1)
    console.print(
        f"{counts.total()} places in {found} files of {len(longest)}; the longest file, {name}, has {lines} lines"
    )


if __name__ == "__main__":
    typer.run(main)
