"""The command `hf-iai`: a fast start, quiet runs, the defaults of the code, errors of one line."""

import json
import logging
import re
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest
import typer
from peft import LoraConfig, get_peft_model
from samples import BYTES, tokenizer
from tiny import chunks, make_base, make_encoder, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
)
from typer.testing import CliRunner

from hf_iai import IAIConfig, IAITrainingArguments
from hf_iai.cli import app, quiet
from hf_iai.commands.inputs import adapter_folder, documents, examples
from hf_iai.commands.train import text_config
from hf_iai.hub.published import published_adapter

COMMANDS = ["demo", "train", "adapt", "classify", "export"]
# Runs each list of arguments through the installed script, then fails if a package in `forbidden` was imported.
SCRIPT = """
import json, sys
from importlib.metadata import entry_points

runs, forbidden = json.loads(sys.argv[1])
(script,) = entry_points(group="console_scripts", name="hf-iai")
main = script.load()
for run in runs:
    sys.argv = ["hf-iai", *run]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
loaded = [name for name in forbidden if name in sys.modules]
sys.exit(f"loaded {loaded}" if loaded else 0)
"""
WORDS = " ".join(f"word {i}" for i in range(400))


def script(*runs, forbidden=(), cwd=None) -> subprocess.CompletedProcess:
    arguments = json.dumps([[list(map(str, run)) for run in runs], list(forbidden)])
    done = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def refused(*arguments) -> str:
    """The message, without the frame that typer may draw around it."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output + repr(result.exception)
    return " ".join(result.output.replace("│", " ").split())


def test_digits_are_not_read_by_a_base_of_text(tmp_path):
    assert "got --base x: leave it out" in refused("demo", "--task", "digits", "--base", "x", "--output", tmp_path)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda command: "-".join(command))
def test_help_loads_neither_torch_nor_transformers_nor_peft(command):
    output = script([*command, "--help"], forbidden=["torch", "transformers", "peft", "hf_iai"]).stdout
    assert "Usage: hf-iai" in output
    assert all(name in output for name in (COMMANDS if not command else ["--output"]))


@pytest.mark.slow
def test_the_module_runs_too():
    done = subprocess.run([sys.executable, "-m", "hf_iai.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)


# Options of `train`, by the name of the field that they set; with what the help says where the default is no value.
OF_CONFIG = ["state_type", "num_state_tokens", "num_kept_tokens", "state_r", "signal", "head", "r", "target_modules"]
OF_ARGUMENTS = {"batch_size": "per_device_train_batch_size"} | {
    name: name for name in "chunk_size max_chunks max_steps num_train_epochs learning_rate seed".split()
}
IN_WORDS = {
    "target_modules": "PEFT's choice for the base",
    "chunk_size": "what the base can read at once",
    "max_steps": "as many as the epochs have",
}


def test_train_has_no_defaults_of_its_own():
    options = {option.name: option for option in typer.main.get_command(app).commands["train"].params}
    assert set(options) == {"data", "output", "model", *OF_CONFIG, *OF_ARGUMENTS}
    config = text_config()
    gradients = text_config(signal="gradients")
    arguments = {field.name: field.default for field in fields(IAITrainingArguments)}
    usual = {name: getattr(config, name) for name in OF_CONFIG} | {"head": gradients.head}
    usual |= {name: arguments[of] for name, of in OF_ARGUMENTS.items()}
    for name, value in usual.items():
        assert options[name].default is None
        assert options[name].show_default == IN_WORDS.get(name, str(value)), name
    assert (usual["target_modules"], usual["chunk_size"], usual["max_steps"]) == (None, None, -1)
    assert usual["learning_rate"] == IAITrainingArguments(output_dir="out").learning_rate == 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kept_tokens": 3},
        {"state_type": "prompt", "num_state_tokens": 5, "r": 2},
        {"state_type": "lora", "signal": "gradients", "head": "sgd", "state_r": 2},
        {"signal": "both"},
        {"target_modules": "all-linear"},
    ],
)
def test_options_of_train_make_a_configuration(options):
    assert text_config(**options).to_dict() == IAIConfig(task_type="CAUSAL_LM", **options).to_dict()


def test_target_modules_are_names_with_commas_between_them():
    assert text_config(target_modules="q_proj,v_proj").target_modules == {"q_proj", "v_proj"}
    assert text_config(target_modules="q_proj").target_modules == {"q_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--state-type linear", "a state of type 'linear' is not read from texts"),
        ("--signal magic", "signal must be one of"),
        ("--head sgd", "signal='observations' has the heads ['gated'], got head='sgd'"),
        ("--state-type prompt --num-kept-tokens 2", "num_kept_tokens=2 has no meaning for state_type='prompt'"),
        ("--state-type mlp", "a state of type 'mlp' is not read from texts"),
        ("--state-r 0", "Invalid value for '--state-r'"),
        ("--chunk-size 64", "no document has a window of 576 tokens"),
        ("--target-modules nothing", "Target modules {'nothing'} not found"),
    ],
)
def test_train_refuses_options_that_cannot_work(tmp_path, options, message):
    (tmp_path / "short.txt").write_text("short")
    assert message in refused("train", "--data", tmp_path, "--output", tmp_path / "out", *options.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("nothing", "Error: 'nothing' is no folder, no Hub id and no published adapter; published: ['code-both',"),
        ("FOLDER", "Error: Can't find 'adapter_config.json' at "),
        ("minilm-linear", "Error: minilm-linear reads labelled texts, and makes a classifier of them: use `hf-iai cl"),
        ("vectors-linear", "Error: vectors-linear reads vectors, which no file holds here: use model.adapt("),
    ],
)
def test_an_adapter_that_cannot_read_text_is_one_line(tmp_path, adapter, message):
    text = tmp_path / "text.txt"
    text.write_text(WORDS)
    adapter = str(tmp_path) if adapter == "FOLDER" else adapter
    for command in (["adapt", "--data", text], ["export", "--state", tmp_path]):
        result = CliRunner().invoke(app, [*map(str, command), "--adapter", adapter, "--output", str(tmp_path / "out")])
        assert result.exit_code == 2 and result.output.count("\n") == 1
        assert result.output.startswith(message)


def test_a_text_without_a_token_is_one_line(tmp_path):
    (tmp_path / "empty.txt").touch()
    options = ["--adapter", "code-prefix", "--data", tmp_path / "empty.txt", "--output", tmp_path / "out"]
    assert refused("adapt", *options).startswith("Error: adapt got no chunk: pass at least one")


def test_documents_of_a_folder_and_of_json_lines(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("first")
    (tmp_path / "two.bin").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "three.md").write_text("third")
    assert list(documents(tmp_path)) == [{"text": "first", "path": "a/one.txt"}, {"text": "third", "path": "three.md"}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "x"}\n\n{"text": "y", "path": "p"}\n')
    assert list(documents(lines)) == [{"text": "x", "path": "rows.jsonl:1"}, {"text": "y", "path": "p"}]
    assert list(examples(lines)) == [{"text": "x"}, {"text": "y", "path": "p"}]
    assert list(documents(tmp_path / "three.md")) == [{"text": "third", "path": "three.md"}]
    lines.write_text('{"text": "x"}\n{"texts": "y"}\n')
    with pytest.raises(ValueError, match="line 2 of .*rows.jsonl: 'text' is None"):
        list(documents(lines))
    with pytest.raises(ValueError, match="line 2 of .*rows.jsonl: an example must have exactly one of"):
        list(examples(lines))


def test_an_adapter_is_published_or_a_folder_or_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert adapter_folder("code-prefix") == published_adapter("code-prefix")
    assert [adapter_folder(name) for name in ("mine", "me/mine", str(tmp_path))] == ["mine", "me/mine", str(tmp_path)]


def test_quiet_is_about_other_packages_and_ends(caplog, recwarn):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with quiet():
        logger.warning("no kernel")
        logger.error("broken")
        warnings.warn_explicit("old name", FutureWarning, "peft.py", 1, module="peft.peft_model")
        warnings.warn_explicit("ours", UserWarning, "config.py", 1, module="hf_iai.config")
        warnings.warn_explicit("not ours", UserWarning, "torchvision.py", 1, module="torchvision")
    logger.warning("again")
    assert caplog.messages == ["broken", "again"]
    assert [str(found.message) for found in recwarn] == ["ours", "not ours"]


def test_commands_print_nothing_but_their_own(tmp_path):
    """With pipes for stdout and stderr: no warnings, no progress bars."""
    for number in range(4):
        (tmp_path / f"data/{number}").mkdir(parents=True)
        (tmp_path / f"data/{number}/text.txt").write_text(WORDS.replace("word", f"word{number}"))
    rows = [{"text": f"{word} {i}", "label": word} for word in ("cat", "dog") for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=400, **sizes)).save_pretrained(tmp_path / "encoder")  # without a classifier
    ByT5Tokenizer().save_pretrained(tmp_path / "encoder")
    few = "--chunk-size 32 --max-chunks 2 --max-steps 2 --batch-size 2 --num-state-tokens 4".split()
    done = script(
        ["train", "--data", "data", "--output", "adapter", *few],
        ["adapt", "--adapter", "adapter", "--data", "data/0/text.txt", "--output", "state"],
        ["export", "--adapter", "adapter", "--state", "state", "--output", "plain"],
        ["adapt", "--adapter", "code-prefix", "--data", "data", "--output", "read"],
        ["export", "--adapter", "code-prefix", "--state", "read", "--output", "read_plain"],
        ["classify", "rows.jsonl", "--test", "rows.jsonl", "--encoder", "encoder", "--output", "classifier"],
        cwd=tmp_path,
    )
    assert done.stderr == ""
    assert "Warning" not in done.stdout and "\r" not in done.stdout
    assert re.match(r"trained for 2 steps; mean loss \d\.\d{3}\nadapter written to adapter\n", done.stdout)
    assert "next: hf-iai export --adapter code-prefix --state read --output FOLDER" in done.stdout.splitlines()
    for folder in ("plain", "read_plain"):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"


@pytest.mark.slow
def test_the_demo_prints_nothing_but_its_own(tmp_path):
    assert script(["demo", "--output", tmp_path / "code"], ["demo", "--task", "digits"], cwd=tmp_path).stderr == ""
    assert (tmp_path / "code/curve.png").is_file() and (tmp_path / "demo_output/digits.png").is_file()


@pytest.mark.slow
def test_train_a_lora_state_then_export(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps({"text": WORDS})] * 4))
    (tmp_path / "text.txt").write_text(WORDS)
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
        (tmp_path / "data" / f"{number}.txt").write_text(WORDS.replace("word", f"word{number}"))
    adapter, state = tmp_path / "adapter", tmp_path / "state"
    few = "--chunk-size 32 --max-chunks 2 --max-steps 2 --batch-size 2 --num-state-tokens 4".split()
    run("train", "--data", tmp_path / "data", "--output", adapter, *few)
    run("adapt", "--adapter", adapter, "--data", tmp_path / "data" / "0.txt", "--output", state, "--chunk-size", "32")
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 8)
    run("adapt", "--adapter", adapter, "--data", examples, "--output", state, "--chunk-size", "32")
    assert (state / "config.json").is_file()


# ---------------------------------------------------------------- errors of users


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, adapters of both kinds, a state of each, and files that are wrong in many ways."""
    place = tmp_path_factory.mktemp("errors")
    model = make_model(saved_base(place, make_base()), state_type="prompt", regime="parametric", num_state_tokens=4)
    model.save_pretrained(place / "adapter")
    make_model(saved_base(place, make_base()), num_state_tokens=3).save_pretrained(place / "other")
    model.adapt(chunks(2, batch=1)).save_pretrained(place / "state")
    encoder = AutoModelForSequenceClassification.from_pretrained(saved_folder(place / "encoder", make_encoder()))
    get_peft_model(encoder, IAIConfig(task_type="SEQ_CLS", state_type="linear", r=2)).save_pretrained(place / "linear")
    get_peft_model(saved_base(place, make_base()), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(place / "lora")
    files = {
        "text.txt": b"w5 w6 w7 " * 80,
        "empty.txt": b"",
        "bytes.txt": b"\xff\xfe",
        "rows.jsonl": b'{"text": "w5"}\n{"tex',
        "vocabulary.jsonl": b'{"input_ids": [1, 99999]}\n',
        "fields.jsonl": b'{"a": 1}\n',
        "labels.csv": b"text,label\nhi,a\nho,b\n",
        "one.csv": b"text,label\nhi,a\nho,a\n",
        "comma.csv": b"text,label\na,b,c\n",
        "mine/classifier/thesis.txt": b"mine",
        "mine/export/thesis.txt": b"mine",
        "damaged/task_state.safetensors": b"\0" * 9,
    }
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    (place / "nothing").mkdir()
    return place


def saved_folder(folder, model):
    model.save_pretrained(folder)
    (tokenizer() if "encoder" not in folder.name else BYTES).save_pretrained(folder)
    return folder


def saved_base(place, base):
    return AutoModelForCausalLM.from_pretrained(saved_folder(place / "base", base))


ERRORS = [
    ("adapt --adapter adapter --data empty.txt", "no chunk"),
    ("adapt --adapter adapter --data bytes.txt", "bytes.txt is not UTF-8 text"),
    ("adapt --adapter adapter --data rows.jsonl", "line 2 of"),
    ("adapt --adapter adapter --data fields.jsonl", "line 1 of"),
    ("adapt --adapter adapter --data vocabulary.jsonl", "do not fit a vocabulary"),
    ("adapt --adapter adapter --data nothing", "no chunk"),
    ("adapt --adapter adapter --data text.txt --chunk-size 9999", "does not fit"),
    ("adapt --adapter lora --data text.txt", "of the method LORA"),
    ("adapt --adapter nothing --data text.txt", "adapter_config.json"),
    ("adapt --adapter me/unknown --data text.txt", "me/unknown"),
    ("adapt --adapter adapter --data text.txt --output text.txt", "text.txt"),
    ("export --adapter adapter --state nothing", "holds no task state"),
    ("export --adapter adapter --state damaged", "damaged"),
    ("export --adapter other --state state", "belongs to"),
    ("export --adapter adapter --state state --type LORA", "cannot become 'LORA'"),
    ("export --adapter adapter --state state --output mine/export", "thesis.txt"),
    ("classify labels.csv --adapter linear --text subject", "'subject' is None"),
    ("classify one.csv --adapter linear", "needs two classes"),
    ("classify comma.csv --adapter linear", "row 1 of"),
    ("classify text.txt --adapter linear", "is no table"),
    ("classify labels.csv --adapter linear --test rows.jsonl", "rows.jsonl"),
    ("classify labels.csv --adapter adapter", "linear state"),
    ("classify labels.csv --adapter linear --output mine", "thesis.txt"),
    ("train --data nothing --model base", "no document"),
    ("train --data text.txt --model base --chunk-size 9999", "document has a window"),
    ("train --data rows.jsonl --model base", "line 2 of"),
    ("train --data text.txt --model nothing", "nothing"),
    ("train --data text.txt --model me/unknown", "me/unknown"),
]


@pytest.mark.parametrize(("command", "message"), ERRORS)
def test_every_error_of_a_user_is_one_line(place, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(place)
    arguments = command.split()
    arguments += [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), repr(result.exception)
    assert message in " ".join(result.output.split()) and result.output.count("Error: ") == 1
    assert (place / "mine" / "classifier" / "thesis.txt").read_bytes() == b"mine"
