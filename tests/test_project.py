"""The project files: the wheel, the README, the tree."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hf_iai.hub.published import published_adapter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
QUICKSTART = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
LAUNCHER = "hf_iai/launcher"  # inside the package in a checkout, beside it once installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what is packaged (a stale build folder must not help) and unpacked elsewhere."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "site"
    for name in ("hf_iai", "adapters", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, *folder.glob("*.whl"))
    return target


def python(*arguments, **keywords) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **keywords)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_every_package_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    present = {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("hf_iai/**/__init__.py")}
    data = {"hf_iai/adapters", "hf_iai/embedded/base", "hf_iai/model_cards"}
    listed = {name.replace(".", "/") for name in settings["packages"]}
    assert listed == (present - {LAUNCHER}) | data | {"hf_iai_launcher"}
    assert settings["package-dir"]["hf_iai_launcher"] == LAUNCHER


@pytest.mark.slow
def test_wheel_carries_everything(installed):
    outside = {f"launcher/{name}" for name in files_in(ROOT / LAUNCHER)}
    assert files_in(ROOT / "hf_iai") - outside <= files_in(installed / "hf_iai")
    assert files_in(ROOT / LAUNCHER) == files_in(installed / "hf_iai_launcher")
    assert files_in(ROOT / "adapters") == files_in(installed / "hf_iai" / "adapters")
    assert files_in(installed / "hf_iai" / "model_cards") == {"template.md"}


@pytest.mark.slow
def test_script_of_the_wheel_runs_the_package_that_comes_first(installed, tmp_path):
    """That of the wheel itself, or a checkout on PYTHONPATH."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "hf_iai", checkout / "hf_iai", ignore=shutil.ignore_patterns("__pycache__"))
    command = checkout / "hf_iai" / "cli.py"
    command.write_text(command.read_text().replace("carries a task state", "carries a state of mine"))
    for path, said in ((installed, "carries a task state"), (f"{checkout}:{installed}", "carries a state of mine")):
        output = python(installed / "bin" / "hf-iai", "--help", cwd=tmp_path, env={"PYTHONPATH": str(path)})
        assert said in output


def test_installed_wheel_runs_the_first_step_of_the_demo(installed, tmp_path):
    code = (
        "import hf_iai; from hf_iai.commands.demo_code import load_memory; print(hf_iai.__file__); "
        "print(type(load_memory('hf_iai:embedded')[0].base_model).__name__)"
    )
    output = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"})
    assert str(installed) in output.splitlines()[0]
    assert output.splitlines()[-1] == "IAIModel"


def test_readme_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "prefix+lora" in QUICKSTART and "model.state_effect(" in ast.unparse(ast.parse(QUICKSTART).body[-1])
    exec(compile(QUICKSTART, "README.md", "exec"), {})


def test_readme_and_its_quickstart_are_short():
    assert len(README.splitlines()) <= 130 and len(README) <= 9000
    statements = [node for node in ast.parse(QUICKSTART).body if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(statements) <= 14


def test_tree_is_true():
    """Every entry exists, and every file and folder of the package has its entry, but for `__init__.py` of a folder."""
    entries = tree_of((ROOT / "CONTRIBUTING.md").read_text())
    assert [path for path in entries if not (ROOT / path).exists()] == []
    folders = [ROOT / "hf_iai", *(p for p in (ROOT / "hf_iai").iterdir() if p.is_dir() and p.name != "__pycache__")]
    present = {p for folder in folders for p in folder.iterdir() if p.name != "__pycache__"}
    present -= {folder / "__init__.py" for folder in folders[1:]}
    named = [path for path in entries if path.startswith("hf_iai/")]
    assert set(named) == {p.relative_to(ROOT).as_posix() for p in present}
    assert len(named) == len(set(named))


def tree_of(page: str) -> list[str]:
    """Paths of the entries below "## The tree"; each level is indented by two spaces more."""
    entries, parents = [], []
    tree = re.search(r"## The tree\n.*?```\n(.*?)```", page, re.DOTALL).group(1)
    for line in filter(str.strip, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [line.split()[0].rstrip("/")]
        entries.append("/".join(parents))
    return entries


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_links_of_the_documents_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_published_adapter_names_what_there_is():
    assert Path(published_adapter("code-prefix"), "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="'nothing' is not published; choose one of .*code-prefix"):
        published_adapter("nothing")
