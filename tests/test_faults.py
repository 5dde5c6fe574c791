"""What may go wrong in a run, put there on purpose: what the user sees, and that nothing else is lost."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_training import assert_same, assert_same_state, losses, read_log, toy_flags

import gpt
import resume
import scaling

ROOT = Path(__file__).resolve().parent.parent


def spoil_gradients(monkeypatch, steps, value=math.nan):
    """Put value into one gradient of these steps (0 is the first); return the list of weights before each step."""
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def spoiling(parameters, max_norm):
        parameters = list(parameters)
        seen.append([p.detach().clone() for p in parameters])
        if len(seen) - 1 in steps:
            parameters[3].grad.view(-1)[5] = value
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiling)
    return seen


# ---- a loss or gradient that is not finite ----


class StandIn(str):
    """What torch takes for the CPU and gpt.py for MPS."""

    type = "mps"


def test_such_a_step_changes_nothing_on_mps_either(settings, monkeypatch, tmp_path):
    """Its fused AdamW does not look at found_inf."""
    machine = gpt.Machine(StandIn("cpu"), torch.float32, False, 0, 1)
    monkeypatch.setattr(gpt, "set_up_machine", lambda: machine)
    step = torch.optim.AdamW.step

    def heedless(self):
        self.found_inf = None
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", heedless)
    settings(max_iters=6, eval_interval=6, sample_tokens=0)
    seen = spoil_gradients(monkeypatch, steps={3}, value=math.nan)
    gpt.train()
    assert all(torch.equal(a, b) for a, b in zip(seen[3], seen[4]))
    assert not all(torch.equal(a, b) for a, b in zip(seen[4], seen[5]))
    assert [r["skipped"] for r in read_log(tmp_path / "out") if "loss" in r] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    settings, monkeypatch, tmp_path, capsys, value, optimizer
):
    """Neither weights nor averages nor AdamW's count of steps; the steps after it train on, and it is counted."""
    settings(max_iters=6, eval_interval=3, optimizer=optimizer, weight_decay=0.1)
    seen = spoil_gradients(monkeypatch, steps={3}, value=value)
    gpt.train()
    assert all(torch.equal(a, b) for a, b in zip(seen[3], seen[4]))
    assert not all(torch.equal(a, b) for a, b in zip(seen[4], seen[5]))
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert all(int(s["step"]) == 5 for s in state["optimizers"][0]["state"].values())
    for o in state["optimizers"]:
        for averages in o["state"].values():
            assert all(torch.isfinite(average).all() for average in averages.values())
    assert [r["skipped"] for r in read_log(tmp_path / "out") if "loss" in r] == [0, 0, 0, 1, 1, 1]
    assert capsys.readouterr().out.count("1 skipped: gradient not finite") == 3


def test_momentum_is_as_if_the_skipped_step_had_not_been(settings, monkeypatch, tmp_path):
    """Muon's and AdamW's averages before and after the step are the same, bit for bit."""
    states, step = [], gpt.Muon.step

    def noting(self, *args):
        states.append([s["momentum_buffer"].clone() for s in self.state.values()])
        return step(self, *args)

    monkeypatch.setattr(gpt.Muon, "step", noting)
    settings(max_iters=5, tie_weights=True)
    spoil_gradients(monkeypatch, steps={2})
    gpt.train()
    assert all(torch.equal(a, b) for a, b in zip(states[2], states[3]))
    assert not all(torch.equal(a, b) for a, b in zip(states[3], states[4]))


def test_max_bad_steps_in_a_row_end_the_run(settings, monkeypatch, tmp_path):
    """Two good steps between bad ones begin the count anew; the checkpoint before stays as it was."""
    settings(max_iters=40, eval_interval=5, max_bad_steps=3)
    seen = spoil_gradients(monkeypatch, steps={6, 7, 8, *range(11, 40)})
    with pytest.raises(
        ValueError, match=r"4 gradients in a row are not finite: .*out by --init_from=resume"
    ):
        gpt.train()
    assert len(seen) == 15
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["step"] == 10 and all(torch.isfinite(w).all() for w in state["model"].values())


