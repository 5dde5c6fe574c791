"""Random command lines, checkpoints and data: they work or are refused in a sentence, run no code.

A tenth of the whole by default; FUZZ=10 pytest tests/test_fuzz.py does all of it.
"""

import contextlib
import json
import linecache
import math
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_training import Clock

import configurator
import gpt
import sample

FUZZ = int(os.environ.get("FUZZ", "1"))
WORDS = [
    "",
    "0",
    "1",
    "-1",
    "3",
    "64",
    "1e3",
    "-1e-3",
    "0.5",
    "nan",
    "inf",
    "1" * 30,
    "true",
    "False",
    "none",
    "x",
]
WORDS += [
    "float32",
    "muon",
    "ä=ö",
    "--",
    "-",
    "=",
    "'",
    "a\nb",
    "../..",
    "/",
    "config/debug.py",
    "no.py",
    "\0",
    "💥" * 99,
]
VALUES = [
    None,
    True,
    -1,
    0,
    7,
    10**12,
    1.5,
    math.nan,
    "",
    "x",
    "💥",
    [],
    {},
    [1],
    {"a": 1},
    {1: 2},
    b"x",
]


class Hung(BaseException):
    """Is raised in what takes too long; no handler of Exception catches it."""


@contextlib.contextmanager
def limit(seconds):
    """Raise Hung if the block takes longer."""

    def hung(*_):
        raise Hung(f"hung for {seconds} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def clean(action, *arguments):
    """Run an action; return whether it worked. It may raise what scripts show as a sentence."""
    with limit(60):
        try:
            action(*arguments)
        except (ValueError, OSError) as e:
            assert str(e).strip(), repr(e)
            return False
        return True


def random_line(draw, names):
    """Return a command line of known keys, now and then misspelt, with values of all kinds."""
    line = []
    for _ in range(draw.randint(1, 5)):
        name, value = draw.choice(names), draw.choice(WORDS)
        if draw.random() < 0.5:
            value = str(
                draw.choice([draw.randint(1, 300), draw.random(), draw.choice([1, 2, 4, 8, 64])])
            )
        if draw.random() < 0.05:
            name = name[:-1]
        line += draw.choice(
            [[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [value]] + [[]] * 2
        )
    return line


def test_command_lines():
    """Flags, config files and checks alone: no model is built, only config files are read."""
    draw = random.Random(1)
    names = list(gpt.SETTINGS)
    worked = 0

    def machine_names():
        return {"device_type": "cpu", "native_bfloat16": False}

    def configured(line):
        script = dict(vars(gpt))
        configurator.configure(script, line, gpt.SETTINGS, gpt.check_setting, machine_names)
        chosen = gpt.checked_settings(**{name: script[name] for name in names})
        gpt.model_config(chosen, vocab_size=65)

    for _ in range(1000 * FUZZ):
        worked += clean(configured, random_line(draw, names))
    assert 0.1 < worked / (1000 * FUZZ) < 0.9


def test_values_from_python():
    """What train() is given as keywords is checked as flags are, whatever its type."""
    draw = random.Random(4)
    names = [*gpt.SETTINGS, "no_such_setting"]
    good = [1, 8, 64, np.int64(4), np.float32(0.5), 0.25, True, torch.device("cpu"), ROOT]
    bad = [*VALUES, *WORDS, torch.zeros(2), torch.nn.Linear, np.zeros(3)]
    worked = 0
    for _ in range(1000 * FUZZ):
        values = draw.choice([good, good, bad])
        name, value = draw.choice(names), draw.choice(values)
        worked += clean(lambda name=name, value=value: gpt.checked_settings(**{name: value}))
    assert 0.1 < worked / (1000 * FUZZ) < 0.9


class Intruder:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def mutate_bytes(content, draw):
    """Return content cut, lengthened, with bits flipped, zeroed or moved."""
    content = bytearray(content)
    i = draw.randrange(max(1, len(content)))
    kind = draw.randrange(6)
    if kind == 0:
        return bytes(content[:i])
    if kind == 1:
        return bytes(content[i:])
    if kind == 2:
        return bytes(content[:i] + draw.randbytes(draw.randint(1, 99)) + content[i:])
    if kind == 3:
        content[i : i + 200] = bytes(min(200, len(content) - i))
    elif kind == 4:
        content[i : i + 500] = content[:500]
    elif content:
        content[i] ^= 1 << draw.randrange(8)
    return bytes(content)


def mutate_value(tree, draw, values):
    """Replace or remove something at random, in a nested structure of dicts and lists; in place."""
    while True:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        inner = tree[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            tree = inner
        elif draw.random() < 0.2:
            del tree[key]
            return
        else:
            value = draw.choice(values)
            # The next mutation may change a list or a dict itself.
            tree[key] = type(value)(value) if isinstance(value, dict | list) else value
            return


def test_checkpoints(settings, tmp_path, capsys):
    """Bytes or values changed at random: what sample.py loads and what a run resumes from."""
    settings(max_iters=2, eval_interval=2, n_layer=1)
    gpt.train()
    out = tmp_path / "out"
    intruder = tmp_path / "intruder"
    whole = (out / "ckpt.pt").read_bytes()
    draw = random.Random(2)
    worked = 0
    values = [*VALUES, Intruder(intruder), torch.zeros(2), torch.ones(3, 3), torch.tensor(math.nan)]
    settings(init_from="resume", max_iters=3)
    for i in range(50 * FUZZ):
        shutil.rmtree(out)
        out.mkdir()
        if i % 2:
            (out / "ckpt.pt").write_bytes(mutate_bytes(whole, draw))
        else:
            (out / "ckpt.pt").write_bytes(whole)
            state = torch.load(out / "ckpt.pt", weights_only=True)
            for _ in range(draw.randint(1, 3)):
                mutate_value(state, draw, values)
            torch.save(state, out / "ckpt.pt")
        clean(sample.load_model, out / "ckpt.pt", torch.device("cpu"), "float32", "", 16)
        worked += clean(gpt.train)
        shutil.copy(out / "ckpt.pt", out / "best.pt")
        clean(lambda: gpt.train(eval_only=True, init_from="scratch"))
        assert not intruder.exists()
    assert 0 < worked < 50 * FUZZ


def test_data_folders(settings, tmp_path, capsys):
    """meta.json or token files changed at random: what a run trains on and is evaluated by."""
    settings(max_iters=1, eval_interval=1, n_layer=1)
    folder = tmp_path / "data" / "toy"
    draw = random.Random(3)
    worked = 0
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for i in range(50 * FUZZ):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        if i % 2:
            path = folder / draw.choice(sorted(whole))
            path.write_bytes(mutate_bytes(path.read_bytes(), draw))
        else:
            meta = json.loads(whole["meta.json"])
            for _ in range(draw.randint(1, 3)):
                mutate_value(
                    meta, draw, [value for value in VALUES if not isinstance(value, bytes)]
                )
            meta = {str(k): v for k, v in meta.items()}
            (folder / "meta.json").write_text(json.dumps(meta, skipkeys=True), encoding="utf-8")
        worked += clean(gpt.train)
    assert 0 < worked < 50 * FUZZ


def test_environments(settings, monkeypatch, capsys):
    """Variables of torchrun, Slurm and others, of which some are set: the run is a single one."""
    settings(max_iters=1, eval_interval=1, n_layer=1)
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    others = ["LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "TORCHELASTIC_RESTART_COUNT"]
    others += ["TORCHELASTIC_USE_AGENT_STORE", "NO_COLOR", "COLUMNS", "LANG", "TMPDIR"]
    draw = random.Random(5)
    for _ in range(20 * FUZZ):
        with monkeypatch.context() as patch:
            for name in (*names, *others):
                patch.delenv(name, raising=False)
            missing = draw.choice(names)
            for name in draw.sample([*names, *others], draw.randint(1, 8)):
                if name != missing:
                    patch.setenv(name, draw.choice([w for w in WORDS if "\0" not in w]))
            assert gpt.train()["step"] == 1


def test_notebooks(settings, tmp_path, capsys):
    """Names that earlier cells gave to values of all kinds, before and after gpt.py is pasted."""
    draw = random.Random(6)
    source = (ROOT / "gpt.py").read_text(encoding="utf-8")
    definitions = compile(source, "<cell>", "exec")
    linecache.cache["<cell>"] = (len(source), None, source.splitlines(keepends=True), "<cell>")
    tiny = {"max_iters": 1, "eval_iters": 1, "n_layer": 1, "n_embd": 8, "block_size": 8}
    tiny |= {"dataset": "toy", "data_dir": str(tmp_path / "data"), "sample_tokens": 0}
    names = ["text", "data", "model", "vocab_size", "checkpoint", "tokenizer", "x", "idx", "seed"]
    names += ["batch_size", "learning_rate", "train", "json", "log", "config", "device", "out"]
    for i in range(10 * FUZZ):
        # There is no __file__, as in Jupyter, where __name__ would start a run.
        cells = {name: draw.choice(VALUES) for name in draw.sample(names, 5)}
        cells["__name__"] = "gpt_in_a_cell"
        exec(definitions, cells)  # noqa: S102
        after = [name for name in names if name not in cells or name in gpt.SETTINGS]
        cells |= {name: draw.choice(VALUES) for name in draw.sample(after, min(3, len(after)))}
        options = tiny | {"out_dir": str(tmp_path / f"out{i}")}
        clean(lambda cells=cells, options=options: cells["train"](**options))


def test_data_that_change_between_runs(settings, tmp_path, capsys):
    """Another text under the same name, other sizes, resumed or begun anew: nothing is lost."""
    settings(max_iters=2, eval_interval=1, n_layer=1)
    folder, out = tmp_path / "data" / "toy", tmp_path / "out"
    draw = random.Random(7)
    texts = ["".join(draw.choices("ab\n", k=n)) for n in (30, 400, 3000)]
    texts += ["".join(draw.choices("abc\n", k=3000)), "ä日\n" * 500]
    worked = 0
    for _ in range(40 * FUZZ):
        if draw.random() < 0.5:
            text = draw.choice(texts)
            tokenizer = gpt.Tokenizer("char", "".join(sorted(set(text))))
            gpt.write_dataset(folder, text, tokenizer, "drawn")
        saved = {gpt.read_checkpoint(path)["step"] for path in out.glob("ckpt.pt*")}
        changes = {"batch_size": draw.choice([1, 3, 8]), "block_size": draw.choice([4, 16, 64])}
        changes["init_from"] = draw.choice(["scratch", "resume", "auto"])
        changes["max_iters"] = draw.randint(1, 9)
        worked += clean(lambda changes=changes: gpt.train(**changes))
        kept = {gpt.read_checkpoint(path)["step"] for path in out.glob("ckpt.pt*")}
        assert len(kept) >= 1 or not worked
        assert max(kept, default=0) >= max(saved, default=0)
    assert 0 < worked < 40 * FUZZ


def test_clocks(settings, tmp_path, monkeypatch, capsys):
    """Clocks that jump, stand still for a while or are set: runs under max_minutes end in time."""
    draw = random.Random(8)
    forward = gpt.GPT.forward
    for i in range(5 * FUZZ):
        clock = Clock()

        def slow(self, *args, clock=clock, **kwargs):
            clock.now += draw.choice([0.0, 0.1, 1.0, 5.0, 60.0])
            clock.set_by += draw.choice([0.0] * 9 + [-1e9, -3600.0, 0.5, 1e6])
            return forward(self, *args, **kwargs)

        minutes = draw.choice([0.01, 1.0, 5.0])
        out = tmp_path / f"out{i}"
        with monkeypatch.context() as patch:
            patch.setattr(gpt, "time", clock)
            patch.setattr(gpt.GPT, "forward", slow)
            evals = {"eval_interval": draw.choice([1, 3, 50]), "eval_iters": draw.choice([1, 4])}
            evals |= {"compile": None if i % 5 == 0 else False}  # compiling takes seconds
            figures = gpt.train(out_dir=str(out), max_minutes=minutes, max_iters=10**6, **evals)
        # An evaluation has four batches at most, besides the whole split's at the end.
        spent = clock.now - 1000
        assert spent < 60 * minutes + 60 * 4 * 30, (i, spent, minutes)
        lines = [json.loads(x) for x in (out / "log.jsonl").read_text("utf-8").splitlines()]
        seconds = [line["elapsed_s"] for line in lines]
        assert seconds == sorted(seconds) and 0 <= seconds[0] <= seconds[-1] < spent + 0.1
        assert figures["step"] >= 1
    assert "-1 day" not in capsys.readouterr().out


def test_two_runs_in_a_folder(settings, tmp_path, monkeypatch, capsys):
    """A run that begins in the folder of one that is under way is refused, and harms nothing."""
    draw = random.Random(9)
    settings(n_layer=1, eval_interval=2)
    gradients = gpt.Trainer.gradients
    out = tmp_path / "out"
    for i in range(8 * FUZZ):
        same = draw.random() < 0.7
        second = {"out_dir": str(out if same else tmp_path / f"other{i}")}
        second |= {"max_iters": draw.randint(0, 3), "n_layer": draw.randint(1, 2)}
        second |= {"init_from": draw.choice(["scratch", "auto", "resume"])}
        at, steps = draw.randint(1, 5), draw.randint(5, 7)
        calls, worked = [], []

        def meeting(self, *args, at=at, second=second, calls=calls, worked=worked):
            calls.append(1)
            if len(calls) == at:
                worked.append(clean(lambda: gpt.train(**second)))
            return gradients(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(gpt.Trainer, "gradients", meeting)
            assert gpt.train(max_iters=steps)["step"] == steps
        assert worked == [not same and second["init_from"] != "resume"]
        assert gpt.read_checkpoint(out / "ckpt.pt")["step"] == steps
        assert not list(out.glob("*.tmp"))


def test_checkpoints_of_other_versions(settings, tmp_path, capsys):
    """Keys that an older version lacked, or that a newer one will add; any version's name."""
    settings(max_iters=2, eval_interval=2, n_layer=1)
    gpt.train()
    path = tmp_path / "out" / "ckpt.pt"
    whole = torch.load(path, weights_only=True)
    draw = random.Random(10)
    loaded, resumed = [], []
    settings(init_from="resume", max_iters=3)
    for _ in range(12 * FUZZ):
        state = whole | {"model_args": dict(whole["model_args"]), "config": dict(whole["config"])}
        state["version"] = draw.choice(["0.1", "1.0.0", "2.1.0", "9.0", "", None, 3])
        for tree in (state, state["model_args"], state["config"]):
            for key in draw.sample(sorted(tree), draw.choice([0, 0, 0, 1, 2])):
                del tree[key]
            if draw.random() < 0.1:
                tree["setting_of_another_version"] = draw.choice(VALUES)
        torch.save(state, path)
        loaded.append(clean(gpt.load_checkpoint, path))
        resumed.append(clean(gpt.train))
        assert [loaded[-1], resumed[-1]] != [False, True]
    assert 0 < sum(resumed) <= sum(loaded) < 12 * FUZZ


def test_fuzzing_would_notice_a_traceback(monkeypatch, tmp_path):
    """What is neither ValueError nor OSError, and what hangs, is not taken for an answer."""

    def fails():
        return {}["absent"]

    with pytest.raises(KeyError):
        clean(fails)

    def hangs(*_, **__):
        while True:
            pass

    with pytest.raises(Hung), limit(1):
        hangs()
    gpt.save_checkpoint(tmp_path / "best.pt", {})
    monkeypatch.setattr(torch, "load", hangs)
    with pytest.raises(Hung), limit(1):  # although read_checkpoint catches every Exception
        gpt.read_checkpoint(tmp_path)


def test_nothing_but_weights_is_unpickled():
    """Every torch.load in the project says weights_only=True."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), *ROOT.glob("config/*.py")]
    assert ROOT / "gpt.py" in paths
    for path in paths:
        source = path.read_text(encoding="utf-8")
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        assert "pickle.load" not in source and "allow_pickle" not in source, path
        # extras/foreign.py reads nanoGPT's meta.pkl by an Unpickler that finds no class.
        assert "import pickle" not in source or path.name == "foreign.py", path
