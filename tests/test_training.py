"""Training as a whole: schedule, resume, weights, time budget, several processes, learning."""

import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import new_trainer
from forks import NO_PICTURES, run_jobs

import gpt

ROOT = Path(__file__).resolve().parent.parent


def read_log(out):
    """Return the lines of a run's log as dicts."""
    return [
        json.loads(line)
        for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def run_two_processes(*flags):
    """Run gpt.py in two processes, with what torchrun tells them, which must end well."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(s.getsockname()[1]),
            "WORLD_SIZE": "2",
        }
    jobs = [
        {"argv": [ROOT / "gpt.py", *flags], "env": env | {"RANK": r, "LOCAL_RANK": r}} for r in "01"
    ]
    done = run_jobs(*jobs)
    assert [process.returncode for process in done] == [0, 0], done
    return done[0]


def losses(out):
    """Return {step: loss} and {step: val_loss} of a run's log."""
    lines = read_log(out)
    return (
        {r["step"]: r["loss"] for r in lines if "loss" in r},
        {r["step"]: r["val_loss"] for r in lines if "val_loss" in r},
    )


def assert_same(a, b, where=""):
    """Compare nested dicts, lists and tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_state(a, b):
    a, b = gpt.read_checkpoint(a), gpt.read_checkpoint(b)
    for key in ("model", "optimizers", "step", "tokenizer", "model_args", "best_val_loss"):
        assert_same(a[key], b[key], key)


def toy_flags(tmp_path):
    """Return the flags of a small run on the `toy` data that the settings fixture makes."""
    sizes = ["--n_layer=2", "--n_embd=32", "--n_head=4", "--block_size=16", "--batch_size=4"]
    return [f"--data_dir={tmp_path / 'data'}", "--dataset=toy", *sizes]


# ---- schedule ----


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("linear", {0.0: 1.0, 0.25: 0.75 + 0.25 * 0.1, 0.5: 0.55, 1.0: 0.1}),
        ("cosine", {0.0: 1.0, 0.5: 0.55, 1.0: 0.1}),
        ("wsd", {0.0: 1.0, 0.5: 1.0, 0.8: 1.0, 0.9: 0.55, 1.0: 0.1}),
        ("constant", {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
    ],
)
def test_schedule_values(schedule, expected):
    chosen = gpt.checked_settings(
        lr_schedule=schedule, warmup_iters=0, learning_rate=1.0, min_lr=0.1
    )
    for progress, value in expected.items():
        assert gpt.lr_scale(10, progress, chosen) == pytest.approx(value)


def test_warmup_is_linear_and_never_zero():
    chosen = gpt.checked_settings(warmup_iters=4, min_lr=0.0, lr_schedule="constant")
    scales = [gpt.lr_scale(step, 0.0, chosen) for step in range(6)]
    assert scales == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_stays_at_its_lowest_after_lr_decay_iters(settings, tmp_path, schedule):
    settings(max_iters=12, warmup_iters=0, lr_decay_iters=6, lr_schedule=schedule)
    gpt.train(learning_rate=1e-3, min_lr=1e-4)
    rates = [r["lr"] for r in read_log(tmp_path / "out") if "lr" in r]
    assert rates[0] == pytest.approx(1e-3) and rates[3] == pytest.approx(5.5e-4)
    assert rates[5] > 1.1e-4
    assert rates[6:] == pytest.approx([1e-4] * 6)


def test_rates_of_a_run_follow_the_schedule_and_each_step_has_its_own(settings, tmp_path):
    settings(
        max_iters=10,
        warmup_iters=0,
        lr_schedule="linear",
        learning_rate=1e-3,
        min_lr=0.0,
        gradient_accumulation_steps=2,
    )
    gpt.train()
    rates = [r["lr"] for r in read_log(tmp_path / "out") if "lr" in r]
    assert rates == pytest.approx([1e-3 * (1 - step / 10) for step in range(10)])
    assert len(rates) == 10


# ---- what a run leaves behind ----


def test_a_run_makes_max_iters_updates_and_saves_and_evaluates_the_last(settings, tmp_path):
    settings(max_iters=7, eval_interval=3)
    figures = gpt.train()
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert figures["step"] == state["step"] == 7
    assert all(
        int(s["step"]) == 7 for s in state["optimizers"][0]["state"].values()
    )  # AdamW's own count
    assert sorted(losses(tmp_path / "out")[1]) == [0, 3, 6, 7]
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    data = gpt.Data(tmp_path / "data" / "toy", 16)
    tokens = torch.from_numpy(
        np.fromfile(tmp_path / "data" / "toy" / "val.bin", dtype="<u2").astype(np.int64)
    )
    total = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        with torch.no_grad():
            logits = model(window[None, :-1])[0][0]
        total -= (
            logits.double().log_softmax(-1)[torch.arange(len(window) - 1), window[1:]].sum().item()
        )
    expected = total / (len(tokens) - 1)
    assert figures["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    n_bytes = len(tokenizer.decode(tokens.tolist()).encode())
    assert figures["bits_per_byte"] == pytest.approx(
        expected / math.log(2) * len(tokens) / n_bytes, rel=1e-4
    )
    assert data.meta["val_tokens"] == len(tokens)


def test_log_begins_with_the_run_and_ends_with_the_figures(settings, tmp_path):
    settings(max_iters=3)
    figures = gpt.train()
    first, *_, last = read_log(tmp_path / "out")
    assert first["config"]["n_layer"] == 2 and first["config"]["dataset"] == "toy"
    assert (
        first["torch"] == torch.__version__
        and len(first["dataset_sha256"]) == 64
        and "machine" in first
    )
    assert (
        last["val_loss"] == figures["val_loss"] and {"perplexity", "bits_per_byte"} <= last.keys()
    )
    steps = [r for r in read_log(tmp_path / "out") if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3]
    assert all({"elapsed_s", "lr", "grad_norm", "tokens_per_s", "mfu"} <= r.keys() for r in steps)


def test_best_keeps_the_best_weights(settings, tmp_path, monkeypatch):
    settings(max_iters=6, eval_interval=2)
    scripted = iter([9.0, 3.0, 5.0, 4.0, 4.0])
    monkeypatch.setattr(gpt, "evaluate", lambda *_: next(scripted))
    figures = gpt.train()
    assert figures["best_val_loss"] == 3.0
    assert gpt.read_checkpoint(tmp_path / "out" / "best.pt")["step"] == 2
    assert gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 6


def test_checkpoint_is_plain_and_its_keys_are_those_of_the_model(settings, tmp_path):
    settings(max_iters=1)
    gpt.train()
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert (
        state["model"].keys() == gpt.GPT(gpt.GPTConfig(**state["model_args"])).state_dict().keys()
    )

    def check(value):
        assert isinstance(
            value, dict | list | tuple | str | int | float | bool | None | torch.Tensor
        ), type(value)
        for inner in (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, list | tuple)
            else ()
        ):
            check(inner)

    check(state)


def test_eval_only_gives_the_figures_of_the_best_checkpoint_and_writes_nothing(
    settings, tmp_path, capsys
):
    settings(max_iters=10)
    figures = gpt.train()
    (tmp_path / "out" / "ckpt.pt").unlink()
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    settings(eval_only=True)
    assert gpt.train()["val_loss"] == figures["val_loss"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    assert f"{figures['val_loss']:.4f}" in capsys.readouterr().out


def test_samples_are_printed_at_evaluations_and_at_the_end(settings, capsys):
    settings(max_iters=4, eval_interval=2, sample_tokens=5, sample_at_eval=True)
    gpt.train()
    assert capsys.readouterr().out.count("-" * 80) == 2 * 3
    settings(sample_at_eval=False)
    gpt.train()
    assert capsys.readouterr().out.count("-" * 80) == 2


# ---- resume ----


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"optimizer": "adamw", "dropout": 0.2},
        {
            "optimizer": "muon",
            "gradient_accumulation_steps": 3,
            "dropout": 0.1,
            "tie_weights": False,
        },
        {"optimizer": "muon", "dtype": "bfloat16"},
    ],
)
def test_resume_is_bit_exact(settings, tmp_path, changes):
    settings(
        max_iters=40,
        eval_interval=10,
        lr_decay_iters=40,
        warmup_iters=5,
        out_dir=str(tmp_path / "a"),
        **changes,
    )
    gpt.train()
    settings(max_iters=20, out_dir=str(tmp_path / "b"))
    gpt.train()
    settings(max_iters=40, init_from="resume")
    gpt.train()
    assert_same_state(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")
    straight, resumed = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert resumed == straight
    assert sorted(straight[0]) == list(range(1, 41))


def test_resume_after_sigterm_is_bit_exact(settings, tmp_path, run_script):
    settings()
    common = [
        *toy_flags(tmp_path),
        "--max_iters=3000",
        "--lr_decay_iters=3000",
        "--log_interval=1",
        "--eval_interval=500",
        "--eval_iters=2",
        "--sample_tokens=0",
        "--dtype=float32",
        "--dropout=0.1",
        "--compile=False",
    ]
    process = subprocess.Popen(
        [sys.executable, "gpt.py", *common, f"--out_dir={tmp_path / 'cut'}"],
        cwd=ROOT,
        env=os.environ | NO_PICTURES | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step     3"):
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    stopped = gpt.read_checkpoint(tmp_path / "cut" / "ckpt.pt")["step"]
    assert process.returncode == 128 + signal.SIGTERM and f"stopped at step {stopped:,}" in rest
    assert 0 < stopped < 3000
    end = stopped + 40
    for name, init in (("cut", "resume"), ("whole", "scratch")):
        done = run_script(
            "gpt.py",
            *common,
            f"--max_iters={end}",
            f"--out_dir={tmp_path / name}",
            f"--init_from={init}",
        )
        assert done.returncode == 0, done.stderr
    assert_same_state(tmp_path / "cut" / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")
    assert losses(tmp_path / "cut")[0] == losses(tmp_path / "whole")[0]


def test_a_second_interrupt_is_not_swallowed_and_handlers_are_restored(settings, monkeypatch):
    settings(max_iters=1000, eval_interval=1000)
    original = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background ignores it
    step = torch.optim.AdamW.step

    def interrupting(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupting)
    try:
        with pytest.raises(KeyboardInterrupt):
            gpt.train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, original)


@pytest.mark.parametrize(
    "name, value",
    [
        ("n_layer", 3),
        ("n_embd", 64),
        ("qk_norm", False),
        ("block_size", 8),
        ("optimizer", "adamw"),
        ("tie_weights", True),
    ],
)
def test_resume_with_a_changed_architecture_is_refused(settings, name, value):
    settings(max_iters=2)
    gpt.train()
    settings(init_from="resume", **{name: value})
    with pytest.raises(ValueError, match=f"^{name} is {value}, but ") as e:
        gpt.train()
    named = set(re.findall(r"(\w+) is ", str(e.value)))
    assert named <= gpt.SETTINGS.keys()  # no size that follows from others


def test_all_that_resuming_lacks_is_named_at_once(settings):
    """A config may choose other sizes on another machine; its remedy must work as it is printed."""
    settings(max_iters=2)
    gpt.train()
    before = {name: getattr(gpt, name) for name in ("block_size", "n_layer")}
    settings(init_from="resume", max_iters=3, n_layer=before["n_layer"] + 1, block_size=8)
    with pytest.raises(ValueError, match="^block_size is 8, but .*; n_layer is ") as refused:
        gpt.train()
    flags = dict(re.findall(r"--(\w+)=(\d+)", str(refused.value)))
    assert flags == {name: str(value) for name, value in before.items()}
    settings(**{name: int(value) for name, value in flags.items()})
    assert gpt.train()["step"] == 3


def test_resume_takes_dropout_and_train_temperature_from_the_settings(settings, tmp_path):
    settings(max_iters=2)
    gpt.train()
    settings(max_iters=4, init_from="resume", dropout=0.3, train_temperature=0.8)
    gpt.train()
    config = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["model_args"]
    assert (config["dropout"], config["train_temperature"]) == (0.3, 0.8)


def test_resume_takes_rates_and_decay_from_the_settings(settings, tmp_path):
    settings(max_iters=2)
    gpt.train()
    before = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    settings(
        max_iters=6,
        init_from="resume",
        learning_rate=1e-12,
        muon_lr=1e-12,
        weight_decay=0.5,
        beta2=0.9,
    )
    gpt.train()
    after = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    for name, weight in before["model"].items():
        assert torch.allclose(weight, after["model"][name], atol=1e-8), name
    adamw, muon = (o["param_groups"][0] for o in after["optimizers"])
    assert (adamw["weight_decay"], adamw["betas"], muon["weight_decay"]) == (0.5, (0.9, 0.9), 0.5)


def test_resume_without_all_weights_is_refused(settings, tmp_path):
    """What a checkpoint lacks is not left as it was drawn."""
    settings(max_iters=1)
    gpt.train()
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    del state["model"]["h.1.mlp.c_fc.weight"]
    gpt.save_checkpoint(tmp_path / "out" / "ckpt.pt", state)
    settings(init_from="resume", max_iters=2)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight"):
        gpt.train()


def test_resume_with_another_tokenizer_is_refused(settings, tmp_path):
    """Other characters, or special tokens that the checkpoint lacks; the same ones are fine."""
    settings(max_iters=2)
    gpt.train()
    chars = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["tokenizer"]["chars"]
    others = [
        gpt.Tokenizer("char", chars[1:] + "%"),
        gpt.Tokenizer("char", chars, special="<|endoftext|>"),
    ]
    for i, tokenizer in enumerate([*others, gpt.Tokenizer("char", chars)]):
        gpt.write_dataset(tmp_path / "data" / f"toy{i}", chars[1:] * 50, tokenizer, "tests")
        settings(dataset=f"toy{i}", init_from="resume", max_iters=3)
        if i < 2:
            with pytest.raises(
                ValueError, match=f"toy{i} has a different tokenizer from the model"
            ):
                gpt.train()
    assert gpt.train()["step"] == 3


# ---- weights ----

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WEIGHTED_RUN = {
    "dataset": "chats",
    "block_size": 8,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "max_iters": 8,
    "eval_interval": 4,
}


def some_examples(seed, n):
    """Return examples of prompts that weigh 0, and of short and long responses of any weight."""
    draw = random.Random(seed)

    def text(length):
        return "".join(draw.choice(LETTERS) for _ in range(length))

    sizes = [(draw.randint(0, 6), draw.choice([1, 2, 20])) for _ in range(n)]
    return [[(text(a), 0), (text(b), draw.choice([255, 255, 128, 20, 0]))] for a, b in sizes]


@pytest.fixture
def chats(settings, tmp_path, write_examples):
    """The settings of a run on weighted examples, some of them longer than a block."""
    splits = {"train": some_examples(1, 40), "val": some_examples(2, 23)}
    write_examples(tmp_path / "data" / "chats", LETTERS, **splits)
    settings(**WEIGHTED_RUN)
    return splits


@torch.no_grad()
def explicit_losses(model, x, y):
    """Return -log softmax at the targets, float64, by the model's logits alone."""
    return -model(x)[0].double().log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]


