"""A process whose Hub is a server of ours: huggingface_hub reads the Hub's address when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Imports take most of the time of a short script: they are made once, and each script runs in a fork.
WORKER = """
import json, os, sys, traceback
import warnings; warnings.simplefilter("ignore")
import huggingface_hub
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM
from tiny import chunks, ids, make_base, make_model
from hf_iai import IAITrainer, TaskState

for line in sys.stdin:
    script, folder = json.loads(line)
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
        continue
    code = 1
    try:
        os.chdir(folder)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        exec(script)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
"""


class HubProcess:
    """Runs scripts, each as if alone; all of them share what they have downloaded.

    Args:
        url: of the Hub.
        home: folder of the downloads.
    """

    def __init__(self, url: str, home: Path) -> None:
        here = Path(__file__).parent
        own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": f"{here}:{here.parent}"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, folder: Path) -> str:
        """What a script prints that runs in `folder`."""
        self.process.stdin.write(json.dumps([script, str(folder)]) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        assert code == "0", f"exit status {code!r}\n{(folder / 'stderr').read_text()[-3000:]}"
        return (folder / "stdout").read_text()

    def close(self) -> None:
        with self.process:
            self.process.kill()
