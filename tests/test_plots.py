"""Pictures and logs hold the numbers of log.jsonl; attention and next tokens are the model's."""

import importlib.util
import json
import math
import sys
import time

import numpy as np
import pytest
import torch

import configurator
import gpt
import sample
from extras import plots

PICTURE = plots.Picture  # conftest puts nothing in its place
LOG = [
    {"step": 0, "elapsed_s": 0.1, "config": {"n_layer": 2}, "machine": "1 x cpu"},
    {"step": 0, "elapsed_s": 0.2, "val_loss": 4.0},
    {
        "step": 1,
        "elapsed_s": 0.3,
        "loss": 4.1,
        "lr": 1e-3,
        "tokens_per_s": 100.0,
        "mfu": None,
        "skipped": 0,
    },
    {
        "step": 5,
        "elapsed_s": 0.4,
        "loss": 3.0,
        "lr": 2e-3,
        "tokens_per_s": 120.0,
        "mfu": None,
        "skipped": 0,
    },
    {"step": 5, "elapsed_s": 0.5, "val_loss": 3.5},
]


def write_log(folder, lines, rest=""):
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest, encoding="utf-8")
    return path


@pytest.fixture
def pictures(monkeypatch):
    """Let runs draw; return a list with {label: (steps, values)} of each picture's losses."""
    drawn, figure_of = [], plots.loss_figure

    def noting(*args):
        figure = figure_of(*args)
        drawn.append({line.get_label(): line.get_data() for line in figure.axes[0].lines})
        return figure

    monkeypatch.setattr(plots, "Picture", PICTURE)
    monkeypatch.setattr(plots, "loss_figure", noting)
    return drawn


# ---- The log ----
def test_read_log_takes_each_step_once_and_passes_over_torn_lines(tmp_path):
    again = {"step": 5, "elapsed_s": 0.6, "loss": 2.9}
    log = plots.read_log(
        write_log(tmp_path, [*LOG, again, 5, {"loss": 7}], '{"step": 9, "loss": 1')
    )
    assert log["loss"] == ([1, 5], [4.1, 2.9])
    assert log["val_loss"] == ([0, 5], [4.0, 3.5])
    assert not {"config", "machine", "mfu"} & set(log)


@pytest.mark.parametrize("lost", ["null", "NaN", "Infinity"])
def test_read_log_leaves_out_losses_that_are_not_finite(tmp_path, lost):
    """They are null; logs of versions before 2.0.0 hold NaN, which is no JSON."""
    rest = f'{{"step": 6, "loss": {lost}, "val_loss": {lost}}}\n{{"step": 7, "loss": 2.5}}\n'
    log = plots.read_log(write_log(tmp_path, LOG, rest))
    assert log["loss"] == ([1, 5, 7], [4.1, 3.0, 2.5])
    assert log["val_loss"] == ([0, 5], [4.0, 3.5])


def test_loss_figure_shows_the_logs_numbers_with_their_units(tmp_path):
    figure = plots.loss_figure(plots.read_log(write_log(tmp_path, LOG)), "a run")
    top, rate, speed = figure.axes
    lines = {line.get_label(): [list(data) for data in line.get_data()] for line in top.lines}
    assert lines["training, by batch"] == [[1, 5], [4.1, 3.0]]
    assert lines["validation"] == [[0, 5], [4.0, 3.5]]
    assert "lowest validation 3.5000" in lines
    assert list(rate.lines[0].get_ydata()) == [1e-3, 2e-3]
    assert list(speed.lines[0].get_ydata()) == [100, 120]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss, nats per token", "learning rate\n(AdamW)", "tokens/s"]
    assert (speed.get_xlabel(), top.get_title()) == ("step", "a run")
    assert figure.get_facecolor() == (1, 1, 1, 1), "an own background: readable on dark pages, too"


def test_the_first_steps_do_not_flatten_the_curve():
    values = [10.0] + [2 - i / 100 for i in range(40)]
    top = plots.loss_figure({"loss": (list(range(41)), values)}).axes[0]
    low, high = top.get_ylim()
    assert low < min(values) and max(values[3:]) < high < 3


