"""Several processes by gloo: DDP and FSDP2 train as one process does, and their checkpoints are the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import losses

import gpt

ROOT = Path(__file__).resolve().parent.parent

# Each process trains once for every set of settings, in turn; torchrun's start alone would take longer than the runs.
WORKER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, gpt
torch.set_num_threads(1)
for port, settings in json.loads(sys.argv[2]):
    os.environ["MASTER_PORT"] = str(port)
    vars(gpt).update(settings)
    gpt.train()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_processes(world_size, *runs):
    """Train in world_size processes once for each of `runs`, dicts of settings that add to the current ones."""
    base = {name: getattr(gpt, name) for name in gpt.SETTINGS}
    jobs = json.dumps([(free_port(), base | run) for run in runs])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(ROOT), jobs],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, outputs
    return outputs


def largest_difference(a, b):
    """Return the largest difference of two runs' losses, training and validation, of the same steps."""
    assert all(x.keys() == y.keys() and x for x, y in zip(losses(a), losses(b)))
    return max(abs(x[step] - y[step]) for x, y in zip(losses(a), losses(b)) for step in x)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_train_as_one(settings, tmp_path, world_size):
    """50 steps by DDP and FSDP2, Muon and AdamW, tied and not, give one process's losses and weights; evaluation
    batches (7) do not share out evenly."""
    settings(
        batch_size=4,
        gradient_accumulation_steps=2,
        max_iters=50,
        eval_interval=25,
        eval_iters=7,
        sample_tokens=2,
        sample_at_eval=True,
    )
    adamw = {"optimizer": "adamw", "learning_rate": 2e-3, "tie_weights": True, "gradient_checkpointing": True}
    muon = {"optimizer": "muon"} | {name: getattr(gpt, name) for name in list(adamw)[1:]}
    for name, changes in (("muon", muon), ("adamw", adamw)):
        settings(**changes, out_dir=str(tmp_path / name))
        gpt.train()
    runs = [
        changes | {"fsdp": fsdp, "out_dir": str(tmp_path / f"{name}{fsdp}")}
        for name, changes in (("muon", muon), ("adamw", adamw))
        for fsdp in (False, True)
    ]
    outputs = run_processes(world_size, *runs)
    assert all(out == "" for out, _ in outputs[1:])  # only the first process prints
    assert outputs[0][0].count("FSDP,") == outputs[0][0].count("DDP,") == 2
    for run in runs:
        out, name = Path(run["out_dir"]), run["optimizer"]
        assert largest_difference(out, tmp_path / name) < 1e-5, out
        a, b = (torch.load(path / "ckpt.pt", weights_only=True) for path in (out, tmp_path / name))
        assert a["model"].keys() == b["model"].keys()
        assert all(type(w) is torch.Tensor and w.shape == b["model"][k].shape for k, w in a["model"].items())
        assert max(float((w - b["model"][k]).abs().max()) for k, w in a["model"].items()) < 1e-4