def test_accumulated_weighted_batches_train_as_one(chats, settings, tmp_path):
    """Four micro-batches of 2 rows, whose weights differ, train as one batch of 8 rows."""
    runs = {}
    for name, rows, accumulation in (("one", 8, 1), ("four", 2, 4), ("eight", 1, 8)):
        settings(
            batch_size=rows, gradient_accumulation_steps=accumulation, out_dir=str(tmp_path / name)
        )
        gpt.train()
        runs[name] = (
            losses(tmp_path / name)[0],
            gpt.read_checkpoint(tmp_path / name / "ckpt.pt")["model"],
        )
    settings(batch_size=8, gradient_accumulation_steps=1)
    trainer = new_trainer()
    x, y, w = trainer.data.get_batch("train", 0, 8)
    each = explicit_losses(trainer.model, x, y)
    expected = float((each * w).sum() / w.sum())
    first, after = runs["one"]
    assert first[1] == pytest.approx(expected, abs=1e-5)
    for name in ("four", "eight"):
        steps, weights = runs[name]
        assert sorted(steps) == sorted(first) == list(range(1, 9))
        assert max(abs(steps[step] - first[step]) for step in steps) < 1e-5
        assert max(float((weights[key] - after[key]).abs().max()) for key in after) < 1e-4
    sums = w.view(4, 2, 8).sum((1, 2))
    assert sums.min() < 0.6 * sums.max()  # so that equal shares would not do


