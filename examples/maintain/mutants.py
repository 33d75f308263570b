"""Mutation testing: change one operator or number of the package, and see whether the tests of its part notice.

    pip install cosmic-ray
    make mutants                                               # a seeded sample of 300: hours on one core
    python -m examples.maintain.mutants run --num 300          # goes on where it was stopped
    python -m examples.maintain.mutants report

Each mutant is made in a copy of the checkout, and tested in a process that starts with the libraries already loaded.
"""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from examples.research.common.files import write_json
from examples.research.common.provenance import recipe

app = typer.Typer(no_args_is_help=True)
ROOT = Path(__file__).parents[2]
# Part of the package -> the tests of it, the quickest first.
PARTS = {
    "heads/class_rows.py": "test_class_rows test_linear_state",
    "heads/gaussian_rows.py": "test_gaussian_rows",
    "heads/chosen.py": "test_two_speeds",
    "heads/normalized.py": "test_two_speeds",
    "heads/guards.py": "test_gradients test_two_speeds test_learned_optimizer",
    "heads/kept.py": "test_memory test_reading",
    "heads/learned_step.py": "test_gradients test_learned_optimizer",
    "heads/step_settings.py": "test_gradients test_learned_optimizer",
    "heads/classical.py": "test_gradients",
    "heads/delta.py": "test_reading test_memory",
    "heads/average.py": "test_reading test_memory",
    "heads/correction.py": "test_reading test_memory test_gradients",
    "signals/one_pass.py": "test_two_speeds",
    "signals/gradients.py": "test_gradients",
    "signals/observations.py": "test_reading",
    "signals/pooling.py": "test_reading test_memory",
    "objectives.py": "test_training test_gradients",
    "cores/tokens.py": "test_two_speeds test_padding",
    "cores/memory.py": "test_two_speeds test_padding",
    "cores/linear.py": "test_linear_state test_class_rows",
    "cores/gaussian.py": "test_gaussian_rows test_vector_states",
    "cores/vectors.py": "test_vector_states test_vectors",
    "cores/implicit.py": "test_implicit",
    "cores/implicit_vectors.py": "test_implicit_vectors",
    "cores/average.py": "test_reading test_memory",
    "cores/both.py": "test_gradients",
    "cores/gradient.py": "test_gradients",
    "cores/recent.py": "test_reading",
    "cores/core.py": "test_reading test_gradients",
    "state.py": "test_state_file test_roundtrip test_memory test_two_speeds",
    "state_file.py": "test_state_file",
    "files.py": "test_files",
}
OPERATORS = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Mul", "Mod_Mul")
KINDS = ("NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd")
KINDS += ("AddNot", "ZeroIterationForLoop", "ReplaceUnaryOperator", "ReplaceComparisonOperator")
LOADED = ("torch", "transformers", "peft", "datasets", "pandas", "pytest", "scipy.stats", "transformers.models.llama")
SECONDS = 400  # a mutant that hangs is noticed too


def mutants(code: str) -> Iterator[tuple[str, int, int]]:
    """Operator, number and line of every change that can be made to a file."""
    import cosmic_ray.ast
    import cosmic_ray.plugins

    nodes = list(cosmic_ray.ast.ast_nodes(cosmic_ray.ast.get_ast(code)))
    for name in cosmic_ray.plugins.operator_names():
        kind = name.removeprefix("core/")
        if kind.removeprefix("ReplaceBinaryOperator_") in OPERATORS or kind.startswith(KINDS):
            operator = cosmic_ray.plugins.get_operator(name)()
            places = (place for node in nodes for place in operator.mutation_positions(node))
            yield from ((name, number, place[0][0]) for number, place in enumerate(places))


def sample(num: int, seed: int) -> list[tuple[str, str, int, int]]:
    """A random sample of the mutants of all parts; one of a place is enough."""
    every = {}
    for part in PARTS:
        for name, number, line in mutants((ROOT / "hf_iai" / part).read_text()):
            every.setdefault((part, line, name.split("_")[0]), []).append((part, name, number, line))
    draw = random.Random(seed)
    return draw.sample([draw.choice(found) for _, found in sorted(every.items())], min(num, len(every)))


def mutated(code: str, name: str, number: int) -> str | None:
    import cosmic_ray.mutating
    import cosmic_ray.plugins

    return cosmic_ray.mutating.mutate_code(code, cosmic_ray.plugins.get_operator(name)(), number)


def noticed(copy: Path, tests: str) -> bool:
    """Whether the tests fail, or do not end."""
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        import pytest

        files = [f"tests/{name}.py" for name in tests.split()]
        code = pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", *files])
        os._exit(0 if code == 0 else 1)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status != 0
        time.sleep(0.1)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


@app.command()
def run(
    num: Annotated[int, typer.Option(help="Size of the sample.")] = 300,
    seed: int = 0,
    minutes: Annotated[float, typer.Option(help="Stop after so long.")] = 1e9,
    work: Path = Path("work/mutants"),
) -> None:
    """Test a sample of mutants."""
    for name in LOADED:
        importlib.import_module(name)
    path, copy, end = work / "mutants.json", (work / "copy").absolute(), time.monotonic() + 60 * minutes
    done = json.loads(path.read_text())["mutants"] if path.exists() else []
    shutil.rmtree(copy, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(copy)], check=True)
    passing: set[str] = set()
    for part, name, number, line in tqdm(sample(num, seed)[len(done) :], disable=None):
        if time.monotonic() > end:
            break
        if PARTS[part] not in passing and noticed(copy, PARTS[part]):
            raise SystemExit(f"{PARTS[part]}: these tests fail without any change")
        passing.add(PARTS[part])
        target = copy / "hf_iai" / part
        code = target.read_text()
        changed = mutated(code, name, number)
        target.write_text(changed)
        try:
            killed = noticed(copy, PARTS[part])
        finally:
            target.write_text(code)
        text = changed.splitlines()[line - 1].strip()
        done.append({"part": part, "line": line, "operator": name, "killed": killed, "mutant": text})
        write_json({"recipe": recipe("maintain.mutants run", num=num, seed=seed), "mutants": done}, path)


@app.command()
def report(work: Path = Path("work/mutants")) -> None:
    """Print the share of mutants that were noticed, for each part, and those that were not."""
    done = json.loads((work / "mutants.json").read_text())["mutants"]
    table = Table("part", "mutants", "noticed")
    for part in PARTS:
        own = [mutant["killed"] for mutant in done if mutant["part"] == part]
        table.add_row(part, str(len(own)), f"{sum(own) / len(own):.2f}" if own else "")
    killed = [mutant["killed"] for mutant in done]
    table.add_row("all", str(len(killed)), f"{sum(killed) / len(killed):.2f}")
    console = Console(width=160)
    console.print(table)
    for mutant in done:
        if not mutant["killed"]:
            console.print(f"{mutant['part']}:{mutant['line']}  {mutant['mutant']}", markup=False)


if __name__ == "__main__":
    app()
