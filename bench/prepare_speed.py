"""Measure prepare.py: training a BPE vocabulary, and tokenizing 1 GB versus tiktoken in one thread.

    python bench/prepare_speed.py [bpe] [tokenize] [--small=FILE] [--mb=110] [--gb=1] [--runs=3]
    python bench/prepare_speed.py versus --before=CHECKOUT [--gb=1] [--runs=3]

The text is made of the sources in Python's standard library and in the installed packages, such as
torch. They are repeated if they are not enough, and the files have 10 MB each. GPT-2's encoding
must be in TIKTOKEN_CACHE_DIR or come from the network. FILE is a small text for a vocabulary of
4,096, such as tiny Shakespeare.

Memory is that of prepare.py and its worker processes together. It is the peak of the sum of their
resident sets, in which a shared page counts for each process, and of the sum of their proportional
sets, in which a shared page counts once.
"""

import argparse
import codecs
import json
import random
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
    """Yield the contents of the sources, again and again."""
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
    """Fill a folder with texts of about file_bytes each and n_bytes in total."""
    folder.mkdir()
    contents = sources()
    for n in range(round(n_bytes / file_bytes)):
        with open(folder / f"{n:04d}.txt", "wb") as file:
            while file.tell() < file_bytes:
                file.write(next(contents))


def memory_of(pid):
    """Return (resident, proportional) MiB of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    resident = proportional = 0
    for process in (pid, *children):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        sizes = {}
        for line in lines[1:]:
            name, size, *_ = line.split()
            sizes[name] = int(size)
        resident += sizes["Rss:"]
        proportional += sizes["Pss:"]
    return resident / 1024, proportional / 1024


def run_prepare(*arguments, project=ROOT):
    """Run a project's prepare.py; return (seconds, output, peak resident and proportional MiB, the meta)."""
    with tempfile.TemporaryDirectory() as data, tempfile.TemporaryFile("w+") as out:
        command = [sys.executable, Path(project) / "prepare.py", *arguments]
        command += [f"--data_dir={data}", "--name=x"]
        peaks = (0.0, 0.0)
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.1)
            try:
                peaks = tuple(map(max, peaks, memory_of(process.pid)))
            except (OSError, KeyError):  # a process has just ended
                continue
        seconds = time.monotonic() - began
        out.seek(0)
        text = out.read()
        if process.returncode:
            raise SystemExit(text)
        meta = json.loads((Path(data) / "x" / "meta.json").read_text(encoding="utf-8"))
    return seconds, text, *peaks, meta


def bench_bpe(title, path, vocab_size):
    """Measure a whole command that trains a vocabulary, and record it."""
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


def one_thread_of_tiktoken(paths):
    """Return (seconds, number of tokens) of encoding texts with GPT-2's tokens in this thread."""
    encoding = tiktoken.get_encoding("gpt2")
    seconds = 0.0
    n_tokens = 0
    for path in paths:
        text = path.read_bytes().decode()
        began = time.perf_counter()
        n_tokens += len(encoding.encode_ordinary(text))
        seconds += time.perf_counter() - began
    return seconds, n_tokens


def bench_tokenize(folder, runs):
    """Measure how fast prepare.py and tiktoken tokenize a folder, in turn, and record both."""
    paths = sorted(folder.iterdir())
    rows = []
    for _ in range(runs):
        one_thread, n_tokens = one_thread_of_tiktoken(paths)
        seconds, _, rss, pss, meta = run_prepare(f"--input={folder}", "--tokenizer=gpt2")
        # Each document ends with a token of its own.
        assert meta["train_tokens"] + meta["val_tokens"] == n_tokens + len(paths)
        ratio = one_thread / seconds
        rows.append((one_thread, seconds, rss, pss, ratio))
        print(
            f"one thread {one_thread:.1f} s, prepare.py {seconds:.1f} s: {ratio:.2f} times",
            flush=True,
        )
    one_thread, seconds, rss, pss, ratios = zip(*rows)
    record(
        "prepare_tokenize",
        gigabytes=round((meta["train_bytes"] + meta["val_bytes"]) / 1e9, 2),
        tokens=n_tokens,
        one_thread_s=round(statistics.median(one_thread), 1),
        prepare_s=round(statistics.median(seconds), 1),
        ratio=round(statistics.median(ratios), 2),
        ratios=[round(ratio, 2) for ratio in ratios],
        peak_rss_mib=round(max(rss)),
        peak_pss_mib=round(max(pss)),
    )


def chinese(n_bytes, seed=1):
    """Return a text of random Chinese words and sentences, in indented paragraphs."""
    draw = random.Random(seed)
    letters = [chr(draw.randrange(0x4E00, 0x9FA0)) for _ in range(3000)]
    words = ["".join(draw.choices(letters[:500], k=draw.randint(1, 4))) for _ in range(5000)]
    parts = []
    while 3 * len(parts) < n_bytes / 2:  # a word has about two letters of three bytes
        parts += draw.choices(words, k=draw.randint(3, 15))
        parts.append(draw.choice(("，", "，", "。", "？", "。\n\u3000\u3000")))
    return "".join(parts)


def bench_versus(before, folder, n_bytes, runs):
    """Measure prepare.py of another checkout and of this one, in turn, in two languages."""
    folder.mkdir()
    write_sources(folder / "english", n_bytes, n_bytes)
    (folder / "chinese").mkdir()
    (folder / "chinese" / "0.txt").write_text(chinese(n_bytes), encoding="utf-8")
    per_megabyte = {}
    for language in ("english", "chinese"):
        (path,) = (folder / language).iterdir()
        seconds = {"before": [], "now": []}
        for _ in range(runs):
            for version, project in (("before", before), ("now", ROOT)):
                took, *_ = run_prepare(f"--input={path}", "--tokenizer=gpt2", project=project)
                seconds[version].append(took)
        ratios = [a / b for a, b in zip(seconds["before"], seconds["now"])]
        megabytes = path.stat().st_size / 1e6
        per_megabyte[language] = statistics.median(seconds["now"]) / megabytes
        record(
            "prepare_versus_before",
            language=language,
            megabytes=round(megabytes, 1),
            before_s=round(statistics.median(seconds["before"]), 1),
            now_s=round(statistics.median(seconds["now"]), 1),
            speedups=[round(ratio, 2) for ratio in ratios],
        )
    slower = per_megabyte["chinese"] / per_megabyte["english"]
    print(f"a byte of Chinese takes {slower:.2f} times as long as one of English")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["bpe", "tokenize"])
    parser.add_argument("--small")
    parser.add_argument("--mb", type=float, default=110)  # of bpe's text; a tenth is for validation
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--before")  # for the part versus: a checkout of an earlier version
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if "bpe" in options.parts:
            if options.small:
                bench_bpe(Path(options.small).name, options.small, 4096)
            folder = Path(temporary) / "bpe"
            write_sources(folder, options.mb * 1e6)
            bench_bpe("Python, C and text of the installed packages", folder, 32768)
        if "tokenize" in options.parts:
            write_sources(Path(temporary) / "gb", options.gb * 1e9)
            bench_tokenize(Path(temporary) / "gb", options.runs)
        if "versus" in options.parts:
            n_bytes = int(options.gb * 1e9)
            bench_versus(options.before, Path(temporary) / "versus", n_bytes, options.runs)


if __name__ == "__main__":
    main()
