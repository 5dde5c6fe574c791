"""configurator.py: config files and --key=value flags, for every script.

A script hands over its own globals, its settings and the check that every value must pass. A
config file is plain Python that assigns to the settings' names. It starts from their current
values, so it can build on them and branch: `if device_type == "cpu": ...`. Config files run from
left to right, and flags override files wherever they stand.
"""

import errno
import gc
import os
import sys
import textwrap
import types
from pathlib import Path

# Settings of other programs and of earlier versions of this one, and what replaces them here.
RENAMED = {
    # nanoGPT's train.py and sample.py
    "start": "in sample.py, --prompt gives the text to continue",
    "max_new_tokens": "sample.py takes the length of a sample as --max_tokens",
    "decay_lr": "--lr_schedule=constant turns off learning rate decay",
    "backend": "leave it out, since the device decides how processes communicate",
    "always_save_checkpoint": "leave it out, since ckpt.pt is saved before every evaluation",
    "wandb_project": "set the environment variable WANDB_PROJECT instead",
    "wandb_run_name": "set the environment variable WANDB_NAME instead",
    # earlier versions of this program
    "eval_text": "evaluate a text with python evaluate.py --text=FILE",
    "eval_stride": "evaluate in overlapping windows with python evaluate.py --stride=TOKENS",
    "keep_checkpoints": "leave it out, since a run keeps its last checkpoint and its best one",
    "export": "write a model for Hugging Face with python hub.py export RUN FOLDER",
}

# torchrun sets all of these; a process that finds only some of them was not started by it.
TORCHRUN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOST_PROCESS = "Connection closed by peer"  # from torch.distributed, when another process ends
HELP_WIDTH = 100
HELP_INDENT = 37


# ---- Values ----
def checked(name, value, settings, check):
    """Return the value as the setting `name` stores it. Raises ValueError, naming the remedy."""
    if name not in settings and name in RENAMED:
        raise ValueError(f"unknown setting {name!r}: {RENAMED[name]}")
    return check(name, value, settings)


def value_of(text, kind):
    """Return what a flag's text means for a setting of type `kind`.

    A text that has no such meaning is returned as it is, and the check then rejects its type.
    """
    if kind is str:
        return text
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text) if kind is float else int(text)
    except ValueError:
        return text


# ---- Flags ----
def text_of_bare_flag(name, setting, rest):
    """Return the text of a flag without an equals sign.

    The text may be the first word of rest, which is then removed from rest. Raises ValueError if
    the flag needs a value and has none.
    """
    if setting.type is bool:
        if rest and rest[0].lower() in ("true", "false", "1", "0", "none"):
            return rest.pop(0)
        return "True"
    if rest and not rest[0].startswith("--"):
        return rest.pop(0)
    if setting.type is str and setting.optional:
        return ""  # the only value other than None that a bare flag can mean
    raise ValueError(f"--{name} needs a value, as in --{name}=VALUE")


def read_flags(argv, settings, check):
    """Return (words, flags) of a command line.

    words: the arguments that are not flags.
    flags: {name: value} of --name=value, --name value and a bare --name.
    """
    words = []
    flags = {}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        if name in settings:
            if not equals:
                text = text_of_bare_flag(name, settings[name], rest)
            text = value_of(text, settings[name].type)
        flags[name] = checked(name, text, settings, check)
    return words, flags


# ---- Config files ----
def find_config(word, folder):
    """Return the path of a config file, as given or beside the script. Raises FileNotFoundError."""
    given = Path(os.path.expanduser(word))
    for path in (given, Path(folder) / given):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"config file {word} does not exist (settings are given as --key=value)"
    )


def run_config(path, names):
    """Run a config file with `names` defined; return all names after it. Raises ValueError."""
    after = names | {"__file__": str(path), "__name__": "config"}
    try:
        source = path.read_text(encoding="utf-8-sig")
        exec(compile(source, str(path), "exec"), after)  # noqa: S102
    except SyntaxError as e:
        raise ValueError(f"{path}, line {e.lineno}: {e.msg}") from e
    except Exception as e:  # a config file may raise anything
        # These names are defined here, so the error comes from a file that this one imports.
        if isinstance(e, NameError) and e.name in names:
            raise ValueError(
                f"{path}: it imports a config file in which {e.name} is not defined: name both "
                "files on the command line instead, as in gpt.py config/a.py config/b.py"
            ) from e
        kind = "" if isinstance(e, (ValueError, OSError)) else f"{type(e).__name__}: "
        raise ValueError(f"{path}: {kind}{e}") from e
    return after


