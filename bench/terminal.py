"""Draw docs/terminal.svg: a terminal in which sample.py writes and gpt.py trains.

    python bench/terminal.py

sample.py runs now, with the model that comes along. The lines of training are those of the session
that docs/training.md shows; long ones are cut.
"""

import html
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "terminal.svg"
COLUMNS, LINE_HEIGHT, MARGIN = 84, 19, 18
N_SAMPLE_LINES = 9
SHOWN = ("fitted", "machine", "model", "run ", "step", "compiled")  # how the lines begin


def sample():
    """Return the first lines that sample.py writes after a prompt."""
    command = [sys.executable, "sample.py", "--prompt", "ROMEO:", "--max_tokens=300", "--seed=3"]
    command += ["--out_dir=models/shakespeare", "--device=cpu"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.rstrip().splitlines()[:N_SAMPLE_LINES]


def training():
    """Return lines of the session in docs/training.md."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    session = re.search(r"\n    \$ python gpt.py .*\n((?:(?:    .*)?\n)+)", page)[1]
    lines = [line[4:] for line in session.splitlines()]
    chosen = [line for line in lines if line.startswith(SHOWN)]
    end = next(line for line in lines if "whole validation split" in line)
    return [*chosen, end]


def shortened(line):
    return line if len(line) <= COLUMNS else line[: COLUMNS - 3] + "..."


def draw(lines):
    """Return an SVG of lines of text; those that begin with $ are commands."""
    width = round(COLUMNS * 7.83) + 2 * MARGIN
    height = len(lines) * LINE_HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117" stroke="#30363d"/>',
        '<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13">',
    ]
    for i, line in enumerate(lines):
        color = "#7ee787" if line.startswith("$") else "#e6edf3"
        y = MARGIN + round((i + 0.75) * LINE_HEIGHT)
        text = html.escape(shortened(line))
        parts.append(
            f'<text x="{MARGIN}" y="{y}" fill="{color}" xml:space="preserve">{text}</text>'
        )
    return "\n".join([*parts, "</g>", "</svg>", ""])


def main():
    lines = ['$ python sample.py --prompt "ROMEO:"', *sample(), ""]
    lines += ["$ python gpt.py config/train_shakespeare.py", *training()]
    TARGET.write_text(draw(lines), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
