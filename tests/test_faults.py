"""What may go wrong in a run, put there on purpose: what users see, and that nothing is lost."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TEXT, new_trainer
from forks import NO_PICTURES, run_jobs
from terminal import Terminal
from test_training import assert_same, assert_same_state, losses, read_log, toy_flags

import configurator
import gpt
import sample
from extras import plots

ROOT = Path(__file__).resolve().parent.parent


def spoil_gradients(monkeypatch, steps, value=math.nan):
    """Put value into one gradient of these steps, of which 0 is the first.

    Return the list of the weights before each step, which grows as the run goes on.
    """
    clip = torch.nn.utils.clip_grad_norm_
    seen = []

    def spoiling(parameters, max_norm):
        parameters = list(parameters)
        seen.append([p.detach().clone() for p in parameters])
        if len(seen) - 1 in steps:
            parameters[3].grad.view(-1)[5] = value
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiling)
    return seen


# ---- a loss or gradient that is not finite ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    settings, monkeypatch, tmp_path, capsys, value, optimizer
):
    """Neither weights nor optimizer state nor AdamW's count of steps; it is counted and said."""
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
    """The optimizers' state before and after the step is the same, bit for bit."""
    before = []
    after = []
    update = gpt.Trainer.update

    def tensors(trainer):
        states = [state for o in trainer.optimizers for state in o.state.values()]
        return [tensor.clone() for state in states for tensor in state.values()]

    def noting(self):
        before.append(tensors(self))
        norm = update(self)
        after.append(tensors(self))
        return norm

    monkeypatch.setattr(gpt.Trainer, "update", noting)
    settings(max_iters=5, tie_weights=True)
    spoil_gradients(monkeypatch, steps={2})
    gpt.train()
    same = [all(torch.equal(x, y) for x, y in zip(a, b)) for a, b in zip(before[1:], after[1:])]
    assert same == [False, True, False, False]
    assert len(before[2]) == len(after[2]) > 10


def test_max_bad_steps_in_a_row_end_the_run(settings, monkeypatch, tmp_path):
    """Two good steps between bad ones begin the count anew; the checkpoint before stays."""
    settings(max_iters=40, eval_interval=5, max_bad_steps=3)
    seen = spoil_gradients(monkeypatch, steps={6, 7, 8, *range(11, 40)})
    with pytest.raises(
        ValueError,
        match=r"step 15: 4 gradients in a row are not finite; resume .*out with --init_from=",
    ):
        gpt.train()
    assert len(seen) == 15
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert state["step"] == 10 and all(torch.isfinite(w).all() for w in state["model"].values())


def test_bad_steps_between_two_progress_lines_are_noticed(settings, monkeypatch):
    """Also where the steps that are shown, and the last one, are good."""
    settings(max_iters=40, log_interval=1000, max_bad_steps=3, eval_interval=40)
    spoil_gradients(monkeypatch, steps={12, 13, 14, 15})
    with pytest.raises(ValueError, match="step 16: 4 gradients in a row are not finite"):
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
    with pytest.raises(ValueError, match="step 10: weights are not finite; resume .*learning_rate"):
        gpt.train()
    for name in ("ckpt.pt", "best.pt"):
        state = gpt.read_checkpoint(tmp_path / "out" / name)
        assert state["step"] == 5
        assert all(torch.isfinite(w).all() for w in state["model"].values())


# ---- memory that runs out ----


CUDA = torch.OutOfMemoryError("CUDA out of memory.")
MPS = RuntimeError("MPS backend out of memory (allocated: 9 GB)")


class Accelerator(str):
    """What torch takes for the CPU and gpt.py for a device of its own."""

    type = "mps"


@pytest.fixture
def accelerator(monkeypatch):
    """Let runs take the CPU for an accelerator."""
    machine = gpt.Machine(Accelerator("cpu"), torch.float32)
    monkeypatch.setattr(gpt, "set_up_machine", lambda settings: machine)
    return machine


def limit_rows(monkeypatch, most, error=CUDA):
    """Let forward passes of training run out of memory with more than `most` rows.

    Return the list of the numbers of rows that fitted.
    """
    forward = gpt.GPT.forward
    fitted = []

    def limited(self, idx, *args, **kwargs):
        if self.training and len(idx) > most:
            raise error
        if self.training:
            fitted.append(len(idx))
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(gpt.GPT, "forward", limited)
    return fitted


@pytest.mark.parametrize(
    "rows, most, tried", [(8, 2, [4, 2]), (8, 7, [4]), (9, 4, [3]), (6, 1, [3, 1]), (5, 2, [1])]
)
def test_micro_batches_are_made_smaller_until_they_fit(
    settings, accelerator, monkeypatch, tmp_path, capsys, rows, most, tried
):
    """Before the first step; the losses and weights are those of a machine with memory enough."""
    settings(batch_size=rows, gradient_accumulation_steps=2, max_iters=5, eval_interval=5)
    settings(out_dir=str(tmp_path / "enough"))
    gpt.train()
    capsys.readouterr()
    fitted = limit_rows(monkeypatch, most)
    settings(out_dir=str(tmp_path / "short"))
    gpt.train()
    assert set(fitted) == {tried[-1]} and len(fitted) == 1 + 5 * 2 * rows // tried[-1]
    told = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory")
    ]
    assert told == [f"out of memory: trying micro-batches of {n} rows" for n in tried]
    for a, b in zip(losses(tmp_path / "enough"), losses(tmp_path / "short")):
        assert a.keys() == b.keys() and max(abs(a[step] - b[step]) for step in a) < 1e-5
    a, b = (gpt.read_checkpoint(tmp_path / run / "ckpt.pt")["model"] for run in ("enough", "short"))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4


