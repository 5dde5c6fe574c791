"""Settings: config files and flags pass one check, and a mistake is one sentence."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import configurator
import evaluate
import gpt
import hub
import prepare
import sample

ROOT = Path(__file__).resolve().parent.parent
TOY = '''"""toy.py: a script of the tests."""
import os

# ---- settings ----
n_layer = 4  # blocks
learning_rate = 1e-3  # step size; 1e-3 = small
bias = False  # biases in linear layers
name = "a"  # of the run
shift = -1  # may be negative
compile: bool | None = None  # None: by hardware
limit: int | None = 3  # None: no limit

HERE = "x"  # a constant
nothing = 7

def main():
    """Do nothing."""

late = 3  # assigned below the first def
'''


SETTINGS = gpt.read_settings(TOY)


def test_a_setting_that_a_formatter_has_wrapped_is_not_lost():
    with pytest.raises(ValueError, match="write a setting on one line"):
        gpt.read_settings('name = (\n    "a"  # of the run\n)\n')


@pytest.fixture
def toy(tmp_path):
    """Return a function that gives the globals of a toy script after configure(argv)."""
    path = tmp_path / "toy.py"
    path.write_text(TOY, encoding="utf-8")

    def run(*argv, **options):
        script = runpy.run_path(str(path))
        configurator.configure(script, list(argv), SETTINGS, gpt.check_setting, **options)
        return script

    return run


@pytest.fixture
def config(tmp_path):
    """Return a function that writes a config file and gives its path as a string."""

    def write(text, name="config.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Return a function that runs configurator.run_script on the toy script by a command line."""
    path = tmp_path / "toy.py"
    path.write_text(TOY, encoding="utf-8")

    def run(main, *argv):
        script = runpy.run_path(str(path))
        monkeypatch.setattr(sys, "argv", ["toy.py", *argv])
        configurator.run_script(script, lambda: main(script), SETTINGS, gpt.check_setting)
        return script

    return run


def test_read_settings_finds_names_types_and_help():
    """Only commented lower-case assignments above the first def are settings."""
    found = {name: (s.type, s.optional, s.help) for name, s in SETTINGS.items()}
    assert found == {
        "n_layer": (int, False, "blocks"),
        "learning_rate": (float, False, "step size; 1e-3 = small"),
        "bias": (bool, False, "biases in linear layers"),
        "name": (str, False, "of the run"),
        "shift": (int, False, "may be negative"),
        "compile": (bool, True, "None: by hardware"),
        "limit": (int, True, "None: no limit"),
    }


def plain_globals(module):
    """Return the names of a module's lower-case globals that hold a plain value."""
    plain = bool | int | float | str | None
    return [k for k, v in vars(module).items() if k[0].islower() and isinstance(v, plain)]


SCRIPTS = pytest.mark.parametrize(
    "module", [gpt, prepare, sample, evaluate], ids=lambda module: module.__name__
)


@SCRIPTS
def test_every_plain_global_of_a_script_is_a_setting_with_a_help_text(module):
    """No setting escapes the flags, and each has the type of its default."""
    assert list(module.SETTINGS) == plain_globals(module)
    assert len(module.SETTINGS) >= 5
    for name, setting in module.SETTINGS.items():
        value = getattr(module, name)
        assert len(setting.help) > 3, name
        assert type(value) is setting.type or (value is None and setting.optional), name


def test_the_optional_settings_of_gpt():
    assert {"dataset", "n_kv_head", "muon_lr", "compile"} <= set(gpt.SETTINGS)
    assert gpt.SETTINGS["compile"].type is bool
    optional = {name for name, setting in gpt.SETTINGS.items() if setting.optional}
    assert optional == {"compile", *gpt.UNFITTED}
    for name, value in gpt.UNFITTED.items():  # the help text ends with the value, in brackets
        text = gpt.SETTINGS[name].help
        assert float(text[text.rindex("[") + 1 : -1]) == value, text


