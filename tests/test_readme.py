"""What the pages say works: commands run, small, as does code, and links lead somewhere."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import urllib.parse
from pathlib import Path

import pytest
from forks import run_jobs

import configurator
import gpt
import hub
import sample

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES += ["CHANGELOG.md", "CONTRIBUTING.md", "config/README.md", "data/README.md", "out/README.md"]
PAGES += ["models/shakespeare/README.md", "bench/README.md", "notebooks/README.md"]
NOTEBOOKS = sorted(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb"))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
README = TEXTS["README.md"]
# The pages whose commands run here. Those of CHANGELOG.md and models/ take minutes, or are gone.
GUIDES = [name for name in PAGES if name == "README.md" or name.startswith("docs/")]
TEXT = "".join(
    f"ROMEO: {i} times JULIET is O, KING {i * i}! A quick brown fox jumps over lazy dogs.\n"
    for i in range(80)
)

# What needs a network, an installation or minutes: pip and pytest are what runs these tests, the
# rest is others' programs, or a measurement with tests of its own.
NOT_RUN = (
    "pip ",
    "pytest",
    "vllm ",
    "uv run ",
    "python llama.cpp/",
    "python bench/",
    "TRACEBACK=1 python gpt.py ...",
)
SHAPE = "--n_layer=1 --n_head=4 --n_kv_head=4 --n_embd=32 --block_size=16"
SHAPE += " --batch_size=2 --gradient_accumulation_steps=2"
SHORT = "--max_iters=2 --max_minutes=0 --eval_iters=1 --sample_tokens=3"
SMALL = {  # flags before a command's own, and after
    "gpt.py": (SHAPE, f"{SHORT} --device=cpu --dtype=float32"),
    "sample.py": ("", "--max_tokens=3 --device=cpu"),
    "evaluate.py": ("", "--device=cpu --dtype=float32 --block_size=16 --batch_size=64"),
    "hub.py": ("", ""),
    "prepare.py": ("", ""),
    "extras/plots.py": ("", ""),
}
# Stand-ins for the data sets library, for the models of the hub, which all are one folder's, for the
# download of Shakespeare, and for Python's standard library, which is large.
STAND_INS = """
import sys, sysconfig, types
import gpt
get_path = sysconfig.get_path
sysconfig.get_path = lambda name, *more: "config" if name == "stdlib" else get_path(name, *more)
rows = [{{"text": text, "content": text}} for text in (" = A title = \\n", " Some words .\\n")] * 50
sys.modules["datasets"] = types.SimpleNamespace(
    disable_progress_bars=lambda: None,
    get_dataset_split_names=lambda *args: ["train"],
    load_dataset=lambda *args, **options: rows,
)
sys.modules["huggingface_hub"] = types.SimpleNamespace(snapshot_download=lambda *_, **__: "standin")
gpt.SHAKESPEARE_URLS, gpt.SHAKESPEARE_SHA256 = {address}
"""


def page_commands(name):
    """Return the commands of a page, in its order: lines of code blocks and inline ones."""
    found = []
    for line in TEXTS[name].splitlines():
        if re.match(r"    (python|torchrun|pip|uv|vllm|pytest)\b", line):
            found.append(re.sub(r"\s+#.*", "", line.strip()))
        elif not line.startswith("    "):
            found += re.findall(r"`((?:python|torchrun|uv run|TRACEBACK=1) [^`]*\.py[^`]*)`", line)
    return found


def config_commands():
    """Return the commands in the first comments of config/*.py; those that prepare data come first.

    A command ends at the line's end, two spaces, or a comma.
    """
    found = []
    for path in sorted((ROOT / "config").glob("*.py")):
        header = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8"))[0]
        own = []
        for part in re.findall(r"(?:python|torchrun) [^&\n]*", header):
            own.append(re.split("  |, ", part)[0].strip(" .)"))
        assert own, f"{path.name} says no command"
        prepares = [command for command in own if " prepare.py " in command]
        samples = [command for command in own if " sample.py " in command]
        found += prepares
        found += [command for command in own if command not in prepares + samples]
        found += samples
    return found


def python_blocks():
    """Return the pages' blocks of Python code, fenced or indented."""
    text = "\n".join(TEXTS[name] for name in GUIDES)
    indented = re.findall(r"\n\n((?:    .*\n)+)", text)
    blocks = [
        re.sub("^    ", "", block, flags=re.MULTILINE)
        for block in indented
        if "    import gpt" in block
    ]
    return blocks + re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with the project's files, data sets of all names in use, and a model."""
    folder = tmp_path_factory.mktemp("a project")
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, folder)
    for name in ("config", "extras"):  # copies: files know where they lie
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(ROOT / "models" / "shakespeare", folder / "models" / "shakespeare")
    (folder / "texts").mkdir()
    for name in ("my_novel.txt", "book.txt", "texts/a.txt", "texts/b.txt", "kaggle.txt"):
        (folder / name).write_text(TEXT, encoding="utf-8")
    (folder / "start.txt").write_text("KING:", encoding="utf-8")
    question = {"ctx": "1 times 1", "endings": ["is 1", "is 2"], "label": 0}
    (folder / "questions.jsonl").write_text(json.dumps(question), encoding="utf-8")
    rows = [
        "prompt,response,rating",
        '"a\nb","c",5',
        *(f"{i}+{i}=,{2 * i},{5 - i % 3}" for i in range(40)),
    ]
    for name in ("examples.csv", "rated.csv"):
        (folder / name).write_text("\n".join(rows), encoding="utf-8")
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    (folder / "chat.jsonl").write_text(
        "\n".join([json.dumps({"messages": turns})] * 40), encoding="utf-8"
    )
    chars = gpt.Tokenizer("char", "".join(sorted(set(TEXT))))
    for name in ("shakespeare", "pydoc", "squares", "NAME"):
        gpt.write_dataset(folder / "data" / name, TEXT, chars, "tests")
    ranks = " ".join(base64.b64encode(bytes([i])).decode() for i in range(256))
    tokenizer = gpt.Tokenizer("bpe", ranks=ranks, pattern=r"\S+|\s+", special="<|endoftext|>")
    model = gpt.GPT(gpt.GPTConfig(64, tokenizer.vocab_size, 1, 4, 2, 32))
    state = {"model": model.state_dict(), "model_args": vars(model.config)}
    gpt.save_checkpoint(folder / "standin.pt", state | {"tokenizer": tokenizer.state})
    hub.export(folder / "standin.pt", folder / "standin")
    for name in (
        "mytext",
        "shakespeare_bpe",
        "stdlib",
        "tinystories",
        "wikitext-103",
        "wikitext-2",
        "fineweb-edu",
    ):
        gpt.write_dataset(folder / "data" / name, TEXT, tokenizer, "tests")
    return folder


@pytest.fixture(scope="module")
def run(project):
    """Return a function that runs words or code in the project: (exit code, all it printed)."""
    source = project / "kaggle.txt"
    address = [source.as_uri()], hashlib.sha256(source.read_bytes()).hexdigest()

    def run(argv, code="", pictures=False):
        code = STAND_INS.format(address=address) + code
        env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        job = {
            "argv": argv,
            "code": f"import sys; sys.path[0] = {str(project)!r}\n{code}",
            "env": env,
            "pictures": pictures,
        }
        (done,) = run_jobs(job | {"cwd": project, "stdin": "2+2?\nq\n"})
        return done.returncode, done.stdout + done.stderr

    return run


def small(command):
    """Return a command's words as they run here: the script, small flags, its own, last ones."""
    for there, here in (
        ("/kaggle/input/NAME/FILE.txt", "kaggle.txt"),
        ("/kaggle/working/", "working/"),
        ("ID_OR_FOLDER", "rows"),
        ("--input=FOLDER", "--input=texts"),
        ("RUN FOLDER", "models/shakespeare EXPORTED"),
        ("models/NAME", "models/standin"),
        ("FOLDER_OR_ID", "standin"),
    ):
        command = command.replace(there, here)
    command = re.sub(r"\[[^]]*\] ?", "", command)  # [config files]
    command = re.sub("--tokenizer=gpt2(?= |$)", "--tokenizer=standin", command)
    words = shlex.split(command)
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        arguments = parse_args(words[1:])  # ends the test if an option is unknown
        words = ["python", arguments.training_script, *arguments.training_script_args]
    script, own = words[1], words[2:]
    before, after = (flags.split() for flags in SMALL[script])
    if any("finetune" in word for word in own):  # the model's shape is that of its checkpoint
        before = [flag for flag in before if not flag.startswith("--n_")]
    if "stdlib" in own:
        after = ["--max_tokens=2000", "--vocab_size=300"]
    elif script == "prepare.py" and not re.search(
        "tokenizer=|csv|shakespeare|novel|kaggle|info|stdlib|texts", command
    ):
        after = ["--tokenizer=standin"]  # instead of GPT-2's, which would be downloaded
    return [script, *before, *own, *after]


def check(run, commands):
    """Run commands in turn; the assertion tells of all that failed."""
    failed = []
    for command in commands:
        if (
            command.startswith(NOT_RUN) or "=root" in command
        ):  # root: see test_the_pages_changes_work
            continue
        words = small(command)
        if "--init_from=resume" in words:  # there must be a run of that shape
            run([word for word in words if word != "--init_from=resume"])
        draws = {"--tensorboard=True", "--show=attention", "extras/plots.py"} & set(words)
        code, output = run(words, pictures=bool(draws))
        if code:
            failed.append(
                f"{command}\n  as {shlex.join(words)}\n  exit code {code}: {output[-600:]}"
            )
    assert not failed, "\n\n".join(failed)


def test_the_pages_commands_run(run, project):
    assert page_commands("README.md")[:3] == [
        "pip install -r requirements.txt",
        'python sample.py --prompt "ROMEO:"',
        "python gpt.py config/train_shakespeare.py",
    ]
    commands = [command for name in GUIDES for command in page_commands(name)]
    assert len(set(commands)) > 60
    check(run, dict.fromkeys(commands))
    for made in (
        "FOLDER/config.json",
        "long.txt",
        "attention.png",
        "out/shakespeare/loss.png*",
        "working/out/mine/best.pt",
        "models/gpt2/best.pt",
        "EXPORTED/model.safetensors",
        "shakespeare.gguf",
    ):
        assert list(project.glob(made)), made


def test_configs_commands_run(run):
    commands = config_commands()
    assert {path.name for path in (ROOT / "config").glob("*.py")} <= {
        Path(word).name for command in commands for word in command.split()
    }
    check(run, dict.fromkeys(commands))


def test_the_pages_python_runs(run, project):
    blocks = python_blocks()
    assert len(blocks) == 4
    tiny = "".join(f"gpt.{name} = {value}\n" for name, value in re.findall(r"--(\w+)=(\d+)", SHAPE))
    for block in blocks:
        code, output = run(["-c"], f"{tiny}gpt.eval_iters = 1\n{block.replace('=200', '=2')}")
        assert code == 0, f"{block}\n{output[-1000:]}"
    meta = json.loads((project / "data" / "squares" / "meta.json").read_text(encoding="utf-8"))
    assert meta["source"] == "made by me"


def test_the_pages_changes_work(run, project):
    """Each diff fits gpt.py and what it makes trains; the schedule by its new name."""
    original = (ROOT / "gpt.py").read_text(encoding="utf-8")
    changes = re.findall(r"```diff\n(.*?)```", TEXTS["docs/hacking.md"], flags=re.DOTALL)
    assert len(changes) == 4
    assert set(re.findall(r"```diff\n(.*?)```", README, flags=re.DOTALL)) <= set(changes)
    changed = original
    for change in changes:
        old, new = (
            "".join(line[1:] + "\n" for line in change.splitlines() if line[0] in signs)
            for signs in ("- ", "+ ")
        )
        assert original.count(old) == 1, old
        changed = changed.replace(old, new)
    (project / "gpt.py").write_text(changed, encoding="utf-8")
    try:
        code, output = run(
            [
                "gpt.py",
                "config/debug.py",
                "--dataset=shakespeare",
                "--device=cpu",
                "--lr_schedule=root",
            ]
        )
    finally:
        (project / "gpt.py").write_text(original, encoding="utf-8")
    assert code == 0, output[-1000:]
    rates = [float(rate) for rate in re.findall(r"lr (\S+)", output)]
    assert rates and rates[-1] < rates[len(rates) // 2]


# ---- Links ----
def anchors(page):
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, *NOTEBOOKS])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 10 or name != "README.md"
    for link in links:
        if link.startswith("https://"):
            assert urllib.parse.urlparse(link).netloc, link
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link


def test_the_page_of_measurements_names_every_script():
    for path in (ROOT / "bench").glob("*.py"):
        assert path.name == "common.py" or f"`{path.name}`" in TEXTS["bench/README.md"], path.name


def test_settings_that_the_pages_name_exist():
    """Each --name, and each function on the page about changes, is one of a script's."""
    known = {
        "help",
        "standalone",
        "nproc_per_node",
        "max-restarts",
        "nnodes",
        "rdzv_backend",
        "rdzv_endpoint",
    }
    known |= {
        "kills",
        "processes",
        "small",
        "outfile",
        "logdir",
        "key",
        "index-url",
        "draw",
        "grid",
    }
    known |= {"model", "model_args", "tasks", "include_path"}  # of lm_eval
    known |= {
        "check",
        "nodes",
        "ntasks-per-node",
        "gpus-per-node",
        "cpus-per-task",
        "time",
    }  # Slurm
    known |= {"rdzv_id", "partition", "account"}
    for path in ROOT.glob("*.py"):
        known |= set(gpt.read_settings(path.read_text(encoding="utf-8")))
    for name in GUIDES:
        if name != "docs/from_nanogpt.md":
            assert set(re.findall(r"--([a-zA-Z][\w-]*)", TEXTS[name])) <= known, name
    changes = TEXTS["docs/hacking.md"]
    source = (ROOT / "gpt.py").read_text(encoding="utf-8")
    dotted = re.findall(r"`([A-Z]\w+)\.(\w+)`", changes)
    assert len(dotted) > 5
    for owner, name in dotted:
        assert hasattr(getattr(gpt, owner), name) or f"self.{name} = " in source, (owner, name)
    for name in re.findall(r"`([a-z_]+)`", changes):
        assert (
            hasattr(gpt, name) or hasattr(gpt.GPT, name) or name in ("pick", "lr", "data", "models")
        ), name


def test_what_is_done_for_speed_stands_where_the_page_says():
    """The names at the ends of the list's lines are classes, methods and functions."""
    listed = TEXTS["docs/speed.md"].partition("## What gpt.py does for speed")[2]
    names = set(re.findall(r"`((?:[A-Z]\w+\.)?[A-Za-z]\w+)`", listed)) - set(gpt.SETTINGS)
    assert len(names) > 15
    for name in names:
        owner, _, last = name.rpartition(".")
        places = [getattr(gpt, owner)] if owner else [gpt, sample]
        assert any(hasattr(place, last) for place in places), name


@pytest.mark.parametrize("page", [name for name in GUIDES if name != "docs/from_nanogpt.md"])
def test_files_that_the_pages_name_exist(page):
    """Names in backticks that look like the project's files are files."""
    for name in re.findall(r"`([\w/]+\.(?:py|ipynb|md))`", TEXTS[page]):
        places = [ROOT / name, *(ROOT / folder / name for folder in ("config", "notebooks"))]
        assert any(place.exists() for place in places), name


def test_readme_is_short_and_names_no_place_that_is_missing():
    assert len(README.split()) <= 1200
    assert not any("OWNER" in text for text in TEXTS.values())


# ---- The model that comes along ----
def test_the_model_that_comes_along_is_what_its_page_says():
    folder = ROOT / "models" / "shakespeare"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8 * 2**20
    model, tokenizer, state = gpt.load_checkpoint(folder / "best.pt")
    page = (folder / "README.md").read_text(encoding="utf-8")
    log = [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for value in (
        f"{log[-1]['val_loss']:.4f}",
        f"{model.n_params() / 1e6:.2f}M",
        f"{state['step']:,} steps",
    ):
        assert value in page, value
    assert log[-1]["tokens"] == 111_540, "of the full validation split of tiny Shakespeare"
    assert state["dataset_sha256"] == log[0]["dataset_sha256"] == gpt.SHAKESPEARE_SHA256
    (command,) = re.findall(r"^    python (gpt\.py .*)$", page, flags=re.MULTILINE)
    script = {name: getattr(gpt, name) for name in gpt.SETTINGS} | {
        "__file__": str(ROOT / "gpt.py")
    }
    derived = {"device_type": "cpu", "native_bfloat16": True}
    words = shlex.split(command)[1:]
    configurator.configure(script, words, gpt.SETTINGS, gpt.check_setting, lambda: derived)
    gone = {"eval_text", "eval_stride", "keep_checkpoints"}  # with version 2.0.0
    for name, value in state["config"].items():
        assert name in gone or script[name] == value or name == "init_from", (
            f"{name}: the command on the page makes another model"
        )
    assert tokenizer.vocab_size == 65


def test_the_long_sample_has_ten_thousand_words_of_the_models_own():
    words = (ROOT / "models" / "shakespeare" / "sample_10k.txt").read_text(encoding="utf-8").split()
    assert len(words) >= 10_000
    assert len(set(words)) > 1500, "it repeats itself"