def test_memory_of_mps_that_runs_out(settings, accelerator, monkeypatch):
    """The error there is a RuntimeError; another one is none of memory."""
    fitted = limit_rows(monkeypatch, 2, MPS)
    settings(batch_size=4, max_iters=2)
    assert gpt.train()["step"] == 2 and set(fitted) == {2}
    limit_rows(monkeypatch, 1, RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="^shapes$"):
        gpt.train()


def test_full_memory_is_no_failure_of_the_compiler(settings, accelerator, monkeypatch, capsys):
    """The compiled model is tried with smaller micro-batches."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    fitted = limit_rows(monkeypatch, 2)
    settings(batch_size=4, max_iters=2, compile=True)
    assert gpt.train()["step"] == 2 and set(fitted) == {2}
    assert "torch.compile failed" not in capsys.readouterr().out


FULL = r"^out of memory: lower batch_size \(\d+\) .*--gradient_checkpointing="


def test_memory_that_is_full_where_nothing_can_be_made_smaller(settings, accelerator, monkeypatch):
    """One row that does not fit, or other processes that would wait: a sentence with ways out."""
    limit_rows(monkeypatch, 0)
    with pytest.raises(ValueError, match=FULL):
        gpt.train()
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, **_: model)
    trainer = new_trainer()
    trainer.machine.world_size = 2
    with pytest.raises(ValueError, match=FULL):
        trainer.get_ready()
    assert trainer.micro_rows == 4


CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["CUDA", "CPU", "Python"])
@pytest.mark.parametrize(
    "owner, name, call",
    [(torch.Tensor, "backward", 8), (gpt.Muon, "step", 8)],
    ids=["gradients", "update"],
)
def test_memory_that_runs_out_in_a_later_step(
    settings, monkeypatch, tmp_path, owner, name, call, error
):
    """A sentence, and the checkpoint before stays."""
    function = getattr(owner, name)
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    settings(batch_size=4, max_iters=10, eval_interval=5)
    with pytest.raises(ValueError, match=FULL):
        gpt.train()
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 5


def test_memory_that_runs_out_in_an_evaluation(settings, monkeypatch, tmp_path):
    """The checkpoint precedes the evaluation, so no step is lost."""
    forward = gpt.GPT.forward

    def failing(self, *args, **kwargs):
        if not self.training and self.ln_f.weight.ne(1).any():
            raise CUDA
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(gpt.GPT, "forward", failing)
    settings(batch_size=4, max_iters=10, eval_interval=5)
    with pytest.raises(ValueError, match=FULL):
        gpt.train()
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 5


# ---- checkpoints ----


@pytest.fixture
def finished(settings, tmp_path):
    """The folder of a run whose ckpt.pt and best.pt are of step 8."""
    settings(max_iters=8, eval_interval=2, lr_decay_iters=12)
    gpt.train()
    return tmp_path / "out"


@pytest.mark.parametrize("damage", ["cut short", "a bit flipped"])
def test_a_damaged_checkpoint_is_named(finished, settings, damage):
    """At 50 random places; a bit may go unnoticed only where nothing that is read differs."""
    path = finished / "ckpt.pt"
    whole = path.read_bytes()
    before = gpt.read_checkpoint(path)
    draw = random.Random(damage)
    noticed = 0
    for _ in range(50):
        content = bytearray(whole)
        place = draw.randrange(len(whole))
        if damage == "cut short":
            del content[place:]
        else:
            content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            assert_same(gpt.read_checkpoint(path), before)
        except ValueError as e:
            assert str(e).startswith(f"{path} is damaged or not a checkpoint (")
            noticed += 1
    assert noticed >= (50 if damage == "cut short" else 40)


@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_a_run_with_a_damaged_checkpoint_changes_nothing(finished, settings, init_from):
    """The sentence names the checkpoint beside it, which may be finetuned instead."""
    (finished / "ckpt.pt").write_bytes((finished / "ckpt.pt").read_bytes()[:-99])
    before = {path: path.read_bytes() for path in finished.iterdir()}
    settings(init_from=init_from)
    with pytest.raises(ValueError, match=r"ckpt.pt is damaged .*: use another one"):
        gpt.train()
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"progress": {"step": "8"}},
        {"progress": {"step": -1}},
        {"progress": {"next_row": 1.5}},
        {"progress": {"spent_s": math.nan}},
        {"progress": {"trained_s": -1.0}},
        {"progress": {"moons": 2}},
        {"progress": 7},
        {"optimizers": {}},
        {"config": None},
    ],
    ids=str,
)
def test_a_checkpoint_with_wrong_figures_is_no_run(finished, settings, changes):
    path = finished / "ckpt.pt"
    state = gpt.read_checkpoint(path)
    ((name, value),) = changes.items()
    if isinstance(value, dict) and name == "progress":
        value = state["progress"] | value
    gpt.save_checkpoint(path, state | {name: value})
    settings(init_from="resume")
    with pytest.raises(ValueError, match="^(the checkpoint in )?/.* is damaged"):
        gpt.train()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["optimizers"].pop(),
        lambda state: state["optimizers"][0]["state"].pop(0),
        lambda state: state["optimizers"][0]["state"][0].update(exp_avg=torch.zeros(2)),
        lambda state: state["optimizers"][0]["state"][0].update(exp_avg_sq=torch.tensor(1.0)),
        lambda state: state["optimizers"][1]["state"][0].update(momentum_buffer=0),
    ],
    ids=["an optimizer", "a parameter", "a shape", "a number", "no tensor"],
)
def test_optimizer_state_that_does_not_fit_is_named(finished, settings, change):
    state = gpt.read_checkpoint(finished / "ckpt.pt")
    change(state)
    gpt.save_checkpoint(finished / "ckpt.pt", state)
    settings(init_from="resume", max_iters=9)
    with pytest.raises(
        ValueError, match="^the checkpoint in .* is damaged or from another program"
    ):
        gpt.train()


def test_a_run_of_an_earlier_version_is_resumed(finished, settings, tmp_path):
    """Its seconds, which a clock that was set may have made negative, begin at 0 then."""
    state = gpt.read_checkpoint(finished / "ckpt.pt")
    for name in ("version", "progress", "val_conditions"):
        del state[name]
    state |= {"stale": 0, "reserve": 0.5, "paused": 3.0, "elapsed_s": -3600.0}
    gpt.save_checkpoint(finished / "ckpt.pt", state)
    settings(max_iters=12, init_from="resume")
    gpt.train()
    settings(init_from="scratch", out_dir=str(tmp_path / "whole"))
    gpt.train()
    assert_same_state(finished / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")


def test_auto_begins_and_then_goes_on(settings, tmp_path):
    """The same command again and again is one run, with the losses of a run in one piece."""
    settings(init_from="auto", lr_decay_iters=9, eval_interval=3)
    for max_iters in (3, 6, 9):
        settings(max_iters=max_iters)
        assert gpt.train()["step"] == max_iters
    settings(init_from="scratch", out_dir=str(tmp_path / "whole"))
    gpt.train()
    assert_same_state(tmp_path / "out" / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_auto_begins_where_only_other_checkpoints_lie(finished, settings):
    """Such as a copy of one's own, or one of an earlier version."""
    (finished / "ckpt.pt").rename(finished / "ckpt_backup.pt")
    backup = (finished / "ckpt_backup.pt").read_bytes()
    settings(init_from="auto", max_iters=3)
    assert gpt.train()["step"] == 3
    assert backup in [path.read_bytes() for path in finished.glob("ckpt_backup.pt*")]