def test_a_mean_of_means_would_be_another_gradient(chats, settings, tmp_path, monkeypatch):
    """The gradient that the optimizer sees is that of all the step's weighted targets alike."""
    seen, step = [], torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        seen.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    settings(batch_size=2, gradient_accumulation_steps=4, max_iters=1, grad_clip=0.0)
    gpt.train()
    trainer = new_trainer()
    parameters = [p for g in trainer.optimizers[0].param_groups for p in g["params"]]
    x, y, w = trainer.data.get_batch("train", 0, 8)
    logits = trainer.model(x)[0].flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, y.flatten().clamp(min=0), reduction="none")
    each = each.view(4, 16) * w.view(4, 16)
    wanted = each.sum() / w.sum(), (each.sum(1) / w.view(4, 16).sum(1)).mean()
    right, naive = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
        for loss in wanted
    )
    assert (seen[0] - right).norm() / right.norm() < 1e-4
    assert (naive - right).norm() / right.norm() > 0.05


def test_evaluation_is_the_weighted_mean_over_all_examples(chats, settings, tmp_path, capsys):
    """By hand from the logits of each example's blocks: responses by weight, prompts not at all."""
    settings(batch_size=3, eval_iters=1000)
    figures = gpt.train()
    model, _, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    total = weight = 0.0
    for example in chats["val"]:
        ids = torch.tensor([LETTERS.index(c) for text, _ in example for c in text] + [26])
        weights = [w / 255 for text, w in example for _ in text] + [example[-1][1] / 255]
        for start in range(0, len(ids) - 1, 8):
            window = ids[start : start + 9]
            own = torch.tensor(weights[start + 1 : start + 9], dtype=torch.float64)
            total += float(
                (explicit_losses(model, window[None, :-1], window[None, 1:])[0] * own).sum()
            )
            weight += float(own.sum())
    assert figures["val_loss"] == pytest.approx(total / weight, abs=1e-5)
    assert losses(tmp_path / "out")[1][8] == pytest.approx(total / weight, abs=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-4)
    assert "bits_per_byte" not in figures | read_log(tmp_path / "out")[-1]
    assert "bits_per_byte" not in capsys.readouterr().out


def test_bits_per_byte_are_of_plain_text_only(settings, capsys):
    """The toy text has them, in the figures and on the screen."""
    settings(max_iters=1)
    assert "bits_per_byte" in gpt.train()
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.mark.parametrize("weight", [0, 255])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_example_without_weight_teaches_nothing(
    chats, settings, tmp_path, write_examples, weight, accumulation
):
    """Whatever a response that weighs 0 says, the trained weights are the same, bit for bit."""
    states = []
    for response in ("aaaaaaaaaaaa", "qwertzuiopqw"):
        examples = chats["train"][:12]
        examples[3:3] = [[("what", 0), (response, weight)]]
        write_examples(tmp_path / "data" / "chats", LETTERS, train=examples, val=chats["val"])
        settings(
            batch_size=4 // accumulation, gradient_accumulation_steps=accumulation, max_iters=12
        )
        gpt.train()
        states.append(gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["model"])
    same = [torch.equal(states[0][name], states[1][name]) for name in states[0]]
    assert all(same) if weight == 0 else not any(same)


def test_no_step_teaches_nothing(settings, tmp_path, write_examples, capsys):
    """Long prompts with short answers: rows without a target are left out, and no loss is 0.

    Two steps hold the same two answers at the same places, so that each costs about as much.
    """
    example = [("quite a long question " * 10, 0), ("yes", 255)]
    chars = "".join(sorted(set("quite a long question yes")))
    write_examples(tmp_path / "data" / "long", chars, train=[example] * 9, val=[example] * 2)
    settings(dataset="long", batch_size=2, eval_iters=1, eval_interval=5, max_iters=20)
    figures = gpt.train()
    steps, evaluations = losses(tmp_path / "out")
    assert sorted(steps) == list(range(1, 21))
    assert all(abs(loss / math.log(len(chars) + 4) - 1) < 0.5 for loss in list(steps.values())[:2])
    assert min(steps.values()) > 0 and min(evaluations.values()) > 0
    assert figures["val_loss"] > 0
    # Of the 223 targets of an example, which fill 14 rows, the last 4 count, all in the last row.
    assert f"{13 * 11} rows hold no target and are left out" in capsys.readouterr().out