def test_bad_steps_between_two_progress_lines_are_noticed(settings, monkeypatch):
    """Also where the steps that are shown, and the last one, are good."""
    settings(max_iters=40, log_interval=10, max_bad_steps=3, eval_interval=40)
    spoil_gradients(monkeypatch, steps={12, 13, 14, 15})
    with pytest.raises(ValueError, match="4 gradients in a row are not finite"):
        gpt.train()
    settings(log_interval=1000)
    spoil_gradients(monkeypatch, steps={12, 13, 14, 15})
    with pytest.raises(ValueError, match="step 40: weights or 4 gradients in a row are not finite"):
        gpt.train()


def test_weights_that_are_not_finite_are_never_saved(settings, monkeypatch, tmp_path):
    settings(max_iters=20, eval_interval=5, max_bad_steps=100)
    step = torch.optim.AdamW.step

    def poisoning(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        poisoning.calls += 1
        if poisoning.calls == 7:
            self.param_groups[0]["params"][0].data[0, 0] = math.nan
        return result

    poisoning.calls = 0
    monkeypatch.setattr(torch.optim.AdamW, "step", poisoning)
    with pytest.raises(
        ValueError, match=r"step 10: weights or 101 gradients in a row are not finite: go on from"
    ):
        gpt.train()
    for name, saved in (("ckpt.pt", 5), ("ckpt-1.pt", 0), ("best.pt", 5)):
        state = gpt.read_checkpoint(tmp_path / "out" / name)
        assert state["step"] == saved
        assert all(torch.isfinite(w).all() for w in state["model"].values())


# ---- memory that runs out ----


CUDA, MPS = (
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("MPS backend out of memory (allocated: 9 GB)"),
)


def limit_rows(monkeypatch, most, error=CUDA):
    """Let forward passes of training run out of memory with more than `most` rows; return the rows that fitted."""
    forward, fitted = gpt.GPT.forward, []

    def limited(self, idx, *args, **kwargs):
        if self.training and len(idx) > most:
            raise error
        if self.training:
            fitted.append(len(idx))
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(gpt.GPT, "forward", limited)
    return fitted


@pytest.mark.parametrize(
    "rows, most, left", [(8, 2, 2), (8, 7, 4), (9, 4, 3), (6, 1, 1), (5, 2, 1)]
)
def test_micro_batches_are_cut_until_they_fit(
    settings, monkeypatch, tmp_path, capsys, rows, most, left
):
    """The losses and weights are those of a machine with memory enough, from the same global batches."""
    settings(batch_size=rows, gradient_accumulation_steps=2, max_iters=5, eval_interval=5)
    settings(out_dir=str(tmp_path / "enough"))
    gpt.train()
    capsys.readouterr()
    fitted = limit_rows(monkeypatch, most)
    settings(out_dir=str(tmp_path / "short"))
    gpt.train()
    assert set(fitted) == {left} and len(fitted) == 5 * 2 * rows // left
    told = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("memory is full")
    ]
    assert told[-1].endswith(f"{2 * rows // left} micro-batches of {left}")
    for a, b in zip(losses(tmp_path / "enough"), losses(tmp_path / "short")):
        assert a.keys() == b.keys() and max(abs(a[step] - b[step]) for step in a) < 1e-5
    a, b = (gpt.read_checkpoint(tmp_path / run / "ckpt.pt")["model"] for run in ("enough", "short"))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4


def test_memory_of_mps_that_runs_out(settings, monkeypatch):
    """Its error is a RuntimeError; another one is none of memory."""
    fitted = limit_rows(monkeypatch, 2, MPS)
    settings(batch_size=4, max_iters=2)
    assert gpt.train()["step"] == 2 and set(fitted) == {2}
    limit_rows(monkeypatch, 1, RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="^shapes$"):
        gpt.train()


def test_memory_that_runs_out_in_the_backward_pass_of_a_later_step(settings, monkeypatch, tmp_path):
    """Gradients that were added before it happened do not count twice."""
    settings(batch_size=4, gradient_accumulation_steps=3, max_iters=5, eval_interval=5)
    settings(out_dir=str(tmp_path / "enough"))
    gpt.train()
    backward, calls = torch.Tensor.backward, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        result = backward(self, *args, **kwargs)
        if len(calls) == 8:  # the second micro-batch of the third step, its gradients already added
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(torch.Tensor, "backward", failing)
    settings(out_dir=str(tmp_path / "short"))
    gpt.train()
    assert len(calls) == 3 + 3 + 2 + 3 * 6
    for a, b in zip(losses(tmp_path / "enough"), losses(tmp_path / "short")):
        assert max(abs(a[step] - b[step]) for step in a) < 1e-5


