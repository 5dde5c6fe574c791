"""A user's mistake: one sentence on stderr, exit code 2, no traceback, nothing written."""

import errno
import json
import os
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch

import gpt

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "dataset": "toy",
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "block_size": 16,
    "batch_size": 4,
    "max_iters": 2,
    "eval_interval": 10,
    "eval_iters": 2,
    "sample_tokens": 0,
    "device": "cpu",
    "dtype": "float32",
}


def tree(folder):
    """Return {path: content} of all files and folders in folder; a folder's content is None."""
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def launch(monkeypatch, tmp_path, settings):
    """Return a function that runs a script as __main__ on toy data, flags before the arguments."""
    where = {"data_dir": tmp_path / "data", "out_dir": tmp_path / "out"}

    def run(script, *arguments, **flags):
        flags = {
            "gpt.py": TINY | where,
            "sample.py": {"device": "cpu", "out_dir": where["out_dir"]},
            "prepare.py": {"data_dir": where["data_dir"]},
        }[script] | flags
        given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        monkeypatch.setattr(sys, "argv", [script, *given, *map(str, arguments)])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return run


@pytest.fixture
def mistake(launch, tmp_path, capsys):
    """Return a function that expects a script to refuse in one line, and to change no file."""

    def run(script, *arguments, holds=(), stays=True, **flags):
        before = tree(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            launch(script, *arguments, **flags)
        out, err = capsys.readouterr()
        assert e.value.code == 2
        *notes, last = err.splitlines()
        assert last.startswith("error: ")
        assert err.endswith("\n")
        assert not notes or (
            script == "sample.py" and len(notes) == 1 and ".pt: step 2, " in notes[0]
        )
        assert "Traceback" not in out + err
        for fragment in holds:
            assert fragment in last
        if stays:
            assert tree(tmp_path) == before

    return run


@pytest.fixture
def checkpoint(settings, capsys):
    """The path of a trained run's only ckpt.pt; best.pt is beside it."""
    settings(max_iters=2)
    gpt.train()
    capsys.readouterr()
    return Path(gpt.out_dir) / "ckpt.pt"


def test_the_flags_of_these_tests_do_train(launch, tmp_path, capsys):
    """Without a mistake the same command trains: what is refused is refused for its mistake."""
    launch("gpt.py")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "best.pt",
        "ckpt.pt",
        "log.jsonl",
    ]
    launch("sample.py", "--prompt=7", "--max_tokens=3")
    assert capsys.readouterr().out.splitlines()[-1].startswith("7")


