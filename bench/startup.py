"""Measure the time from a process's start to what a user waits for, versus `import torch`.

    python bench/startup.py [--runs=5] [--old=PATH]

Some cases take the time to the process's end. sample.py uses the model that comes with this
project, or a newer run. Each figure is the median of the runs in seconds, taken in turn. --old is
another checkout of this project, which is then measured, too.
"""

import statistics
import subprocess
import sys
import tempfile
import time

from common import ROOT, flags, record


def seconds(command, until=None, cwd=ROOT):
    """Return the seconds until a process ends or, with `until`, until its output continues past it.

    command: the words after `python`.
    until: bytes. Once they have been printed, the process is stopped.
    """
    began = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, *command], cwd=cwd, **pipes) as process:
        if until is None:
            process.communicate()
            seen = True
        else:
            seen = goes_past(until, process.stdout)
        took = time.perf_counter() - began
        if until is not None:
            process.kill()
        elif process.returncode:
            raise SystemExit(f"{command} failed with exit code {process.returncode}")
    if not seen:
        raise SystemExit(f"{command} did not print {until}")
    return took


def goes_past(until, file):
    """Read a file until the bytes `until` and one more have come; return whether they have."""
    seen = b""
    while not seen.partition(until)[2]:
        byte = file.read1(1)
        if not byte:
            return False
        seen += byte
    return True


def waits(out):
    """Return {what a user waits for: (command, what it prints then)}.

    out: a folder for runs.
    """
    shakespeare = ["gpt.py", "config/train_shakespeare.py", f"--out_dir={out}"]
    return {
        "import torch": (["-c", "import torch"], None),
        "import gpt": (["-c", "import gpt"], None),
        "gpt.py --help": (["gpt.py", "--help"], None),
        "gpt.py: first step": (shakespeare, b"step      1"),
        "gpt.py, not compiled: first step": ([*shakespeare, "--compile=False"], b"step      1"),
        "sample.py: first character": (["sample.py", "--prompt=ROMEO:"], b"ROMEO:"),
        "config/debug.py, to its end": (
            ["gpt.py", "config/debug.py", f"--out_dir={out}/debug"],
            None,
        ),
        "20 characters, to the end": (["sample.py", "--prompt=ROMEO:", "--max_tokens=20"], None),
    }


def measure(checkouts, runs, only=""):
    """Return {what a user waits for: {checkout's name: seconds of each run}}, measured in turn.

    checkouts: {name: path}. only: a text that the measured names contain.
    """
    found = {}
    with tempfile.TemporaryDirectory() as out:
        for what, wait in waits(out).items():
            if only in what:
                found[what] = {name: [] for name in checkouts}
                for _ in range(runs):
                    for name, path in checkouts.items():
                        found[what][name].append(seconds(*wait, cwd=path))
    return found


def main():
    f = flags(runs=5, old="")
    checkouts = {"this": ROOT} | ({"old": f["old"]} if f["old"] else {})
    medians = {name: {} for name in checkouts}
    for what, found in measure(checkouts, f["runs"]).items():
        for name, times in found.items():
            medians[name][what] = round(statistics.median(times), 2)
            print(f"{name:5s} {what:34s} {medians[name][what]:6.2f} s")
    more = {"old_seconds": medians["old"]} if f["old"] else {}
    record("startup", seconds=medians["this"], **more)


if __name__ == "__main__":
    main()
