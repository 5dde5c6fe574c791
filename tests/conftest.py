"""Shared fixtures. Every test runs on the CPU, offline, in folders of its own."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_jobs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gpt
from extras import plots

TEXT = "".join(
    f"{i} times {j} is {i * j}, said the {'cat' if i % 2 else 'dog'}.\n"
    for i in range(40)
    for j in range(10)
)


# The files that take longest, so that both processes of pytest end at about the same time.
FIRST = ["training", "readme", "faults", "prepare", "distributed", "notebooks", "alone", "fitting"]


def pytest_collection_modifyitems(items):
    names = [f"test_{name}.py" for name in FIRST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else 99)


@pytest.fixture(autouse=True)
def small_machine():
    """One thread: the tests' models are small, and two processes may run at once."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Runs draw no loss.png, to save time; test_plots.py has them draw."""
    monkeypatch.setattr(plots, "Picture", lambda out: lambda values: None)


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Return a function that sets gpt.py's settings for one test, which begins with a tiny run."""
    chars = "".join(sorted(set(TEXT)))
    gpt.write_dataset(
        tmp_path / "data" / "toy", TEXT, gpt.Tokenizer("char", chars), "made by the tests"
    )

    def change(**values):
        for name, value in values.items():
            assert name in gpt.SETTINGS, name
            monkeypatch.setattr(gpt, name, value)

    change(**gpt.UNFITTED)  # a test that has something fitted sets it to None
    change(
        dataset="toy",
        data_dir=str(tmp_path / "data"),
        out_dir=str(tmp_path / "out"),
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        block_size=16,
        batch_size=4,
        max_iters=10,
        eval_interval=10,
        eval_iters=2,
        log_interval=1,
        sample_tokens=0,
        device="cpu",
        dtype="float32",
    )
    return change


def new_trainer(**changes):
    """Return a Trainer of a new model, by gpt.py's settings and changes of them."""
    chosen = gpt.checked_settings(**changes)
    machine = gpt.set_up_machine(chosen)
    data = gpt.Data(
        gpt.as_path(chosen.data_dir or gpt.HERE / "data") / chosen.dataset,
        chosen.block_size,
        chosen.seed,
    )
    model = gpt.build_model(chosen, data, None, Path(chosen.out_dir))
    return gpt.Trainer(chosen, model, data, machine)


@pytest.fixture
def write_examples():
    """Return a function that writes a weighted data set; an example is a list of (text, weight)."""

    def write(folder, chars, **splits):
        """Write the splits' examples, each ended by <|endoftext|>, whose id is len(chars).

        Weights are from 0 to 255.
        """
        special = "<|endoftext|> <|user|> <|assistant|> <|pad|>"
        meta = {"source": "tests", "sha256": "", "dtype": "uint16", "vocab_size": len(chars) + 4}
        meta["tokenizer"] = {"kind": "char", "chars": chars, "special": special}
        folder.mkdir(parents=True, exist_ok=True)
        for split, examples in splits.items():
            ids, weights = [], []
            for example in examples:
                for text, weight in example:
                    ids += [chars.index(c) for c in text]
                    weights += [weight] * len(text)
                ids.append(len(chars))
                weights.append(example[-1][1])
            (folder / f"{split}.bin").write_bytes(np.array(ids, dtype="<u2").tobytes())
            (folder / f"{split}.weight.bin").write_bytes(bytes(weights))
            meta |= {f"{split}_tokens": len(ids), f"{split}_bytes": len(ids)}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def run_script():
    """Return a function that runs a script as a user does: run_script("gpt.py", "--max_iters=3")."""

    def run(*arguments, cwd=ROOT, timeout=120, stdin=None, pictures=False, **env):
        script, *rest = arguments
        job = {"argv": [ROOT / script, *rest], "cwd": cwd, "stdin": stdin, "env": env}
        job["pictures"] = pictures
        return run_jobs(job, timeout=timeout)[0]

    return run