VALID = [
    (["--n_layer=6"], "n_layer", 6),
    (["--n_layer", "6"], "n_layer", 6),
    (["--shift=-12"], "shift", -12),
    (["--shift", "-12"], "shift", -12),
    (["--learning_rate=3"], "learning_rate", 3.0),
    (["--learning_rate=-2.5e-2"], "learning_rate", -0.025),
    (["--learning_rate", "-.5"], "learning_rate", -0.5),
    (["--bias"], "bias", True),
    (["--bias=true"], "bias", True),
    (["--bias=False"], "bias", False),
    (["--bias=1"], "bias", True),
    (["--bias=0"], "bias", False),
    (["--bias", "TRUE"], "bias", True),
    (["--bias", "--n_layer=2"], "bias", True),
    (["--compile"], "compile", True),
    (["--compile=None"], "compile", None),
    (["--compile", "false"], "compile", False),
    (["--limit=none"], "limit", None),
    (["--limit=9"], "limit", 9),
    (["--name=a=b==c"], "name", "a=b==c"),
    (["--name", "k=v"], "name", "k=v"),
    (["--name="], "name", ""),
    (["--name=12"], "name", "12"),
    (["--name=None"], "name", "None"),
    (["--name=true"], "name", "true"),
    (["--name=--n_layer=2"], "name", "--n_layer=2"),
    (["--name= two words "], "name", " two words "),
    (["--n_layer=5", "--n_layer=7"], "n_layer", 7),
]


@pytest.mark.parametrize(
    ("argv", "name", "expected"), VALID, ids=[" ".join(case[0]) for case in VALID]
)
def test_flags_take_values_of_the_right_type(toy, argv, name, expected):
    """All three forms of a flag work, strings stay raw, and the value has the setting's type."""
    value = toy(*argv)[name]
    assert (type(value), value) == (type(expected), expected)


def test_several_flags_leave_the_rest_alone(toy):
    """What no flag names keeps its default."""
    script = toy("--n_layer", "2", "--bias", "--name=x")
    assert [
        script[k] for k in ("n_layer", "learning_rate", "bias", "name", "shift", "compile", "limit")
    ] == [
        2,
        1e-3,
        True,
        "x",
        -1,
        None,
        3,
    ]


INVALID_FLAGS = [
    ("--n_layer=2.5", "n_layer is '2.5': expected an integer"),
    ("--n_layer=two", "n_layer is 'two': expected an integer"),
    ("--n_layer=true", "n_layer is True: expected an integer"),
    ("--n_layer=None", "n_layer is None: expected an integer"),
    ("--n_layer=", "n_layer is '': expected an integer"),
    ("--learning_rate=fast", "learning_rate is 'fast': expected a number"),
    ("--learning_rate=true", "learning_rate is True: expected a number"),
    ("--learning_rate=None", "learning_rate is None: expected a number"),
    ("--bias=2", "bias is 2: expected True or False"),
    ("--bias=yes", "bias is 'yes': expected True or False"),
    ("--bias=None", "bias is None: expected True or False"),
    ("--compile=maybe", "compile is 'maybe': expected True or False, or None"),
    ("--limit=1.5", "limit is '1.5': expected an integer, or None"),
]
INVALID_LINES = [
    ("n_layer = 2.5", "n_layer is 2.5: expected an integer"),
    ("n_layer = 6.0", "n_layer is 6.0: expected an integer"),
    ("n_layer = '6'", "n_layer is '6': expected an integer"),
    ("n_layer = True", "n_layer is True: expected an integer"),
    ("n_layer = None", "n_layer is None: expected an integer"),
    ("n_layer = [6]", "n_layer is [6]: expected an integer"),
    ("learning_rate = '1e-3'", "learning_rate is '1e-3': expected a number"),
    ("learning_rate = True", "learning_rate is True: expected a number"),
    ("bias = 2", "bias is 2: expected True or False"),
    ("bias = 'true'", "bias is 'true': expected True or False"),
    ("bias = None", "bias is None: expected True or False"),
    ("name = 3", "name is 3: expected text"),
    ("name = None", "name is None: expected text"),
    ("compile = 'yes'", "compile is 'yes': expected True or False, or None"),
]


@pytest.mark.parametrize(("flag", "message"), INVALID_FLAGS)
def test_a_flag_of_the_wrong_type_names_key_value_and_type(toy, flag, message):
    """The message holds all that is needed to mend the flag."""
    with pytest.raises(ValueError) as e:
        toy(flag)
    assert str(e.value) == message


