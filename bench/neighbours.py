"""Measure training beside busy processes, versus fixed numbers of threads and ways of waiting.

    python bench/neighbours.py [--seconds=20] [--rounds=2]

A neighbour is a process that computes without end, at equal priority. Beside none, one and two of
them, gpt.py's default model trains for some seconds in turn: as gpt.py chooses ("ours"), and with
each fixed choice. All are compiled beforehand, on two cores, ours for each number of threads. Ours
chooses at the beginning of each turn, by the compiled model, which counts. A run chooses by the
plain model, compiles for the number that it chose, and does so only if the load average says that
others are busy. The ratio is
ours / the best fixed choice in that situation.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import torch
from common import ROOT, flags, record

import gpt

CHOICES = {
    "ours": {},
    "all threads": {},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "passive": {"OMP_WAIT_POLICY": "passive"},  # threads sleep at once while they wait
}


class Worker:
    """A process that trains for as long as it is asked to."""

    def __init__(self, name):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | CHOICES[name],
        )
        self.ask(1)

    def ask(self, seconds):
        """Return the tokens per second of training for some seconds."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def new_trainer():
    """Return a Trainer of gpt.py's default model, with compiled blocks."""
    settings = gpt.checked_settings(**gpt.UNFITTED, dataset="pydoc", max_minutes=2.0)
    machine = gpt.set_up_machine(settings)
    machine.say = lambda text: print(text, file=sys.stderr, flush=True)
    machine.threads.say = machine.say
    folder = gpt.prepare_if_missing("pydoc", ROOT / "data")
    data = gpt.Data(folder, settings.block_size, settings.seed)
    model = gpt.GPT(gpt.model_config(settings, data.meta["vocab_size"]))
    return gpt.Trainer(settings, model, data, machine)


def be_a_worker(name):
    """Train for the seconds in each line of the input; print the tokens per second."""
    trainer = new_trainer()
    trainer.compile()
    threads = trainer.machine.threads
    if name == "ours":  # compile for both numbers of threads
        for count in (1, threads.most):
            torch.set_num_threads(count)
            trainer.try_micro_batch()
    step = 0
    for line in sys.stdin:
        began = time.monotonic()
        first = step
        if name == "ours":
            threads.choose(trainer.try_micro_batch)
        while time.monotonic() - began < float(line):
            trainer.gradients(step * trainer.rows_per_step)
            trainer.update()
            step += 1
        speed = (step - first) * trainer.tokens_per_step / (time.monotonic() - began)
        print(json.dumps(speed), flush=True)


def main():
    f = flags(seconds=20.0, rounds=2)
    workers = {name: Worker(name) for name in CHOICES}
    for count in (0, 1, 2):
        neighbours = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)
        ]
        speeds = {name: [] for name in workers}
        try:
            for _ in range(f["rounds"]):
                for name, worker in workers.items():
                    speeds[name].append(worker.ask(f["seconds"]))
        finally:
            for neighbour in neighbours:
                neighbour.kill()
        medians = {name: round(statistics.median(found)) for name, found in speeds.items()}
        best = max(value for name, value in medians.items() if name != "ours")
        ratio = round(medians["ours"] / best, 3)
        record("neighbours", neighbours=count, tokens_per_s=medians, ratio=ratio, **f)
    for worker in workers.values():
        worker.process.stdin.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        be_a_worker(sys.argv[2])
    else:
        main()