def read_config(path, names, settings, check):
    """Return {name: value} of the settings that a config file assigns. Raises ValueError.

    names: what the file may read, namely the settings' values and what is derived from them.
    """
    assigned = {}
    for name, value in run_config(path, names).items():
        is_helper = isinstance(value, types.ModuleType) or callable(value)
        is_unchanged = name in names and value is names[name]
        if name.startswith("_") or is_helper or is_unchanged:
            continue
        try:
            assigned[name] = checked(name, value, settings, check)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
    return assigned


def configure(script, argv, settings, check, derive=dict, word_settings=()):
    """Set the settings in `script`, a script's own globals, as the command line argv says.

    settings: {name: Setting} of the script.
    check: a function of (name, value, settings) that returns the value or raises ValueError.
    derive: returns what config files may read besides the settings; called after the flags are set.
    word_settings: the settings that take the words that are not flags, in this order; if there
        are none, words are config files.
    Raises ValueError and FileNotFoundError.
    """
    words, flags = read_flags(argv, settings, check)
    if word_settings:
        if len(words) > len(word_settings):
            word = words[len(word_settings)]
            raise ValueError(f"{word!r} is one word too many: settings are given as --key=value")
        flags |= dict(zip(word_settings, words))
        words = []
    script.update(flags)
    for word in words:
        path = find_config(word, Path(script.get("__file__", "")).parent)
        names = {name: script[name] for name in settings} | derive()
        script.update(read_config(path, names, settings, check) | flags)


# ---- Scripts ----
def help_text(script, settings):
    """Return the script's docstring and, for each setting, its flag with the current value."""
    lines = [script["__doc__"].strip(), ""]
    for name, setting in settings.items():
        flag = f"--{name}={script[name]!r}"
        text = f"{flag:{HELP_INDENT - 1}} {setting.help}"
        lines += textwrap.wrap(text, HELP_WIDTH, subsequent_indent=" " * HELP_INDENT)
    return "\n".join(lines)


def open_closed_streams():
    """Connect the standard streams that the caller closed, as `>&-` does, to the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def process_rank():
    """Return this process's rank among those that torchrun started, and 0 outside of torchrun."""
    if all(os.environ.get(name) for name in TORCHRUN_NAMES):
        return int(os.environ["RANK"])
    return 0


# What torch, CUDA and C++ say when a GPU or the computer has no memory left (also in gpt.py)
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")


def lacks_memory(error):
    is_said = any(words in str(error) for words in NO_MEMORY) and not isinstance(error, ValueError)
    return is_said or isinstance(error, MemoryError)


def explains_itself(error):
    """Return whether an error's message is enough, as for a user's mistake or something missing."""
    if isinstance(error, RuntimeError):  # any other RuntimeError is a bug
        return lacks_memory(error) or LOST_PROCESS in str(error)
    return True


def report(error):
    """Print an error as one sentence, unless the first process prints the same one."""
    message = " ".join(str(error).split())
    if LOST_PROCESS in message:
        message = "another process has ended"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        message = "the disk is full: free some space, then run the command again"
    if lacks_memory(error):
        message = f"out of memory ({message}): close other programs, or use a smaller model or text"

    rank = process_rank()
    distributed = sys.modules.get("torch.distributed")
    if rank == 0:
        print("error:", message, file=sys.stderr)
    elif distributed and distributed.is_initialized():  # before that, all processes fail alike
        print(f"error in process {rank}:", message, file=sys.stderr)


def run_script(script, main, settings, check, derive=dict, word_settings=()):
    """Configure a script from its command line, and run main().

    A mistake is reported in one sentence, with exit code 2. The exit code is 130 after Ctrl-C and
    141 if the output was closed. It is 128 + signal if main returns {"stopped_by": signal}. With
    TRACEBACK=1 in the environment, a mistake is shown with its traceback.

    script: the globals of the script; the other arguments are those of configure.
    """
    open_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that lacks a character must not end a run.
        sys.stdout.reconfigure(errors="replace")
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(help_text(script, settings), flush=True)
            return
        configure(script, sys.argv[1:], settings, check, derive, word_settings)
        figures = main() or {}
        sys.stdout.flush()
        if figures.get("stopped_by"):
            sys.exit(128 + figures["stopped_by"])
    except BrokenPipeError:  # the output goes to `head`, say, which reads no further
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # or Python would raise the error again on exit
        sys.exit(141)  # 128 + SIGPIPE, as in other programs
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        if os.environ.get("TRACEBACK") or not explains_itself(e):
            raise
        report(e)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # Otherwise Python would spend its last second searching torch's objects for cycles.
        gc.freeze()