@pytest.mark.parametrize(("line", "message"), INVALID_LINES)
def test_a_config_file_passes_the_same_check(toy, config, line, message):
    """A file's wrong type is refused with the file's name before the same sentence."""
    path = config(line + "\n")
    with pytest.raises(ValueError) as e:
        toy(path)
    assert str(e.value) == f"{path}: {message}"


def test_a_config_file_converts_as_flags_do(toy, config):
    """Whole numbers are fine for float, 0 and 1 for bool, None where the default allows it."""
    script = toy(config("learning_rate = 2\nbias = 1\ncompile = None\nlimit = None\nshift = -3\n"))
    values = [script[k] for k in ("learning_rate", "bias", "compile", "limit", "shift")]
    assert values == [2.0, True, None, None, -3]
    assert [type(v) for v in values[:2]] == [float, bool]


@pytest.mark.parametrize("text", ["--n_layr=3", "--n_layr 3", "--n_layr"])
def test_an_unknown_flag_gets_a_suggestion(toy, text):
    """The closest known name is proposed."""
    with pytest.raises(ValueError, match="'n_layr'.*did you mean n_layer"):
        toy(*text.split())


def test_an_unknown_name_without_a_neighbour_points_to_help(toy, config):
    """Where nothing is close, --help is named; constants and late names are no settings."""
    with pytest.raises(ValueError, match="'zzzzzz'.*--help"):
        toy("--zzzzzz=3")
    for name in ("HERE", "late", "nothing"):
        with pytest.raises(ValueError, match=f"unknown setting '{name}'"):
            toy(f"--{name}=3")
    with pytest.raises(ValueError, match=r"config\.py: unknown setting 'n_head'"):
        toy(config("n_head = 4\n"))


FOREIGN = {
    "start": "--prompt",
    "max_new_tokens": "--max_tokens",
    "decay_lr": "--lr_schedule=constant",
    "backend": "leave it out",
    "always_save_checkpoint": "leave it out",
    "wandb_project": "WANDB_PROJECT",
    "wandb_run_name": "WANDB_NAME",
    "eval_text": "python evaluate.py --text=FILE",
    "eval_stride": "python evaluate.py --stride=",
    "keep_checkpoints": "leave it out",
    "export": "python hub.py export RUN FOLDER",
}


@pytest.mark.parametrize(("name", "answer"), FOREIGN.items(), ids=list(FOREIGN))
def test_other_programs_and_former_names_are_answered_with_ours(toy, config, name, answer):
    """They come in flags and in config files, such as nanoGPT's; no script has such a setting."""
    for argv in ([f"--{name}=x"], [f"--{name}", "x"], [config(f"{name} = 1\n")]):
        with pytest.raises(ValueError, match=f"unknown setting '{name}': ") as e:
            toy(*argv)
        assert answer in str(e.value)
    for module in (gpt, prepare, sample, evaluate):
        assert name not in module.SETTINGS


def test_a_script_may_have_a_setting_of_a_renamed_name(tmp_path):
    """The table is for names that are unknown."""
    settings = gpt.read_settings("start = 1  # of the toy script\n")
    script = {"start": 1}
    configurator.configure(script, ["--start=2"], settings, gpt.check_setting)
    assert script == {"start": 2}


def test_a_flag_that_lacks_its_value_says_so(toy):
    """A name at the end, or before another flag, is no value."""
    for argv in (["--n_layer"], ["--name", "--n_layer=3"]):
        with pytest.raises(ValueError, match="needs a value"):
            toy(*argv)


@pytest.mark.parametrize("word", ["n_layer=3", "-n_layer=3", "none.py", "3"])
def test_a_word_that_is_neither_flag_nor_file_is_named(toy, word):
    """The message shows how settings are given."""
    with pytest.raises(FileNotFoundError, match=re.escape(word) + ".*--key=value"):
        toy(word)


def test_files_run_left_to_right_and_see_what_went_before(toy, config):
    """A later file starts with the values that an earlier one left."""
    first = config("n_layer = 10\nname = 'first'\n", "1.py")
    second = config("n_layer = n_layer + 1\n", "2.py")
    script = toy(first, second)
    assert (script["n_layer"], script["name"]) == (11, "first")
    assert toy(second, first)["n_layer"] == 10


