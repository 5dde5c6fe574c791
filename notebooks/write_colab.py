"""Write colab.ipynb, which holds the text of gpt.py, so that it needs no other file.

    python notebooks/write_colab.py

Run it after a change of gpt.py or extras/plots.py; a test compares the texts.
"""

from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "notebooks" / "colab.ipynb"
FILES = ("gpt.py", "extras/plots.py")

INTRODUCTION = """
# Train a GPT here: Colab, Kaggle, or any notebook

Choose a GPU first, if there is one. On Colab this is *Runtime, Change runtime type, T4 GPU*; on Kaggle it is
*Settings, Accelerator*. Without a GPU everything works, with smaller models. Then run all cells from the top
(*Runtime, Run all*), or one after the other.

The next three cells write the files that this notebook uses: `gpt.py`, which holds the model and its training,
and `extras/plots.py`, which draws the loss. You can read and change them there. The cell after them installs
`tiktoken` if it is missing.
"""

START = """
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if not importlib.util.find_spec("tiktoken"):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tiktoken"], check=True)
sys.path.insert(0, "")  # where the cells above wrote the files
import gpt

machine = gpt.pick_device("auto")
minutes = float(os.environ.get("MINUTES", "3" if machine.type == "cuda" else "1"))
# On Kaggle only this folder is kept; /kaggle/input is read-only.
WORK = Path("/kaggle/working") if Path("/kaggle").exists() else Path.cwd() / "work"
print(f"this machine's device is {machine}; each training takes {minutes:g} minutes")
"""

TRAIN_TEXT = """
## Train, with a live loss curve

`gpt.train` prepares tiny Shakespeare; without a network it takes Python's own documentation. It then fits the
model's size to the text, the minutes and the machine, and prints what it chose. Each evaluation redraws the
curve, which is also saved as `loss.png` in the run's folder. At the end the model writes a sample.
"""

TRAIN = """
first = gpt.train(
    dataset="shakespeare",
    data_dir=WORK / "data",
    out_dir=WORK / "out" / "first",
    max_minutes=minutes,
    eval_interval=100,
)
"""

WRITE_TEXT = """
## Let it write

Change the prompt and the temperature: a low one makes the model repeat itself, a high one makes it invent words.
"""

WRITE = """
def write(prompt, run, n=400, **sampling):
    model, tokenizer, _ = gpt.load_checkpoint(Path(run["out_dir"]) / "best.pt", machine)
    print(prompt, end="")
    for token in model.generate([tokenizer.encode(prompt)], n, **sampling):
        print(tokenizer.decode(token.tolist()), end="", flush=True)
    print()


write("The ", first, temperature=0.8)
"""

OWN_TEXT = """
## Finetune on your own text

Provide a plain text file. On Colab, set `upload = True`, and a button appears. On Kaggle, add the file under
*Add Input* and set `own` to its path, such as `/kaggle/input/<name>/<file>.txt`. Without a file, the next cell takes
the Zen of Python, repeated. The model knows only the characters that it was trained on, so all others become
spaces here.
"""

OWN = """
upload = False
own = None  # or Path("/kaggle/input/NAME/FILE.txt")
if upload:
    from google.colab import files

    own = Path(next(iter(files.upload())))
if own:
    text = own.read_text(encoding="utf-8", errors="replace")
else:
    import codecs
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = codecs.decode(this.s, "rot13") * 50

model, tokenizer, checkpoint = gpt.load_checkpoint(Path(first["out_dir"]) / "best.pt")
known = set(tokenizer.state["chars"])
fitting = "".join(c if c in known else " " for c in text)
n_unknown = sum(a != b for a, b in zip(text, fitting))
unknown = "".join(sorted(set(text) - known))
print(f"{len(text):,} characters, {n_unknown:,} of them unknown: {unknown}")
gpt.write_dataset(WORK / "data" / "own", fitting, tokenizer, str(own or "the Zen of Python"))
"""

FINETUNE_TEXT = """
Finetuning begins with the weights of `init_from` and takes lower learning rates. It is short, because a model soon
overfits a small text: then the validation loss rises again, and `best.pt` keeps the weights from before the rise.
"""

FINETUNE = """
own_run = gpt.train(
    init_from=Path(first["out_dir"]) / "best.pt",
    dataset="own",
    data_dir=WORK / "data",
    out_dir=WORK / "out" / "own",
    max_minutes=minutes / 2,
    learning_rate=1e-3,
    muon_lr=0.005,
    warmup_iters=5,
    eval_interval=50,
    early_stop=3,
    block_size=model.config.block_size,
)
write("The ", own_run, n=200)
"""

KEEP_TEXT = """
## Keep it

A run's folder holds `best.pt` (the weights and the tokenizer), `log.jsonl` and `loss.png`. What lies under
`/kaggle/working` stays with the notebook's version (*Save Version*). Colab forgets everything when it disconnects,
so copy the folder to your Drive: set `to_drive = True`.
"""

KEEP = """
import shutil

to_drive = False
if to_drive:
    from google.colab import drive

    drive.mount("/content/drive")
    shutil.copytree(WORK / "out", "/content/drive/MyDrive/gpt-py", dirs_exist_ok=True)
for path in sorted((WORK / "out").glob("*/*")):
    print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path}")
"""

END = """
With the whole repository, `python sample.py --checkpoint=best.pt --prompt="The "` continues a prompt later, here or
on another machine. To continue a run that was cut off, call the same `gpt.train(...)` again, with
`init_from="resume"` added.

Eight more notebooks in the repository show what happens inside a GPT.
"""


def cells():
    """Return the cells as (kind, text) pairs."""
    yield "markdown", INTRODUCTION
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        if "/" in name:
            yield "code", f'import os\n\nos.makedirs("{name.split("/")[0]}", exist_ok=True)'
        yield "code", f"%%writefile {name}\n{text.rstrip()}"
    yield "code", START
    for text, code in ((TRAIN_TEXT, TRAIN), (WRITE_TEXT, WRITE), (OWN_TEXT, OWN)):
        yield from (("markdown", text), ("code", code))
    yield from (("markdown", FINETUNE_TEXT), ("code", FINETUNE))
    yield from (("markdown", KEEP_TEXT), ("code", KEEP), ("markdown", END))


def notebook():
    """Return the notebook, without outputs."""
    new = nbformat.v4.new_notebook()
    new.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    for i, (kind, text) in enumerate(cells()):
        make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        new.cells.append(make(text.strip("\n"), id=f"colab-{i:02d}"))
    return new


if __name__ == "__main__":
    nbformat.write(notebook(), TARGET)
    print(f"wrote {TARGET}")