def test_one_sequence_that_does_not_fit_is_a_sentence_with_ways_out(settings, monkeypatch):
    limit_rows(monkeypatch, 0)
    settings(batch_size=4)
    ways = [
        r"--gradient_checkpointing=True [\d.]+ [KMG]iB",
        r"--block_size=8 [\d.]+ MiB",
        r"--fsdp=True on 2 GPUs",
    ]
    with pytest.raises(
        ValueError, match="memory is full with micro-batches of 1 x 16 tokens.*" + ".*".join(ways)
    ):
        gpt.train()


def test_no_cut_while_other_processes_wait(settings, monkeypatch):
    """In a step's last micro-batch by DDP, and anywhere by FSDP, repeating would hang; so it is said instead."""
    settings()
    model = gpt.GPT(gpt.model_config(20))
    batches = [[torch.zeros(4, 16)] * 3]
    ddp = SimpleNamespace(require_backward_grad_sync=True)
    two = SimpleNamespace(
        world_size=2, sharded=False, dtype=torch.float32, device=torch.device("cpu")
    )
    with pytest.raises(
        ValueError, match="half the batch_size, twice the gradient_accumulation_steps"
    ):
        scaling.cut(batches, model, ddp, two, "adamw")
    ddp.require_backward_grad_sync = False
    assert [len(batch[0]) for batch in scaling.cut(batches, model, ddp, two, "adamw")] == [2, 2]
    two.sharded = True
    with pytest.raises(ValueError, match="memory is full"):
        scaling.cut(batches, model, ddp, two, "adamw")


def saved_bytes(config, rows):
    """Return the bytes that autograd keeps for a backward pass on this CPU, weights not counted."""
    model, seen = gpt.GPT(config), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    x = torch.randint(config.vocab_size, (rows, config.block_size))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, x)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_head": 4, "n_layer": 4},
        {"use_swiglu": False},
        {"vocab_size": 2000},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_estimate_of_activations_is_near_what_autograd_keeps(changes):
    """Within a third, in float32, with 16 bytes a logit, which are not kept; with gradient_checkpointing, whose
    one block comes later, above it."""
    base = {
        "block_size": 128,
        "vocab_size": 65,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 128,
    }
    config = gpt.GPTConfig(**base | {"dropout": 0.0} | changes)
    machine = SimpleNamespace(
        world_size=1, sharded=False, dtype=torch.float32, device=torch.device("cpu")
    )
    model = gpt.GPT(config)
    state, estimated = scaling.memory(model, 8, machine, "adamw")
    kept = saved_bytes(config, 8) + 16 * 8 * 128 * config.vocab_size
    assert state == 16 * model.n_params()
    if config.gradient_checkpointing:
        plain = scaling.memory(model, 8, machine, "adamw", gradient_checkpointing=False)[1]
        assert kept < estimated < 0.7 * plain
    else:
        assert 0.75 * kept < estimated < 1.33 * kept