def test_flags_win_wherever_they_stand_and_files_see_them(toy, config):
    """A flag holds before and after a file, and the file can branch on it."""
    path = config("shift = n_layer * 2\nn_layer = 99\n")
    for argv in (["--n_layer=8", path], [path, "--n_layer=8"]):
        script = toy(*argv)
        assert (script["n_layer"], script["shift"]) == (8, 16)


def test_a_flag_holds_for_every_one_of_several_files(toy, config):
    """The second file sees the flag too, not what the first file assigned."""
    first, second = config("n_layer = 50\n", "1.py"), config("shift = n_layer\n", "2.py")
    assert toy(first, second, "--n_layer=8")["shift"] == 8


def test_files_may_read_what_derive_returns_but_not_set_it(toy, config, tmp_path):
    """derive() runs once the flags are set; its names are for reading."""
    script = {}

    def derive():
        return {"device_type": "gpu" if script["bias"] else "cpu"}

    path = config("if device_type == 'cpu':\n    n_layer = 1\nelse:\n    n_layer = 2\n")
    for argv, expected in (([path], 1), ([path, "--bias"], 2)):
        script.clear()
        script.update(runpy.run_path(str(tmp_path / "toy.py")))
        configurator.configure(script, argv, SETTINGS, gpt.check_setting, derive=derive)
        assert script["n_layer"] == expected
        assert "device_type" not in script
    with pytest.raises(ValueError, match="unknown setting 'device_type'"):
        toy(config("device_type = 'tpu'\n"), derive=lambda: {"device_type": "cpu"})


HELPERS = """\
import math
import os.path as p
from math import sqrt
from pathlib import Path
_width = 3
class Size:
    big = 8
def twice(n):
    return 2 * n
half = lambda n: n // 2
n_layer = twice(_width) + half(Size.big) + int(sqrt(4)) + int(math.pi)
"""


def test_config_files_may_hold_helpers(toy, config):
    """Imports, functions, classes and _names are no settings."""
    script = toy(config(HELPERS))
    assert script["n_layer"] == 6 + 4 + 2 + 3
    assert not {"math", "sqrt", "twice", "half", "Size", "_width", "Path"} & set(script)


def test_a_config_file_sees_its_own_path(toy, config):
    """__file__ is the file's path and __name__ is not __main__."""
    path = config("name = __file__\nif __name__ == '__main__':\n    n_layer = 0\n")
    script = toy(path)
    assert (script["name"], script["n_layer"]) == (path, 4)


def test_config_files_are_found_beside_the_script_too(toy, config, tmp_path, monkeypatch):
    """A path is tried from the current folder first, then from the script's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config("n_layer = 21\n", "beside.py")
    assert toy("beside.py")["n_layer"] == 21
    (elsewhere / "beside.py").write_text("n_layer = 22\n", encoding="utf-8")
    assert toy("beside.py")["n_layer"] == 22


def test_errors_inside_a_config_file_name_file_and_place(toy, config):
    """A syntax error has its line, any other its type, and nothing is set."""
    path = config("n_layer = 3\nname = = 2\n", "broken.py")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ") + "."):
        toy(path)
    for text, kind in (
        ("n_layer = 1 // 0\n", "ZeroDivisionError"),
        ("n_layer = missing\n", "NameError"),
        ("raise KeyError('x')\n", "KeyError"),
        ("import no_such_module\n", "ModuleNotFound"),
    ):
        path = config(text, "fails.py")
        with pytest.raises(ValueError, match=re.escape(f"{path}: {kind}")):
            toy(path)


def test_a_byte_order_mark_is_no_part_of_a_config_file(toy, tmp_path):
    """Editors on Windows write one."""
    path = tmp_path / "bom.py"
    path.write_bytes(b"\xef\xbb\xbfname = 'caf\xc3\xa9'\r\nn_layer = 5\r\n")
    script = toy(str(path))
    assert (script["name"], script["n_layer"]) == ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", 5)


def test_a_tilde_in_a_config_files_path_is_the_home_folder(toy, config, tmp_path, monkeypatch):
    """A shell expands it only where it begins a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config("n_layer = 31\n", "home.py")
    assert toy("~/home.py")["n_layer"] == 31
    with pytest.raises(FileNotFoundError, match="~/none.py does not exist"):
        toy("~/none.py")


