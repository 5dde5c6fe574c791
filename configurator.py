"""Turn config files and --key=value flags into checked overrides of a script's settings.

A script's settings are its assignments `name = value  # help text` above the first def or class. A config
file is plain Python that assigns to the same names; it starts from their current values, so it can branch on
them (`if device_type == "cpu": ...`). Flags win over files wherever they stand. Both pass one check: known
name, right type.
"""

import ast
import difflib
import errno
import functools
import gc
import math
import os
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import NamedTuple


class Setting(NamedTuple):
    type: type
    optional: bool  # may be None
    help: str


@functools.lru_cache
def read_settings(source):
    """Return {name: Setting} of a script's source; the type is the annotation's or else the value's."""
    settings, lines = {}, source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        comment = re.match(r"[a-z]\w*.* = .+  # (.+)$", lines[node.lineno - 1])
        if isinstance(node, ast.Assign | ast.AnnAssign) and comment:
            if isinstance(node, ast.AnnAssign):
                name, types_ = ast.unparse(node.target), ast.unparse(node.annotation).split(" | ")
            else:
                name, types_ = (
                    ast.unparse(node.targets[0]),
                    [type(ast.literal_eval(node.value)).__name__],
                )
            kind = {"bool": bool, "int": int, "float": float, "str": str}[types_[0]]
            settings[name] = Setting(kind, "None" in types_, comment[1])
    return settings


def checked(settings, name, value):
    """Return value as the setting `name` takes it. Raises ValueError for an unknown name or a wrong type."""
    if name not in settings:
        close = difflib.get_close_matches(name, settings, 1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else "--help lists all; names of your own begin with _"
        )
        raise ValueError(f"unknown setting {name!r}: {hint}")
    kind = settings[name].type
    if (kind is bool and type(value) is int and value in (0, 1)) or (
        kind is float and type(value) is int
    ):
        value = kind(value)
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: expected a finite number")
    if type(value) is kind or (value is None and settings[name].optional):
        return value
    words = {bool: "True, False", int: "an integer", float: "a number", str: "text"}
    expected = f"{words[kind]}, None" if settings[name].optional else words[kind]
    expected = " or ".join(expected.rsplit(", ", 1))
    raise ValueError(f"{name} is {value!r}: expected {expected}")


def parsed(settings, name, text):
    """Return what a flag's text means for the setting `name`. Raises ValueError as `checked` does."""
    if name in settings and settings[name].type is not str:  # strings stay raw
        words = {"true": True, "false": False, "none": None}
        read = float if settings[name].type is float else int
        try:
            text = words[text.lower()] if text.lower() in words else read(text)
        except ValueError:
            pass  # stays a string, which is then named as a wrong type
    return checked(settings, name, text)


def read_flags(settings, argv):
    """Return (words, flags): what is no flag, and {name: value} of --name=value, --name value and --name."""
    words, flags, rest = [], {}, list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        if not equals and name in settings:
            is_bool = settings[name].type is bool
            truths = ("true", "false", "1", "0", "none")
            if rest and (rest[0].lower() in truths if is_bool else not rest[0].startswith("--")):
                text = rest.pop(0)
            elif is_bool:
                text = "True"
            elif settings[name].type is str and settings[name].optional:
                text = ""  # what else than None a bare flag can mean
            else:
                raise ValueError(f"--{name} needs a value, as in --{name}=VALUE")
        flags[name] = parsed(settings, name, text)
    return words, flags


def read_config(path, settings, names):
    """Return the settings that a config file assigns when it runs among `names`. Raises ValueError."""
    after = names | {"__file__": str(path), "__name__": "config"}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), after)  # noqa: S102
    except SyntaxError as e:
        raise ValueError(f"{path}, line {e.lineno}: {e.msg}") from e
    except Exception as e:  # a config file may raise anything
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from e
    changed = {
        k: v for k, v in after.items() if k[0] != "_" and (k not in names or v is not names[k])
    }
    helpers = {k for k, v in changed.items() if isinstance(v, types.ModuleType) or callable(v)}
    try:
        return {k: checked(settings, k, v) for k, v in changed.items() if k not in helpers}
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def find_config(word, script):
    """Return the config file's path: as given, or beside the script. Raises FileNotFoundError."""
    for path in (Path(word), Path(script).parent / word):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"config file {word} does not exist (settings are given as --key=value)"
    )


def configure(script, argv, derive=dict, word_setting=None):
    """Override the settings in `script`, the globals of a script, by argv.

    A word that is no flag names a config file, or, with word_setting, is that setting's value. derive()
    returns what config files may read besides the settings; it runs when the flags are set. Raises ValueError
    and FileNotFoundError.
    """
    settings = read_settings(Path(script["__file__"]).read_text(encoding="utf-8"))
    words, flags = read_flags(settings, argv)
    if word_setting and words:
        flags[word_setting] = words.pop(0)
        if words:
            raise ValueError(
                f"{words[0]!r} is one word too many: settings are given as --key=value"
            )
    script.update(flags)
    for word in words:
        names = {name: script[name] for name in settings} | derive()
        script.update(read_config(find_config(word, script["__file__"]), settings, names) | flags)


def help_text(script):
    lines = [script["__doc__"].strip(), ""]
    for name, setting in read_settings(
        Path(script["__file__"]).read_text(encoding="utf-8")
    ).items():
        flag = f"--{name}={script[name]!r}"
        lines += textwrap.wrap(f"{flag:36} {setting.help}", 110, subsequent_indent=" " * 37)
    return "\n".join(lines)


def run_script(script, main, derive=dict, word_setting=None):
    """Configure a script by its command line and run main(); a mistake is one sentence and exit code 2.

    Ctrl-C gives exit code 130, a closed output 141, and 128 + a signal that main returns as {"stopped_by":
    signal}. With TRACEBACK=1 in the environment, mistakes show where they were found.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal that lacks a character must not end a run
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(help_text(script), flush=True)
            return
        configure(script, sys.argv[1:], derive, word_setting)
        figures = main() or {}
        sys.stdout.flush()
        if figures.get("stopped_by"):
            sys.exit(128 + figures["stopped_by"])
    except BrokenPipeError:  # piped into head, say: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(141)  # 128 + SIGPIPE, as other programs
    except (ValueError, OSError, RuntimeError) as e:
        full, lost = "out of memory" in str(e), "Connection closed by peer" in str(e)
        if os.environ.get("TRACEBACK") or (isinstance(e, RuntimeError) and not full and not lost):
            raise
        words = "another process has ended" if lost else " ".join(str(e).split())  # on one line
        if isinstance(e, OSError) and e.errno == errno.ENOSPC and not e.filename:
            words += ": free some space, then go on with --init_from=resume"
        rank, joined = os.environ.get("RANK", "0"), sys.modules.get("torch.distributed")
        if rank == "0":
            print("error:", words, file=sys.stderr)
        elif joined and joined.is_initialized():  # before, the first one says the same
            print(f"error in process {rank}:", words, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # or Python would end by looking for cycles among all of torch's objects, for a second