GPT_MISTAKES = [
    (["--n_layr=3"], ["'n_layr'", "did you mean n_layer?"]),
    (["--max_iter=3"], ["'max_iter'", "did you mean max_iters?"]),
    (["--eval_text=x.txt"], ["'eval_text'", "evaluate.py"]),
    (["--zzzzzz=3"], ["'zzzzzz'", "--help"]),
    (["--n_layer=two"], ["n_layer", "'two'", "an integer"]),
    (["--learning_rate=fast"], ["learning_rate", "'fast'", "a number"]),
    (["--compile=perhaps"], ["compile", "'perhaps'", "expected True or False, or None"]),
    (["--n_layer"], ["--n_layer needs a value"]),
    (["config/absent.py"], ["config/absent.py"]),
    (["n_layer=3"], ["n_layer=3", "--key=value"]),
    (["--n_head=4", "--n_kv_head=3"], ["n_head (4)", "n_kv_head (3)"]),
    (["--n_embd=30"], ["n_embd (30)", "n_head (4)"]),
    (["--n_embd=20"], ["is 5", "even"]),
    (["--n_layer=0"], ["n_layer is 0"]),
    (["--n_kv_head=0"], ["n_kv_head is 0"]),
    (["--block_size=0"], ["block_size is 0"]),
    (["--mlp_ratio=0"], ["is 0"]),
    (["--mlp_ratio=inf"], ["mlp_ratio", "inf"]),
    (["--mlp_ratio=nan"], ["mlp_ratio", "nan"]),
    (["--dropout=1"], ["dropout is 1.0"]),
    (["--dropout=-0.1"], ["dropout is -0.1"]),
    (["--train_temperature=0"], ["train_temperature is 0.0: it must be above 0"]),
    (["--dataset=absent"], ["absent", "prepare.py"]),
    (["--block_size=99999"], ["tokens for train", "99999"]),
    (["--device=foo"], ["'foo'", "cpu"]),
    (["--device="], ["device '' is not available"]),
    (["--device=cpu:x"], ["'cpu:x'"]),
    (["--device=hpu"], ["'hpu'"]),
    (["--dtype=float16"], ["float16", "cpu"]),
    (["--dtype=int8"], ["dtype is 'int8'", "bfloat16"]),
    (["--optimizer=foo"], ["optimizer is 'foo'", "muon, adamw"]),
    (["--optimizer="], ["optimizer is ''"]),
    (["--lr_schedule=step"], ["lr_schedule is 'step'", "cosine"]),
    (["--init_from=no/such/folder/at/all"], ["no/such/folder/at/all", "python hub.py get"]),
    (["--max_iters=-1"], ["max_iters is -1", "at least 0", "below 2**31"]),
    (["--max_minutes=-1"], ["max_minutes is -1"]),
    (["--batch_size=0"], ["batch_size is 0", "above 0", "below 2**31"]),
    (["--gradient_accumulation_steps=0"], ["gradient_accumulation_steps is 0"]),
    (["--eval_interval=0"], ["eval_interval is 0"]),
    (["--log_interval=0"], ["log_interval is 0"]),
    (["--eval_iters=0"], ["eval_iters is 0"]),
    (["--learning_rate=0"], ["learning_rate is 0.0"]),
    (["--learning_rate=nan"], ["learning_rate is nan"]),
    (["--muon_lr=inf"], ["muon_lr is inf"]),
    (["--muon_lr=-0.01"], ["muon_lr is -0.01"]),
    (["--min_lr=-1e-4"], ["min_lr is -0.0001"]),
    (["--early_stop=-1"], ["early_stop is -1"]),
    (["--offline_fallback=False"], ["'offline_fallback'"]),
    (["--grad_clip=-1"], ["grad_clip is -1.0"]),
    (["--weight_decay=-0.1"], ["weight_decay is -0.1"]),
    (["--beta1=1.0"], ["beta1 is 1.0", "below 1"]),
    (["--beta2=-0.5"], ["beta2 is -0.5"]),
    (["--muon_momentum=1.5"], ["muon_momentum is 1.5", "below 1"]),
    (["--lora_rank=4"], ["lora_rank is 4", "--init_from"]),
    (["--seed=-1"], ["seed is -1"]),
    (["--seed=99999999999999999999"], ["seed", "99999999999999999999"]),
    (["--seed=5000000000"], ["seed", "5000000000"]),
    (["--init_from=resume"], ["no run to resume", "--init_from=auto"]),
    (["--eval_only"], ["best.pt"]),
]


@pytest.mark.parametrize(
    ("arguments", "holds"), GPT_MISTAKES, ids=[case[0][-1] for case in GPT_MISTAKES]
)
def test_gpt_refuses(mistake, arguments, holds):
    """Settings that are unknown, of the wrong type, or without meaning."""
    mistake("gpt.py", *arguments, holds=holds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpt.py", "sample.py"])
def test_a_gpu_that_is_not_there_is_named(mistake, script, checkpoint):
    """--device=cuda on a machine without one."""
    mistake(script, "--device=cuda", holds=["'cuda'", "--device=auto"])


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("n_layer = = 3\n", ["wrong.py, line 1"]),
        ("\n\nif True\n    n_layer = 3\n", ["wrong.py, line 3"]),
        ("n_layr = 3\n", ["wrong.py", "'n_layr'", "n_layer?"]),
        ("\0", ["wrong.py"]),
        ("n_layer = 'three'\n", ["wrong.py", "n_layer is 'three'", "an integer"]),
        ("n_layer = 1 / 0\n", ["wrong.py", "ZeroDivisionError"]),
        ("max_iters = -5\n", ["max_iters is -5"]),
        ("raise ValueError('one\\ntwo')\n", ["wrong.py: one two"]),
    ],
)
def test_a_mistake_in_a_config_file(mistake, tmp_path, text, holds):
    """The file is named wherever it could not be run."""
    path = tmp_path / "wrong.py"
    path.write_text(text, encoding="utf-8")
    mistake("gpt.py", path, max_iters=None, holds=holds)


