"""gpt.py from Python: values of any origin pass one check, before anything is touched."""

from pathlib import Path

import numpy as np
import pytest
import torch

import gpt

PLAIN = [
    ("learning_rate", np.float64(1e-3), 1e-3),
    ("learning_rate", np.float32(0.5), 0.5),
    ("learning_rate", 1, 1.0),
    ("max_iters", np.int64(2), 2),
    ("n_layer", np.int64(3), 3),
    ("n_embd", np.uint8(64), 64),
    ("bias", np.bool_(True), True),
    ("bias", 1, True),
    ("device", torch.device("cpu"), "cpu"),
    ("dtype", torch.bfloat16, "bfloat16"),
    ("compile", np.bool_(False), False),
    ("compile", None, None),
]


@pytest.fixture(params=["assigned", "keyword"])
def train(request, settings, monkeypatch):
    """Return a function that trains with settings given in one of the two ways."""
    settings(max_iters=2, compile=False)

    def assigned(**values):
        for name, value in values.items():
            monkeypatch.setattr(gpt, name, value, raising=False)
        return gpt.train()

    return assigned if request.param == "assigned" else gpt.train


@pytest.mark.parametrize(("name", "value", "plain"), PLAIN, ids=repr)
def test_values_that_stand_for_plain_ones_become_these(train, tmp_path, name, value, plain):
    """A run trains with them, and its checkpoints, which hold them, can be read and resumed."""
    train(**{name: value})
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert type(state["config"][name]) is type(plain)
    assert state["config"][name] == plain
    settings = {name: plain, "init_from": "resume", "max_iters": 3}
    assert gpt.train(**settings)["step"] == 3


def test_folders_may_be_paths(train, tmp_path):
    train(out_dir=tmp_path / "mine", data_dir=Path(gpt.data_dir))
    config = gpt.read_checkpoint(tmp_path / "mine" / "ckpt.pt")["config"]
    assert config["out_dir"] == str(tmp_path / "mine")
    train(out_dir=tmp_path / "tuned", init_from=tmp_path / "mine" / "best.pt")
    assert (tmp_path / "tuned" / "best.pt").exists()


REFUSED = [
    ({"batch_size": 4.0}, "batch_size is 4.0: expected an integer"),
    ({"n_layer": "2"}, "n_layer is '2': expected an integer"),
    ({"n_layer": np.float64(2)}, "n_layer is 2.0: expected an integer"),
    ({"max_iters": True}, "max_iters is True: expected an integer"),
    ({"max_iters": None}, "max_iters is None: expected an integer"),
    ({"learning_rate": "1e-3"}, "learning_rate is '1e-3': expected a number"),
    ({"learning_rate": torch.tensor(0.5)}, r"learning_rate is tensor\(0.5000\): expected a number"),
    ({"learning_rate": np.float64("nan")}, "learning_rate is nan: expected a finite number"),
    ({"bias": 2}, "bias is 2: expected True or False"),
    ({"dataset": 7}, "dataset is 7: expected text"),
    ({"compile": "yes"}, "compile is 'yes': expected True or False, or None"),
    ({"max_iters": np.int64(-1)}, "max_iters is -1: it must be at least 0"),
    ({"optimizer": "sgd"}, "optimizer is 'sgd': it must be one of muon, adamw"),
    ({"n_head": 3, "n_kv_head": 3}, r"n_embd \(32\) must be a multiple of n_head \(3\)"),
    ({"max_iter": 1}, "unknown setting 'max_iter': did you mean max_iters?"),
    ({"max_iter": np.int64(1)}, "unknown setting 'max_iter': did you mean max_iters?"),
    ({"outdir": Path("x")}, "unknown setting 'outdir': did you mean out_dir?"),
    ({"n_layers": 2}, "unknown setting 'n_layers': did you mean n_layer?"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda case: str(case)[:40])
def test_a_mistake_is_a_sentence_before_anything_is_touched(train, tmp_path, changes, message):
    """An earlier run's files keep their names and their content."""
    gpt.train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"^{message}"):
        train(**changes)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_settings_hold_for_one_call(settings):
    """Keywords change nothing for the calls that follow."""
    settings(max_iters=1)
    assert gpt.train(max_iters=3)["step"] == 3
    assert gpt.train()["step"] == 1


def test_what_is_no_number_or_text_may_be_added_to_the_module(settings, monkeypatch):
    """Such as a function or a module of one's own; it cannot be a mistyped setting."""
    monkeypatch.setattr(gpt, "my_function", lambda: 1, raising=False)
    monkeypatch.setattr(gpt, "my_module", np, raising=False)
    assert gpt.train(max_iters=1)["step"] == 1