def test_a_run_draws_its_losses_at_every_evaluation(settings, pictures, tmp_path):
    settings(max_iters=30, eval_interval=10, log_interval=5)
    gpt.train()
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
    losses = [(line["step"], line["val_loss"]) for line in log if "val_loss" in line]
    assert [step for step, _ in losses] == [
        0,
        10,
        20,
        30,
        30,
    ]  # the last one is over the full split
    seen = [list(zip(*picture["validation"])) for picture in pictures]
    assert seen == [losses[:2], losses[:3], losses[:4], losses[:4]]
    ((label, point),) = ((k, v) for k, v in pictures[-1].items() if k.startswith("full"))
    assert label == f"full validation split {losses[4][1]:.4f}"
    assert list(zip(*point)) == losses[4:]
    png = (tmp_path / "out" / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (800, 600)


def test_a_picture_that_cannot_be_written_does_not_end_the_run(
    settings, pictures, monkeypatch, capsys
):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    settings(max_iters=10)
    assert gpt.train()["step"] == 10
    assert (
        "loss.png is no longer written (OSError: [Errno 28] No space left"
        in capsys.readouterr().out
    )


def test_an_earlier_runs_picture_is_renamed_with_it(settings, pictures, tmp_path):
    settings(max_iters=10)
    gpt.train()
    before = (tmp_path / "out" / "loss.png").read_bytes()
    settings(max_iters=0)
    gpt.train()
    kept = [path.read_bytes() for path in (tmp_path / "out").glob("loss.png.2*")]
    assert kept == [before]


@pytest.mark.parametrize("where", [0, 5, 39])
def test_losses_that_are_not_finite_can_be_drawn(tmp_path, where):
    lines = [{"step": i, "loss": 3 - i / 40} for i in range(40)]
    lines[where]["loss"] = math.nan
    lines += [{"step": 0, "val_loss": math.inf}, {"step": 20, "val_loss": 2.0}]
    log = plots.read_log(write_log(tmp_path, lines))
    low, high = plots.loss_figure(log).axes[0].get_ylim()
    assert low < 2.1 < high < 3.2


def test_a_rising_validation_loss_stays_in_the_picture():
    log = {
        "loss": (list(range(200)), [2 - i / 200 for i in range(200)]),
        "val_loss": ([0, 100, 199], [4, 2, 5.0]),
    }
    assert plots.loss_figure(log).axes[0].get_ylim()[1] > 5


def test_a_skipped_step_does_not_end_a_run_that_draws(settings, pictures, monkeypatch, tmp_path):
    """The loss of a step with a gradient that is not finite is left out."""
    settings(max_iters=60, eval_interval=20, log_interval=1)
    get_batch = gpt.Data.get_batch
    calls = []

    def spoiled(self, split, *args):
        x, y, w = get_batch(self, split, *args)
        calls.append(split)
        if split == "train" and calls.count("train") == 5:
            w[0, 0] = math.nan
        return x, y, w

    monkeypatch.setattr(gpt.Data, "get_batch", spoiled)
    assert gpt.train()["step"] == 60
    assert len(pictures) == 4 and (tmp_path / "out" / "loss.png").exists()
    steps, values = pictures[-1]["training, by batch"]
    assert sorted(set(range(1, 61)) - set(steps)) == [5]
    assert all(map(math.isfinite, values))


def test_a_logger_that_fails_does_not_end_the_run(settings, monkeypatch, capsys):
    def failing(out, config, step):
        return lambda values: 1 / 0

    monkeypatch.setattr(plots, "tensorboard_writer", failing)
    settings(max_iters=10, tensorboard=True)
    assert gpt.train()["step"] == 10
    assert capsys.readouterr().out.count("tensorboard is no longer written (ZeroDivisionError") == 1


def test_dollar_signs_are_no_mathematics(tmp_path):
    plots.loss_figure({}, "cost_$5_and_$6").savefig(tmp_path / "a.png")
    plots.attention_figure(torch.eye(2).expand(1, 1, 2, 2), ["$$", "$x^$"]).savefig(
        tmp_path / "b.png"
    )


def test_without_matplotlib_there_is_no_picture(settings, pictures, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name != "matplotlib" and find(name)
    )
    settings(max_iters=10)
    gpt.train()
    assert not (tmp_path / "out" / "loss.png").exists()


def test_plots_draws_a_finished_run(run_script, tmp_path):
    write_log(tmp_path, LOG)
    done = run_script("extras/plots.py", tmp_path, pictures=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"wrote {tmp_path / 'loss.png'}")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    done = run_script("extras/plots.py", "nowhere", pictures=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "log.jsonl does not exist: name a run's folder" in done.stderr
    done = run_script("extras/plots.py")
    assert done.returncode == 2
    assert done.stderr == "error: got 0 arguments: name exactly one run's folder\n"
    done = run_script("extras/plots.py", "--help")
    assert done.returncode == 0 and done.stdout.startswith("plots.py: ")


def test_a_path_may_begin_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_log(tmp_path, LOG)
    plots.draw_run("~")
    assert (tmp_path / "loss.png").exists()


# ---- TensorBoard, Weights & Biases ----
def logged_numbers(out):
    """Return {name: [(step, value), ...]} of all numbers in a log.jsonl, in its order."""
    found = {}
    for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        for name in values.keys() - {"step"}:
            if type(values[name]) in (int, float):
                found.setdefault(name, []).append((values["step"], values[name]))
    return found


def events_of(folder):
    """Return {name: [(step, value), ...]} of what TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def in_float32(points):
    return [(step, float(np.float32(value))) for step, value in points]


def test_tensorboard_holds_the_numbers_of_the_log(settings, tmp_path):
    settings(max_iters=12, eval_interval=5, log_interval=2, tensorboard=True)
    gpt.train()
    (folder,) = (tmp_path / "out" / "tensorboard").iterdir()
    expected = logged_numbers(tmp_path / "out")
    assert {"loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "perplexity"} <= set(expected)
    found = events_of(folder)
    assert set(found) == set(expected)
    for name, points in expected.items():
        assert found[name] == in_float32(points), name


def test_a_resumed_run_continues_its_curves_in_tensorboard(settings, tmp_path):
    """There is one folder, in which each step has its last value; a new run has another folder."""
    options = {"eval_interval": 5, "log_interval": 1, "tensorboard": True}
    settings(max_iters=10, **options)
    gpt.train()
    settings(init_from="resume", max_iters=20)
    gpt.train()
    (folder,) = (tmp_path / "out" / "tensorboard").iterdir()
    found, expected = events_of(folder), logged_numbers(tmp_path / "out")
    assert dict(found["loss"]) == dict(in_float32(expected["loss"]))
    assert [step for step, _ in found["loss"]] == list(range(1, 21))
    assert dict(found["val_loss"]) == dict(in_float32(expected["val_loss"]))
    settings(init_from="scratch", max_iters=5)
    gpt.train()
    folders = sorted((tmp_path / "out" / "tensorboard").iterdir())
    assert [path.name for path in folders] == ["run-1", "run-2"]
    assert len(events_of(folders[1])["loss"]) == 5


def test_tensorboard_drops_what_was_logged_after_the_checkpoint(tmp_path):
    """A killed run is resumed from an earlier step, whose later steps are then another's."""
    (write, *_) = plots.open_writers(tmp_path, {}, tensorboard=True)
    for step in range(1, 8):
        write({"step": step, "loss": 1.0})
    (write, *_) = plots.open_writers(tmp_path, {}, tensorboard=True, step=4)
    for step in range(5, 10):
        write({"step": step, "loss": 2.0})
    (folder,) = (tmp_path / "tensorboard").iterdir()
    losses = [1.0] * 4 + [2.0] * 5
    assert events_of(folder)["loss"] == list(enumerate(losses, 1))


def leveldb_records(log):
    """Yield the records of a log in LevelDB's format (its doc/log_format.md), as wandb writes it.

    Blocks of 32 KiB hold chunks: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3:
    middle, 4: last).
    """
    place, record = 0, b""
    while place < len(log):
        left = (
            2**15 - (place + 7) % 2**15
        )  # of the block, in which wandb counts its own seven bytes
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        assert kind in (1, 2, 3, 4), kind
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline_holds_the_numbers_of_the_log(settings, monkeypatch, tmp_path):
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings(max_iters=12, eval_interval=5, log_interval=2, wandb_log=True)
    gpt.train()
    wandb.finish()
    (path,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    found, config = {}, {}
    deadline = time.time() + 20  # wandb's own process writes the file
    while b"perplexity" not in path.read_bytes() and time.time() < deadline:
        time.sleep(0.1)
    for data in leveldb_records(path.read_bytes()[7:]):  # behind wandb's own seven bytes
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        values = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
        for name, value in values.items():
            if name[0] != "_" and name != "step":
                found.setdefault(name, {})[values["_step"]] = value
        config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    expected = {name: dict(points) for name, points in logged_numbers(tmp_path / "out").items()}
    assert found == expected  # of one step's losses the last one, over the full split, stays
    assert (config["n_layer"], config["max_iters"]) == (2, 12)


def test_a_resumed_run_continues_its_run_of_wandb(settings, monkeypatch, tmp_path):
    """By the id that is kept in its folder; a new run in that folder gets another id."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    asked = []
    init = wandb.init

    def spy(**options):
        asked.append((options.get("id"), options.get("resume")))
        return init(**options)

    monkeypatch.setattr(wandb, "init", spy)
    settings(max_iters=2, eval_interval=2, wandb_log=True)
    gpt.train()
    first = (tmp_path / "out" / "wandb_id.txt").read_text()
    settings(init_from="resume", max_iters=4)
    gpt.train()
    assert (tmp_path / "out" / "wandb_id.txt").read_text() == first
    settings(init_from="scratch", max_iters=0)
    gpt.train()
    other = (tmp_path / "out" / "wandb_id.txt").read_text()
    wandb.finish()
    assert asked == [(None, None), (first, "allow"), (None, None)]
    folders = (tmp_path / "out" / "wandb").glob("offline-run-*")
    ids = {path.name.split("-")[3] for path in folders}  # offline-run-<date>-<id>
    assert other != first and ids == {first, other}


@pytest.mark.parametrize(
    ("setting", "library", "message"),
    [
        (
            "tensorboard",
            "torch.utils.tensorboard",
            "tensorboard=True needs tensorboard, .* pip install tensorboard",
        ),
        ("wandb_log", "wandb", "wandb_log=True needs wandb, .* pip install wandb"),
    ],
)
def test_a_missing_library_is_named_with_its_remedy(
    settings, monkeypatch, tmp_path, setting, library, message
):
    """The files of an earlier run keep their names."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "best.pt").write_bytes(b"of an earlier run")
    monkeypatch.setitem(sys.modules, library, None)
    settings(**{setting: True})
    with pytest.raises(ValueError, match=message):
        gpt.train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["best.pt"]


# ---- The model ----
def small_model(**changes):
    torch.manual_seed(1)
    sizes = {
        "block_size": 16,
        "vocab_size": 11,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
    }
    model = gpt.GPT(gpt.GPTConfig(**sizes | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


FAMILIES = pytest.mark.parametrize(
    "changes", [{}, {"use_rope": False, "bias": True}, {"qk_norm": True, "n_kv_head": 1}], ids=str
)


@FAMILIES
def test_attention_weights_are_those_that_the_model_uses(changes):
    """Applied to each layer's values by hand, they give what its attention gives."""
    model, ids = small_model(**changes), [3, 1, 4, 1, 5, 9, 2]
    expected, seen = model(torch.tensor([ids]))[0], []

    def note(attention, args, output):
        q, _, v = attention.project(args[0], args[2])
        v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
        seen.append((attention, v, output))

    hooks = [block.attn.register_forward_hook(note) for block in model.h]
    weights = plots.attention_weights(model, ids)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(weights) == 2
    for (attention, v, output), shares in zip(seen, weights):
        y = (shares[None] @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention.c_proj(y), output, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(torch.tensor([ids]))[0], expected), "the model stays as it was"
    assert not any(block.attn._forward_pre_hooks for block in model.h)


def test_a_failing_model_keeps_no_hook():
    model = small_model()
    with pytest.raises(AssertionError):
        plots.attention_weights(model, [1] * 17)  # block_size is 16
    assert not any(block.attn._forward_pre_hooks for block in model.h)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_shares_are_torchs(kind, groups):
    """torch's own attention to values that are the identity returns its weights."""
    q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 6 // groups, 7, 8)
    mask = {"none": None, "bool": torch.rand(2, 1, 5, 7) < 0.5, "float": torch.randn(5, 7)}[kind]
    if mask is None:
        k = k[:, :, :5]
    elif kind == "bool":
        mask[..., 0] = True  # a query that sees nothing has no shares
    values = torch.eye(k.size(2)).expand(2, 6, -1, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(groups, dim=1), values, mask, is_causal=mask is None
    )
    torch.testing.assert_close(plots.attention_shares(q, k, mask), expected)


def test_attention_weights_are_causal_shares():
    weights = plots.attention_weights(small_model(), [1, 2, 3, 4, 5])
    assert weights.shape == (2, 4, 5, 5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 5))
    assert (weights.triu(1) == 0).all()
    assert not torch.allclose(weights[0, 0], weights[0, 1])


def test_attention_weights_without_queries_are_an_average():
    """Where all scores are 0, token i looks at i + 1 tokens alike."""
    model = small_model(n_layer=1)
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[:32] = 0
    weights = plots.attention_weights(model, [1, 2, 3, 4])
    expected = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    assert torch.allclose(weights, expected.expand(1, 4, 4, 4))


def test_attention_figure_shows_the_weights_and_names_the_tokens():
    weights = plots.attention_weights(small_model(), [1, 2, 3])
    figure = plots.attention_figure(weights, ["a", " ", "\n"])
    maps = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in maps] == [
        f"layer {i}, head {j}" for i in (1, 2) for j in (1, 2, 3, 4)
    ]
    for axes, expected in zip(maps, weights.flatten(0, 1)):
        assert np.allclose(axes.images[0].get_array(), expected)
    assert [t.get_text() for t in maps[-1].get_xticklabels()] == ["a", "\N{OPEN BOX}", "\\n"]
    assert figure.get_supxlabel() == "token attended to"


def test_attention_figure_picks_layers_and_heads_of_a_large_model():
    figure = plots.attention_figure(torch.eye(2).expand(12, 16, 2, 2), ["a", "b"], most=4)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == 16
    assert (titles[0], titles[-1]) == ("layer 1, head 1", "layer 12, head 16")
    assert "layer 5, head 6" in titles


def test_bars_show_the_likeliest_tokens():
    tokenizer = gpt.Tokenizer("char", "ab\n'")
    lines = plots.bars(torch.tensor([0.1, 0.6, 0.25, 0.05]), tokenizer, n=3).splitlines()
    assert [line.split() for line in lines] == [
        ["'b'", "60.00%", "#" * 50],
        ["'\\n'", "25.00%", "#" * 21],
        ["'a'", "10.00%", "#" * 8],
        ["others", "5.00%"],
    ]
    assert len({line.index("%") for line in lines}) == 1


def test_next_probabilities_are_the_softmax_of_the_last_logits():
    model = small_model(dropout=0.5).train()
    found = plots.next_probabilities(model, [1, 2, 3])
    logits = model.eval()(torch.tensor([[1, 2, 3]]))[0][0, -1].tolist()
    total = sum(math.exp(x) for x in logits)
    assert found.tolist() == pytest.approx([math.exp(x) / total for x in logits], rel=1e-5)


@pytest.fixture
def checkpoint(tmp_path):
    model, tokenizer = small_model(), gpt.Tokenizer("char", "abcdefghij\n")
    state = {
        "model": model.state_dict(),
        "model_args": vars(model.config),
        "tokenizer": tokenizer.state,
    }
    gpt.save_checkpoint(tmp_path / "best.pt", state)
    return model, tmp_path / "best.pt"


def test_sample_shows_the_next_token(checkpoint, run_script):
    model, path = checkpoint
    done = run_script(
        "sample.py", f"--checkpoint={path}", "abc", "--show", "--device=cpu", "--dtype=float32"
    )
    best = model(torch.tensor([[0, 1, 2]]))[0][0, -1].softmax(-1).max(0)
    title, first, *_ = done.stdout.splitlines()
    assert title == "next token after 'abc', at temperature 1:"
    assert first.split()[:2] == [repr("abcdefghij\n"[best.indices]), f"{best.values:.2%}"]
    done = run_script("sample.py", f"--checkpoint={path}", "--show", "abc")
    assert done.returncode == 2 and "show is 'abc': it must be attention" in done.stderr


def test_sample_shows_attention(checkpoint, run_script, tmp_path):
    _, path = checkpoint
    words = [f"--checkpoint={path}", "abc" * 9, "--show=attention"]
    done = run_script("sample.py", *words, cwd=tmp_path, pictures=True)
    assert (done.returncode, done.stdout.strip()) == (0, "wrote attention.png"), done.stderr
    assert (tmp_path / "attention.png").read_bytes()[:4] == b"\x89PNG"


def test_showing_attention_needs_matplotlib(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sample, "checkpoint", str(checkpoint[1]))
    monkeypatch.setattr(sample, "show", "attention")
    with pytest.raises(
        ValueError, match="--show=attention needs matplotlib, .* pip install matplotlib"
    ):
        sample.main()


def test_a_bare_flag_is_the_empty_text_where_none_is_allowed():
    settings = gpt.read_settings('show: str | None = None  # a\nname = "x"  # b\n')
    for argv, expected in (
        (["--show"], {"show": ""}),
        (["--show", "--name=y"], {"show": "", "name": "y"}),
        (["--show=attention"], {"show": "attention"}),
        (["--show", "attention"], {"show": "attention"}),
    ):
        assert configurator.read_flags(argv, settings, gpt.check_setting) == ([], expected)
    with pytest.raises(ValueError, match="--name needs a value"):
        configurator.read_flags(["--name"], settings, gpt.check_setting)
