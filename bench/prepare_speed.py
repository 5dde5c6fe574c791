"""Measure prepare.py: training a BPE vocabulary, and tokenizing 1 GB with GPT-2's against one thread of tiktoken.

    python bench/prepare_speed.py [bpe] [tokenize] [--small=FILE] [--gb=1.0] [--runs=3]

The text is made of the sources in Python's standard library and in the installed packages, torch's among them,
repeated where they are not enough, in files of 10 MB. GPT-2's encoding must be in TIKTOKEN_CACHE_DIR or come from the network.
FILE is a small text for a vocabulary of 4,096, as tiny Shakespeare. Memory is that of prepare.py and its worker
processes together: the peak of the sum of their resident sets (pages shared by several count for each), and of
their proportional sets (shared pages count once).
"""

import argparse
import codecs
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import tiktoken
from common import ROOT, record


def sources():
    """Yield the sources' contents, again and again."""
    paths = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}
    suffixes = (".py", ".h", ".pyi", ".md", ".txt")
    files = sorted({p for path in paths for p in path.rglob("*") if p.suffix in suffixes})
    while True:
        for path in files:
            content = path.read_bytes()
            try:
                content.decode()
            except UnicodeDecodeError:
                continue
            if b"\0" not in content and not content.startswith(codecs.BOM_UTF8):
                yield content


def write_sources(folder, n_bytes, file_bytes=10_000_000):
    """Fill folder with texts of about file_bytes each, n_bytes together."""
    folder.mkdir()
    contents = sources()
    for n in range(round(n_bytes / file_bytes)):
        with open(folder / f"{n:04d}.txt", "wb") as file:
            while file.tell() < file_bytes:
                file.write(next(contents))


def memory_of(pid):
    """Return (resident, proportional) MiB of a process and its children."""
    rss = pss = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    for process in (pid, *children):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        sizes = {
            line.split(":")[0]: int(line.split()[1]) for line in lines[1:] if line.endswith("kB")
        }
        rss, pss = rss + sizes["Rss"], pss + sizes["Pss"]
    return rss / 1024, pss / 1024


def run_prepare(*arguments):
    """Run prepare.py; return (seconds, its output, peak resident MiB, peak proportional MiB)."""
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryFile("w+") as out:
        command = [
            sys.executable,
            ROOT / "prepare.py",
            *arguments,
            f"--data_dir={data}",
            "--name=x",
        ]
        began, peaks = time.time(), (0.0, 0.0)
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.1)
            try:
                peaks = tuple(map(max, peaks, memory_of(process.pid)))
            except (OSError, KeyError):  # a process has just ended
                continue
        seconds = time.time() - began
        out.seek(0)
        text = out.read()
        if process.returncode:
            raise SystemExit(text)
        return (
            seconds,
            text,
            *peaks,
            json.loads((Path(data) / "x" / "meta.json").read_text(encoding="utf-8")),
        )


def bench_bpe(title, path, vocab_size):
    seconds, out, rss, pss, meta = run_prepare(
        f"--input={path}", "--tokenizer=bpe", f"--vocab_size={vocab_size}"
    )
    trained = next(line for line in out.splitlines() if line.startswith("trained"))
    record(
        "prepare_bpe",
        text=title,
        megabytes=round((meta["train_bytes"] + meta["val_bytes"]) / 1e6, 1),
        vocab_size=meta["vocab_size"],
        trained=trained,
        whole_command_s=round(seconds, 1),
        peak_rss_mib=round(rss),
        peak_pss_mib=round(pss),
    )


def bench_tokenize(folder, runs):
    encoding = tiktoken.get_encoding("gpt2")
    ratios, results = [], []
    for _ in range(runs):
        texts = (path.read_bytes().decode() for path in sorted(folder.iterdir()))
        one_thread = n_tokens = 0
        for text in texts:
            began = time.perf_counter()
            n_tokens += len(encoding.encode_ordinary(text))
            one_thread += time.perf_counter() - began
        seconds, _, rss, pss, meta = run_prepare(f"--input={folder}", "--tokenizer=gpt2")
        documents = len(list(folder.iterdir()))
        assert meta["train_tokens"] + meta["val_tokens"] == n_tokens + documents
        ratios.append(one_thread / seconds)
        results.append((one_thread, seconds, rss, pss))
        print(
            f"one thread {one_thread:.1f} s, prepare.py {seconds:.1f} s: {ratios[-1]:.2f} times",
            flush=True,
        )
    one_thread, seconds, rss, pss = (
        round(statistics.median(column), 1) for column in zip(*results)
    )
    record(
        "prepare_tokenize",
        gigabytes=round((meta["train_bytes"] + meta["val_bytes"]) / 1e9, 2),
        tokens=n_tokens,
        one_thread_s=one_thread,
        prepare_s=seconds,
        ratio=round(statistics.median(ratios), 2),
        ratios=[round(ratio, 2) for ratio in ratios],
        peak_rss_mib=round(max(row[2] for row in results)),
        peak_pss_mib=round(max(row[3] for row in results)),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["bpe", "tokenize"])
    parser.add_argument("--small")
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if "bpe" in options.parts:
            if options.small:
                bench_bpe(Path(options.small).name, options.small, 4096)
            write_sources(Path(temporary) / "bpe", 110_000_000)  # a tenth is for validation
            bench_bpe(
                "Python, C and text of the installed packages", Path(temporary) / "bpe", 32768
            )
        if "tokenize" in options.parts:
            write_sources(Path(temporary) / "gb", options.gb * 1e9)
            bench_tokenize(Path(temporary) / "gb", options.runs)


if __name__ == "__main__":
    main()
