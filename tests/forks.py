"""Scripts run as by a command line, in processes forked from one that has imported torch already.

To start Python and import torch anew for each would take minutes. Nothing of the project is imported
before the fork. Tests of closed outputs, terminals and torchrun, and some of signals, start real
processes instead.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# For scripts that are started anew: they draw no loss.png, which saves time.
NO_PICTURES = {"PYTHONPATH": str(Path(__file__).parent / "no_pictures")}

RUNNER = """
import atexit, gc, json, os, runpy, signal, sys, traceback
import torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
import numpy, tiktoken, matplotlib.figure, matplotlib.backends.backend_agg

def work(job):
    for number, name in enumerate(job["files"]):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
    signal.alarm(job["timeout"])
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    if not job["pictures"]:
        sys.modules["matplotlib"] = None  # as if it were not installed
    sys.stdin, sys.argv, sys.path[0] = open(0), job["argv"], os.path.dirname(job["argv"][0])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        exec(job["code"], {"__name__": "__main__"})
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as e:
        return e.code or 0
    except BaseException:
        traceback.print_exc()
        return 1

gc.freeze()  # or each child would copy the pages of all these objects at its first garbage collection
for line in sys.stdin:
    children = []
    for job in json.loads(line):
        if child := os.fork():
            children.append(child)
            continue
        code = work(job)
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""
runner = None


def run_jobs(*jobs, timeout=120):
    """Run jobs at once; return a subprocess.CompletedProcess for each.

    A job is a dict with argv (a script's path and its words) and, if need be, code (to run before, or alone, if argv
    begins with no .py), cwd, env (added to the current one), stdin, a text, and pictures, whether it may draw.
    """
    global runner
    if runner is None:
        pipe = subprocess.PIPE
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        runner = subprocess.Popen(
            [sys.executable, "-c", RUNNER], stdin=pipe, stdout=pipe, env=environment, text=True
        )
        atexit.register(runner.stdin.close)
    with tempfile.TemporaryDirectory() as folder:
        whole = []
        for i, job in enumerate(jobs):
            files = [Path(folder) / f"{i}-{kind}" for kind in ("stdin", "stdout", "stderr")]
            for path in files:
                path.write_text(
                    job.get("stdin") or "" if path is files[0] else "", encoding="utf-8"
                )
            plain = {
                "code": "",
                "pictures": False,
                "cwd": os.getcwd(),
                "timeout": timeout,
                "files": list(map(str, files)),
            }
            environment = {"OMP_NUM_THREADS": "1"} | job.get("env", {})
            whole.append(plain | job | {"env": environment, "argv": list(map(str, job["argv"]))})
            whole[-1]["cwd"] = str(whole[-1]["cwd"])
        runner.stdin.write(json.dumps(whole) + "\n")
        runner.stdin.flush()
        codes = json.loads(runner.stdout.readline())
        read = [
            [Path(name).read_text(encoding="utf-8", errors="replace") for name in job["files"][1:]]
            for job in whole
        ]
    return [
        subprocess.CompletedProcess(job["argv"], code, *texts)
        for job, code, texts in zip(whole, codes, read)
    ]