# ---- a run that is resumed with other data or settings ----


def shuffled_text():
    """Return the toy text's characters in random order, which no model can predict."""
    return "".join(random.Random(0).sample(TEXT, len(TEXT)))


def prepare(folder, text):
    gpt.write_dataset(folder, text, gpt.Tokenizer("char", "".join(sorted(set(TEXT)))), "tests")


@pytest.mark.parametrize("same_name", [True, False])
def test_other_data_begin_the_best_loss_anew(settings, tmp_path, capsys, same_name):
    """The loss of an easier text must not keep that of the text trained on now from best.pt."""
    settings(max_iters=60, eval_interval=30)
    easy = gpt.train()["best_val_loss"]
    name = "toy" if same_name else "other"
    prepare(tmp_path / "data" / name, shuffled_text())
    capsys.readouterr()
    settings(dataset=name, init_from="resume", max_iters=90)
    figures = gpt.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "start over" in line]
    assert len(said) == 1 and "best.pt and early_stop start over" in said[0]
    assert "the data set" in said[0]
    best = gpt.read_checkpoint(tmp_path / "out" / "best.pt")
    lines = [r for r in read_log(tmp_path / "out") if "val_loss" in r and "perplexity" not in r]
    assert [r["step"] for r in lines] == [0, 30, 60, 60, 90]
    assert figures["best_val_loss"] == min(r["val_loss"] for r in lines[3:]) > easy + 0.2
    assert best["step"] >= 60
    assert best["best_val_loss"] == figures["best_val_loss"]
    capsys.readouterr()
    settings(max_iters=91)
    gpt.train()
    assert "start over" not in capsys.readouterr().out  # once is enough


@pytest.mark.parametrize("changes", [{"eval_iters": 3}, {"batch_size": 2}], ids=str)
def test_another_evaluation_begins_best_and_early_stop_anew(
    settings, monkeypatch, tmp_path, capsys, changes
):
    """Two evaluations without a new best, and then two by another measure, are not four."""
    scripted = iter([9.0, 1.0, 2.0, 3.0, 9.9])  # the last is over the whole split
    monkeypatch.setattr(gpt, "evaluate", lambda *_: next(scripted))
    settings(max_iters=6, eval_interval=2, early_stop=3)
    assert gpt.train()["best_val_loss"] == 1.0
    capsys.readouterr()
    scripted = iter([6.0, 7.0, 7.5, 5.0, 5.5, 5.0, 5.0, 8.0])  # at steps 6, 8, 10, 12, 14, 16, 18
    settings(init_from="resume", max_iters=30)
    figures = gpt.train(**changes)
    ((name, _),) = changes.items()
    assert f"{name} changed: earlier validation losses cannot be" in capsys.readouterr().out
    assert (figures["step"], figures["best_val_loss"]) == (18, 5.0)
    assert gpt.read_checkpoint(tmp_path / "out" / "best.pt")["step"] == 12