def test_resume_on_weighted_data_is_bit_exact(chats, settings, tmp_path):
    """A run in two halves is one in one piece."""
    settings(
        batch_size=3, gradient_accumulation_steps=2, lr_decay_iters=8, out_dir=str(tmp_path / "a")
    )
    gpt.train()
    settings(max_iters=4, out_dir=str(tmp_path / "b"))
    gpt.train()
    settings(max_iters=8, init_from="resume")
    gpt.train()
    assert_same_state(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")
    assert losses(tmp_path / "a")[0] == losses(tmp_path / "b")[0]


# ---- gradients ----


def test_gradients_are_clipped_to_grad_clip(settings, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        model_norm = sum(
            p.grad.square().sum() for g in self.param_groups for p in g["params"]
        ).sqrt()
        norms.append(float(model_norm))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    settings(optimizer="adamw", grad_clip=0.01, max_iters=5)
    gpt.train()
    assert norms == pytest.approx([0.01] * 5, rel=1e-3)
    settings(grad_clip=0.0)
    gpt.train()
    assert min(norms[5:]) > 0.02


def test_muon_lr_of_zero_leaves_the_matrices_as_they_began(settings, tmp_path):
    """AdamW's parameters learn, Muon's, without decay, do not."""
    settings(
        muon_lr=0.0, max_iters=3, tie_weights=True
    )  # else c_proj and head are 0 and stop all gradients
    gpt.train()
    began = new_trainer().model.state_dict()
    after = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["model"]
    for name, weight in after.items():
        assert torch.equal(weight, began[name]) == (
            name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        )


def scaled_run(settings, monkeypatch, tmp_path, overflow_at):
    """Train 6 steps in float32 with a working GradScaler, its gradients overflowing at one step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler)
    clip = torch.nn.utils.clip_grad_norm_
    seen = []

    def noting(parameters, max_norm):
        parameters = list(parameters)
        seen.append([p.detach().clone() for p in parameters])
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noting)
    scale, calls = scaler.scale, [0]

    def overflowing(loss):
        calls[0] += 1
        return scale(loss) * (math.inf if calls[0] == overflow_at else 1)

    monkeypatch.setattr(scaler, "scale", overflowing)
    settings(max_iters=6, out_dir=str(tmp_path / f"scaled{overflow_at}"))
    return gpt.train(), seen


def test_scaled_losses_train_as_unscaled_ones(settings, monkeypatch, tmp_path):
    settings(max_iters=6)
    plain = gpt.train()
    scaled, _ = scaled_run(settings, monkeypatch, tmp_path, overflow_at=None)
    assert scaled["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-5)


def test_an_overflow_skips_the_step_of_both_optimizers(settings, monkeypatch, tmp_path):
    figures, seen = scaled_run(settings, monkeypatch, tmp_path, overflow_at=3)
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3]))  # weights at steps 3 and 4
    assert not all(torch.equal(a, b) for a, b in zip(seen[3], seen[4]))
    assert math.isfinite(figures["val_loss"])


def test_early_stop_ends_after_evaluations_without_a_new_best(settings, monkeypatch, capsys):
    """And the run says why it ends."""
    scripted = iter([9.0, 3.0, 5.0, 2.0, 4.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(gpt, "evaluate", lambda *_: next(scripted))
    settings(max_iters=100, eval_interval=2, early_stop=2)
    figures = gpt.train()
    assert (figures["step"], figures["best_val_loss"], figures["stopped_by"]) == (10, 2.0, None)
    assert "\nearly stop: 2 evaluations without a new best\n" in capsys.readouterr().out


# ---- time budget ----


class Clock:
    """A time module whose seconds pass as a test says."""

    def __init__(self):
        self.now = 1000.0  # of the clock that only goes forward
        self.set_by = 1.7e9  # how far the wall clock is ahead of it
        self.strftime = time.strftime

    def monotonic(self):
        return self.now

    def time(self):
        return self.now + self.set_by


@pytest.fixture
def clock(monkeypatch):
    """Give gpt.py a Clock: a training step takes 0.5 s, a batch evaluated 0.3 s, compiling 20 s."""
    clock = Clock()
    forward = gpt.GPT.forward

    def slow(self, *args, **kwargs):
        clock.now += 0.5 if self.training else 0.3
        return forward(self, *args, **kwargs)

    def compile_slowly(self):
        clock.now += 20

    monkeypatch.setattr(gpt, "time", clock)
    monkeypatch.setattr(gpt.GPT, "forward", slow)
    monkeypatch.setattr(gpt.Trainer, "compile", compile_slowly)
    return clock


@pytest.mark.parametrize("compiled", [False, True])
def test_max_minutes_ends_on_time_with_the_schedule_at_its_end(settings, tmp_path, clock, compiled):
    """Two minutes, of which 5 s have gone before train()."""
    settings(max_minutes=2.0, max_iters=3, eval_interval=40, warmup_iters=2, compile=compiled)
    figures = gpt.run(gpt.checked_settings(), clock.now - 5)
    assert 0.95 * 120 < clock.now - (1000 - 5) < 1.05 * 120
    records = read_log(tmp_path / "out")
    rates = [r["lr"] for r in records if "lr" in r]
    assert len(rates) == figures["step"] > 100
    assert rates[-1] < 0.02 * max(rates) and max(rates) > 0.9 * gpt.learning_rate
    assert rates[2:] == sorted(rates[2:], reverse=True)
    drops = [a - b for a, b in itertools.pairwise(rates)]
    assert max(drops[2:]) < 0.03 * max(rates)  # no jump where it compiled or evaluated
    assert all(r["tokens_per_s"] == pytest.approx(64 / 0.5) for r in records if "tokens_per_s" in r)


def test_max_minutes_counts_on_after_a_resume(settings, tmp_path, clock, monkeypatch):
    """A run of two minutes, stopped after one and resumed an hour later, trains for one more."""
    settings(max_minutes=2.0, eval_interval=40, warmup_iters=2, compile=True)
    autocast = gpt.Machine.autocast

    def stopping(self):
        if clock.now > 1060 and gpt.init_from == "scratch":
            signal.raise_signal(signal.SIGTERM)
        return autocast(self)

    monkeypatch.setattr(gpt.Machine, "autocast", stopping)
    assert gpt.train()["stopped_by"] == signal.SIGTERM
    first = clock.now - 1000
    clock.now += 3600
    settings(init_from="resume")
    assert gpt.train()["stopped_by"] is None
    assert 59 < first < 63
    assert 0.95 * 120 < clock.now - 3600 - 1000 < 1.05 * 120
    rates = [r["lr"] for r in read_log(tmp_path / "out") if "lr" in r]
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.02 * max(rates)


@pytest.mark.parametrize("jump", [-7200.0, 50.0])
def test_setting_the_wall_clock_changes_nothing(settings, tmp_path, clock, monkeypatch, jump):
    """Summer time begins or ends in a run of two minutes, which takes them, and can be resumed."""
    autocast = gpt.Machine.autocast
    calls = []

    def noting(self):
        calls.append(self)
        if len(calls) in (30, 90):
            clock.set_by += jump
        return autocast(self)

    monkeypatch.setattr(gpt.Machine, "autocast", noting)
    settings(max_minutes=2.0, eval_interval=40, warmup_iters=2)
    figures = gpt.train()
    assert 0.95 * 120 < clock.now - 1000 < 1.05 * 120
    records = read_log(tmp_path / "out")
    seconds = [r["elapsed_s"] for r in records]
    assert seconds == sorted(seconds) and 0 <= seconds[0] and seconds[-1] < 126
    assert all(r["tokens_per_s"] == pytest.approx(64 / 0.5) for r in records if "loss" in r)
    clock.set_by -= 5 * jump
    settings(init_from="resume", max_minutes=3.0)
    resumed = gpt.train()
    assert 0.95 * 180 < clock.now - 1000 < 1.05 * 180
    assert resumed["step"] > figures["step"] + 50


def test_a_clock_of_whole_seconds_divides_by_nothing(settings, monkeypatch):
    """On some systems a step may begin and end at the same time."""
    monkeypatch.setattr(gpt, "time", Clock())
    assert gpt.train(max_iters=3)["step"] == 3
    for minutes in (0.0, 1.0):
        assert gpt.train(dry_run=True, max_minutes=minutes)["seconds_per_step"] < 1e-6


def test_no_script_measures_a_duration_by_the_wall_clock():
    """NTP, summer time and laptops that wake up set it."""
    files = [
        ROOT / name for name in ("configurator", "gpt", "hub", "prepare", "sample", "evaluate")
    ]
    files = [path.with_suffix(".py") for path in files] + list((ROOT / "extras").glob("*.py"))
    for path in files:
        source = path.read_text(encoding="utf-8")
        assert not re.findall(r"\btime\.time\b|from time import|datetime\.now", source), path


# ---- distributed ----


def test_two_processes_train_on_weighted_data_as_one(chats, settings, tmp_path):
    """Two processes whose rows weigh differently give the losses and weights of one."""
    settings(
        batch_size=2, gradient_accumulation_steps=4, eval_iters=5, out_dir=str(tmp_path / "one")
    )
    gpt.train()
    data = gpt.Data(tmp_path / "data" / "chats", 8)
    halves = [data.get_batch("train", 4 * half, 4)[2].sum() for half in range(2 * gpt.max_iters)]
    assert max(abs(a - b) for a, b in zip(halves[::2], halves[1::2])) > 3  # what rank 0 and 1 hold
    flags = [
        f"--{name}={getattr(gpt, name)}"
        for name in gpt.SETTINGS
        if name not in ("out_dir", "compile")
    ]
    run_two_processes(*flags, f"--out_dir={tmp_path / 'two'}")
    for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two")):
        assert len(a) >= 3 and a.keys() == b.keys()
        assert max(abs(a[step] - b[step]) for step in a) < 1e-5
    one, two = (gpt.read_checkpoint(tmp_path / run / "ckpt.pt")["model"] for run in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


@pytest.mark.parametrize(
    "world_size, accumulation, expected",
    [(1, 4, (4, 12)), (2, 4, (2, 12)), (2, 1, (1, 6)), (4, 1, (1, 3)), (2, 5, (3, 10))],
)
def test_processes_share_the_global_batch(
    settings, monkeypatch, world_size, accumulation, expected
):
    """Together they take the rows of the global batch, each once, in micro-batches of one size."""
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, **_: model)
    trainer = new_trainer(batch_size=12, gradient_accumulation_steps=accumulation)
    first_row = 12 * accumulation * 3
    x, _, _ = trainer.data.get_batch("train", first_row, 12 * accumulation)
    shares = []
    for rank in range(world_size):
        machine = gpt.Machine(torch.device("cpu"), torch.float32, rank, world_size)
        part = gpt.Trainer(trainer.settings, trainer.model, trainer.data, machine)
        taken = []

        def backward(x, y, w, share, taken=taken):
            taken.append(x)
            return torch.zeros(())

        part.backward = part.first_backward = backward
        part.machine.mean = float
        part.gradients(first_row)
        assert (len(taken), *{len(x) for x in taken}) == expected
        shares += taken
    assert torch.equal(torch.cat(shares), x)


def test_a_batch_that_cannot_be_shared_is_refused(settings):
    trainer = new_trainer(batch_size=3)
    machine = gpt.Machine(torch.device("cpu"), torch.float32, 0, 2)
    with pytest.raises(ValueError, match="steps is 3: for 2 processes it must be a multiple of 2"):
        gpt.Trainer(trainer.settings, trainer.model, trainer.data, machine)


# ---- learning ----


def test_overfits_one_batch(settings):
    trainer = new_trainer(learning_rate=3e-3)
    x, y, _ = trainer.data.get_batch("train", 0, 4)
    for _ in range(200):
        loss = trainer.model(x, y)[1]
        loss.backward()
        trainer.optimizer_steps()
        trainer.model.zero_grad()
    assert loss.item() < 0.05


def test_learns_pydoc(settings, tmp_path):
    settings(
        dataset="pydoc",
        block_size=64,
        n_embd=64,
        batch_size=16,
        max_iters=160,
        eval_interval=160,
        eval_iters=5,
        muon_lr=0.035,
        learning_rate=8e-3,
    )
    figures = gpt.train()
    assert figures["val_loss"] < 2.4  # 2.46: by the previous character alone
    assert json.loads((tmp_path / "data" / "pydoc" / "meta.json").read_text())["source"]


# ---- the machine ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_machine_weighs_a_batch_and_computes_in_its_dtype(chats, settings, tmp_path, dtype):
    """The loss is the weighted one, in float32 by float32 logits, in bfloat16 near it."""
    settings(tie_weights=True)
    trainer = new_trainer()
    model = trainer.model
    machine = gpt.Machine(torch.device("cpu"), dtype)
    with torch.no_grad():
        model.wte.weight.mul_(20)  # so that losses differ
    x, y, _ = trainer.data.get_batch("train", 0, 8)
    each = explicit_losses(model, x, y)
    seen = []
    w = 0.4 * (each > each.mean()).float()
    model.ln_f.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    trainer.machine = machine
    loss = float(trainer.backward(x, y, w, 1.0))
    expected = float((each * w).sum() / w.sum())
    assert seen == [dtype]
    assert loss == pytest.approx(expected, abs=1e-5 if dtype == torch.float32 else 3e-2)
    assert expected - float(each.mean()) > 0.5


def test_mfu_counts_the_known_gpus_and_is_none_elsewhere(monkeypatch):
    machine = gpt.Machine(torch.device("cpu"), torch.bfloat16, 0, 2)
    assert machine.mfu(1e12) is None
    monkeypatch.setattr(gpt.Machine, "name", lambda self: "NVIDIA A100-SXM4-80GB")
    assert machine.mfu(312e12) == pytest.approx(0.5)
    assert gpt.Machine(torch.device("cpu"), torch.float32).mfu(1e12) is None


@pytest.mark.filterwarnings(
    "ignore:torch.cuda.amp.GradScaler is enabled, but CUDA is not available"
)
def test_a_gpu_that_does_not_work_gives_way_to_the_cpu(monkeypatch, capsys):
    """Such as one that is older than what this build of torch has kernels for."""
    gpt.say_once.cache_clear()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(gpt, "launched_by_torchrun", lambda: False)

    def no_kernel(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution")

    monkeypatch.setattr(torch, "ones", no_kernel)
    for _ in range(2):
        assert gpt.pick_device("auto") == torch.device("cpu")
    told = capsys.readouterr().err
    assert told == (
        "cuda does not work here (CUDA error: no kernel image is available for execution): "
        "using the CPU\n"
    )
    with pytest.raises(ValueError, match="device 'cuda' is not available"):
        gpt.pick_device("cuda")


@pytest.mark.parametrize("build", [None, "13.0"])
def test_a_torch_without_cuda_beside_a_gpu_is_named(monkeypatch, capsys, build):
    """pip installs such a torch on Windows."""
    gpt.say_once.cache_clear()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert gpt.pick_device("auto") == torch.device("cpu")
    assert ("cannot use the NVIDIA GPU" in capsys.readouterr().err) == (build is None)


@pytest.mark.parametrize(
    "capability, expected",
    [
        ((9, 0), (torch.bfloat16, True)),
        ((8, 0), (torch.bfloat16, True)),
        ((7, 5), (torch.float16, True)),
        ((6, 1), (torch.float32, False)),
    ],
)
@pytest.mark.parametrize(
    (
        "changes",
        "long",
    ),  # 400 * 256 tokens a step of (6 * 377,600 + 12 * 2 * 128 * 256) FLOPs: 3.125e11 a step
    [
        ({"max_iters": 15_900}, False),
        ({"max_iters": 16_100}, True),
        ({"max_iters": 1_610, "gradient_accumulation_steps": 10}, True),
        ({"max_minutes": 1.9}, False),
        ({"max_minutes": 2.0}, True),
    ],
)
def test_dtype_and_compile_follow_the_gpu(
    settings, monkeypatch, capability, expected, changes, long
):
    """From two minutes on compiling pays; without a limit in minutes from 5e15 FLOPs on."""
    sizes = {"n_embd": 128, "n_layer": 2, "batch_size": 400, "block_size": 256}
    settings(**{"dtype": "auto", "device": "cuda"} | sizes | changes)
    monkeypatch.setattr(gpt, "pick_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dtype_and_compile() == (expected[0], expected[1] and long)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("changes", "expected"),  # in bfloat16, in float32
    [
        ({"max_minutes": 1.9}, (False, False)),
        ({"max_minutes": 2.0}, (True, False)),
        ({"max_minutes": 5.0}, (True, True)),
        ({"max_minutes": 1.0, "max_iters": 5000}, (False, False)),
        ({"max_minutes": 2.0, "dtype": "float32"}, (False, False)),
        # 8 * 256 tokens a step of (6 * 746,752 + 12 * 4 * 128 * 256) FLOPs: 1.24e10 a step
        (
            {"max_iters": 4000, "n_embd": 128, "n_layer": 4, "batch_size": 8, "block_size": 256},
            (False, False),
        ),
        (
            {"max_iters": 4100, "n_embd": 128, "n_layer": 4, "batch_size": 8, "block_size": 256},
            (True, True),
        ),
        ({"max_minutes": 1.0, "compile": True}, (True, True)),
        ({"max_minutes": 5.0, "compile": False}, (False, False)),
    ],
)
def test_cpu_compiles_where_the_run_is_long_enough(
    settings, monkeypatch, native, changes, expected
):
    """Minutes count before steps; float32 is chosen where bfloat16 is not native."""
    settings(**{"dtype": "auto"} | changes)
    monkeypatch.setattr(gpt, "native_bfloat16", lambda device: native)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    dtype = torch.bfloat16 if native and "dtype" not in changes else torch.float32
    assert dtype_and_compile() == (dtype, expected[not native])


def test_the_size_of_the_model_that_is_trained_decides_on_compiling(settings, monkeypatch):
    """Not that of the settings, which say nothing of a model to finetune."""
    sizes = {
        "block_size": 256,
        "vocab_size": 65,
        "n_layer": 4,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 128,
    }
    large = gpt.GPT(gpt.GPTConfig(**sizes, tie_weights=False))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    settings(max_iters=4100, batch_size=8, block_size=256, n_embd=32, n_layer=1)
    assert not dtype_and_compile()[1]
    assert dtype_and_compile(large)[1]


def dtype_and_compile(model=None):
    """Return the machine's dtype, and whether to compile a model, by default of 65 tokens."""
    chosen = gpt.checked_settings()
    machine = gpt.set_up_machine(chosen)
    model = model or gpt.GPT(gpt.model_config(chosen, vocab_size=65))
    data = SimpleNamespace(n_rows=lambda split: 10**9)
    return machine.dtype, bool(gpt.what_to_compile(chosen, model, data, machine))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_minutes": 2.0}, "blocks"),
        ({"max_minutes": 4.9}, "blocks"),
        ({"max_minutes": 5.0}, "model"),
        ({"max_minutes": 1.9}, ""),
        ({"compile": True}, "blocks"),
        ({"compile": False, "max_minutes": 60.0}, ""),
    ],
)
def test_a_short_run_compiles_the_blocks_alone(settings, monkeypatch, changes, expected):
    settings(dtype="bfloat16", **changes)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    chosen = gpt.checked_settings()
    model = gpt.GPT(gpt.model_config(chosen, vocab_size=65))
    data = SimpleNamespace(n_rows=lambda split: 10**9)
    machine = gpt.set_up_machine(chosen)
    assert gpt.what_to_compile(chosen, model, data, machine) == expected
    few_rows = SimpleNamespace(n_rows=lambda split: 10)
    settings(max_epochs=2.0)
    expected = "blocks" if changes.get("compile") else ""
    assert gpt.what_to_compile(gpt.checked_settings(), model, few_rows, machine) == expected


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_blocks_replace_the_models_own_in_training(
    settings, monkeypatch, gradient_checkpointing
):
    """Each is called once per micro-batch, on the model's weights; gradients are the plain ones."""
    options = {"dropout": 0.1, "gradient_checkpointing": gradient_checkpointing}
    settings(**options)
    plain = new_trainer()
    plain.gradients(0)
    calls = []

    def compile(block, **_):
        def compiled(*args):
            calls.append(block)
            return block(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    trainer = new_trainer(compile=True)
    trainer.get_ready()
    calls.clear()
    trainer.gradients(0)
    assert calls[: len(trainer.model.h)] == list(trainer.model.h)
    for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


# ---- Threads ----
@pytest.fixture
def torch_threads(monkeypatch):
    """Stand in for torch's number of threads, which begins as 4; return the list of its values."""
    counts = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    return counts


@pytest.mark.parametrize(
    ("seconds", "load", "expected"),
    [
        ({4: 0.001, 3: 0.002}, 0.0, 4),  # alone: more threads are faster
        ({4: 0.003, 3: 0.001}, 1.0, 3),  # one thread waits for another process
        ({4: 0.003, 2: 0.001}, 2.0, 2),
        ({4: 0.003, 1: 0.001}, 40.0, 1),
    ],
)
def test_the_fastest_number_of_threads_is_taken(
    torch_threads, monkeypatch, seconds, load, expected
):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)

    def work():
        now[0] += seconds[torch_threads[-1]]

    said = []
    threads = gpt.ThreadCount(said.append, trial_s=0.01)
    threads.choose(work)
    assert torch_threads[-1] == threads.count == expected
    assert set(torch_threads) == set(seconds)
    assert len(said) == (expected < 4)


