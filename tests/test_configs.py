"""The presets have the sizes that their names and first lines promise."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import configurator
import gpt
import hub

ROOT = Path(__file__).resolve().parent.parent


def settings_by(*argv, device="cuda", native_bfloat16=True):
    """Return {name: value} of all settings after config files and flags, on a stand-in device."""
    script = {name: setting.default for name, setting in gpt.SETTINGS.items()}
    script["__file__"] = str(ROOT / "gpt.py")
    derived = {"device_type": device, "native_bfloat16": native_bfloat16}
    configurator.configure(script, list(argv), gpt.SETTINGS, gpt.check_setting, lambda: derived)
    return {name: script[name] for name in gpt.SETTINGS}


def n_params(values, vocab_size):
    """Return how many parameters the model of these settings has."""
    config = gpt.model_config(gpt.checked_settings(**values), vocab_size)
    with torch.device("meta"):
        return gpt.GPT(config).n_params()


@pytest.mark.parametrize(
    ("names", "vocab_size", "promised"),
    [
        (["train_tiny"], 65, 10e6),
        (["train_small"], 65, 25e6),
        (["train_medium"], 50257, 80e6),
        (["train_large"], 50257, 350e6),
        (["train_gpt2"], 50257, 124e6),
        (["train_gpt2", "gpt2_medium"], 50257, 350e6),
        (["train_gpt2", "gpt2_large"], 50257, 774e6),
        (["train_gpt2", "gpt2_xl"], 50257, 1558e6),
        (["train_1b"], 50257, 1.1e9),
    ],
)
def test_preset_is_as_large_as_its_name_says(names, vocab_size, promised):
    files = [str(ROOT / "config" / f"{name}.py") for name in names]
    n = n_params(settings_by(*files), vocab_size)
    assert n == pytest.approx(promised, rel=0.05)
    stated = Path(files[-1]).read_text(encoding="utf-8")
    assert f"{n / 1e6:.1f}M parameters" in stated or f"{n / 1e6:.0f}M parameters" in stated


VOCABULARY = {  # tokens, special ones included; the others' have 50,257
    "train_shakespeare": 65,
    "train_pydoc": 103,
    "debug": 103,
    "train_tiny": 65,
    "train_small": 65,
    "train_stdlib": 8192,
    "train_tinystories": 8192,
}


def stated_sizes(name):
    """Return the sizes that config/README.md gives a config on a CPU and on a GPU, as texts.

    "fitted" means that gpt.py fits the model to the minutes.
    """
    table = (ROOT / "config" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if f"`{name}.py`" in line)
    files = re.findall(r"`(\w+)\.py`", row)
    sizes = re.findall(r"([\d.,]+)M|(fitted) on CPU", row.split("|")[2])
    sizes = [number or word for number, word in sizes]
    if len(files) > 1:
        sizes = [sizes[files.index(name)]]
    return sizes * 2 if len(sizes) == 1 else sizes  # one: for both


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "config").glob("*train_*.py")) + ["debug"]
)
def test_the_table_tells_the_configs_sizes(name):
    for device, stated in zip(("cpu", "cuda"), stated_sizes(name), strict=True):
        values = settings_by(str(ROOT / "config" / f"{name}.py"), device=device)
        if stated == "fitted":
            assert values["max_minutes"] > 0
            assert values["n_embd"] is values["n_layer"] is values["dropout"] is None
            continue
        n = n_params(values, VOCABULARY.get(name, 50257))
        digits = len(stated.partition(".")[2])
        assert f"{n / 1e6:,.{digits}f}" == stated, (name, device)


def test_flags_override_a_preset():
    values = settings_by("--n_layer=3", str(ROOT / "config" / "train_tiny.py"))
    assert (values["n_layer"], values["n_embd"]) == (3, 384)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("finetune_shakespeare", "gpt2"),
        ("finetune_rated", "gpt2"),
        ("finetune_chat", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_finetuning_fetches_its_model_unless_another_is_named(monkeypatch, name, model):
    """Resuming, and a checkpoint by --init_from, fetch nothing."""
    fetched = []

    def get(model_name):
        fetched.append(model_name)
        return ROOT / "models" / "fetched" / "best.pt"

    monkeypatch.setattr(hub, "get", get)
    config = str(ROOT / "config" / f"{name}.py")
    assert settings_by(config, "--init_from=resume")["init_from"] == "resume"
    assert settings_by("--init_from=x/best.pt", config)["init_from"] == "x/best.pt"
    assert fetched == []
    values = settings_by(config)
    assert values["init_from"] == str(ROOT / "models" / "fetched" / "best.pt")
    assert fetched == [model]


def test_the_tables_of_the_pages_are_those_of_the_results(monkeypatch):
    """What the pages quote is what bench/table.py makes of bench/results.jsonl."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    for name, begin, write in table.PARTS:
        page = (ROOT / name).read_text(encoding="utf-8")
        assert begin + "\n" + write() + "\n" + table.END in page, begin
        assert "Measured on 2" in write()


@pytest.mark.parametrize(
    ("minutes", "fitted"), [(0.1, False), (0.4, False), (0.5, True), (2, True)]
)
def test_shakespeare_in_seconds_leaves_nothing_to_be_fitted(minutes, fitted):
    """So no time is spent on it. In float32, chosen or for want of bfloat16, seconds are more."""
    config = str(ROOT / "config" / "train_shakespeare.py")
    for native, dtype, times in ((True, "auto", 1), (True, "float32", 4), (False, "auto", 4)):
        argv = [config, f"--dtype={dtype}", f"--max_minutes={times * minutes}"]
        values = settings_by(*argv, device="cpu", native_bfloat16=native)
        assert values["max_minutes"] == times * minutes
        assert any(values[name] is None for name in gpt.UNFITTED) == fitted


@pytest.mark.parametrize(
    ("flags", "expected"), [([], (1500, 0.2, 0.83)), (["--max_iters=350"], (350, 0.03, 0.9))]
)
def test_shakespeare_on_a_gpu_takes_fewer_steps_with_less_dropout(flags, expected):
    values = settings_by(str(ROOT / "config" / "train_shakespeare.py"), *flags)
    assert tuple(values[name] for name in ("max_iters", "dropout", "train_temperature")) == expected
    assert (values["max_minutes"], values["n_embd"], values["batch_size"]) == (0, 256, 32)