def test_the_best_loss_stays_where_nothing_that_measures_it_changed(settings, monkeypatch, capsys):
    scripted = iter([9.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr(gpt, "evaluate", lambda *_: next(scripted))
    settings(max_iters=4, eval_interval=2)
    gpt.train()
    scripted = iter([2.0, 3.0, 3.0])
    settings(init_from="resume", max_iters=6)
    assert gpt.train(learning_rate=1e-4, dropout=0.1, log_interval=2)["best_val_loss"] == 1.0
    assert "start over" not in capsys.readouterr().out


def test_resuming_says_which_settings_differ(settings, tmp_path, capsys):
    """One line for each, and none for those that are the same or name the place of the run."""
    settings(max_iters=2)
    gpt.train()
    (tmp_path / "out").rename(tmp_path / "moved")
    capsys.readouterr()
    settings(init_from="resume", out_dir=str(tmp_path / "moved"))
    gpt.train(max_iters=4, dropout=0.25, lr_schedule="constant")
    said = [line for line in capsys.readouterr().out.splitlines() if "instead of" in line]
    assert sorted(said) == [
        "resuming with dropout=0.25 instead of 0.0",
        "resuming with lr_schedule=constant instead of linear",
        "resuming with max_iters=4 instead of 2",
    ]


def test_a_data_set_that_took_the_others_place_is_no_change(settings, monkeypatch, capsys):
    """Without a network pydoc stands in for shakespeare, in the resumed run as in the first."""

    def no_network(name):
        if name == "pydoc":
            return TEXT, "tests"
        raise ConnectionError("there is no network")

    monkeypatch.setattr(gpt, "load_corpus", no_network)
    settings(dataset="shakespeare", max_iters=2)
    gpt.train()
    settings(init_from="resume", max_iters=3)
    assert gpt.train()["step"] == 3
    said = [line for line in capsys.readouterr().out.splitlines() if "instead of" in line]
    assert said == ["resuming with max_iters=3 instead of 2"]


@pytest.mark.parametrize("batch_size, accumulation", [(2, 1), (1, 6), (3, 2)])
def test_another_batch_size_repeats_no_row(
    settings, monkeypatch, tmp_path, batch_size, accumulation
):
    """The resumed run takes the rows that follow those which the run before has taken."""
    rows = []
    get_batch = gpt.Data.get_batch

    def noting(self, split, first_row, n_rows):
        if split == "train":
            rows.append(range(first_row, first_row + n_rows))
        return get_batch(self, split, first_row, n_rows)

    monkeypatch.setattr(gpt.Data, "get_batch", noting)
    settings(max_iters=5, batch_size=4)
    gpt.train()
    settings(init_from="resume", max_iters=9, batch_size=batch_size)
    settings(gradient_accumulation_steps=accumulation)
    count = len(rows)
    gpt.train()
    before = set(itertools.chain(*rows[:count])) - {20, 21, 22, 23}  # fetched ahead, not taken
    after = list(itertools.chain(*rows[count:]))
    assert before == set(range(20))
    assert after[: 4 * batch_size * accumulation] == list(
        range(20, 20 + 4 * batch_size * accumulation)
    )


def test_loggers_are_told_where_a_run_is_resumed(settings, monkeypatch):
    """So that TensorBoard and Weights & Biases continue the first run's curves."""
    steps = []
    monkeypatch.setattr(plots, "open_writers", lambda *args: steps.append(args[4]) or [])
    settings(max_iters=3)
    gpt.train()
    settings(init_from="auto", max_iters=5)
    gpt.train()
    assert steps == [0, 3]


# ---- a plan ----


def files(folder):
    """Return {path: time} of all files in a folder."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dataset", ["toy", "pydoc"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    settings, tmp_path, capsys, monkeypatch, dataset
):
    """Also where the data set is missing, which is then prepared in a temporary folder."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(gpt.tempfile, "tempdir", str(temporary))
    settings(dataset=dataset, dry_run=True, gradient_accumulation_steps=2, max_iters=1000)
    before = files(tmp_path)
    plan = gpt.train()
    assert files(tmp_path) == before and list(temporary.iterdir()) == []
    assert (plan["step"], plan["steps"], plan["tokens_per_step"]) == (0, 1000, 2 * 4 * 16)
    assert plan["flops"] == pytest.approx(1000 * 128 * flops_per_token_of(dataset), rel=1e-6)
    assert 0 < plan["seconds_per_step"] < 10
    out = capsys.readouterr().out
    assert f"{dataset}: " in out and "1,000 steps, 128 tokens per step" in out
    for part in (
        "M parameters",
        "MiB",
        "1,000 steps in ",
        " epochs",
        " FLOPs",
        "nothing was written",
    ):
        assert part in out


def flops_per_token_of(dataset):
    """Return 6 a weight that multiplies, and 12 n_layer n_embd block_size, for the toy's sizes."""
    vocab_size = len(set(TEXT if dataset == "toy" else gpt.load_corpus(dataset)[0]))
    c = gpt.model_config(gpt.checked_settings(), vocab_size)
    kv = c.n_kv_head * c.head_dim
    attention = c.n_embd * (c.n_embd + 2 * kv) + c.n_embd**2
    block = attention + 3 * c.n_embd * c.mlp_hidden
    weights = c.n_layer * block + vocab_size * c.n_embd
    return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


# ---- the same run twice ----


def test_the_same_command_twice_is_the_same_run(settings, tmp_path, run_script):
    """log.jsonl, its timing aside, and every tensor; with dropout, accumulation and two threads."""
    settings()
    flags = [
        *toy_flags(tmp_path),
        "--max_iters=6",
        "--eval_interval=3",
        "--eval_iters=2",
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
    path = tmp_path / "data" / "toy" / "train.bin"
    step = gpt.Muon.step

    def shortening(self, *args):
        shortening.calls += 1
        if shortening.calls == 7:
            os.truncate(path, 100)
        return step(self, *args)

    shortening.calls = 0
    monkeypatch.setattr(gpt.Muon, "step", shortening)
    with pytest.raises(OSError, match=r"train.bin has shrunk"):
        gpt.train()
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 5


# ---- signals and a closed output ----


STOPPING = "stopping after this step; another signal ends the run at once\n"


def endless(tmp_path):
    """Return the flags of a run of the toy's size that would take minutes."""
    flags = [*toy_flags(tmp_path), f"--out_dir={tmp_path / 'out'}", "--max_iters=1000000"]
    flags += ["--n_kv_head=2", "--sample_tokens=0", "--compile=False", "--log_interval=1"]
    return [*flags, "--device=cpu"]


def start(tmp_path, *flags):
    """Start a run of the toy's size that would take minutes, and wait for its third step."""
    process = subprocess.Popen(
        [sys.executable, "gpt.py", *endless(tmp_path), *flags],
        cwd=ROOT,
        env=os.environ | NO_PICTURES | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step      3 | loss"):
            return process
    raise AssertionError(process.communicate())


# Code that runs before gpt.py in a process of its own, which then signals itself: `sent` holds
# (after how many lines of the log, signal).
SIGNALLING = """
import os, signal, threading, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
if {ignored}:
    signal.signal({ignored}, signal.SIG_IGN)
def send(log=Path({log!r})):
    for n_lines, signum in {sent}:
        while not log.exists() or log.read_bytes().count(b"\\n") < n_lines:
            time.sleep(0.01)
        os.kill(os.getpid(), signum)
threading.Thread(target=send, daemon=True).start()
"""


def run_signalled(tmp_path, *sent, ignored=0):
    """Return the ended process of a run that would take minutes, but receives these signals."""
    code = SIGNALLING.format(
        log=str(tmp_path / "out" / "log.jsonl"),
        sent=[(n, int(s)) for n, s in sent],
        ignored=int(ignored),
    )
    flags = [*endless(tmp_path), "--eval_interval=100000"]
    return run_jobs({"argv": [ROOT / "gpt.py", *flags], "code": code}, timeout=60)[0]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_saves_and_has_an_exit_code_of_its_own(settings, tmp_path, name):
    """SIGTERM's is tested where the run is resumed."""
    settings()
    signum = getattr(signal, name)
    process = run_signalled(tmp_path, (6, signum))
    assert process.returncode == 128 + signum and process.stderr == STOPPING
    step = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"]
    log = read_log(tmp_path / "out")
    assert f"stopped at step {step:,}: " in process.stdout
    assert step <= max(line["step"] for line in log) + 1


@pytest.mark.parametrize("shell", [False, True])
def test_a_closed_terminal_loses_nothing(settings, tmp_path, shell):
    """The kernel and the shell that ends, too, send SIGHUP; and nothing can be printed any more."""
    settings()
    command = [ROOT / "gpt.py", *endless(tmp_path), "--eval_interval=100000"]
    if shell:
        words = " ".join(f"'{word}'" for word in [sys.executable, *command])
        code = f"import os; os.execvp('bash', ['bash', '-c', {words + '; echo ended'!r}])"
        command = ["-c", code]
    terminal = Terminal(*command)
    shown = ""
    while "step      9 | loss " not in shown:
        shown += os.read(terminal.fd, 4096).decode()
    os.close(terminal.fd)
    os.waitpid(terminal.pid, 0)
    path = tmp_path / "out" / "ckpt.pt"
    deadline = time.monotonic() + 30
    while gpt.read_checkpoint(path)["step"] < 9 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gpt.read_checkpoint(path)["step"] >= 9
    for line in read_log(tmp_path / "out"):
        assert "step" in line


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_a_second_hangup_does_not_end_a_run_that_saves(settings, monkeypatch, tmp_path):
    """A terminal that is closed may send several; other signals end a run at the second."""

    def end(*_):
        raise AssertionError("a hangup has ended the run")

    before = signal.signal(signal.SIGHUP, end)
    step = torch.optim.AdamW.step

    def hanging_up(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", hanging_up)
    try:
        figures = gpt.train(max_iters=1000)
        assert signal.getsignal(signal.SIGHUP) is end
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (figures["step"], figures["stopped_by"]) == (1, signal.SIGHUP)
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 1


def test_a_second_ctrl_c_ends_a_run_at_once(settings, monkeypatch, tmp_path):
    """It ends even a step that takes long, and saves nothing more."""
    settings()
    restore = signal.signal(signal.SIGINT, signal.default_int_handler)
    sent = []

    def endless_step(self, *args, **kwargs):
        while len(sent) < 100:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
            time.sleep(0.001)

    monkeypatch.setattr(torch.optim.AdamW, "step", endless_step)
    try:
        with pytest.raises(KeyboardInterrupt):
            gpt.train(max_iters=1000)
    finally:
        signal.signal(signal.SIGINT, restore)
    assert len(sent) == 1  # append() was not reached again
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 0


def test_ctrl_c_while_compiling_is_answered_at_once(settings, monkeypatch, tmp_path, capfd):
    """Compiling cannot be interrupted, but the user learns that the signal has arrived."""

    compiled = []

    def compiling(block, **_):
        compiled.append(block)
        if len(compiled) == 1:
            signal.raise_signal(signal.SIGINT)
            assert capfd.readouterr().err == STOPPING
        return block

    monkeypatch.setattr(torch, "compile", compiling)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        figures = gpt.train(compile=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (figures["step"], figures["stopped_by"]) == (2, signal.SIGINT)  # after this step
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 2


def test_nohup_is_obeyed(settings, tmp_path):
    """A run that was started to outlive its terminal does."""
    settings()
    sent = [(6, signal.SIGHUP), (26, signal.SIGTERM)]
    process = run_signalled(tmp_path, *sent, ignored=signal.SIGHUP)
    assert process.returncode == 128 + signal.SIGTERM and process.stderr == STOPPING
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] > 20


def test_a_signal_during_an_evaluation_ends_it(settings, monkeypatch, tmp_path):
    """The checkpoint is that of before, and no loss of a part of the data is logged or kept."""
    settings(max_iters=9, eval_interval=3, eval_iters=60, batch_size=1)
    get_batch = gpt.Data.get_batch
    calls = []

    def stopping(self, split, first_row, n_rows):
        calls.append(split)
        if calls.count("val") == 150 and split == "val":
            signal.raise_signal(signal.SIGTERM)
        return get_batch(self, split, first_row, n_rows)

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
    """The file system turns read-only after the first checkpoint, which stays."""
    settings(max_iters=10, eval_interval=4)
    save = torch.save

    def refused(state, path):
        if state["step"] == 4 and Path(path).name.startswith("ckpt."):
            raise OSError(30, "Read-only file system")
        return save(state, path)

    monkeypatch.setattr(torch, "save", refused)
    with pytest.raises(OSError, match="Read-only file system.*the previous file is untouched"):
        gpt.train()
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("unable to mmap 9 bytes from file <ckpt.pt>: Cannot allocate memory (12)"),
        OSError(12, "Cannot allocate memory"),
        OSError(5, "Input/output error"),
    ],
    ids=repr,
)
def test_a_checkpoint_that_cannot_be_read_stays(finished, settings, monkeypatch, error):
    """Short memory or a failing disk are no reason to begin anew; nothing is renamed."""
    settings(init_from="auto")
    names = sorted(path.name for path in finished.iterdir())

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    expected = "OSError" if getattr(error, "errno", 0) == 5 else "^out of memory"
    with pytest.raises(ValueError, match=expected):
        gpt.train()
    assert sorted(path.name for path in finished.iterdir()) == names


@pytest.mark.parametrize("owner", [torch, gpt.GPT], ids=["reading", "placing"])
def test_short_memory_does_not_call_a_checkpoint_damaged(finished, monkeypatch, owner):
    """A user would delete it. sample.py and evaluate.py read it by load_checkpoint."""

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(owner, "load" if owner is torch else "load_state_dict", fail)
    with pytest.raises(RuntimeError, match="allocate memory"):
        gpt.load_checkpoint(finished)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=repr,
)
def test_short_memory_is_a_sentence_in_every_script(monkeypatch, capsys, error):
    """Also where a script has no sentence of its own for it."""
    assert configurator.NO_MEMORY == gpt.NO_MEMORY

    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as e:
        configurator.run_script({}, fail, {}, None)
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and "): close other programs" in said


def test_a_folder_that_is_removed_during_a_run_is_named(settings, monkeypatch, tmp_path):
    backward = gpt.Trainer.backward

    def removing(self, *args, **kwargs):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(gpt.Trainer, "backward", removing)
    with pytest.raises(OSError, match=r"ckpt.pt could not be saved: its folder has been removed"):
        gpt.train(max_iters=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", 5),
        ("config", {"block_size": [1]}),
        ("step", [1]),
        ("step", "x"),
        ("best_val_loss", "x"),
    ],
)
def test_values_of_other_types_in_a_checkpoint(finished, key, value):
    """A sentence, in sample.py and with eval_only."""
    state = torch.load(finished / "best.pt", weights_only=True)
    gpt.save_checkpoint(finished / "best.pt", state | {key: value})
    with pytest.raises(ValueError, match="damaged|block_size is"):
        gpt.train(eval_only=True)
    if value != {"block_size": [1]}:  # sample.py does not need it
        with pytest.raises(ValueError, match="damaged"):
            sample.load_model(finished, torch.device("cpu"), "float32", "", 16)


def test_optimizer_state_that_is_not_whole(finished, settings):
    state = torch.load(finished / "ckpt.pt", weights_only=True)
    state["optimizers"][0]["state"][1].popitem()
    gpt.save_checkpoint(finished / "ckpt.pt", state)
    settings(init_from="resume")
    with pytest.raises(ValueError, match="damaged.*parameter 1 has a different optimizer state"):
        gpt.train()


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_others_place(monkeypatch, tmp_path):
    """It is written, flushed to the disk, and only then renamed."""
    done = []
    fsync = os.fsync
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        Path, "replace", lambda self, new: (done.append(new.name), replace(self, new))[1]
    )
    for value in (1, 2):
        gpt.save_checkpoint(tmp_path / "ckpt.pt", {"value": value})
    assert done == ["fsync", "ckpt.pt", "fsync", "ckpt.pt"]