def test_threads_are_chosen_anew_when_others_come_or_go(torch_threads, monkeypatch):
    """Not on an idle machine, and not twice within half a minute."""
    now = [1000.0]
    load = [0.0]
    trials = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "getloadavg", lambda: (load[0], 0, 0), raising=False)
    seconds = {4: 0.1, 3: 0.2}  # of a step

    def work():
        trials.append(torch_threads[-1])
        now[0] += seconds[torch_threads[-1]]

    said = []
    threads = gpt.ThreadCount(said.append)
    threads.adapt(work)
    now[0] += 600
    load[0] = 4.0  # our own threads
    threads.adapt(work)
    assert trials == []
    load[0] = 5.0  # another process has come
    now[0] += 29
    threads.adapt(work)
    assert trials == []
    now[0] += 2
    seconds.update({4: 0.3, 3: 0.1})
    threads.adapt(work, least_gain=3.5)  # it must pay for compiling anew
    assert threads.count == torch_threads[-1] == 4
    now[0] += 61
    threads.adapt(work, least_gain=2.5)
    assert threads.count == torch_threads[-1] == 3
    load[0] = 3.0  # it has gone
    threads.adapt(work)
    assert threads.count == 3
    now[0] += 31
    seconds.update({4: 0.1, 3: 0.2})
    threads.adapt(work)
    assert threads.count == torch_threads[-1] == 4
    assert len(said) == 2
    load[0] = 5.0  # one that does not disturb us, on other cores
    for wait_s, expected in ((31, True), (31, False), (31, True)):
        trials.clear()
        now[0] += wait_s
        threads.adapt(work)
        assert bool(trials) == expected