def spoil(tmp_path, **content):
    """Replace files of the toy data set, given as train=b"..." or meta={...}."""
    folder = tmp_path / "data" / "toy"
    for name, value in content.items():
        if name == "meta":
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            (folder / "meta.json").write_text(json.dumps(meta | value), encoding="utf-8")
        else:
            (folder / f"{name}.bin").write_bytes(value)


def test_a_data_set_that_is_spoiled(mistake, tmp_path):
    """Files that are empty, short or not as long as meta.json says, and no meta.json."""
    n = json.loads((tmp_path / "data" / "toy" / "meta.json").read_text(encoding="utf-8"))[
        "train_tokens"
    ]
    spoil(tmp_path, train=b"")
    mistake("gpt.py", holds=["toy", f"0 tokens for train, not {n}"])
    spoil(tmp_path, meta={"train_tokens": 0})
    mistake("gpt.py", holds=["toy holds 0 tokens for train", "block_size 16"])
    spoil(tmp_path, train=b"\1\0" * 16, meta={"train_tokens": 16})
    mistake("gpt.py", holds=["toy holds 16 tokens for train", "block_size 16"])
    spoil(tmp_path, train=b"\1\0" * 100, val=b"\1\0", meta={"train_tokens": 100, "val_tokens": 1})
    mistake("gpt.py", holds=["toy holds 1 tokens for val", "--val_fraction"])
    (tmp_path / "data" / "toy" / "meta.json").unlink()
    mistake("gpt.py", holds=["toy", "prepare.py"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_ids_beyond_the_vocabulary(mistake, tmp_path, split):
    """What was logged before the first such batch is all that is written."""
    spoil(tmp_path, **{split: b"\xe7\3" * 100}, meta={f"{split}_tokens": 100})
    mistake("gpt.py", holds=["toy holds id 999, but its vocabulary has only 25 ids"], stays=False)
    assert not (tmp_path / "out" / "best.pt").exists()


@pytest.mark.parametrize("script", ["gpt.py", "sample.py"])
def test_a_checkpoint_cut_short(mistake, checkpoint, script):
    """Whatever its length, the file is named."""
    whole = checkpoint.read_bytes()
    checkpoint.with_name("best.pt").unlink()
    flags = ["--init_from=resume"] if script == "gpt.py" else []
    for length in (0, 1, 4, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        checkpoint.write_bytes(whole[:length])
        mistake(script, *flags, holds=[str(checkpoint), "damaged"])


class Intruder:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("script", ["gpt.py", "sample.py"])
def test_a_file_that_is_no_checkpoint(mistake, checkpoint, script):
    """Bytes, text, pickles and dicts of other things are named, and no code of theirs is run."""
    checkpoint.with_name("best.pt").unlink()
    flags = ["--init_from=resume"] if script == "gpt.py" else []
    backwards, intruder = checkpoint.read_bytes()[::-1], Intruder(checkpoint.with_name("intruder"))
    for content in (
        b"\0" * 1000,
        b"hello",
        pickle.dumps([1, 2], 2),
        pickle.dumps(intruder, 2),
        backwards,
    ):
        checkpoint.write_bytes(content)
        mistake(script, *flags, holds=[str(checkpoint)])
    for other in ([1, 2], {"model": {}}, {"a": 1}, intruder):
        torch.save(other, checkpoint)
        mistake(script, *flags, holds=[str(checkpoint)])


def test_a_checkpoint_whose_bytes_changed(mistake, checkpoint):
    """Weights that were overwritten in the middle of the file are noticed."""
    whole = bytearray(checkpoint.read_bytes())
    for i in range(len(whole) // 4, len(whole) // 4 + 20_000):
        whole[i] ^= 0x55
    checkpoint.write_bytes(whole)
    mistake("gpt.py", "--init_from=resume", holds=[str(checkpoint)])


def test_best_pt_is_not_what_resume_needs(mistake, checkpoint):
    """A best.pt copied over ckpt.pt lacks the optimizers' state, which is a sentence."""
    checkpoint.write_bytes(checkpoint.with_name("best.pt").read_bytes())
    mistake("gpt.py", "--init_from=resume", holds=[str(checkpoint)])


def test_a_checkpoint_whose_weights_do_not_fit(mistake, checkpoint):
    """model_args that contradict the weights, or are not known: a sentence that names the file."""
    checkpoint.with_name("best.pt").unlink()
    state = torch.load(checkpoint)
    for args in (state["model_args"] | {"n_embd": 64}, state["model_args"] | {"n_moons": 2}):
        torch.save(state | {"model_args": args}, checkpoint)
        mistake("sample.py", holds=[str(checkpoint)])


@pytest.mark.parametrize(
    "flag",
    [
        "n_layer=3",
        "n_embd=64",
        "block_size=8",
        "use_rope=False",
        "optimizer=adamw",
        "bias=True",
        "tie_weights=True",
        "mlp_ratio=8",
    ],
)
def test_resume_with_a_changed_architecture(mistake, checkpoint, flag):
    """The message names the setting with both values, and the checkpoint stays as it was."""
    name, value = flag.split("=")
    mistake(
        "gpt.py", "--init_from=resume", f"--{flag}", holds=[f"{name} is {value}", " in the run: "]
    )


def test_resume_with_another_tokenizer(mistake, launch, checkpoint, tmp_path):
    """Data whose characters differ, if only in their order, do not fit the weights."""
    chars = torch.load(checkpoint)["tokenizer"]["chars"]
    spoil(tmp_path, meta={"tokenizer": {"kind": "char", "chars": chars[::-1]}})
    mistake("gpt.py", "--init_from=resume", holds=["toy has a different tokenizer", "--tokenizer="])
    mistake("gpt.py", "--eval_only", holds=["toy has a different tokenizer", "--tokenizer="])
    spoil(tmp_path, meta={"tokenizer": {"kind": "char", "chars": chars}})
    before = tree(checkpoint.parent)
    launch("gpt.py", "--eval_only")
    assert tree(checkpoint.parent) == before


def test_an_out_dir_that_cannot_be_written(mistake, tmp_path):
    """Below a regular file no folder can be made."""
    (tmp_path / "file").write_text("x", encoding="utf-8")
    out = tmp_path / "file" / "run"
    mistake("gpt.py", out_dir=out, holds=[str(out), "--out_dir"])


def test_a_data_dir_that_cannot_be_written(mistake, tmp_path):
    """Neither prepare.py nor gpt.py shows a traceback for a data_dir below a regular file."""
    (tmp_path / "file").write_text("some text", encoding="utf-8")
    folder = tmp_path / "file" / "data"
    mistake("prepare.py", f"--input={tmp_path / 'file'}", data_dir=folder, holds=[str(folder)])
    mistake("gpt.py", data_dir=folder, holds=[str(folder)])
    mistake("gpt.py", data_dir=folder, dataset="pydoc", holds=[str(folder)])


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        (b"ab\0cd", ["binary"]),
        (b"caf\xe9", ["UTF-8", "0xe9"]),
        (b"", ["empty"]),
        (bytes(range(256)), ["UTF-8"]),
        ("text".encode("utf-16"), ["UTF-8"]),
    ],
)
def test_prepare_refuses_what_is_no_text(mistake, tmp_path, content, holds):
    """The file is named."""
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    mistake("prepare.py", f"--input={path}", holds=[str(path), *holds])


@pytest.mark.parametrize(
    ("arguments", "holds"),
    [
        ([], ["shakespeare", "pydoc"]),
        (["dickens"], ["'dickens'"]),
        (["pydoc", "more"], ["'more'"]),
        (["--input=absent.txt"], ["absent.txt"]),
        (["--inptu=a"], ["'inptu'", "input"]),
        (["pydoc", "--val_fraction=2"], ["val_fraction is 2.0"]),
        (["pydoc", "--val_fraction=x"], ["val_fraction", "'x'", "a number"]),
    ],
)
def test_prepare_refuses(mistake, arguments, holds):
    """Names, words and settings that are not known."""
    mistake("prepare.py", *arguments, holds=holds)


@pytest.mark.parametrize(
    ("arguments", "holds"),
    [
        (["--prompt=a~c"], ["'~'"]),
        (["--prompt=FILE:absent.txt"], ["absent.txt"]),
        (["--temperature=-1"], ["temperature is -1.0"]),
        (["--top_p=0"], ["top_p is 0.0"]),
        (["--top_p=1.5"], ["top_p is 1.5"]),
        (["--top_k=-2"], ["top_k is -2"]),
        (["--min_p=2"], ["min_p is 2.0"]),
        (["--max_tokens=-1"], ["max_tokens is -1"]),
        (["--num_samples=0"], ["num_samples is 0"]),
        (["--repetition_penalty=0"], ["repetition_penalty is 0.0"]),
        (["--temprature=1"], ["temperature?"]),
        (["--device=foo"], ["'foo'"]),
        (["--dtype=float16", "--quantize=int8"], ["dtype is float16", "without quantize"]),
        (["--checkpoint=absent.pt"], ["absent.pt"]),
        (["--out_dir=absent"], ["absent"]),
        (["7 times", "more"], ["more"]),
        (["--output=absent/x.txt"], ["absent/x.txt"]),
        (["--seed=99999999999999999999"], ["99999999999999999999"]),
    ],
)
def test_sample_refuses(mistake, checkpoint, arguments, holds, tmp_path, monkeypatch):
    """Ranges, names and characters that are not known."""
    monkeypatch.chdir(tmp_path)
    mistake("sample.py", *arguments, holds=holds)


def fail_midway(error):
    """Return a torch.save that writes some bytes and then raises."""

    def save(state, path):
        path.write_bytes(b"the beginning of a file")
        raise error

    return save


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(checkpoint, monkeypatch, error):
    """Where writing fails midway, the earlier file stays, and no part of the new one."""
    before = tree(checkpoint.parent)
    monkeypatch.setattr(torch, "save", fail_midway(error))
    with pytest.raises(OSError, match="could not be saved") as e:
        gpt.save_checkpoint(checkpoint, {"step": 3})
    assert str(checkpoint) in str(e.value)
    assert str(error) in str(e.value)
    assert tree(checkpoint.parent) == before


def test_a_file_system_with_a_limit(checkpoint):
    """A real write that fails in the middle: files may have 20,000 bytes and this one has more."""
    resource = pytest.importorskip("resource")
    before, (soft, hard) = tree(checkpoint.parent), resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"model": torch.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="could not be saved"):
            gpt.save_checkpoint(checkpoint, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(checkpoint.parent) == before
    gpt.save_checkpoint(checkpoint, state)
    assert torch.load(checkpoint)["model"].shape == (100_000,)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_device_without_space(checkpoint):
    """The part of a checkpoint goes to a device that is full."""
    before = tree(checkpoint.parent)
    checkpoint.with_suffix(f".{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="could not be saved"):
        gpt.save_checkpoint(checkpoint, {"model": torch.zeros(100_000)})
    assert tree(checkpoint.parent) == before


def test_training_on_a_full_disk_is_one_sentence(mistake, checkpoint, monkeypatch):
    """The run ends with exit code 2, and what was saved before it stays."""
    before = tree(checkpoint.parent)
    monkeypatch.setattr(
        torch, "save", fail_midway(OSError(errno.ENOSPC, "No space left on device"))
    )
    mistake(
        "gpt.py",
        "--init_from=resume",
        "--max_iters=4",
        stays=False,
        holds=[str(checkpoint), "No space left on device"],
    )
    after = tree(checkpoint.parent)
    log = checkpoint.with_name("log.jsonl")
    assert after.pop(log).startswith(before.pop(log))
    assert after == before


def test_the_first_checkpoint_of_a_run_on_a_full_disk(mistake, tmp_path, monkeypatch):
    """No part of a file is left behind."""
    monkeypatch.setattr(
        torch, "save", fail_midway(OSError(errno.ENOSPC, "No space left on device"))
    )
    mistake("gpt.py", holds=["ckpt.pt", "No space left on device"], stays=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    ("script", "arguments", "fragment"),
    [
        ("gpt.py", ["--n_layer=two"], "'two'"),
        ("sample.py", ["--top_p=1.5"], "1.5"),
        ("prepare.py", ["dickens"], "dickens"),
    ],
)
def test_the_shell_sees_exit_code_2(run_script, tmp_path, script, arguments, fragment):
    """A real process: one line on stderr, nothing on stdout."""
    done = run_script(script, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert fragment in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["finetune_rated", "finetune_chat", "finetune_shakespeare"])
def test_a_finetuning_config_does_not_begin_from_scratch_by_auto(mistake, name):
    """The flag would take the place of the model to finetune, and a random one would be trained."""
    mistake(
        "gpt.py",
        f"config/{name}.py",
        "--init_from=auto",
        holds=["init_from is auto", "--init_from=resume"],
    )
