"""The notebooks run from top to bottom, with their pictures, away from the network."""

import base64
import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


def run(name, folder, monkeypatch, **env):
    """Execute a notebook beside copies of the project's files; return it, with its outputs."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for part in ("config", "extras", "models/shakespeare"):
        shutil.copytree(ROOT / part, folder / part)
    (folder / "notebooks").mkdir()
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    resources = {"metadata": {"path": str(folder / "notebooks")}}
    return NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=resources
    ).execute()


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


def test_the_tour_runs_with_all_its_pictures(tmp_path, monkeypatch):
    text, pictures = outputs(run("tour.ipynb", tmp_path, monkeypatch, OMP_NUM_THREADS="1"))
    assert len(pictures) == 12
    assert all(400 < size(picture)[0] < 1200 for picture in pictures)
    assert "False" not in text, "an equality that the text promises does not hold"
    assert len(re.findall("True", text)) >= 12
    assert "whole validation split" in text


def test_the_colab_notebook_trains_finetunes_and_keeps(tmp_path, monkeypatch):
    """In an empty folder: it writes the files that it needs."""
    monkeypatch.setenv("MINUTES", "0.05")
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


@pytest.mark.parametrize("name", ["tour.ipynb", "colab.ipynb"])
def test_notebooks_are_small_and_whole(name):
    path = NOTEBOOKS / name
    assert path.stat().st_size < 2**20
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not any(output.output_type == "error" for output in cell.get("outputs", []))
        if cell.cell_type == "code":
            compile(re.sub(r"^%%writefile .*", "", cell.source), name, "exec")
