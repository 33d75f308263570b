"""Show what works on which model family: run tests/test_families.py, slow checks too, and write docs/families.md.

    python -m examples.maintain.families_table     # 5 minutes on one core

A cell is `yes` if every case of the check passed, `refused` if the state type is refused with a message, and `-` if the
check does not apply (the page says why). A failed check is written as FAILED; the script then ends with an error.
"""

import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer

ROOT = Path(__file__).parents[2]
STATES = {  # as the tests name them, and as the page does
    "prefix": "`prefix`",
    "prompt": "`prompt`",
    "kept": "`prefix` with kept tokens",
    "delta": "`prefix` with the delta rule",
}
REFUSED = "test_refused_by_design"
# test: (column, what holds)
CHECKS = {
    "test_answers_equal_a_reference": (
        "reference",
        "logits equal transformers' own with the state in a `DynamicCache`, or the prompt as embeddings (1e-5); the "
        "loss is the shifted loss of the query",
    ),
    "test_recent_untrained_is_fewer_shots": (
        "fewer shots",
        '`accumulation="recent"`, untrained, equals the base that sees the last m tokens (1e-5); kept tokens belong to '
        '`"average"` alone',
    ),
    "test_sequence_parallel_and_merge": (
        "merge",
        "reading in sequence = in parallel = merging the states of single chunks (1e-5)",
    ),
    "test_the_delta_rule": (
        "delta rule",
        "with `delta_rule`: reading in sequence = in parallel; an episode's loss reaches every parameter",
    ),
    "test_padding_masked_rows_and_batches_change_nothing": (
        "padding",
        "padding on the left or right changes nothing (1e-5), what stands under the mask nothing bitwise; a row "
        "that is all masked keeps its state bitwise",
    ),
    "test_streams_of_different_length_in_one_batch": (
        "streams",
        "streams of different length in one batch = each alone (1e-5); one state answers many queries",
    ),
    "test_generate": (
        "generate",
        "cached = step by step = single rows = padded on the left, token for token",
    ),
    "test_beams_and_seeded_samples": (
        "beams",
        "beam search of a batch = alone; sampling under a seed repeats",
    ),
    "test_text_longer_than_a_sliding_window": (
        "long text",
        "text longer than a sliding window: cached in parts = in one pass",
    ),
    "test_keys_are_moved_exactly": (
        "keys",
        "keys read elsewhere and moved to their place are those read there (1e-4); a prompt has none, and where "
        "positions are added to the embeddings (GPT-2, OPT) keys stay as they were read",
    ),
    "test_without_a_state_and_disabled": (
        "no state",
        "without a state, base + LoRA in `explicit` and the bare base, bitwise, in `parametric`; disabled, the bare "
        "base, bitwise, and a state is an error",
    ),
    "test_saved_and_loaded": (
        "save",
        "adapter and state, saved and loaded, give the same logits bitwise",
    ),
    "test_an_episode_trains_everything": (
        "train",
        "an episode's loss reaches every parameter; gradient checkpointing changes neither loss nor gradients",
    ),
    "test_a_parametric_episode_trains_everything": (
        "parametric",
        "an episode's loss reaches every parameter in regime `parametric`",
    ),
    "test_bfloat16_base": (
        "bf16",
        "on a base in bfloat16 state and head stay float32, and logits are close to those of the same weights in "
        "float32 (tolerances: `BFLOAT16` in the tests)",
    ),
    "test_compiled_base": (
        "compile",
        '`base.compile(backend="eager")` changes no logit (1e-5) and its graph has no break, but for transformers\' '
        "own under dynamic NTK; not run with kept tokens, whose pass is that of any prefix",
    ),
}
HEAD = """# Families

Written from a run of `tests/test_families.py` on tiny random models by

    python -m examples.maintain.families_table

{versions}: {passed} cases passed, {failed} failed.

`yes`: every case of the check passed. `refused`: by design and with a message, since layers that are not attention have
no keys and values to prepend. `-`: the check does not apply.

| check | what holds |
|---|---|
{checks}
"""


class Results:
    """(check, family, state) -> for each of its cases, whether it passed."""

    def __init__(self, junit: Path, families: set[str]) -> None:
        self.passed: dict[tuple[str, str, str], list[bool]] = defaultdict(list)
        for case in ElementTree.parse(junit).iter("testcase"):
            check, _, values = case.get("name").rstrip("]").partition("[")
            values = set(values.split("-"))
            for family in values & families:
                for state in values & set(STATES):
                    self.passed[check, family, state].append(
                        all(case.find(outcome) is None for outcome in ("failure", "error", "skipped"))
                    )

    def cell(self, check: str, family: str, state: str) -> str:
        for name, word in ((check, "yes"), (REFUSED, "refused")):
            if cases := self.passed.get((name, family, state)):
                return word if all(cases) else "FAILED"
        return "-"

    def count(self, outcome: bool) -> int:
        return sum(cases.count(outcome) for cases in self.passed.values())


def page(results: Results, families: list[str]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    checks = "\n".join(f"| {column} | {meaning} |" for column, meaning in CHECKS.values())
    counts = {"passed": results.count(True), "failed": results.count(False)}
    parts = [HEAD.format(versions=versions, checks=checks, **counts)]
    for state, title in STATES.items():
        made = [check for check in CHECKS if any((check, family, state) in results.passed for family in families)]
        columns = " | ".join(CHECKS[check][0] for check in made)
        parts.append(f"\n## State {title}\n\n| family | {columns} |")
        parts.append("|---" * (1 + len(made)) + "|")
        for family in families:
            parts.append(f"| {family} | " + " | ".join(results.cell(c, family, state) for c in made) + " |")
    return "\n".join(parts) + "\n"


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import ATTENTION_FAMILIES, RECURRENT_FAMILIES

    families = ATTENTION_FAMILIES + RECURRENT_FAMILIES
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "families.xml")
        code = pytest.main(["-q", f"--rootdir={ROOT}", str(ROOT / "tests" / "test_families.py"), f"--junitxml={junit}"])
        results = Results(junit, set(families))
    (ROOT / "docs" / "families.md").write_text(page(results, families))
    if code:
        sys.exit(f"the run ended with {code!r}, {results.count(False)} cases failed: see docs/families.md")


if __name__ == "__main__":
    typer.run(main)