@pytest.mark.parametrize("times", [2, 99])
def test_a_file_that_somebody_reads_is_replaced_later(monkeypatch, tmp_path, times):
    """On Windows a reader of best.pt lets the renaming fail for a moment."""
    replace = Path.replace
    gpt.save_checkpoint(tmp_path / "best.pt", {"value": 1})
    tries = []

    def failing(self, new):
        tries.append(new)
        if len(tries) <= times:
            raise PermissionError(13, "it is being used by another process")
        return replace(self, new)

    monkeypatch.setattr(Path, "replace", failing)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if times == 2:
        gpt.save_checkpoint(tmp_path / "best.pt", {"value": 2})
    else:
        with pytest.raises(OSError, match="could not be saved .*used by another process"):
            gpt.save_checkpoint(tmp_path / "best.pt", {"value": 2})
    assert torch.load(tmp_path / "best.pt") == {"value": 2 if times == 2 else 1}
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_compressed_checkpoint_is_not_read(finished):
    """A small file of this kind could fill the memory."""
    path = finished / "ckpt.pt"
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        gpt.read_checkpoint(path)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists the mapped files")
def test_processes_share_the_memory_of_a_checkpoint_that_they_read(finished):
    state = gpt.read_checkpoint(finished / "ckpt.pt")
    assert str(finished / "ckpt.pt") in Path("/proc/self/maps").read_text()
    assert state["step"] == 8


