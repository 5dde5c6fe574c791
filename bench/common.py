"""What the bench scripts share: this machine's description, a peer's model, paired runs, the file of results."""

import datetime
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def hardware():
    """Return the processor's, or else the GPU's, name, with the number of threads or GPUs."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    level = torch.backends.cpu.get_cpu_capability()
    bf16 = (
        ", AVX512-BF16"
        if level == "AVX512" and torch.cpu._is_avx512_bf16_supported()
        else f", {level}"
    )
    return f"{torch.get_num_threads()} cores of {name}{bf16}"


def flags(**defaults):
    """Return the defaults with the command line's --key=value flags in their place."""
    for flag in sys.argv[1:]:
        key, found, value = flag.removeprefix("--").partition("=")
        if key not in defaults or not found:
            raise SystemExit(f"{flag}: the flags are " + ", ".join(f"--{key}=" for key in defaults))
        defaults[key] = type(defaults[key])(value)
    return defaults


def nanogpt(path):
    """Return model.py of the nanoGPT checkout at path, imported."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(prepare):
    """Be the process of one case, a script's only argument: get ready, then measure for each line of input."""
    measure = prepare(json.loads(sys.argv[1]))
    print("READY", flush=True)
    for _ in sys.stdin:
        print(measure(), flush=True)


def in_turn(cases, runs):
    """Measure each of the cases {name: (script, case)} `runs` times, A B C A B C ...; return {name: [numbers]}.

    Each is a process of its own, `script CASE-as-JSON`, that serves: it prints READY, then a number for each line it
    reads. They get ready, which may mean to compile, one after the other on a CPU and all at once on a GPU, whose
    numbers come once all are. A process that fails is named and left out.
    """
    workers, found = {}, {}

    def wait(name):
        for line in workers[name].stdout:
            if line.startswith("READY"):
                found[name] = []
                return
        print(f"{name}: failed", flush=True)

    for name, (script, case) in cases.items():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers[name] = subprocess.Popen([sys.executable, script, json.dumps(case)], **pipes)
        if not torch.cuda.is_available():
            wait(name)
    for name in cases:
        if torch.cuda.is_available():
            wait(name)
    for run in range(runs):
        for name in list(found):
            workers[name].stdin.write("\n")
            workers[name].stdin.flush()
            answer = workers[name].stdout.readline().split()
            if not answer:
                del found[name]
                print(f"{name}: failed", flush=True)
                continue
            found[name].append(float(answer[-1]))
            print(f"run {run + 1}: {name} {found[name][-1]:,.1f}", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return found


def ratios(numbers, others):
    """Return the median, lowest and highest ratio of paired numbers, as a list."""
    found = sorted(a / b for a, b in zip(numbers, others, strict=True))
    return [round(x, 2) for x in (statistics.median(found), found[0], found[-1])]


def commit():
    """Return the commit of the code that runs, with "-dirty" if more than results and README differ from it."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", ROOT, *words], check=False, capture_output=True, text=True
        ).stdout

    changed = git("status", "--porcelain", "-uno", "--", ":!bench/results.jsonl", ":!README.md")
    return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")


COMMIT = commit()  # before anything runs


def record(bench, **figures):
    """Print a result and append it to bench/results.jsonl."""
    line = {
        "bench": bench,
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "hardware": hardware(),
        "torch": torch.__version__,
        "commit": COMMIT,
        **figures,
    }
    print(json.dumps(line))
    with open(ROOT / "bench" / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
