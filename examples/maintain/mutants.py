"""Mutation testing: change one operator or number of the package, and see whether the tests of its part notice.

    pip install cosmic-ray coverage
    make mutants                                               # a seeded sample of 300: hours on one core
    python -m examples.maintain.mutants run --num 300          # goes on where it was stopped
    python -m examples.maintain.mutants again                  # those that were not noticed, after new tests
    python -m examples.maintain.mutants report

Each mutant is made in a copy of the checkout, and tested in a process that starts with the libraries already loaded.
The tests that run the changed line come first. `docs/equivalent_mutants.json` lists those that change nothing that can
be observed, and why.
"""

import ast
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
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
    "heads/class_rows.py": "test_formulas test_class_rows test_linear_state",
    "heads/gaussian_rows.py": "test_formulas test_gaussian_rows",
    "heads/chosen.py": "test_two_speeds",
    "heads/normalized.py": "test_formulas test_two_speeds",
    "heads/guards.py": "test_formulas test_gradients test_two_speeds test_learned_optimizer",
    "heads/kept.py": "test_reading",
    "heads/learned_step.py": "test_formulas test_gradients test_learned_optimizer",
    "heads/step_settings.py": "test_errors test_learned_optimizer",
    "heads/classical.py": "test_gradients",
    "heads/delta.py": "test_formulas test_reading",
    "heads/average.py": "test_formulas test_reading test_errors",
    "heads/correction.py": "test_formulas test_reading test_gradients",
    "signals/one_pass.py": "test_two_speeds",
    "signals/gradients.py": "test_gradients",
    "signals/observations.py": "test_reading",
    "signals/pooling.py": "test_reading",
    "objectives.py": "test_training test_gradients",
    "cores/tokens.py": "test_two_speeds test_padding",
    "cores/memory.py": "test_two_speeds test_padding",
    "cores/linear.py": "test_linear_state",
    "cores/gaussian.py": "test_linear_state test_vector_states",
    "cores/vectors.py": "test_vector_states test_vectors",
    "cores/implicit.py": "test_implicit",
    "cores/implicit_vectors.py": "test_implicit_vectors",
    "cores/average.py": "test_reading",
    "cores/both.py": "test_formulas test_errors test_two_speeds test_gradients",
    "cores/gradient.py": "test_errors test_gradients",
    "cores/recent.py": "test_reading",
    "cores/core.py": "test_reading test_gradients",
    "state.py": "test_state_file test_linear_state test_reading test_roundtrip test_two_speeds",
    "state_file.py": "test_state_file",
    "files.py": "test_files",
}
OPERATORS = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "FloorDiv_Mul", "Mod_Mul")
KINDS = ("NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd")
KINDS += ("AddNot", "ZeroIterationForLoop", "ReplaceUnaryOperator", "ReplaceComparisonOperator")
LOADED = ("torch", "transformers", "peft", "datasets", "pandas", "pytest", "scipy.stats", "transformers.models.llama")
EQUIVALENT = ROOT / "docs" / "equivalent_mutants.json"
WORK, NAME = Path("work/mutants"), "mutants.json"
SECONDS = 600  # a mutant that hangs is noticed too


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
            found = [(name, number, place[0][0]) for number, place in enumerate(places)]
            yield from (each for each in found if is_arithmetic(code, *each[:2]))


def is_arithmetic(code: str, name: str, number: int) -> bool:
    """False for a star that is no operator: one between or before arguments."""
    if "BinaryOperator" not in name:
        return True
    try:
        return _operators(code) != _operators(mutated(code, name, number))
    except SyntaxError:
        return False


def _operators(code: str) -> list[type]:
    return [type(node.op) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.BinOp)]


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


class Record:
    """A pytest plugin: the seconds of each test, and the lines of the package that it runs."""

    def __init__(self, package: Path) -> None:
        import coverage

        self.package, self.seconds = package, {}
        self.coverage = coverage.Coverage(data_file=None, include=[f"{package}/*"])
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        started = time.perf_counter()
        result = yield
        self.seconds[item.nodeid] = time.perf_counter() - started
        return result

    def lines(self) -> dict[str, dict[int, list[str]]]:
        """Part -> line -> the tests that run it."""
        self.coverage.stop()
        data = self.coverage.get_data()
        of_part = {str(self.package / part): part for part in PARTS}
        return {of_part[name]: data.contexts_by_lineno(name) for name in data.measured_files() if name in of_part}


