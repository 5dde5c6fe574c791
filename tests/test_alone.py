"""gpt.py alone: in an empty folder as a script, in two processes, and pasted into a notebook's cell."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from forks import run_jobs
from nbclient import NotebookClient
from test_distributed import free_port

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "gpt.py").read_text(encoding="utf-8")
TINY = {
    "dataset": "pydoc",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "dropout": 0.1,
    "max_iters": 8,
    "eval_interval": 4,
    "eval_iters": 2,
    "log_interval": 1,
    "batch_size": 32,
    "sample_tokens": 8,
    "device": "cpu",
    "dtype": "float32",
}

# A stand-in for gpt2, whose vocabulary tiktoken would download: a named encoding of tiktoken's own.
PLUGIN = """
def tiny():
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"th": 256, b"the": 257, b" the": 258}
    return {
        "name": "tiny",
        "pat_str": r" ?[a-z]+|.|\\n",
        "mergeable_ranks": ranks,
        "special_tokens": {"<|endoftext|>": 259},
    }

ENCODING_CONSTRUCTORS = {"tiny": tiny}
"""


def edited(source, **values):
    """Return gpt.py's text with other values in its settings block, as a user would type them."""
    for name, value in values.items():
        pattern = rf"(?m)^({name}(?:: [^=]+)?) = .+?(  # )"
        source, count = re.subn(pattern, lambda m, v=value: f"{m[1]} = {v!r}{m[2]}", source)
        assert count == 1, name
    return source


def run_alone(folder, n_processes=1, **values):
    """Write gpt.py with these settings into a folder and run it there; return the first process.

    n_processes: how many run at once, with the variables that torchrun sets; the others must end
        well. test_distributed.py runs torchrun itself.
    """
    (folder / "gpt.py").write_text(edited(SOURCE, **(TINY | values)), encoding="utf-8")
    if n_processes == 1:
        return run_jobs({"argv": [folder / "gpt.py"], "cwd": folder})[0]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    jobs = []
    for rank in map(str, range(n_processes)):
        env = address | {"WORLD_SIZE": str(n_processes), "RANK": rank, "LOCAL_RANK": rank}
        jobs.append({"argv": [folder / "gpt.py"], "cwd": folder, "env": env})
    first, *others = run_jobs(*jobs)
    assert not any(process.returncode for process in others), others
    return first


def saved(folder, name="ckpt.pt", dataset="pydoc"):
    return torch.load(folder / "out" / dataset / name, weights_only=True)