# ---- files of an earlier run, and of another one ----


def test_quick_runs_keep_the_files_of_all_before(settings, tmp_path, monkeypatch):
    """Six runs within one second: no name is given twice, and the log begins anew."""
    monkeypatch.setattr(gpt.time, "strftime", lambda _: "2026-11-30-120000")
    settings(max_iters=1)
    written = []
    for seed in range(6):
        gpt.train(seed=seed)
        (tmp_path / "out" / "loss.png").write_bytes(bytes([seed]))
        written.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
        written[-1] = {n: written[-1][n] for n in ("ckpt.pt", "best.pt", "log.jsonl", "loss.png")}
    assert len({run["ckpt.pt"] for run in written}) == 6
    for name in written[0]:
        kept = [path.read_bytes() for path in (tmp_path / "out").glob(f"{name}*")]
        assert sorted(kept) == sorted(run[name] for run in written)
        assert (tmp_path / "out" / name).read_bytes() == written[-1][name]
    assert len([r for r in read_log(tmp_path / "out") if "config" in r]) == 1


def test_a_second_run_in_the_same_folder_is_refused(settings, tmp_path):
    """While the first one runs, also after it has drawn its losses; nothing of it is touched."""
    settings()
    process = start(tmp_path, "--eval_interval=10")
    for line in process.stdout:
        if line.startswith("step     30 | loss"):
            break
    for init_from in ("scratch", "resume", "auto"):
        before = {path.name for path in (tmp_path / "out").iterdir()}
        with pytest.raises(
            ValueError, match="another run is writing to .*out: choose another --out_dir"
        ):
            gpt.train(init_from=init_from)
        after = {path.name for path in (tmp_path / "out").iterdir()}
        assert {name for name in before ^ after if not name.endswith(".tmp")} == set()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    lines = read_log(tmp_path / "out")
    assert len([line for line in lines if "config" in line]) == 1
    stopped = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"]
    assert gpt.train(init_from="resume", max_iters=stopped + 2)["step"] == stopped + 2