def test_the_plan_counts_gradients_twice_where_ddp_adds_up_several_micro_batches():
    """Weights, gradients, two averages and DDP's buckets; FSDP's shares of three, and the gradients whole."""
    model = gpt.GPT(
        gpt.GPTConfig(vocab_size=8, block_size=8, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
    )
    size = 4 * model.n_params()
    for sharded, n_micro, expected in (
        (False, 1, 4),
        (False, 2, 5),
        (True, 1, 4 / 2),
        (True, 2, 3 / 2 + 1),
    ):
        machine = SimpleNamespace(
            world_size=2, sharded=sharded, dtype=torch.float32, device=torch.device("cpu")
        )
        assert scaling.memory(model, 1, machine, "adamw", n_micro)[0] == expected * size


def test_ways_out_of_full_memory_count_what_fsdp_would_take():
    model = gpt.GPT(
        gpt.GPTConfig(vocab_size=8, block_size=8, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
    )
    machine = SimpleNamespace(
        world_size=4, sharded=False, dtype=torch.float32, device=torch.device("cpu")
    )
    said = scaling.out_of_memory(model, machine, 1, "adamw", n_micro=2)
    saved = 4 * model.n_params() * (5 - (3 / 4 + 1))
    assert said.endswith(f"--fsdp=True on 4 GPUs {scaling.spelled(saved)}")


# ---- checkpoints ----


def test_older_checkpoints_are_kept_as_many_as_wanted(settings, tmp_path):
    for keep, steps in ((1, [8]), (2, [8, 6]), (4, [8, 6, 4, 2])):
        settings(
            max_iters=8, eval_interval=2, keep_checkpoints=keep, out_dir=str(tmp_path / str(keep))
        )
        gpt.train()
        names = ["ckpt.pt", *(f"ckpt-{i}.pt" for i in range(1, keep))]
        assert [gpt.read_checkpoint(tmp_path / str(keep) / name)["step"] for name in names] == steps
        assert len(list((tmp_path / str(keep)).glob("ckpt*"))) == keep


@pytest.fixture
def two_checkpoints(settings, tmp_path):
    """The folder of a run whose ckpt.pt is of step 8 and whose ckpt-1.pt of step 6."""
    settings(max_iters=8, eval_interval=2, lr_decay_iters=12)
    gpt.train()
    return tmp_path / "out"


@pytest.mark.parametrize("damage", ["cut short", "a bit flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    two_checkpoints, tmp_path, capsys, damage
):
    """At 50 random places; a bit that changes nothing that is read may go unnoticed, but then nothing differs."""
    whole, draw, noticed = (two_checkpoints / "ckpt.pt").read_bytes(), random.Random(damage), 0
    before = gpt.read_checkpoint(two_checkpoints / "ckpt.pt")
    older = (two_checkpoints / "ckpt-1.pt").read_bytes()
    for i in range(50):
        folder, content, place = tmp_path / str(i), bytearray(whole), draw.randrange(len(whole))
        if damage == "cut short":
            del content[place:]
        else:
            content[place] ^= 1 << draw.randrange(8)
        folder.mkdir()
        (folder / "ckpt.pt").write_bytes(content)
        (folder / "ckpt-1.pt").write_bytes(older)
        capsys.readouterr()
        path = resume.newest_checkpoint(gpt, folder)[0]
        if path.name == "ckpt.pt":
            assert_same(gpt.read_checkpoint(path), before)
            continue
        noticed += 1
        assert path.name == "ckpt-1.pt" and gpt.read_checkpoint(path)["step"] == 6
        assert "ckpt.pt is damaged" in capsys.readouterr().out
        assert (folder / "ckpt.pt.damaged").read_bytes() == content
    assert noticed >= (50 if damage == "cut short" else 40)


def test_a_run_goes_on_from_the_older_checkpoint_to_the_same_end(
    two_checkpoints, settings, tmp_path
):
    content = bytearray((two_checkpoints / "ckpt.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (two_checkpoints / "ckpt.pt").write_bytes(content)
    settings(max_iters=12, init_from="resume")
    gpt.train()
    settings(init_from="scratch", out_dir=str(tmp_path / "whole"))
    gpt.train()
    assert_same_state(two_checkpoints / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")


def test_all_checkpoints_damaged_is_an_error(two_checkpoints, settings):
    for path in two_checkpoints.glob("ckpt*.pt"):
        path.write_bytes(b"no checkpoint")
    for init_from in ("resume", "auto"):
        settings(init_from=init_from)
        with pytest.raises(ValueError, match="ckpt-1.pt is damaged"):
            gpt.train()


@pytest.mark.parametrize(
    "name, value", [("step", "8"), ("step", -1), ("elapsed_s", math.nan), ("optimizers", {})]
)
def test_a_checkpoint_with_wrong_figures_is_no_run(two_checkpoints, settings, name, value):
    state = gpt.read_checkpoint(two_checkpoints / "ckpt.pt")
    gpt.save_checkpoint(two_checkpoints / "ckpt.pt", state | {name: value})
    settings(init_from="resume")
    with pytest.raises(ValueError, match=rf"ckpt.pt does not hold a run to resume \({name}\)"):
        gpt.train()


def test_auto_begins_and_then_goes_on(settings, tmp_path):
    """The same command again and again is one run; log.jsonl and its losses are those of a run in one piece."""
    settings(init_from="auto", lr_decay_iters=9, eval_interval=3)
    for max_iters in (3, 6, 9):
        settings(max_iters=max_iters)
        assert gpt.train()["step"] == max_iters
    settings(init_from="scratch", out_dir=str(tmp_path / "whole"))
    gpt.train()
    assert_same_state(tmp_path / "out" / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


# ---- a plan ----


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_prints_the_plan_and_writes_nothing(settings, tmp_path, capsys, monkeypatch):
    settings(dry_run=True, gradient_accumulation_steps=2, max_iters=1000)
    before, made = tree(tmp_path), tmp_path / "temporary"
    made.mkdir()
    monkeypatch.setattr(scaling.tempfile, "tempdir", str(made))
    for dataset in ("toy", "pydoc"):  # the second is missing
        settings(dataset=dataset)
        plan = gpt.train()
        assert plan["steps"] == 1000 and plan["tokens_per_step"] == 2 * 4 * 16
        out = capsys.readouterr().out
        for part in (
            f"data/{dataset}: " if dataset == "toy" else "pydoc: ",
            "M parameters",
            "MiB",
            "1,000 steps in ",
        ):
            assert part in out
        assert (
            "takes 2 x 4 x 16 tokens a step" in out and "FLOPs" in out and "steps an epoch" in out
        )
    assert not [
        path for path in made.iterdir() if "torchinductor" not in path.name
    ]  # torch's own, once made
    shutil.rmtree(made)
    assert {path: t for path, t in tree(tmp_path).items() if path.is_file()} == {
        path: t for path, t in before.items() if path.is_file()
    }
    settings(dataset="toy", dry_run=False)
    assert plan["flops"] == pytest.approx(
        1000 * 128 * flops_per_token_of("pydoc", tmp_path), rel=1e-6
    )


def flops_per_token_of(dataset, tmp_path):
    """Return 6 a weight that multiplies, and 12 n_layer n_embd block_size, for the toy sizes on a data set."""
    vocab = len(set(gpt.corpus(dataset)[0]))
    c = gpt.model_config(vocab)
    kv = c.n_kv_head * c.head_dim
    block = (
        c.n_embd * (c.n_embd + 2 * kv) + c.n_embd**2 + 3 * c.n_embd * c.mlp_hidden + 2 * c.n_embd
    )
    return (
        6 * (c.n_layer * block + c.n_embd + vocab * c.n_embd)
        + 12 * c.n_layer * c.n_embd * c.block_size
    )


# ---- the same run twice ----


def test_the_same_command_twice_is_the_same_run(settings, tmp_path, run_script):
    """log.jsonl, its timing aside, and every tensor; with dropout, accumulation and two threads."""
    settings()
    flags = [
        *toy_flags(tmp_path),
        "--max_iters=8",
        "--eval_interval=4",
        "--log_interval=1",
        "--sample_tokens=5",
    ]
    flags += ["--dropout=0.1", "--gradient_accumulation_steps=2", "--device=cpu"]
    logs = []
    for name in ("a", "b"):
        done = run_script("gpt.py", *flags, f"--out_dir={tmp_path / name}", OMP_NUM_THREADS="2")
        assert done.returncode == 0, done.stderr
        lines = read_log(tmp_path / name)
        lines[0]["config"].pop("out_dir")
        logs.append(
            [{k: v for k, v in r.items() if k not in ("elapsed_s", "tokens_per_s")} for r in lines]
        )
    assert logs[0] == logs[1] and len(logs[0]) > 10
    assert_same_state(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")
    assert_same(*(gpt.read_checkpoint(tmp_path / name / "best.pt")["model"] for name in "ab"))


# ---- data ----


def test_a_data_file_that_becomes_shorter_while_a_run_reads_it(settings, monkeypatch, tmp_path):
    """Nothing is trained on what is not there, and the checkpoint before stays."""
    settings(max_iters=200, eval_interval=5)
    path, step = tmp_path / "data" / "toy" / "train.bin", gpt.Muon.step

    def shortening(self, *args):
        shortening.calls += 1
        if shortening.calls == 7:
            os.truncate(path, 100)
        return step(self, *args)

    shortening.calls = 0
    monkeypatch.setattr(gpt.Muon, "step", shortening)
    with pytest.raises(OSError, match=r"train.bin has become shorter"):
        gpt.train()
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 5


# ---- signals and a closed output ----


def start(tmp_path, *flags):
    """Start a run of the toy's size that would take minutes, and wait for its third step."""
    process = subprocess.Popen(
        [
            sys.executable,
            "gpt.py",
            *toy_flags(tmp_path),
            f"--out_dir={tmp_path / 'out'}",
            "--max_iters=1000000",
        ]
        + ["--sample_tokens=0", "--compile=False", "--log_interval=1", *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step      3 | loss"):
            return process
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT"])
def test_a_signal_saves_and_has_an_exit_code_of_its_own(settings, tmp_path, name):
    """SIGTERM's is tested where the run is resumed."""
    settings()
    signum = getattr(signal, name)
    restore = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background ignores it
    try:
        process = start(tmp_path, "--eval_interval=100000")
    finally:
        signal.signal(signal.SIGINT, restore)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and err == ""
    step, log = (
        gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"],
        read_log(tmp_path / "out"),
    )
    assert f"stopped at step {step:,}: " in out
    assert step <= max(line["step"] for line in log) + 1


def test_a_signal_during_an_evaluation_ends_it(settings, monkeypatch, tmp_path):
    """The checkpoint is that of before the evaluation, and no loss of a part of the data is logged or kept."""
    settings(max_iters=9, eval_interval=3, eval_iters=60, batch_size=1)
    get_batch, calls = gpt.Data.get_batch, []

    def stopping(self, split, step, batch_size):
        calls.append(split)
        if calls.count("val") == 150 and split == "val":
            signal.raise_signal(signal.SIGTERM)
        return get_batch(self, split, step, batch_size)

    monkeypatch.setattr(gpt.Data, "get_batch", stopping)
    figures = gpt.train()
    assert (figures["step"], figures["stopped_by"]) == (6, signal.SIGTERM)
    assert calls.count("val") == 150
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["step"] == 6 and sorted(losses(tmp_path / "out")[1]) == [0, 3]
    settings(init_from="resume")
    assert gpt.train()["step"] == 9
    assert sorted(losses(tmp_path / "out")[1]) == [0, 3, 6, 9]


def test_a_closed_output_ends_the_run_with_the_shells_code_for_it(settings, tmp_path):
    """As other programs piped into head end; the last checkpoint stays sound."""
    settings()
    process = start(tmp_path, "--eval_interval=20")
    time.sleep(0.3)
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    process.stderr.close()
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] % 20 == 0


def test_a_folder_that_cannot_be_written_when_saving(settings, monkeypatch, tmp_path):
    """The file system turns read-only after the first checkpoint: a sentence, and that checkpoint stays."""
    settings(max_iters=10, eval_interval=4)
    save = torch.save

    def refused(state, path):
        if state["step"] == 4 and Path(path).name == "ckpt.tmp":
            raise OSError(30, "Read-only file system")
        return save(state, path)

    monkeypatch.setattr(torch, "save", refused)
    with pytest.raises(
        OSError, match="Read-only file system.*the one saved before it is untouched"
    ):
        gpt.train()
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 0
    assert np.isfinite(gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["elapsed_s"])


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(
    two_checkpoints, settings, monkeypatch
):
    """Short memory or a failing disk are no reason to go back; nothing is renamed."""
    settings(init_from="resume")
    for error in (MemoryError(), OSError(5, "Input/output error")):
        monkeypatch.setattr(
            torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
        )
        with pytest.raises(ValueError, match=type(error).__name__):
            gpt.train()
    assert sorted(p.name for p in two_checkpoints.glob("ckpt*")) == ["ckpt-1.pt", "ckpt.pt"]


def test_files_of_other_names_are_no_checkpoints(two_checkpoints):
    (two_checkpoints / "ckpt.pt").rename(two_checkpoints / "ckpt2.pt")
    (two_checkpoints / "ckpt-best.pt").write_bytes(b"")
    assert resume.newest_checkpoint(gpt, two_checkpoints)[0].name == "ckpt-1.pt"


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_others_place(monkeypatch, tmp_path):
    """The order of what is done: written, flushed to the disk, and only then renamed."""
    done, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        Path, "replace", lambda self, new: (done.append(new.name), replace(self, new))[1]
    )
    for value in (1, 2):
        gpt.save_checkpoint(tmp_path / "ckpt.pt", {"value": value}, keep=2)
    assert done == ["fsync", "ckpt.pt", "fsync", "ckpt-1.pt", "ckpt.pt"]