def assert_same_weights(a, b):
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_the_script_alone_trains_resumes_evaluates_and_finetunes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    done = run_alone(whole, lr_decay_iters=8)
    assert done.returncode == 0, done.stderr
    assert "whole validation split" in done.stdout
    assert run_alone(cut, max_iters=4, lr_decay_iters=8).returncode == 0
    done = run_alone(cut, init_from="resume", lr_decay_iters=8)
    assert done.returncode == 0, done.stderr
    assert saved(cut)["progress"]["step"] == 8
    assert_same_weights(saved(whole), saved(cut))

    done = run_alone(cut, eval_only=True)
    loss = json.loads((cut / "out/pydoc/log.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert done.returncode == 0 and f"tokens: loss {loss:.4f}" in done.stdout

    done = run_alone(cut, init_from="out/pydoc", out_dir="out/further", max_iters=2)
    assert done.returncode == 0, done.stderr
    assert saved(cut, dataset="further")["base"] == "out/pydoc"
    before = saved(cut, "best.pt")["model"]["lm_head.weight"]
    after = saved(cut, dataset="further")["model"]["lm_head.weight"]
    assert 0 < (after - before).norm() < before.norm()  # it began from there


def test_an_interrupt_saves_and_the_run_resumes_bit_for_bit(tmp_path):
    values = {"max_iters": 2000, "eval_interval": 1000, "lr_decay_iters": 2000}
    (tmp_path / "gpt.py").write_text(edited(SOURCE, **(TINY | values)), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "gpt.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step     3"):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    end = saved(tmp_path)["step"] + 3
    ends = {"max_iters": end, "eval_interval": 1000, "lr_decay_iters": 2000}
    assert run_alone(tmp_path, init_from="resume", **ends).returncode == 0
    assert run_alone(tmp_path, out_dir="out/straight", **ends).returncode == 0
    assert_same_weights(saved(tmp_path), saved(tmp_path, dataset="straight"))


def test_a_named_encoding_of_tiktoken(tmp_path):
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "tiny.py").write_text(PLUGIN)
    (tmp_path / "gpt.py").write_text(SOURCE, encoding="utf-8")
    code = "import gpt; gpt.write_dataset('data/t', 'the other the\\n' * 300, gpt.Tokenizer('tiny'), 't')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    done = run_alone(tmp_path, dataset="t", max_iters=2)
    assert done.returncode == 0, done.stderr
    assert "tiny vocabulary of 260" in done.stdout


def test_two_processes_give_one_processes_losses(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    accumulation = {"gradient_accumulation_steps": 2, "dropout": 0.0, "sample_tokens": 0}
    assert run_alone(one, **accumulation).returncode == 0
    done = run_alone(two, n_processes=2, **accumulation)
    assert done.returncode == 0, done.stderr
    assert "DDP" in done.stdout
    for name, weight in saved(one)["model"].items():
        assert torch.allclose(weight, saved(two)["model"][name], atol=1e-4), name


@pytest.mark.parametrize(
    "values, words",
    [
        ({"tensorboard": True}, "extras/plots.py"),
        (
            {"lora_rank": 4, "init_from": "out/pydoc", "optimizer": "adamw", "out_dir": "x"},
            "extras/",
        ),
        ({"batch_size": "8"}, "batch_size is '8': expected an integer, or None"),
        ({"n_head": 3}, "multiple"),
    ],
)
def test_what_needs_more_says_so_in_one_sentence(tmp_path, values, words):
    if "init_from" in values:
        assert run_alone(tmp_path, max_iters=1).returncode == 0
    done = run_alone(tmp_path, **values)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_flags_need_the_configurator(tmp_path):
    (tmp_path / "gpt.py").write_text(SOURCE, encoding="utf-8")
    (done,) = run_jobs({"argv": [tmp_path / "gpt.py", "--max_iters=3"], "cwd": tmp_path})
    assert done.returncode == 2 and "configurator.py" in done.stderr


EARLIER_CELL = """
vocab_size = 65
seed = 'seven'
text = 'x' * 70_000
max_bad_steps = None
"""

LATER_CELLS = [
    """
model = data = checkpoint = tokens = config = loss = step = batch = 'mine'
print('vocab_size' in SETTINGS, 'text' in SETTINGS)
""",
    """
first = train(max_iters=4, lr_decay_iters=8, out_dir='out/cut')
again = train(max_iters=8, lr_decay_iters=8, out_dir='out/cut', init_from='resume')
straight = train(max_iters=8, lr_decay_iters=8, out_dir='out/straight')
print('same loss', again['val_loss'] == straight['val_loss'])
""",
    """
print('evaluated', train(out_dir='out/cut', eval_only=True)['val_loss'])
""",
    """
further = train(init_from='out/cut', out_dir='out/further', max_iters=2)
print('finetuned', further['step'])
""",
    """
import os, signal, threading
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
stopped = train(max_iters=10**6, eval_interval=10**6, out_dir='out/stopped')
print('stopped by', int(stopped['stopped_by']))
""",
    """
batch_size = '8'
try:
    train()
except ValueError as e:
    print('refused:', e)
""",
    """
batch_size = 4
config = read_checkpoint('out/cut')['config']
print(config['batch_size'], sorted(config) == sorted(SETTINGS))
""",
]


def test_a_notebook_cell_does_all_that_the_file_does(tmp_path, monkeypatch):
    """A real kernel, in which earlier and later cells use the names that people use."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = [EARLIER_CELL, edited(SOURCE, **TINY), *LATER_CELLS]
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    texts = [
        "".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stdout")
        for cell in notebook.cells
    ]
    assert "whole validation split" in texts[1]
    assert texts[2].split() == ["False", "False"]
    assert "same loss True" in texts[3]
    assert "evaluated" in texts[4]
    assert "finetuned 2" in texts[5]
    assert f"stopped by {int(signal.SIGINT)}" in texts[6]
    assert "refused: batch_size is '8': expected an integer" in texts[7]
    assert texts[8].split() == ["32", "True"]
