"""Peak memory of `adapt` against the number of chunks."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys, torch
from tiny import make_model, ids
torch.set_num_threads(1)
model = make_model()
stream = lambda n: ({"input_ids": ids(1, 64, seed=i)} for i in range(n))
model.adapt(stream(32))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model.adapt(stream(8)); few = peak()
model.adapt(stream(512)); print(peak() - few)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_adapt_needs_no_more_memory_for_more_chunks():
    here = Path(__file__).parent
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=here, capture_output=True, text=True, check=True
    )
    assert float(out.stdout.split()[-1]) <= 2.0, "MB from 8 to 512 chunks"
