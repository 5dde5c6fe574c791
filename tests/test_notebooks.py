"""Both notebooks run from top to bottom, with their pictures, away from the network."""

import base64
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
    run_ = run("colab.ipynb", tmp_path, monkeypatch, MINUTES="0.05", OMP_NUM_THREADS="1")
    text, pictures = outputs(run_)
    assert text.count("whole validation split") == 3, "pasted, by config, finetuned"
    assert len(pictures) == 2 and {size(picture) for picture in pictures} == {(800, 600)}
    for name in ("first/best.pt", "first/loss.png", "own/best.pt", "own/log.jsonl"):
        assert str(Path("work/out") / name) in text


@pytest.mark.parametrize("name", ["tour.ipynb", "colab.ipynb"])
def test_notebooks_are_small_and_whole(name):
    path = NOTEBOOKS / name
    assert path.stat().st_size < 2**20
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not any(output.output_type == "error" for output in cell.get("outputs", []))
        if cell.cell_type == "code":
            compile(cell.source, name, "exec")


def test_the_address_of_the_repository_is_the_same_everywhere():
    source = (NOTEBOOKS / "colab.ipynb").read_text(encoding="utf-8")
    (address,) = re.findall(r'REPOSITORY = \\"([^"\\]+)', source)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"github/([\w.-]+/[\w.-]+)/blob", readme)) == {address}
