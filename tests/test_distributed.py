"""Several processes by gloo: DDP and FSDP2 train as one process does, to the same checkpoints."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forks import NO_PICTURES, run_jobs
from test_training import losses, toy_flags

import gpt

ROOT = Path(__file__).resolve().parent.parent

# Each process trains once for every set of settings, in turn, since to start torchrun takes longer
# than to train.
WORKER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, gpt
torch.set_num_threads(1)
for port, settings in json.loads(sys.argv[2]):
    os.environ["MASTER_PORT"] = str(port)
    gpt.train(**settings)
"""

# As WORKER, but in the second process the third pass with gradients finds memory full.
SHORT_OF_MEMORY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch, gpt
passes = []
def limit(module, args):
    if isinstance(module, gpt.GPT) and module.training:
        passes.append(module)
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
if os.environ["RANK"] == "1":
    torch.nn.modules.module.register_module_forward_pre_hook(limit)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_processes(world_size, *runs, code=WORKER):
    """Train in world_size processes once for each of `runs`; return the ended processes.

    runs: dicts of settings that add to the current ones.
    """
    base = {name: getattr(gpt, name) for name in gpt.SETTINGS}
    argv = ["-c", ROOT, json.dumps([(free_port(), base | run) for run in runs])]
    jobs = []
    for rank in range(world_size):
        env = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world_size)}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        jobs.append({"argv": argv, "code": code, "env": env})
    done = run_jobs(*jobs, timeout=200)
    for process in done:  # torch 2.9 prints how processes are connected
        process.stdout = re.sub(r"(?m)^\[Gloo\].*\n", "", process.stdout)
    return done


def run_processes(world_size, *runs):
    """Do as start_processes does, which must end well; return [(stdout, stderr)]."""
    done = start_processes(world_size, *runs)
    assert [process.returncode for process in done] == [0] * world_size, done
    return [(process.stdout, process.stderr) for process in done]


def largest_difference(a, b):
    """Return the largest difference of two runs' losses, training and validation, at any step."""
    differences = []
    for x, y in zip(losses(a), losses(b)):
        assert x.keys() == y.keys() and x
        differences += [abs(x[step] - y[step]) for step in x]
    return max(differences)


def assert_near(a, b):
    """Compare the weights in two runs' ckpt.pt, which must be whole tensors."""
    a, b = (torch.load(out / "ckpt.pt", weights_only=True)["model"] for out in (a, b))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert type(weight) is torch.Tensor
        torch.testing.assert_close(weight, b[name], atol=1e-4, rtol=0)


# ---- The same losses and weights ----
ADAMW = {
    "optimizer": "adamw",
    "learning_rate": 2e-3,
    "tie_weights": True,
    "gradient_checkpointing": True,
}
CHANGES = {"muon": {}, "adamw": ADAMW}


def compare(settings, tmp_path, world_size, cases):
    """Train in one process and in several, for pairs of optimizer and fsdp; compare the runs."""
    settings(
        batch_size=4,
        gradient_accumulation_steps=2,
        max_iters=10,
        eval_interval=5,
        eval_iters=7,  # batches, which do not share out evenly
        sample_tokens=2,
        sample_at_eval=True,
    )
    for name in {name for name, _ in cases}:
        gpt.train(**CHANGES[name], out_dir=str(tmp_path / name))
    runs = []
    for name, fsdp in cases:
        out = str(tmp_path / f"{name}{fsdp}")
        runs.append(CHANGES[name] | {"fsdp": fsdp, "out_dir": out})
    outputs = run_processes(world_size, *runs)
    assert all(out == "" for out, _ in outputs[1:])  # only the first process prints
    assert not any("Warning" in err for _, err in outputs)
    assert outputs[0][0].count(", DDP\n") == sum(not fsdp for _, fsdp in cases)
    assert outputs[0][0].count(", FSDP\n") == sum(fsdp for _, fsdp in cases)
    for name, fsdp in cases:
        out = tmp_path / f"{name}{fsdp}"
        assert largest_difference(out, tmp_path / name) < 1e-5, out
        assert_near(out, tmp_path / name)


