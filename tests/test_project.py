"""The project files: the wheel, the README, the command line."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_iai.cli import _config, _documents, app
from hf_iai.hub.published import published_adapter

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in ROOT.glob("hf_iai/**/__init__.py")}
    assert set(listed) == present | {"hf_iai.adapters", "hf_iai.embedded.base", "hf_iai.model_cards"}  # data


@pytest.mark.slow
def test_wheel_carries_everything(installed):
    assert files_in(ROOT / "hf_iai") <= files_in(installed / "hf_iai")
    assert files_in(ROOT / "adapters") == files_in(installed / "hf_iai" / "adapters")
    assert files_in(installed / "hf_iai" / "model_cards") == {"template.md"}


def test_installed_wheel_runs_the_first_step_of_the_demo(installed, tmp_path):
    code = (
        "import hf_iai; from hf_iai.commands.demo_code import load_published; print(hf_iai.__file__); "
        "print(type(load_published()[0].base_model).__name__)"
    )
    output = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"})
    assert str(installed) in output.splitlines()[0]
    assert output.splitlines()[-1] == "IAIModel"


def test_readme_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert "max_steps=500" in code
    code = code.replace("max_steps=500", "max_steps=3, report_to='none'")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["tokens"].shape[1] > names["query"]["input_ids"].shape[1]


def test_readme_quickstart_is_short():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    statements = [line for line in code.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(statements) <= 20


def test_readme_tree_is_true():
    """Every entry exists, and every file and folder of the package has its entry."""
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    entries = [line.split()[0].rstrip("/") for line in tree.splitlines()]
    inside = [line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")]
    outside = [name for name in entries if name not in inside]
    assert not [name for name in inside if not (ROOT / "hf_iai" / name).exists()]
    assert not [name for name in outside if not (ROOT / name).exists()]
    present = {p.name for p in (ROOT / "hf_iai").iterdir() if p.name != "__pycache__"}
    assert present == set(inside)


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_links_of_the_documents_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_published_adapter_names_what_there_is():
    assert Path(published_adapter("code-prefix"), "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="'nothing' is not published; choose one of .*code-prefix"):
        published_adapter("nothing")


def test_help_lists_the_commands():
    output = CliRunner().invoke(app, ["--help"]).output
    assert all(command in output for command in ("demo", "train", "adapt", "export"))


def test_documents_of_a_folder_and_of_json_lines(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("first")
    (tmp_path / "two.bin").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "three.md").write_text("third")
    assert list(_documents(tmp_path)) == [{"text": "first", "path": "a/one.txt"}, {"text": "third", "path": "three.md"}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "x"}\n\n{"text": "y", "path": "p"}\n')
    assert list(_documents(lines)) == [{"text": "x", "path": "rows.jsonl:0"}, {"text": "y", "path": "p"}]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 14),
        ({"num_kept_tokens": 3}, 3),
        ({"state_type": "prompt"}, 0),
        ({"state_type": "lora", "signal": "gradients", "head": "sgd", "state_r": 2}, 0),
        ({"signal": "both"}, 0),
    ],
)
def test_options_of_train_make_a_configuration(options, kept):
    usual = {"state_type": "prefix", "signal": "observations", "head": None, "state_r": 8, "num_kept_tokens": None}
    config = _config(16, **(usual | options))
    assert config.num_kept_tokens == kept
    assert all(getattr(config, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--state-type linear", "a state of type 'linear' is not read from texts"),
        ("--signal magic", "signal must be one of"),
        ("--head sgd", "signal='observations' has the heads ['gated'], got head='sgd'"),
        ("--state-type prompt --num-kept-tokens 2", "num_kept_tokens=2 needs state_type='prefix'"),
        ("--state-type mlp", "a state of type 'mlp' is not read from texts"),
        ("--state-r 0", "Invalid value for '--state-r'"),
    ],
)
def test_train_refuses_options_that_cannot_work(tmp_path, options, message):
    result = CliRunner().invoke(app, ["train", "--data", str(tmp_path), "--output", "out", *options.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.slow
def test_train_a_lora_state_then_export(tmp_path):
    text = " ".join(f"word {i}" for i in range(400))
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps({"text": text})] * 4))
    (tmp_path / "text.txt").write_text(text)
    adapter, state, plain = tmp_path / "adapter", tmp_path / "state", tmp_path / "plain"
    few = "--chunk-size 32 --max-chunks 2 --max-steps 2 --batch-size 2 --state-type lora --signal gradients".split()
    run("train", "--data", tmp_path / "data.jsonl", "--output", adapter, *few, "--head", "sgd", "--state-r", "2")
    run("adapt", "--adapter", adapter, "--data", tmp_path / "text.txt", "--output", state, "--chunk-size", "32")
    run("export", "--adapter", adapter, "--state", state, "--output", plain, "--type", "LORA")
    assert json.loads((plain / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.slow
def test_train_then_adapt(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(4):
        text = " ".join(f"word{number} {i}" for i in range(400))
        (tmp_path / "data" / f"{number}.txt").write_text(text)
    adapter, state = tmp_path / "adapter", tmp_path / "state"
    few = "--chunk-size 32 --max-chunks 2 --max-steps 2 --batch-size 2 --num-state-tokens 4".split()
    run("train", "--data", tmp_path / "data", "--output", adapter, *few)
    run("adapt", "--adapter", adapter, "--data", tmp_path / "data" / "0.txt", "--output", state, "--chunk-size", "32")
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 8)
    run("adapt", "--adapter", adapter, "--data", examples, "--output", state, "--chunk-size", "32")
    assert (state / "config.json").is_file()


def run(*arguments) -> None:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