class First:
    """A pytest plugin: the tests that run the changed line come first, the quickest of them before the others."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.seconds.get(item.nodeid, float("inf")))


def tested(copy: Path, tests: str, plugin: object) -> int:
    """Run some test files of a copy, in a process of its own; its exit code."""
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    files = [f"tests/{name}.py" for name in tests.split()]
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return pytest.main([*options, *files], plugins=[plugin])


def passes(function: Callable[[], int]) -> bool:
    """Whether a function returns 0 in a forked process, in time."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = function()
        finally:
            os._exit(0 if code == 0 else 1)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.1)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def recorded(copy: Path, tests: str, path: Path) -> dict:
    """Seconds of each test, and the tests of each line; the tests must pass while nothing is changed."""

    def record() -> int:
        plugin = Record(copy / "hf_iai")
        code = tested(copy, tests, plugin)
        write_json({"seconds": plugin.seconds, "lines": plugin.lines()}, path)
        return code

    if not path.exists() and not passes(record):
        path.unlink(missing_ok=True)
        raise SystemExit(f"{tests}: these tests fail without any change")
    return json.loads(path.read_text())


def judge(copy: Path, work: Path, part: str, name: str, number: int, line: int) -> dict:
    """Whether the tests of a part notice a mutant."""
    found = recorded(copy, PARTS[part], work / f"{PARTS[part].replace(' ', '+')}.json")
    plugin = First({test: found["seconds"][test] for test in found["lines"][part].get(str(line), []) if test})
    target = copy / "hf_iai" / part
    code = target.read_text()
    changed = mutated(code, name, number)
    target.write_text(changed)
    try:
        killed = not passes(partial(tested, copy, PARTS[part], plugin))
    finally:
        target.write_text(code)
    text = changed.splitlines()[line - 1].strip()
    return {"part": part, "line": line, "operator": name, "number": number, "killed": killed, "mutant": text}


def key(mutant: dict) -> tuple[str, str]:
    return mutant["part"], mutant["mutant"]


def equivalent() -> dict[tuple[str, str], str]:
    """Mutants that change nothing that can be observed, and why."""
    return {key(mutant): mutant["why"] for mutant in json.loads(EQUIVALENT.read_text())}


def prepare(work: Path) -> tuple[list[dict], Path]:
    """What was done before, and a fresh copy of the checkout."""
    for name in LOADED:
        importlib.import_module(name)
    path, copy = work / NAME, (work / "copy").absolute()
    shutil.rmtree(copy, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(copy)], check=True)
    return json.loads(path.read_text())["mutants"] if path.exists() else [], copy


@app.command()
def run(
    num: Annotated[int, typer.Option(help="Size of the sample.")] = 300,
    seed: int = 0,
    minutes: Annotated[float, typer.Option(help="Stop after so long.")] = 1e9,
    work: Path = WORK,
) -> None:
    """Test a sample of mutants."""
    (done, copy), end = prepare(work), time.monotonic() + 60 * minutes
    for mutant in tqdm(sample(num, seed)[len(done) :], disable=None):
        if time.monotonic() > end:
            break
        done.append(judge(copy, work, *mutant))
        write_json({"recipe": recipe("maintain.mutants run", num=num, seed=seed), "mutants": done}, work / NAME)


@app.command()
def again(work: Path = WORK) -> None:
    """Test the mutants again that were not noticed, though they change something."""
    (done, copy), equal = prepare(work), equivalent()
    settings = json.loads((work / NAME).read_text())["recipe"]
    for place, mutant in enumerate(tqdm(done, disable=None)):
        if not mutant["killed"] and key(mutant) not in equal:
            done[place] = judge(copy, work, *(mutant[key] for key in ("part", "operator", "number", "line")))
            write_json({"recipe": settings, "mutants": done}, work / NAME)


@app.command()
def report(work: Path = WORK) -> None:
    """Print how many mutants of each folder were noticed, and those that were not."""
    done, equal = json.loads((work / NAME).read_text())["mutants"], equivalent()
    table = Table("part", "mutants", "noticed", "equivalent", "missed")
    for part in ["", *sorted({mutant["part"].split("/")[0] for mutant in done})]:
        own = [mutant for mutant in done if mutant["part"].startswith(part)]
        noticed, same = sum(m["killed"] for m in own), sum(not m["killed"] and key(m) in equal for m in own)
        table.add_row(part or "all", *map(str, (len(own), noticed, same, len(own) - noticed - same)))
    console = Console(width=160)
    console.print(table)
    for mutant in done:
        if not mutant["killed"]:
            why = equal.get(key(mutant), "missed")
            console.print(f"{mutant['part']}:{mutant['line']}  {mutant['mutant']}  ({why})", markup=False)


if __name__ == "__main__":
    app()