def test_two_processes_train_as_one(settings, tmp_path):
    """10 steps by DDP and FSDP2, by Muon and AdamW, give one process's losses and weights."""
    cases = [("muon", False), ("muon", True), ("adamw", False), ("adamw", True)]
    compare(settings, tmp_path, 2, cases)


@pytest.mark.skipif(
    "FOUR" not in os.environ, reason="half a minute on two cores: FOUR=1 pytest runs it, too"
)
def test_four_processes_train_as_one(settings, tmp_path):
    compare(settings, tmp_path, 4, [("muon", False), ("muon", True)])


def test_shares_of_bfloat16_stay_float32(settings, tmp_path):
    """FSDP multiplies in bfloat16, but keeps, and saves, float32."""
    settings(dtype="bfloat16", max_iters=10, gradient_accumulation_steps=2)
    gpt.train(out_dir=str(tmp_path / "one"))
    run_processes(2, {"fsdp": True, "out_dir": str(tmp_path / "two")})
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 0.05
    weights = gpt.read_checkpoint(tmp_path / "two" / "ckpt.pt")["model"]
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_two_processes_train_compiled_as_one_does_plainly(settings, tmp_path):
    """By DDP, whose wrapped model is compiled, as by FSDP2."""
    settings(n_layer=1, batch_size=2, gradient_accumulation_steps=2, max_iters=4, eval_interval=2)
    gpt.train(out_dir=str(tmp_path / "plain"))
    outs = {fsdp: tmp_path / f"fsdp {fsdp}" for fsdp in (False, True)}
    runs = [{"compile": True, "fsdp": fsdp, "out_dir": str(out)} for fsdp, out in outs.items()]
    outputs = run_processes(2, *runs)
    assert outputs[0][0].count("\ncompiled in ") == 2
    for out in outs.values():
        assert largest_difference(out, tmp_path / "plain") < 1e-4
        assert_near(out, tmp_path / "plain")


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_finetune_with_lora_as_one(settings, tmp_path, fsdp):
    """Frozen weights are not exchanged, and are in the checkpoint all the same."""
    settings(gradient_accumulation_steps=2)
    gpt.train(out_dir=str(tmp_path / "base"), max_iters=2)
    settings(init_from=str(tmp_path / "base" / "best.pt"), optimizer="adamw", lora_rank=2)
    gpt.train(out_dir=str(tmp_path / "one"))
    run_processes(2, {"fsdp": fsdp, "out_dir": str(tmp_path / "two")})
    assert largest_difference(tmp_path / "two", tmp_path / "one") < 1e-5
    assert_near(tmp_path / "two", tmp_path / "one")


# ---- Checkpoints, ends and new starts ----
def test_checkpoints_interchange_in_all_directions(settings, tmp_path):
    """A run goes through one process, DDP and FSDP2 in any order, and ends as in one process."""
    settings(
        batch_size=4,
        gradient_accumulation_steps=2,
        lr_decay_iters=12,
        eval_interval=2,
        dropout=0.1,
        train_temperature=0.8,
        init_from="auto",
    )

    def several(names, max_iters):
        """Resume runs, given as pairs of name and fsdp, in two processes."""
        runs = []
        for name, fsdp in names:
            out = str(tmp_path / name)
            runs.append({"fsdp": fsdp, "out_dir": out, "max_iters": max_iters})
        run_processes(2, *runs)

    def alone(name, max_iters):
        gpt.train(max_iters=max_iters, out_dir=str(tmp_path / name))

    alone("one", 12)
    alone("one-ddp-fsdp-one", 2)
    alone("one-fsdp-ddp-one", 2)
    several([("one-ddp-fsdp-one", False), ("one-fsdp-ddp-one", True)], 6)
    several([("one-ddp-fsdp-one", True), ("one-fsdp-ddp-one", False)], 10)
    for name in ("one-ddp-fsdp-one", "one-fsdp-ddp-one"):
        alone(name, 12)
        assert largest_difference(tmp_path / name, tmp_path / "one") < 1e-5


