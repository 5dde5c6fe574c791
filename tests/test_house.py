"""The house: imports point one way, nothing is patched from outside, functions stay small."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {"configurator.py": 0, "gpt.py": 1, "hub.py": 2}
LEVELS |= {"prepare.py": 3, "sample.py": 3, "evaluate.py": 3}


def level(name):
    """Return how high a file stands; it may import from below its own level only."""
    if name.startswith("extras/"):
        return 0
    return LEVELS.get(name, 4)  # config/, bench/


def files_of(root, *apart):
    """Return the names of root's .py files that are tracked or new, but for folders named in apart."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return sorted(n for n in listed if n.split("/")[0] not in apart and (root / n).exists())


def arrows(root, names):
    """Return the pairs (file, imported file) among names, imports inside functions included."""
    modules = {name.removesuffix(".py").replace("/", "."): name for name in names}
    modules |= {Path(name).stem: name for name in names if name.startswith("bench/")}
    found = set()
    for name in names:
        for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported = [node.module]
                imported += [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found |= {(name, modules[module]) for module in imported if module in modules}
    return found


def wrong_arrows(root, names):
    return {
        (a, b)
        for a, b in arrows(root, names)
        if level(b) >= level(a) and a.split("/")[0] != "bench"
    }


def circle(pairs):
    """Return files that import each other in a circle, an empty list if there is none."""
    below = {a: {d for c, d in pairs if c == a} for a, _ in pairs}
    done = set()

    def walk(name, path):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(below.get(name, ())):
            found = walk(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    for name in sorted(below):
        found = walk(name, [])
        if found:
            return found
    return []


def module_names(tree):
    """Return the names by which a file knows modules of the project."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names & {"gpt", "hub", "sample", "prepare", "evaluate", "configurator"}


def patches(text):
    """Return the lines that assign to another module's names, or pass a module as an argument."""
    tree = ast.parse(text)
    modules = module_names(tree)
    found = []
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        parts = [part for target in targets for part in ast.walk(target)]
        attributes = [part for part in parts if isinstance(part, ast.Attribute)]
        owners = {part.value.id for part in attributes if isinstance(part.value, ast.Name)}
        if owners & modules or any(part.attr == "__class__" for part in attributes):
            found.append(node.lineno)
        if isinstance(node, ast.Call):
            passed = [*node.args, *(keyword.value for keyword in node.keywords)]
            names = {part.id for part in passed if isinstance(part, ast.Name)}
            if names & modules or "sys.modules[__name__]" in map(ast.unparse, passed):
                found.append(node.lineno)
    return found


def test_imports_point_one_way():
    names = files_of(ROOT, "tests", "notebooks")
    pairs = arrows(ROOT, names)
    assert ("sample.py", "gpt.py") in pairs and ("gpt.py", "configurator.py") in pairs
    assert any(b.startswith("extras/") for _, b in pairs)
    assert not wrong_arrows(ROOT, names)
    assert not circle(pairs)


def test_the_graph_shows_a_circle_and_an_arrow_up(tmp_path):
    (tmp_path / "extras").mkdir()
    (tmp_path / "gpt.py").write_text("def f():\n    from extras.plots import draw\n")
    (tmp_path / "extras" / "plots.py").write_text("def draw():\n    import gpt\n")
    names = ["gpt.py", "extras/plots.py"]
    assert wrong_arrows(tmp_path, names) == {("extras/plots.py", "gpt.py")}
    assert set(circle(arrows(tmp_path, names))) == set(names)


def test_nothing_is_patched_from_outside():
    for name in files_of(ROOT, "tests", "notebooks"):
        assert patches((ROOT / name).read_text(encoding="utf-8")) == [], name


@pytest.mark.parametrize(
    "line",
    [
        "gpt.max_iters = 3",
        "gpt.attend, x = f, 1",
        "layer.__class__ = Other",
        "run(gpt)",
        "run(x=gpt)",
    ],
)
def test_a_patch_is_seen(line):
    assert patches(f"import gpt\n{line}\n") == [2]
