"""The notebooks run from top to bottom, with their pictures, away from the network."""

import base64
import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from forks import run_jobs
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
LESSONS = sorted(path.name for path in NOTEBOOKS.glob("[0-9]_*.ipynb"))


def outputs(notebook):
    """Return (all that was printed, the PNG pictures) of an executed notebook."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in found)
    pictures = [
        output.data["image/png"] for output in found if "image/png" in output.get("data", {})
    ]
    return text, [base64.b64decode(picture) for picture in pictures]


def size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


# Runs the code cells of notebook.ipynb, in turn and in one namespace, as Jupyter does.
RUN_CELLS = """
import json
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
namespace = {"__name__": "__main__"}
for cell in json.load(open("notebook.ipynb", encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), "<cell>", "exec"), namespace)
        plt.close("all")
"""


# What a lesson trains or writes, made small.
SMALL = {
    "6_training.ipynb": [
        ("n_steps = 120", "n_steps = 15"),
        ("n_steps=40", "n_steps=4"),
        ("range(81)", "range(21)"),
        ("max_iters=100", "max_iters=20"),
    ],
    "7_generation.ipynb": [
        (", 120, greedy)", ", 30, greedy)"),
        (", 120, draw)", ", 30, draw)"),
        (", 120, temperature=0)", ", 30, temperature=0)"),
        ("n_texts=12, n_tokens=60", "n_texts=2, n_tokens=10"),
        ("n_tokens=160", "n_tokens=20"),
    ],
}


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs(name, tmp_path):
    """Its cells run beside copies of the project's files. What they promise to hold holds."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for part in ("extras", "models/shakespeare"):
        shutil.copytree(ROOT / part, tmp_path / part)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    source = (NOTEBOOKS / name).read_text(encoding="utf-8")
    for long, short in SMALL.get(name, []):
        assert source.count(long) == 1, long
        source = source.replace(long, short)
    (folder / "notebook.ipynb").write_text(source, encoding="utf-8")
    job = {"argv": ["notebook"], "cwd": folder, "stdin": None, "env": {}, "pictures": True}
    done = run_jobs(job | {"code": RUN_CELLS})[0]
    assert done.returncode == 0, done.stderr
    committed, pictures = outputs(nbformat.read(NOTEBOOKS / name, as_version=4))
    assert len(pictures) >= 2
    assert all(300 < size(picture)[0] < 1000 for picture in pictures)
    for text in (done.stdout, committed):
        assert "False" not in text, "an equality that the text promises does not hold"
        assert "True" in text
    assert done.stdout.count("True") == committed.count("True")


def test_the_colab_notebook_trains_finetunes_and_keeps(tmp_path, monkeypatch):
    """In an empty folder: it writes the files that it needs."""
    monkeypatch.setenv("MINUTES", "0.02")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOKS / "colab.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    text, pictures = outputs(client.execute())
    assert text.count("whole validation split") == 2, "trained, finetuned"
    assert len(pictures) == 2 and {size(picture) for picture in pictures} == {(800, 600)}
    for name in ("first/best.pt", "first/loss.png", "own/best.pt", "own/log.jsonl"):
        assert str(Path("work/out") / name) in text


def test_the_colab_notebook_holds_gpt_py():
    """python notebooks/write_colab.py writes it anew."""
    spec = importlib.util.spec_from_file_location("write_colab", NOTEBOOKS / "write_colab.py")
    write_colab = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_colab)
    held = nbformat.read(NOTEBOOKS / "colab.ipynb", as_version=4)
    assert [cell.source for cell in held.cells] == [
        cell.source for cell in write_colab.notebook().cells
    ]
    assert (ROOT / "gpt.py").read_text(encoding="utf-8").rstrip() in held.cells[1].source


@pytest.mark.parametrize("name", [*LESSONS, "colab.ipynb"])
def test_notebooks_are_small_and_whole(name):
    path = NOTEBOOKS / name
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not any(output.output_type == "error" for output in cell.get("outputs", []))
        if cell.cell_type == "code":
            compile(re.sub(r"^%%writefile .*", "", cell.source), name, "exec")


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_shows_what_its_cells_gave(name):
    """All cells of the committed notebook have been run, once and in their order."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any("\x1b" in str(cell.get("outputs", "")) for cell in notebook.cells)


def test_there_are_eight_lessons_each_with_links_to_its_neighbours():
    assert len(LESSONS) == 8
    index = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    for name, following in zip(LESSONS, [*LESSONS[1:], None]):
        assert f"({name})" in index
        text = (NOTEBOOKS / name).read_text(encoding="utf-8")
        assert following is None or f"({following})" in text