def test_full_memory_in_one_process_ends_both(settings, tmp_path):
    """The others wait for that process, so that nothing can be repeated: a sentence says so."""
    settings(gradient_accumulation_steps=2, max_iters=50)
    done = start_processes(2, {}, code=SHORT_OF_MEMORY + WORKER)
    assert [process.returncode for process in done] == [1, 1]
    sentence = "ValueError: out of memory: lower batch_size (4)"
    assert sentence in done[1].stderr
    assert "Connection closed by peer" in done[0].stderr


# Each process measures a speed of its own, prints what the run was fitted to, and trains.
UNEQUAL = """
import os, sys
sys.path.insert(0, sys.argv[1])
import gpt
gpt.flops_per_second = lambda machine: 1e9 * 100 ** int(os.environ["RANK"])
fit = gpt.fit_settings
def show(settings, *others):
    fit(settings, *others)
    print([getattr(settings, name) for name in gpt.UNFITTED])
gpt.fit_settings = show
"""


def test_processes_of_unequal_speed_are_fitted_alike(settings, tmp_path):
    """The first one's speed counts, times their number."""
    open_settings = dict.fromkeys(gpt.UNFITTED)
    settings(eval_iters=1, sample_tokens=0)
    done = start_processes(2, open_settings | {"max_minutes": 0.05}, code=UNEQUAL + WORKER)
    assert [process.returncode for process in done] == [0, 0], done
    chosen = [[x for x in process.stdout.splitlines() if x[0] == "["] for process in done]
    assert len(chosen[0]) == 1 and chosen[0] == chosen[1]
    assert "0.002 TFLOP/s" in done[0].stdout
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] > 0


def test_torchrun_starts_a_killed_run_again_and_passes_signals_on(settings, tmp_path):
    """The run resumes its last checkpoint, also by --standalone, and saves when it is stopped.

    Slurm sends SIGTERM to all processes, and torchrun passes its own on: each gets it twice. A step
    takes long here, so that the second one arrives within it.
    """
    settings()
    flags = [*toy_flags(tmp_path), f"--out_dir={tmp_path / 'out'}", "--init_from=auto"]
    flags += ["--gradient_accumulation_steps=200", "--max_iters=1000000", "--eval_interval=2"]
    flags += ["--log_interval=1", "--device=cpu", "--sample_tokens=0", "--compile=False"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*torchrun, "--max-restarts=1", "--monitor-interval=0.1", str(ROOT / "gpt.py"), *flags],
        env=os.environ | NO_PICTURES | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watch = threading.Timer(100, process.kill)
    watch.start()

    def read_to(*words):
        """Read the output until a line holds these words; return it all."""
        lines = []
        for line in process.stdout:
            lines.append(line)
            if all(word in line for word in words):
                break
        return "".join(lines)

    def children():
        command = ["pgrep", "-P", str(process.pid)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in found.split()]

    read_to("step      2 | val loss")
    read_to("step      3 | loss")
    os.kill(children()[1], signal.SIGKILL)
    resumed = read_to(", resumed after step ")
    assert re.search(r"resumed after step [24],", resumed), resumed
    read_to("step ", " | loss ")
    for pid in children():
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    rest = process.communicate()[0]
    watch.cancel()
    assert "stopped at step " in rest
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] >= 3


def test_each_block_is_a_unit_whose_gradients_are_averaged_in_float32(monkeypatch):
    from extras import fsdp

    sharded = []
    monkeypatch.setattr(fsdp.dist, "init_device_mesh", lambda *_: "mesh")
    monkeypatch.setattr(fsdp, "fully_shard", lambda part, **how: sharded.append((part, how)))
    model = gpt.GPT(gpt.GPTConfig(vocab_size=5, n_layer=3, n_embd=8, n_head=2, n_kv_head=1))
    fsdp.shard_model(model, torch.device("cpu"), torch.bfloat16, 2)
    assert [part for part, _ in sharded] == [*model.h, model]
    policies = [how["mp_policy"] for _, how in sharded]
    assert {p.reduce_dtype for p in policies} == {torch.float32}
    assert {p.param_dtype for p in policies} == {torch.bfloat16}