def test_threads_follow_a_load_that_falls_but_not_to_nothing(torch_threads, monkeypatch):
    now = [1000.0]
    load = [3.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpt.ThreadCount, "load_of_others", lambda self: load[0])

    def work():
        free = 4 - load[0]  # a thread that shares its core makes the others wait
        now[0] += 1e-3 / torch_threads[-1] * (10 if torch_threads[-1] > free else 1)

    threads = gpt.ThreadCount(print)
    found = []
    for load[0] in (3.0, 1.0, 2.0, 0.0):
        now[0] += 40
        threads.adapt(work)
        found.append(threads.count)
    assert found == [1, 3, 2, 4]


def test_trials_that_take_long_are_rare(torch_threads, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpt.ThreadCount, "load_of_others", lambda self: 1.0)
    trials = []

    def work():
        trials.append(1)
        now[0] += 10.0

    threads = gpt.ThreadCount(print)
    threads.adapt(work)
    trials.clear()
    now[0] += 20 * 40 - 1
    threads.adapt(work)
    assert not trials
    now[0] += 2
    threads.adapt(work)
    assert trials


def test_a_process_that_came_before_the_run_is_noticed_at_once(torch_threads, monkeypatch):
    """At the start none of the load is our own; later a growing part is."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 0, 0), raising=False)
    threads = gpt.ThreadCount(print)
    assert threads.load_of_others() == 2.0
    now[0] += 60
    assert threads.load_of_others() == 0.0  # 4 * (1 - 1 / e) is 2.53


@pytest.mark.parametrize(
    ("minutes", "compiled", "expected"),
    [(2.0, "", [1.1] * 4), (0.9, "", [1.1]), (2.0, "blocks", [1.25, 1.1, 1.25, 1.25])],
)
def test_a_run_tries_the_threads_anew_as_it_logs(
    settings, monkeypatch, minutes, compiled, expected
):
    """If a minute is left, and if the gain pays for the 20 s that compiling anew would take."""
    gains = []
    monkeypatch.setattr(gpt.ThreadCount, "adapt", lambda self, _, gain=1.1: gains.append(gain))
    monkeypatch.setattr(gpt, "what_to_compile", lambda *_: compiled)
    monkeypatch.setattr(gpt.Trainer, "compile", lambda self: None)
    monkeypatch.setattr(gpt.Clock, "share_done", lambda self, step, epochs: step / 3)
    monkeypatch.setattr(gpt, "seconds_left", lambda *_: 50 * minutes)
    gpt.train(max_iters=3, log_interval=1, max_minutes=minutes, max_epochs=0.0)
    assert gains == expected


def test_a_run_gives_the_number_of_threads_back(settings, torch_threads, monkeypatch):
    """Python callers of train() find what they had."""
    monkeypatch.setattr(gpt.ThreadCount, "seconds_of", lambda self, work, count: count)
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 0, 0), raising=False)
    settings(max_minutes=0.01)
    gpt.train()
    assert torch_threads[-1] == 4
    assert 2 in torch_threads


def test_a_run_of_fixed_length_keeps_its_threads(settings, torch_threads, monkeypatch):
    """With float32 the last bits may depend on them, and a resumed run must be the same."""
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 0, 0), raising=False)
    settings(max_iters=2)
    gpt.train()
    assert torch_threads == [4]


def test_compile_failure_is_one_line_and_trains_on(settings, monkeypatch, capsys):
    settings(compile=True, max_iters=3)

    def broken(*_, **__):
        raise RuntimeError("no compiler\nwith a long story")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    assert gpt.train()["step"] == 3
    out = capsys.readouterr().out
    assert out.count("torch.compile failed (RuntimeError)") == 1 and "long story" not in out


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_a_compiled_run_resumes_bit_for_bit(settings, tmp_path, monkeypatch, what):
    """With dropout and accumulation, too."""
    monkeypatch.setattr(gpt, "what_to_compile", lambda *_: what)
    if not shutil.which("g++"):
        pytest.skip("there is no C++ compiler")
    common = {
        "compile": True,
        "dropout": 0.2,
        "gradient_accumulation_steps": 2,
        "lr_decay_iters": 6,
    }
    common |= {"train_temperature": 0.8}
    for name, stops in (("whole", [6]), ("cut", [3, 6])):
        for i, stop in enumerate(stops):
            settings(
                **common,
                max_iters=stop,
                init_from="resume" if i else "scratch",
                out_dir=str(tmp_path / name),
            )
            gpt.train()
    states = [gpt.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "cut")]
    for name, weight in states[0]["model"].items():
        assert torch.equal(weight, states[1]["model"][name]), name


def test_the_batch_that_compile_is_tried_on_leaves_no_gradient(settings, monkeypatch):
    """Nor does it move a weight."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    trainer = new_trainer(compile=True)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.get_ready()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert_same(before, dict(trainer.model.state_dict()))


