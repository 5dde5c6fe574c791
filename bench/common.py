"""common.py: what the bench scripts share.

It describes this machine, loads a peer's model, measures cases in turn and keeps the results.
"""

import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = os.environ.get("CHECKOUT") or str(ROOT)  # a worker of in_turn may use another one
sys.path.insert(0, CHECKOUT)


# ---- The machine ----
def hardware():
    """Return the name of the GPU, or else of the processor, with the number of GPUs or threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    level = torch.backends.cpu.get_cpu_capability()
    if level == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        level = "AVX512-BF16"
    return f"{torch.get_num_threads()} cores of {processor_name()}, {level}"


def processor_name():
    """Return the processor's name as Linux gives it, or else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def best_device():
    """Return the GPU if there is one, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for(device):
    """Wait until a GPU has finished the work that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- Flags ----
def flags(**defaults):
    """Return the defaults, overridden by the command line's --key=value flags."""
    for flag in sys.argv[1:]:
        key, found, value = flag.removeprefix("--").partition("=")
        if key not in defaults or not found:
            raise SystemExit(f"{flag}: the flags are " + ", ".join(f"--{key}=" for key in defaults))
        defaults[key] = type(defaults[key])(value)
    return defaults


# ---- Peers ----
def nanogpt(path):
    """Import model.py of the nanoGPT checkout at path, and return the module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- Runs ----
def train(*arguments, checkout=ROOT, **env):
    """Run a checkout's gpt.py as a user does; return the lines of its log.jsonl as dicts.

    env: environment variables. Raises CalledProcessError if the run fails.
    """
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [sys.executable, Path(checkout) / "gpt.py", *arguments, f"--out_dir={out}"],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | env,
        )
        return read_log(out)


def read_log(out):
    """Return the lines of a run's log.jsonl as dicts."""
    text = (Path(out) / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def median_speed(log):
    """Return the median tokens per second of a log's lines, without the first two (setup)."""
    speeds = [line["tokens_per_s"] for line in log if "tokens_per_s" in line]
    return statistics.median(speeds[2:] or speeds)


# ---- Cases, measured in turn ----
def serve(prepare):
    """Serve as the process of one case, which is this script's only argument.

    Get ready by measure = prepare(case), then print measure() for each line of the input.
    """
    measure = prepare(json.loads(sys.argv[1]))
    print("READY", flush=True)
    for _ in sys.stdin:
        print(measure(), flush=True)


def is_worker():
    """Tell whether this process serves one case, which is then its command line's argument."""
    return len(sys.argv) == 2 and sys.argv[1].startswith("{")


def in_turn(cases, runs):
    """Measure each case `runs` times, A B C A B C ...; return {name: [numbers]}.

    Each case has a process of its own, which serves it. Getting ready may include compiling. On a
    CPU the processes get ready one after the other, and on a GPU all at once. A process that fails
    is named and left out.

    cases: {name: (script, case)}; the process is `script CASE-as-JSON`. If the case names another
        "checkout" of this project, gpt is imported from there.
    """
    workers = {}
    found = {}
    for name, (script, case) in cases.items():
        workers[name] = subprocess.Popen(
            [sys.executable, script, json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"CHECKOUT": case.get("checkout", "")},
        )
        if not torch.cuda.is_available() and is_ready(name, workers[name]):
            found[name] = []
    if torch.cuda.is_available():
        found = {name: [] for name, worker in workers.items() if is_ready(name, worker)}

    for run in range(runs):
        for name in list(found):
            number = ask(workers[name])
            if number is None:
                del found[name]
                print(f"{name}: failed", flush=True)
                continue
            found[name].append(number)
            print(f"run {run + 1}: {name} {number:,.1f}", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return found


def is_ready(name, worker):
    """Wait until a worker is ready or has failed, and tell whether it is ready."""
    if any(line.startswith("READY") for line in worker.stdout):
        return True
    print(f"{name}: failed", flush=True)
    return False


def ask(worker):
    """Return the number that a worker measures now, or None if it has failed."""
    try:
        worker.stdin.write("\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return None
    answer = worker.stdout.readline().split()
    return float(answer[-1]) if answer else None


def ratios(numbers, others):
    """Return the median, lowest and highest ratio of paired numbers, as a list."""
    found = sorted(a / b for a, b in zip(numbers, others, strict=True))
    return [round(x, 2) for x in (statistics.median(found), found[0], found[-1])]


# ---- Results ----
def commit(root=ROOT):
    """Return the commit of a checkout, with "-dirty" if its files differ from it.

    Differences in the results and in README do not count.
    """

    def git(*words):
        command = ["git", "-C", root, *words]
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout

    changed = git("status", "--porcelain", "-uno", "--", ":!bench/results.jsonl", ":!README.md")
    return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")


COMMIT = commit()  # this is known before anything runs


def record(bench, **figures):
    """Print a result as a line of JSON and append it to bench/results.jsonl."""
    line = {
        "bench": bench,
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "hardware": hardware(),
        "torch": torch.__version__,
        "commit": COMMIT,
        **figures,
    }
    print(json.dumps(line), flush=True)
    with open(ROOT / "bench" / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def show(bench, **figures):
    """Print a result without recording it. --small=1 calls this instead of record."""
    print(bench, figures, flush=True)
