"""The presets have the sizes that their names and first lines promise."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import configurator
import gpt
import scaling

ROOT = Path(__file__).resolve().parent.parent


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
    script = {k: getattr(gpt, k) for k in gpt.SETTINGS} | {"__file__": str(ROOT / "gpt.py")}
    files = [str(ROOT / "config" / f"{name}.py") for name in names]
    configurator.configure(
        script, files, derive=lambda: {"device_type": "cuda", "native_bfloat16": True}
    )
    fields = set(gpt.GPTConfig.__dataclass_fields__) & set(gpt.SETTINGS)
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(vocab_size=vocab_size, **{k: script[k] for k in fields}))
    assert model.n_params() == pytest.approx(promised, rel=0.05)
    stated = Path(files[-1]).read_text(encoding="utf-8")
    n = model.n_params() / 1e6
    assert f"{n:.1f}M parameters" in stated or f"{n:.0f}M parameters" in stated


VOCABULARY = {  # tokens, special ones included
    "train_shakespeare": 65,
    "train_pydoc": 103,
    "debug": 103,
    "train_tiny": 65,
    "train_small": 65,
    "train_stdlib": 8192,
    "train_tinystories": 8192,
}


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "config").glob("*train_*.py")) + ["debug"]
)
def test_readme_tells_the_configs_sizes(name):
    """The numbers in its row: on a CPU, on one without bfloat16 where that differs, on a GPU; or one for all."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Config files\n")[1]
    row = next(line for line in table.splitlines() if f"`{name}.py`" in line)
    files, stated = re.findall(r"`(\w+)\.py`", row), re.findall(r"([\d.,]+)M", row.split("|")[2])
    if len(files) > 1:
        stated = [stated[files.index(name)]]
    with_bfloat16, without, gpu = ("cpu", True), ("cpu", False), ("cuda", True)
    numbers = (
        stated * 3 if len(stated) == 1 else stated if len(stated) == 3 else [stated[0], *stated]
    )
    for (device, native), number in zip((with_bfloat16, without, gpu), numbers, strict=True):
        script = {k: getattr(gpt, k) for k in gpt.SETTINGS} | {"__file__": str(ROOT / "gpt.py")}
        derive = functools.partial(dict, device_type=device, native_bfloat16=native)
        configurator.configure(script, [str(ROOT / "config" / f"{name}.py")], derive=derive)
        fields = set(gpt.GPTConfig.__dataclass_fields__) & set(gpt.SETTINGS)
        with torch.device("meta"):
            vocab_size = VOCABULARY.get(name, 50257)
            model = gpt.GPT(gpt.GPTConfig(vocab_size=vocab_size, **{k: script[k] for k in fields}))
        digits = len(number.partition(".")[2])
        assert f"{model.n_params() / 1e6:,.{digits}f}" == number, (name, device, native)


def test_readmes_table_of_memory_counts_the_configs_own_parameters(monkeypatch, capsys):
    """It is what scaling.py prints, and its sizes are those of the presets, whichever came before."""
    for name in gpt.SETTINGS:
        monkeypatch.setattr(gpt, name, getattr(gpt, name))
    scaling.main()
    printed = capsys.readouterr().out
    assert printed in (ROOT / "README.md").read_text(encoding="utf-8")
    for name, size in (
        ("train_gpt2", "124M"),
        ("train_large", "351M"),
        ("train_1b", "1,073M"),
        ("gpt2_xl", "1,558M"),
    ):
        assert f"| `{name}.py` | {size} |" in printed


def test_flags_override_a_preset():
    script = {k: getattr(gpt, k) for k in gpt.SETTINGS} | {"__file__": str(ROOT / "gpt.py")}
    configurator.configure(
        script,
        ["--n_layer=3", str(ROOT / "config" / "train_tiny.py")],
        derive=lambda: {"device_type": "cuda", "native_bfloat16": True},
    )
    assert (script["n_layer"], script["n_embd"]) == (3, 384)


def test_readmes_tables_are_those_of_the_results():
    """What README quotes of speed is what bench/table.py makes of bench/results.jsonl."""
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench" / "table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.BEGIN + "\n" + table.tables() + "\n" + table.END in readme
    assert table.BEGIN_FRONT + "\n" + table.front() + "\n" + table.END in readme


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [
        (0.1, (2, 96, 64, 0.0, 1.0)),
        (0.5, (3, 128, 128, 0.0, 1.0)),
        (1, (4, 192, 256, 0.0, 0.87)),
        (2, (4, 192, 256, 0.05, 0.87)),
        (3, (4, 192, 256, 0.05, 0.87)),
        (5, (4, 192, 256, 0.1, 0.83)),
        (10, (4, 256, 256, 0.15, 0.83)),
        (25, (4, 256, 256, 0.2, 0.83)),
    ],
)
def test_shakespeare_is_sized_to_the_minutes(minutes, expected):
    """With bfloat16 as many, and four times as many in float32, chosen or for want of bfloat16."""
    config = str(ROOT / "config" / "train_shakespeare.py")
    for native, dtype, times in ((True, "auto", 1), (True, "float32", 4), (False, "auto", 4)):
        script = {k: getattr(gpt, k) for k in gpt.SETTINGS} | {"__file__": str(ROOT / "gpt.py")}
        flags = (
            [f"--max_minutes={times * minutes}"] if times * minutes != 2 else []
        )  # 2: what it chooses
        derive = functools.partial(dict, device_type="cpu", native_bfloat16=native)
        configurator.configure(script, [config, f"--dtype={dtype}", *flags], derive=derive)
        names = "n_layer", "n_embd", "block_size", "dropout", "train_temperature"
        assert tuple(script[name] for name in names) == expected
        assert script["max_minutes"] == times * minutes


@pytest.mark.parametrize(
    ("flags", "expected"), [([], (1500, 0.2, 0.83)), (["--max_iters=350"], (350, 0.03, 0.9))]
)
def test_shakespeare_on_a_gpu_takes_fewer_steps_with_less_dropout(flags, expected):
    script = {k: getattr(gpt, k) for k in gpt.SETTINGS} | {"__file__": str(ROOT / "gpt.py")}
    derive = functools.partial(dict, device_type="cuda", native_bfloat16=True)
    configurator.configure(
        script, [str(ROOT / "config" / "train_shakespeare.py"), *flags], derive=derive
    )
    assert tuple(script[name] for name in ("max_iters", "dropout", "train_temperature")) == expected
    assert (script["max_minutes"], script["n_embd"], script["batch_size"]) == (0, 256, 32)
