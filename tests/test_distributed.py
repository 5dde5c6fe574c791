"""Several processes by gloo: DDP and FSDP2 train as one process does, and their checkpoints are the same."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from forks import run_jobs
from test_training import losses, toy_flags

import gpt

ROOT = Path(__file__).resolve().parent.parent

# As WORKER; the memory of the second process has room for two sequences at once.
SHORT_OF_MEMORY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch, gpt
forward = gpt.GPT.forward
def limited(self, idx, *args, **kwargs):
    if self.training and len(idx) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, idx, *args, **kwargs)
if os.environ["RANK"] == "1":
    gpt.GPT.forward = limited
"""

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


def run_processes(world_size, *runs, code=WORKER):
    """Train in world_size processes once for each of `runs`, dicts of settings that add to the current ones."""
    base = {name: getattr(gpt, name) for name in gpt.SETTINGS}
    jobs = json.dumps([(free_port(), base | run) for run in runs])
    env = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world_size)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    done = run_jobs(
        *({"argv": ["-c", ROOT, jobs], "code": code, "env": env | rank} for rank in ranks),
        timeout=200,
    )
    assert [process.returncode for process in done] == [0] * world_size, done
    return [(process.stdout, process.stderr) for process in done]


def largest_difference(a, b):
    """Return the largest difference of two runs' losses, training and validation, of the same steps."""
    assert all(x.keys() == y.keys() and x for x, y in zip(losses(a), losses(b)))
    return max(abs(x[step] - y[step]) for x, y in zip(losses(a), losses(b)) for step in x)


def test_two_processes_train_as_one(settings, tmp_path):
    """50 steps by DDP and FSDP2, Muon and AdamW, tied and not, give one process's losses and weights; evaluation
    batches (7) do not share out evenly. In bfloat16 FSDP's shares, and so the checkpoint, stay float32."""
    settings(
        dtype="bfloat16",
        max_iters=20,
        out_dir=str(tmp_path / "rounded"),
        gradient_accumulation_steps=2,
    )
    gpt.train()
    short = {
        "dtype": "bfloat16",
        "max_iters": 20,
        "fsdp": True,
        "out_dir": str(tmp_path / "shared"),
    }
    short |= {
        name: getattr(gpt, name)
        for name in ("eval_interval", "eval_iters", "tie_weights", "optimizer")
    }
    short |= {
        "learning_rate": gpt.learning_rate,
        "gradient_checkpointing": False,
        "sample_tokens": 0,
    }
    settings(dtype="float32")
    cases = [("muon", False), ("muon", True), ("adamw", False), ("adamw", True)]
    compare(settings, tmp_path, 2, cases, more=[short])
    assert largest_difference(tmp_path / "rounded", tmp_path / "shared") < 0.05
    weights = gpt.read_checkpoint(tmp_path / "shared" / "ckpt.pt")["model"]
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_two_processes_train_compiled_as_one_does_plainly(settings, tmp_path):
    """By DDP as by FSDP2."""
    settings(batch_size=2, gradient_accumulation_steps=2, max_iters=6, eval_interval=3, dropout=0.0)
    settings(out_dir=str(tmp_path / "plain"))
    gpt.train()
    runs = [
        {"compile": True, "fsdp": fsdp, "out_dir": str(tmp_path / str(fsdp))}
        for fsdp in (False, True)
    ]
    outputs = run_processes(2, *runs)
    assert outputs[0][0].count("\ncompiled in ") == 2
    for run in runs:
        assert largest_difference(Path(run["out_dir"]), tmp_path / "plain") < 1e-4


@pytest.mark.skipif(
    "FOUR" not in os.environ, reason="half a minute on two cores: FOUR=1 pytest runs it, too"
)
def test_four_processes_train_as_one(settings, tmp_path):
    compare(settings, tmp_path, 4, [("muon", False), ("muon", True)])