# ---- from Python ----


def test_import_prints_nothing_and_trains_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from gpt import GPT, GPTConfig, Tokenizer, load_checkpoint, train"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_resume_from_a_checkpoint_with_a_shorter_tokenizer_state(settings, tmp_path):
    """A state that leaves out what is empty rebuilds the same tokenizer, and is taken for it."""
    settings(max_iters=2)
    gpt.train()
    path = tmp_path / "out" / "ckpt.pt"
    state = gpt.read_checkpoint(path)
    state["tokenizer"] = {k: state["tokenizer"][k] for k in ("kind", "chars")}
    gpt.save_checkpoint(path, state)
    settings(init_from="resume", max_iters=3)
    assert gpt.train()["step"] == 3


@pytest.mark.parametrize("weighted", [False, True])
def test_samples_begin_with_a_newline_or_an_examples_prompt(
    settings, write_examples, tmp_path, capsys, weighted
):
    """A text's samples continue a newline; those of answers a validation prompt, up to its end."""
    folder = tmp_path / "data" / "toy"
    if weighted:
        write_examples(
            folder, "abc=", **{split: [[("ab=", 0), ("c", 255)]] * 2 for split in ("train", "val")}
        )
    chosen = gpt.checked_settings(sample_tokens=3)
    data = gpt.Data(folder, 16)
    prompts = []

    class Model(torch.nn.Module):
        def generate(self, idx, max_tokens, **_):
            prompts.extend(idx)
            end = data.tokenizer.special_tokens.get("<|endoftext|>", 0)
            yield from torch.tensor([[1], [end], [2]])[:max_tokens]

    machine = gpt.set_up_machine(chosen)
    gpt.print_sample(SimpleNamespace(eval_model=Model(), data=data, machine=machine), chosen)
    prompt = "ab=" if weighted else "\n"
    assert [data.tokenizer.decode(ids[: len(prompt)]) for ids in prompts] == [prompt]
    if weighted:
        assert capsys.readouterr().out.splitlines()[1:-1] == ["ab=b"]


# ---- what a step, a sample and an evaluation leave behind ----
def test_dropout_depends_on_the_seed_and_on_the_micro_batch_alone(settings, monkeypatch):
    """Otherwise runs, or steps of one run, would drop the same channels."""
    backward = gpt.Trainer.backward
    drawn = []

    def noting(self, *args, **kwargs):
        state = torch.get_rng_state()
        drawn.append(tuple(torch.rand(8).tolist()))
        torch.set_rng_state(state)
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(gpt.Trainer, "backward", noting)
    for seed in (5, 7, 5):  # the rows of a step begin at even numbers
        gpt.train(max_iters=3, batch_size=2, gradient_accumulation_steps=2, seed=seed)
    assert len(set(drawn)) == 12
    assert drawn[:6] == drawn[12:]


def test_samples_and_evaluations_leave_the_model_in_training(settings, monkeypatch):
    """With dropout, every step must train with it."""
    modes = []
    backward = gpt.Trainer.backward

    def noting(self, *args, **kwargs):
        modes.append(self.model.training)
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(gpt.Trainer, "backward", noting)
    gpt.train(max_iters=6, eval_interval=2, sample_at_eval=True, sample_tokens=3)
    assert modes == [True] * 6


def test_the_model_for_evaluation_is_evaluated_and_saved(settings, monkeypatch, tmp_path):
    """Trainer.eval_model may be another model; ckpt.pt holds the one that is trained."""
    place = gpt.Trainer.place

    def place_both(self, model):
        self.eval_model = copy.deepcopy(model)
        with torch.no_grad():
            self.eval_model.lm_head.weight.normal_(std=0.1)
        place(self, model)

    monkeypatch.setattr(gpt.Trainer, "place", place_both)
    figures = gpt.train(max_iters=4, eval_interval=2, tie_weights=False)
    model, _, _ = gpt.load_checkpoint(tmp_path / "out" / "best.pt")
    trained, _, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert not torch.equal(model.lm_head.weight, trained.lm_head.weight)
    losses = [r["val_loss"] for r in read_log(tmp_path / "out") if "val_loss" in r]
    assert len(set(losses[:-1])) == 1  # it is not trained
    chosen = gpt.checked_settings()
    data = gpt.Data(tmp_path / "data" / "toy", chosen.block_size)
    machine = gpt.set_up_machine(chosen)
    n_batches = data.n_val_batches(chosen.batch_size)
    loss = gpt.evaluate(model, data, machine, n_batches, chosen.batch_size)
    assert figures["val_loss"] == pytest.approx(loss, abs=1e-6)


