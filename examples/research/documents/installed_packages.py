"""Measure `adapters/code-prefix` on three installed packages that no training has seen.

    python -m examples.research.documents.installed_packages    # 5 minutes on one core; writes work/packages/curve.json

scikit-learn, scipy and matplotlib are in neither split of `hf_iai.embedded.library_documents`: no base, adapter or
choice of a setting has used them. Tests and vendored code are left out.
"""

from pathlib import Path

import numpy as np
import sklearn
import typer
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from examples.research.documents.adapt_to_documents import report, side_by_side
from examples.research.documents.code_curve import CHUNK, COUNTS, windows
from hf_iai import embedded_base
from hf_iai.embedded.library_code import MAX_BYTES, MIN_BYTES
from hf_iai.evaluation import evaluate_curve

PACKAGES = ("sklearn", "scipy", "matplotlib")
OTHERS = {"tests", "externals", "_lib", "_external"}  # tests, and what the packages vendor
SITE = Path(sklearn.__file__).parent.parent


def files_of(package: str):
    """`{"text", "path"}` of the package's source files, tests left out."""
    for path in sorted((SITE / package).rglob("*.py")):
        text, inside = path.read_text(encoding="utf-8"), path.relative_to(SITE)
        if not OTHERS.intersection(inside.parts) and MIN_BYTES <= len(text) <= MAX_BYTES:
            yield {"text": text, "path": inside.as_posix()}


def main(adapter: str = "adapters/code-prefix", num: int = 160, work: Path = Path("work/packages")) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    curves = []
    for package in PACKAGES:
        test = windows(files_of(package), tokenizer, max(COUNTS), num, seed=0)
        curves.append(evaluate_curve(model, test, COUNTS, tokenizer=tokenizer, chunk_size=CHUNK))
        report(curves[-1], work / package, package=package, windows=len(test), files=len(set(test["group"])))
    whole = side_by_side(curves, np.concatenate([curve.groups for curve in curves]))
    report(
        whole,
        work,
        command="python -m examples.research.documents.installed_packages",
        packages=PACKAGES,
        windows=len(whole.groups),
    )


if __name__ == "__main__":
    typer.run(main)