def compare(settings, tmp_path, world_size, cases, more=()):
    """Train in one process and in several, for pairs of optimizer and fsdp, and compare losses and weights."""
    settings(
        batch_size=4, gradient_accumulation_steps=2, max_iters=50, eval_interval=25, eval_iters=7
    )
    settings(sample_tokens=2, sample_at_eval=True)
    adamw = {
        "optimizer": "adamw",
        "learning_rate": 2e-3,
        "tie_weights": True,
        "gradient_checkpointing": True,
    }
    muon = {"optimizer": "muon"} | {name: getattr(gpt, name) for name in list(adamw)[1:]}
    changes = {"muon": muon, "adamw": adamw}
    for name in {name for name, _ in cases}:
        settings(**changes[name], out_dir=str(tmp_path / name))
        gpt.train()
    runs = [
        changes[name] | {"fsdp": fsdp, "out_dir": str(tmp_path / f"{name}{fsdp}")}
        for name, fsdp in cases
    ]
    outputs = run_processes(world_size, *runs, *more)
    assert all(out == "" for out, _ in outputs[1:])  # only the first process prints
    assert not any("Warning" in err for _, err in outputs)
    assert outputs[0][0].count(", DDP\n") == len(cases) // 2
    assert outputs[0][0].count(", FSDP\n") == len(cases) // 2 + len(more)
    for run in runs:
        out, name = Path(run["out_dir"]), run["optimizer"]
        assert largest_difference(out, tmp_path / name) < 1e-5, out
        a, b = (torch.load(path / "ckpt.pt", weights_only=True) for path in (out, tmp_path / name))
        assert a["model"].keys() == b["model"].keys()
        assert all(
            type(w) is torch.Tensor and w.shape == b["model"][k].shape
            for k, w in a["model"].items()
        )
        assert max(float((w - b["model"][k]).abs().max()) for k, w in a["model"].items()) < 1e-4


def test_one_of_two_processes_may_cut_its_micro_batches(settings, tmp_path):
    """It repeats the forward pass of a step's first micro-batch alone: the other one must not be waited for."""
    settings(batch_size=4, gradient_accumulation_steps=4, max_iters=5, eval_interval=5)
    settings(out_dir=str(tmp_path / "enough"))
    gpt.train()
    outputs = run_processes(2, {"out_dir": str(tmp_path / "short")}, code=SHORT_OF_MEMORY + WORKER)
    assert outputs[1][0].count("a step has 4 micro-batches of 2") == 1
    assert largest_difference(tmp_path / "short", tmp_path / "enough") < 1e-5


def test_checkpoints_interchange_in_all_directions(settings, tmp_path):
    """One run goes through one process, DDP and FSDP2 in every order of two, and ends as in one process."""
    settings(
        batch_size=4, gradient_accumulation_steps=2, lr_decay_iters=30, eval_interval=5, dropout=0.1
    )
    settings(train_temperature=0.8)

    def several(names, max_iters):
        """Go on with these runs, by name and fsdp, in two processes."""
        more = {"init_from": "auto", "max_iters": max_iters}
        run_processes(
            2, *(more | {"fsdp": fsdp, "out_dir": str(tmp_path / name)} for name, fsdp in names)
        )

    def alone(name, max_iters):
        settings(init_from="auto", max_iters=max_iters, out_dir=str(tmp_path / name))
        gpt.train()

    alone("one", 30)
    alone("one-ddp-fsdp-one", 5)
    alone("one-fsdp-ddp-one", 5)
    several([("one-ddp-fsdp-one", False), ("one-fsdp-ddp-one", True)], 15)
    several([("one-ddp-fsdp-one", True), ("one-fsdp-ddp-one", False)], 25)
    for name in ("one-ddp-fsdp-one", "one-fsdp-ddp-one"):
        alone(name, 30)
        assert largest_difference(tmp_path / name, tmp_path / "one") < 1e-5


def test_torchrun_starts_a_killed_run_again(settings, tmp_path):
    """From the newest checkpoint: also by the rendezvous of --standalone, whose store outlives the processes."""
    settings()
    flags = [
        *toy_flags(tmp_path),
        f"--out_dir={tmp_path / 'out'}",
        "--gradient_accumulation_steps=2",
    ]
    flags += [
        "--init_from=auto",
        "--max_iters=60",
        "--eval_interval=10",
        "--device=cpu",
        "--sample_tokens=0",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*torchrun, "--max-restarts=1", "--monitor-interval=0.1", str(ROOT / "gpt.py"), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watch = threading.Timer(100, process.kill)
    watch.start()
    for line in process.stdout:
        if line.startswith("step     20 | val loss"):
            break
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout
    os.kill(int(children.split()[1]), signal.SIGKILL)
    rest = process.communicate()[0]
    watch.cancel()
    assert process.returncode == 0
    assert ", on from step " in rest and "60 steps" in rest
