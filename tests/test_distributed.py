"""Two processes: the gradients are those of one, and no parameter is unused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import json, os, sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tiny import ids, make_model
from hf_iai.objectives import Objective

torch.set_num_threads(1)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
model = make_model(**json.loads(sys.argv[2])).train()
query, support = ids(4, 1, 8, seed=1), ids(4, 3, 10)
rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
inputs = {"input_ids": query[rows], "labels": query[rows], "chunk_input_ids": support[rows]}
inputs["objective"] = Objective("unrolled")
if sys.argv[4] == "uneven":  # the episodes of the second process have one chunk less
    inputs["chunk_attention_mask"] = torch.ones_like(support[rows])
    if world == 1:
        inputs["chunk_attention_mask"][2:, 0] = 0
    elif rank == 1:
        inputs |= {name: inputs[name][:, 1:] for name in ("chunk_input_ids", "chunk_attention_mask")}
if world > 1:
    dist.init_process_group("gloo")
    if sys.argv[3] == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
else:
    wrapped = model
for _ in range(2):  # the second pass of DDP fails if a parameter was unused in the first
    model.zero_grad()
    wrapped(**inputs).loss.backward()
gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
gradients = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
if rank == 0:
    save_file(gradients, f"{sys.argv[1]}/{world}.safetensors")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "kind", "chunks"),
    [
        ('{"signal": "gradients", "state_type": "lora", "regime": "parametric"}', "ddp", "even"),
        ('{"signal": "gradients", "state_type": "prefix", "head": "path_aware"}', "ddp", "even"),
        ('{"signal": "gradients", "state_type": "prompt", "head": "sgd", "second_order": true}', "ddp", "even"),
        ('{"signal": "both", "state_type": "prefix"}', "ddp", "even"),
        ('{"signal": "both", "state_type": "lora", "state_r": 2}', "ddp", "even"),
        ('{"signal": "gradients", "state_type": "lora"}', "fsdp", "even"),
        ('{"signal": "both", "state_type": "prefix"}', "fsdp", "even"),
        ('{"signal": "gradients", "state_type": "lora"}', "fsdp", "uneven"),
        ('{"state_type": "prefix"}', "fsdp", "uneven"),
    ],
)
def test_two_processes(values, kind, chunks, tmp_path):
    for world in (1, 2):
        processes = []
        for rank in range(world):
            own = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            own["MASTER_PORT"] = str(29500 + os.getpid() % 1000)
            command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), values, kind, chunks]
            here = Path(__file__).parent
            processes.append(
                subprocess.Popen(command, cwd=here, env=os.environ | own, stderr=subprocess.PIPE, text=True)
            )
        errors = [process.communicate()[1] for process in processes]
        assert all(process.returncode == 0 for process in processes), errors[0][-3000:]
    one, two = (load_file(tmp_path / f"{world}.safetensors") for world in (1, 2))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        assert (gradient - two[name]).abs().max() < 3e-5 * max(1, gradient.abs().max()), name
        assert torch.isfinite(gradient).all()