def test_evaluation_computes_in_the_dtype_of_the_run(settings):
    """The loss is that of a plain autocast, which differs from the one in float32."""
    trainer = new_trainer(dtype="bfloat16", n_embd=64, batch_size=8)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.normal_()
    loss = gpt.evaluate(trainer.model, trainer.data, trainer.machine, 1, 8)
    x, y, w = trainer.data.get_batch("val", 0, 8)
    expected = {}
    for enabled in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected[enabled] = float(trainer.model(x, y, weights=w, loss_only=True)[1])
    assert loss == pytest.approx(expected[True], abs=1e-6)
    assert abs(loss - expected[False]) > 1e-4


def test_evaluation_keeps_no_gradients(settings, monkeypatch):
    """Else it would take the memory of a training step."""
    forward = gpt.GPT.forward
    modes = []

    def noting(self, *args, **kwargs):
        modes.append((self.training, torch.is_grad_enabled()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(gpt.GPT, "forward", noting)
    gpt.train(max_iters=2, eval_interval=1)
    assert set(modes) == {(True, True), (False, False)}


def test_an_evaluation_of_small_weights_is_their_mean(settings, tmp_path, write_examples):
    """The weights of all targets may sum to less than 1, if the answers are rated low."""
    example = [("a", 0), ("b", 1)]
    write_examples(tmp_path / "data" / "low", "ab", train=[example] * 9, val=[example] * 2)
    trainer = new_trainer(dataset="low", batch_size=2)
    x, y, w = trainer.data.get_batch("val", 0, 2)
    assert 0 < float(w.sum()) < 1
    loss = gpt.evaluate(trainer.model, trainer.data, trainer.machine, 1, 2)
    with torch.no_grad():
        _, expected = trainer.model(x, y, weights=w)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert loss > 0.5


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_rates_of_all_parameters_follow_the_schedule(settings, monkeypatch, optimizer):
    """Of Muon's and of AdamW's."""
    update = gpt.Trainer.update
    seen = []

    def noting(self):
        groups = [group for o in self.optimizers for group in o.param_groups]
        seen.append([group["lr"] / group["initial_lr"] for group in groups])
        return update(self)

    monkeypatch.setattr(gpt.Trainer, "update", noting)
    gpt.train(max_iters=6, optimizer=optimizer, warmup_iters=1, lr_schedule="linear")
    chosen = gpt.checked_settings(max_iters=6, warmup_iters=1, lr_schedule="linear")
    for step, scales in enumerate(seen):
        expected = gpt.lr_scale(step, step / 6, chosen)
        assert scales == pytest.approx([expected] * len(scales))
    assert len(seen) == 6 and seen[-1][0] < 0.5 * max(scales[0] for scales in seen)


def test_time_spent_on_compiling_is_not_counted_as_trained(settings, tmp_path, clock):
    """So that a resumed run goes on with the schedule where it was."""
    gpt.train(max_minutes=1.0, eval_interval=10, eval_iters=1, warmup_iters=2, compile=True)
    progress = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["progress"]
    assert 20 <= progress["spent_s"] - progress["trained_s"] < 22
    assert progress["trained_s"] >= 0.5 * progress["step"] > 10


def test_few_batches_are_spread_over_the_validation_split(settings, monkeypatch):
    trainer = new_trainer()
    last = trainer.data.n_val_batches(2) - 1
    assert last > 10
    rows = []
    get_batch = trainer.data.get_batch
    trainer.data.get_batch = lambda split, row, n: rows.append(row) or get_batch(split, row, n)
    gpt.evaluate(trainer.model, trainer.data, trainer.machine, 3, 2)
    assert rows == [0, 2 * round(last / 2), 2 * last]


def test_the_evaluation_before_the_first_step_is_neither_the_best_nor_a_stale_one(
    settings, monkeypatch
):
    """An untrained model is no model for use, and early_stop counts what came after it."""
    saved = []
    monkeypatch.setattr(
        gpt, "save_checkpoint", lambda path, state: saved.append((path.name, state["step"]))
    )
    monkeypatch.setattr(gpt, "evaluate", lambda *args: 1.0)
    assert gpt.train(max_iters=9, eval_interval=2, early_stop=1, sample_tokens=0)["step"] == 4
    assert saved == [("ckpt.pt", 0), ("ckpt.pt", 2), ("best.pt", 2), ("ckpt.pt", 4)]


def test_the_loss_scale_is_resumed(settings):
    """A float16 run would otherwise skip steps again until its scale has fallen."""
    trainer = new_trainer()
    loaded = []
    trainer.scaler = SimpleNamespace(load_state_dict=loaded.append)
    states = {"optimizers": [o.state_dict() for o in trainer.optimizers]}
    trainer.load_state_dict(states | {"scaler": {"scale": 128.0}})
    trainer.load_state_dict(states | {"scaler": {}})
    assert loaded == [{"scale": 128.0}]


def test_max_minutes_goes_before_lr_decay_iters(settings, tmp_path, clock, capsys):
    """The schedule follows the clock to the end, and the run says that the setting has no effect."""
    gpt.train(max_minutes=1.0, lr_decay_iters=3, eval_interval=40, warmup_iters=2)
    rates = [r["lr"] for r in read_log(tmp_path / "out") if "lr" in r]
    assert len(rates) > 20 and min(rates[2:20]) > 0.5 * max(rates)
    assert "lr_decay_iters has no effect" in capsys.readouterr().out


def test_the_speed_is_that_of_the_steps_since_the_last_line(settings, tmp_path, clock, monkeypatch):
    """Steps that become faster show it in the next line."""
    forward = gpt.GPT.forward
    steps = []

    def slower_at_first(self, *args, **kwargs):
        if self.training:
            steps.append(1)
            clock.now += 1.5 if len(steps) <= 4 else 0
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(gpt.GPT, "forward", slower_at_first)
    gpt.train(max_iters=8, log_interval=2, eval_interval=8)
    speeds = {r["step"]: r["tokens_per_s"] for r in read_log(tmp_path / "out") if "loss" in r}
    expected = {1: 64 / 2, 2: 64 / 2, 4: 64 / 2, 6: 64 / 0.5, 8: 64 / 0.5}
    assert speeds == pytest.approx(expected)


def test_min_lr_above_the_learning_rate_is_refused(settings):
    with pytest.raises(ValueError, match="min_lr is 1.0: it must be at most learning_rate"):
        gpt.train(min_lr=1)


@pytest.mark.parametrize("kind", ["DDP", "FSDP"])
def test_processes_exchange_gradients_in_the_last_micro_batch_alone(settings, monkeypatch, kind):
    """Each exchange costs time, so three micro-batches need one, not three."""
    settings(gradient_accumulation_steps=3)
    trainer = new_trainer()
    exchanged = []
    if kind == "DDP":
        trainer.ddp_model = SimpleNamespace()
    else:
        trainer.machine.fsdp = True
        trainer.model.set_requires_gradient_sync = exchanged.append
    backward = trainer.backward

    def backward_pass(*args, **options):
        if kind == "DDP":
            exchanged.append(trainer.ddp_model.require_backward_grad_sync)
        return backward(*args, **options)

    monkeypatch.setattr(trainer, "backward", backward_pass)
    trainer.first_backward = backward_pass
    trainer.gradients(0)
    assert exchanged == [False, False, True]