def test_a_config_file_that_imports_another_is_told_how_they_combine(toy, config, monkeypatch):
    """An import runs the other file without the names that config files may read."""
    monkeypatch.syspath_prepend(Path(config("")).parent)
    config("n_layer = 6 if device_type == 'cpu' else 12\n", "other_config.py")
    path = config("from other_config import *\nbias = True\n", "mine.py")
    with pytest.raises(
        ValueError,
        match="imports a config file in which device_type is not defined: .* command line",
    ) as e:
        toy(path, derive=lambda: {"device_type": "cpu"})
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)
    other = str(Path(path).with_name("other_config.py"))
    config("bias = True\n", "mine.py")
    script = toy(other, path, derive=lambda: {"device_type": "cpu"})
    assert (script["n_layer"], script["bias"]) == (6, True)


def test_a_config_file_in_another_encoding_is_named(toy, tmp_path):
    """Bytes that are not UTF-8 end in a sentence with the file's name."""
    path = tmp_path / "latin.py"
    path.write_bytes(b"name = 'caf\xe9'\n")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        toy(str(path))


def test_word_setting_takes_the_first_word_and_only_one(toy):
    """With word_settings, a word is that setting's value instead of a config file."""
    assert toy("pydoc", "--n_layer=2", word_settings=("name",))["name"] == "pydoc"
    assert toy("--n_layer=2", word_settings=("name",))["name"] == "a"
    with pytest.raises(ValueError, match="'more' is one word too many"):
        toy("pydoc", "more", word_settings=("name",))


def test_run_script_runs_main_with_the_settings(launch, capsys):
    """Without a mistake nothing is printed and no exit is raised."""
    seen = []
    launch(lambda script: seen.append(script["n_layer"]), "--n_layer=9")
    assert seen == [9]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "mistake", [ValueError("it is 7"), FileNotFoundError("it is 7"), OSError("it is 7")]
)
def test_run_script_turns_a_mistake_into_one_line_and_exit_code_2(launch, capsys, mistake):
    """A ValueError or OSError of main is a user's mistake."""

    def main(script):
        raise mistake

    with pytest.raises(SystemExit) as e:
        launch(main)
    assert e.value.code == 2
    assert capsys.readouterr() == ("", "error: it is 7\n")


@pytest.mark.parametrize("kind", ["CUDA", "MPS backend"])
def test_run_script_words_memory_that_is_full(launch, capsys, kind):
    """One sentence, also on MPS, for whose error torch has no type."""

    def main(script):
        raise (torch.OutOfMemoryError if kind == "CUDA" else RuntimeError)(
            f"{kind} out of memory. Tried\nit"
        )

    with pytest.raises(SystemExit) as e:
        launch(main)
    assert e.value.code == 2
    remedy = "close other programs, or use a smaller model or text"
    expected = f"error: out of memory ({kind} out of memory. Tried it): {remedy}\n"
    assert capsys.readouterr() == ("", expected)


def test_run_script_does_not_run_main_after_a_mistake_in_the_settings(launch, capsys):
    """The settings are checked before anything is done."""
    seen = []
    with pytest.raises(SystemExit) as e:
        launch(seen.append, "--n_layr=9")
    assert (e.value.code, seen) == (2, [])
    assert capsys.readouterr().err == "error: unknown setting 'n_layr': did you mean n_layer?\n"