def test_a_run_that_failed_leaves_its_folder_free(settings, monkeypatch):
    """Though its exception, as a notebook keeps it, still holds all that it was at work on."""
    settings(max_iters=40, max_bad_steps=3)
    with monkeypatch.context() as patch:
        spoil_gradients(patch, steps=range(40))
        with pytest.raises(ValueError, match="4 gradients in a row") as kept:
            gpt.train()
    assert gpt.train(max_iters=2)["step"] == 2
    assert kept.value.__traceback__ is not None


def test_what_a_killed_run_left_half_written_is_removed(settings, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("ckpt.4711.tmp", "best.4711.tmp", "mine.tmp"):
        (tmp_path / "out" / name).write_bytes(b"half of a checkpoint")
    gpt.train(max_iters=1)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["best.pt", "ckpt.pt", "log.jsonl", "mine.tmp"]


def test_a_missing_library_renames_nothing(finished, settings, monkeypatch):
    """The earlier run's files have their names still when the mistake is mended."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    names = sorted(path.name for path in finished.glob("*.*"))
    with pytest.raises(ValueError, match="pip install tensorboard"):
        gpt.train(tensorboard=True)
    assert sorted(path.name for path in finished.glob("*.*")) == names


# ---- the log ----


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_what_is_not_finite_is_logged_as_null(settings, monkeypatch, tmp_path):
    """NaN and Infinity are no JSON, and other programs refuse the whole line."""
    spoil_gradients(monkeypatch, steps={1}, value=math.nan)
    scripted = iter([math.nan, math.inf, 2.5])
    monkeypatch.setattr(gpt, "evaluate", lambda *_: next(scripted))
    gpt.train(max_iters=3)
    text = (tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    norms = {line["step"]: line["grad_norm"] for line in lines if "grad_norm" in line}
    assert norms[1] > 0 and norms[2] is None and norms[3] > 0
    assert [line["val_loss"] for line in lines if "val_loss" in line] == [None, None, 2.5]


@pytest.mark.parametrize("rest", [b'{"step": 3, "lo', b"{", b'{"step": 3}'])
def test_an_unfinished_line_of_the_log_takes_no_other_with_it(finished, settings, rest):
    """As a kill leaves it, also just before the line's end."""
    whole = (finished / "log.jsonl").read_bytes()
    (finished / "log.jsonl").write_bytes(whole + rest)
    settings(init_from="resume", max_iters=9)
    gpt.train()
    text = (finished / "log.jsonl").read_bytes()
    assert text.startswith(whole + rest + b"\n")
    lines = [json.loads(line) for line in text[len(whole + rest) + 1 :].splitlines()]
    assert "config" in lines[0] and "perplexity" in lines[-1]


# ---- half an environment, paths, marks at the beginning of a file ----


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "3"}, {"WORLD_SIZE": "4", "RANK": "1"}, {"RANK": "", "WORLD_SIZE": ""}],
    ids=str,
)
def test_what_torchrun_did_not_set_means_nothing(settings, tmp_path, run_script, environment):
    """A rank that some shell or scheduler left: the run is a run like others, and says so."""
    settings()
    flags = [*toy_flags(tmp_path), f"--out_dir={tmp_path / 'out'}", "--sample_tokens=0"]
    done = run_script("gpt.py", *flags, "--max_iters=2", "--device=cpu", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 2
    assert "whole validation split" in done.stdout
    stray = [name for name, value in environment.items() if value]
    assert ("but not by torchrun: this process trains alone" in done.stdout) == bool(stray)


def test_a_tilde_is_the_home_folder(settings, tmp_path, monkeypatch):
    """In data_dir, out_dir and init_from, and where checkpoints are read and written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings(data_dir="~/data", max_iters=1)
    gpt.train(out_dir="~/runs/first")
    gpt.train(out_dir="~/runs/second", init_from="~/runs/first")
    assert gpt.train(out_dir="~/runs/second", init_from="resume", max_iters=2)["step"] == 2
    assert gpt.train(out_dir="~/runs/second", eval_only=True)["val_loss"] > 0
    assert gpt.load_checkpoint("~/runs/second")[2]["step"] == 2
    gpt.save_checkpoint("~/copy.pt", gpt.read_checkpoint("~/runs/second/best.pt"))
    assert (tmp_path / "copy.pt").exists() and (tmp_path / "runs" / "first" / "ckpt.pt").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_byte_order_mark_before_gpt_py_itself(tmp_path, run_script):
    """As an editor on Windows saves it, with its line ends: the settings are all there."""
    source = (ROOT / "gpt.py").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "gpt.py").write_bytes(b"\xef\xbb\xbf" + source)
    shutil.copy(ROOT / "configurator.py", tmp_path)
    done = run_script(tmp_path / "gpt.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in gpt.SETTINGS:
        assert f"--{name}=" in done.stdout


# ---- finetuning ----


def test_sizes_that_finetuning_passes_over_are_named(settings, tmp_path, capsys):
    """A base keeps its own, whatever the settings ask for; those at their defaults ask nothing."""
    settings(max_iters=1, out_dir=str(tmp_path / "base"))
    gpt.train()
    capsys.readouterr()
    settings(init_from=str(tmp_path / "base"), out_dir=str(tmp_path / "tuned"))
    gpt.train(n_layer=12, n_embd=256, block_size=8, dropout=0.1, use_rope=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "has no effect" in line]
    base = tmp_path / "base"
    assert said == [
        f"n_layer=12 has no effect: {base} has n_layer=2",
        f"n_embd=256 has no effect: {base} has n_embd=32",
    ]


def test_a_shorter_block_has_its_effect_on_learned_positions(settings, tmp_path, capsys):
    """The table and the rows are then as long as block_size says."""
    settings(use_rope=False, max_iters=1, out_dir=str(tmp_path / "base"))
    gpt.train()
    settings(init_from=str(tmp_path / "base"), out_dir=str(tmp_path / "tuned"), block_size=8)
    gpt.train()
    out = capsys.readouterr().out
    assert "has no effect" not in out and "1 steps, 32 tokens per step" in out
    with pytest.raises(ValueError, match="block_size is 32: .*base takes at most 16"):
        gpt.train(block_size=32)


# ---- a message names what failed ----


def test_an_error_in_a_new_run_is_not_taken_for_a_damaged_checkpoint(settings, monkeypatch):
    """Only what is read from a checkpoint can be damaged; a new model reads none."""

    def without_memory(self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(gpt.GPT, "init_weights", without_memory)
    with pytest.raises(ValueError, match=FULL):
        gpt.train()