def test_run_script_passes_on_other_exits(launch):
    """Ctrl-C is 130, main's own exit code stays, and a bug keeps its traceback."""

    def fail(error):
        def main(script):
            raise error

        return main

    for error, code in ((KeyboardInterrupt(), 130), (SystemExit(143), 143)):
        with pytest.raises(SystemExit) as e:
            launch(fail(error))
        assert e.value.code == code
    with pytest.raises(KeyError):
        launch(fail(KeyError("a bug")))


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_only_the_first_process_prints_the_mistake(launch, capsys, monkeypatch):
    """Of the processes that torchrun starts, all exit with 2 and one speaks."""
    for rank, said in (
        ("1", ""),
        ("0", "error: unknown setting 'n_layr': did you mean n_layer?\n"),
    ):
        for name, value in (TORCHRUN | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as e:
            launch(lambda script: None, "--n_layr=9")
        assert e.value.code == 2
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("missing", TORCHRUN)
@pytest.mark.parametrize("empty", [False, True])
def test_a_stray_rank_mutes_no_mistake(launch, capsys, monkeypatch, missing, empty):
    """A variable of torchrun that lacks the others, or is empty, means nothing."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    if empty:
        monkeypatch.setenv(missing, "")
    else:
        monkeypatch.delenv(missing)
    with pytest.raises(SystemExit) as e:
        launch(lambda script: None, "--n_layr=9")
    assert e.value.code == 2
    assert "did you mean n_layer" in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_a_stream_that_the_caller_closed_ends_no_run(launch, monkeypatch, closed):
    """Python has None in its place, as after `python gpt.py >&-`; what is written there is lost."""
    monkeypatch.setattr(sys, closed, None)
    seen = []

    def main(script):
        sys.stdout.write("a text\n")
        sys.stderr.write("a note\n")
        seen.append(sys.stdin.read() if closed == "stdin" else "")

    launch(main)
    assert seen == [""]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_closed_output_is_no_traceback(tmp_path):
    """By a real shell: a run without stdout, or without stderr, ends as it would with them."""
    path = tmp_path / "quiet.py"
    path.write_text(
        f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import run_script

def main():
    print("a text", flush=True)
    open("done", "a").write("x")

run_script(globals(), main, {{}}, None)
""",
        encoding="utf-8",
    )
    for closed in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        command = f"exec {sys.executable} {path} {closed}"
        done = subprocess.run(
            command, check=False, shell=True, cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), closed
    assert (tmp_path / "done").read_text() == "xxxx"


def test_traceback_in_the_environment_shows_where(launch, monkeypatch):
    """TRACEBACK=1 lets the exception through."""
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="n_layr"):
        launch(lambda script: None, "--n_layr=9")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_setting_and_runs_nothing(launch, capsys, flag):
    """Each line is the flag with its default, then the comment."""
    seen = []
    launch(seen.append, "--n_layer=x", flag)
    out = capsys.readouterr().out
    assert seen == []
    assert out.startswith("toy.py: a script of the tests.\n\n")
    assert out.splitlines()[2:] == [
        "--n_layer=4                          blocks",
        "--learning_rate=0.001                step size; 1e-3 = small",
        "--bias=False                         biases in linear layers",
        "--name='a'                           of the run",
        "--shift=-1                           may be negative",
        "--compile=None                       None: by hardware",
        "--limit=3                            None: no limit",
    ]


@pytest.mark.parametrize("name", ["gpt.py", "sample.py", "prepare.py", "evaluate.py"])
def test_help_of_the_scripts_shows_defaults_and_comments(name, monkeypatch, capsys):
    """Every commented assignment at the top of the source is in --help, 100 columns wide."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    runpy.run_path(str(ROOT / name), run_name="__main__")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    flat = " ".join(out.split())
    above = re.split(
        r"^(?:def|class|@)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE
    )[0]
    lines = re.findall(r"^([a-z]\w*)(?:: [\w |]+)? = (.+?)  # (.+)$", above, re.MULTILINE)
    assert len(lines) >= 5
    for key, default, comment in lines:
        assert " ".join(f"--{key}={ast.literal_eval(default)!r} {comment}".split()) in flat


CONFIGS = sorted((ROOT / "config").glob("*.py"))


def test_there_are_config_files():
    """The glob below finds at least the Shakespeare run."""
    assert "train_shakespeare.py" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_gives_valid_settings(path, device_type, monkeypatch):
    """The file runs for both kinds of device and sets something that gpt.py accepts."""
    monkeypatch.setattr(hub, "get", lambda name: Path("models") / name / "best.pt")
    before = {name: getattr(gpt, name) for name in gpt.SETTINGS}
    script = before | {"__file__": gpt.__file__}
    derived = {"device_type": device_type, "native_bfloat16": device_type == "cuda"}
    configurator.configure(
        script,
        [f"config/{path.name}"],
        gpt.SETTINGS,
        gpt.check_setting,
        derive=lambda: derived,
    )
    after = {name: script[name] for name in gpt.SETTINGS}
    assert after != before
    gpt.checked_settings(**after)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_begins_with_its_command(path):
    """The first line is a comment that can be pasted into a shell."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.match(
        rf"# .*\b(python|torchrun) .*gpt\.py .*config/{re.escape(path.name)}\b", first
    ), first
