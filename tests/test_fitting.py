"""What is not set is fitted to the text, the minutes and the machine; what is set stays."""

import math
import random
import re
import signal
from types import SimpleNamespace

import pytest

import gpt

SPEED = 1e11  # FLOPs per second, those of a laptop


def fitted(n_tokens=1_000_000, vocab_size=65, speed=SPEED, seconds=100.0, **asked):
    """Return (settings as gpt.fit_settings leaves them, what it said)."""
    settings = gpt.checked_settings(**{"max_minutes": seconds / 60, **asked})
    said = []
    machine = SimpleNamespace(world_size=1, say=said.append)
    gpt.fit_settings(settings, n_tokens, vocab_size, speed, seconds, machine)
    return settings, "\n".join(said)


def size(settings, vocab_size=65):
    """Return the FLOPs per token / 6, which is the number of weights that products use, about."""
    return gpt.flops_of_token(settings, vocab_size) / 6


def test_nothing_is_left_open_and_all_of_it_is_said():
    settings, said = fitted()
    for name in gpt.UNFITTED:
        value = getattr(settings, name)
        assert value is not None
        assert f"{name}={value:g}" in said
    assert "1.66667 minutes at 0.1 TFLOP/s" in said
    assert "epochs of 1,000,000 tokens" in said
    assert "at 150 TFLOP/s: up to 200 epochs" in fitted(speed=1.5e14, max_epochs=200.0)[1]


@pytest.mark.parametrize("seed", range(12))
def test_what_the_user_sets_stays(seed):
    """Any part of it; the rest gets values with which a model can be made and trained."""
    values = {
        "block_size": 96,
        "n_layer": 5,
        "n_head": 2,
        "n_kv_head": 2,
        "n_embd": 96,
        "dropout": 0.4,
        "train_temperature": 0.95,
        "batch_size": 7,
        "learning_rate": 1e-4,
        "muon_lr": 1e-3,
        "weight_decay": 0.3,
    }
    draw = random.Random(seed)
    names = draw.sample(sorted(values), draw.randint(1, len(values)))
    asked = {name: values[name] for name in names}
    settings, said = fitted(**asked)
    assert {name: getattr(settings, name) for name in names} == asked
    assert not any(f"{name}=" in said for name in names)
    gpt.check_together(settings)
    if not {"n_layer", "n_embd"} <= asked.keys():
        assert size(settings) < 4 * size(fitted()[0])


def test_more_work_makes_a_larger_model_and_a_larger_batch():
    """Unless the text is too small for it."""
    sizes = []
    batches = []
    for exponent in range(12, 22):
        settings, _ = fitted(n_tokens=10**12, speed=10.0**exponent / 100)
        sizes.append(size(settings))
        batches.append(settings.batch_size * settings.block_size)
    assert sizes == sorted(sizes)
    assert batches == sorted(batches)
    assert sizes[-1] > 1000 * sizes[0]


@pytest.mark.parametrize("flops", [1e18, 1e19, 1e20, 1e21, 1e22])
def test_large_runs_are_those_of_published_scaling_laws(flops):
    """Hoffmann et al. (arXiv:2203.15556): the square root of FLOPs / 120, within a factor of 2.

    The runs behind our rule had less work, so this is an extrapolation.
    """
    settings, _ = fitted(n_tokens=10**13, vocab_size=50257, speed=flops / 100)
    ratio = size(settings, 50257) / math.sqrt(flops / 120)
    assert 0.5 < ratio < 2


def test_a_small_text_gets_a_small_model_and_no_more_than_40_epochs():
    """A GPU would train a megabyte for hundreds."""
    settings, said = fitted(speed=2e14, seconds=600.0)
    assert size(settings) < 5e6
    assert settings.max_epochs == 40
    assert settings.max_minutes == 10
    assert "up to 40 epochs" in said
    assert fitted(speed=2e14, seconds=600.0, max_epochs=3.0)[0].dropout < settings.dropout


@pytest.mark.parametrize("asked", [{"n_embd": 192}, {"n_embd": 256, "n_head": 4}, {"n_head": 6}])
def test_a_model_of_a_set_width_becomes_deeper_with_the_minutes(asked):
    layers = [fitted(seconds=s, **asked)[0].n_layer for s in (60.0, 6000.0)]
    assert layers[0] < layers[1]


@pytest.mark.parametrize(
    "asked", [{"n_head": 25}, {"n_kv_head": 8}, {"n_embd": 1000}, {"n_head": 6, "n_kv_head": 3}]
)
def test_odd_heads_and_widths_get_sizes_that_suit_them(asked):
    """Models of about the size that any others get."""
    settings, _ = fitted(**asked)
    assert {name: getattr(settings, name) for name in asked} == asked
    assert settings.n_embd % (2 * settings.n_head) == 0
    if "n_embd" not in asked:
        assert size(settings) < 3 * size(fitted()[0])


def test_accumulated_micro_batches_are_part_of_the_batch():
    alone = fitted(block_size=128, n_embd=128, n_layer=3)[0]
    parts = fitted(block_size=128, n_embd=128, n_layer=3, gradient_accumulation_steps=4)[0]
    assert alone.batch_size == 4 * parts.batch_size


def test_a_text_that_is_seen_more_often_is_held_back_more():
    """Dropout and decay rise with the epochs, from 0 for a text that is seen once."""
    found = [fitted(n_tokens=n, n_embd=128)[0] for n in (10**8, 10**6, 3 * 10**5, 10**5)]
    dropouts = [settings.dropout for settings in found]
    temperatures = [settings.train_temperature for settings in found]
    assert dropouts == sorted(dropouts)
    assert temperatures == sorted(temperatures, reverse=True)
    assert (dropouts[0], temperatures[0], found[0].weight_decay) == (0.0, 1.0, 0.0)
    assert dropouts[-1] > 0.1
    assert temperatures[-1] == 0.83


def test_an_odd_width_is_named_as_the_user_gave_it():
    with pytest.raises(ValueError, match="n_embd / n_head"):
        fitted(n_embd=97)


def test_the_context_is_no_longer_than_the_text():
    settings, _ = fitted(n_tokens=300, n_embd=1024)
    assert settings.block_size == 128


@pytest.mark.parametrize("world_size", [1, 2, 6])
@pytest.mark.parametrize("accumulation", [1, 3, 5, 8])
@pytest.mark.parametrize("seconds", [1.0, 60.0, 6000.0])
def test_processes_share_the_batch_evenly(world_size, accumulation, seconds):
    """As Trainer demands: each takes the same number of micro-batches of the same size."""
    settings = gpt.checked_settings(max_minutes=1.0, gradient_accumulation_steps=accumulation)
    machine = SimpleNamespace(world_size=world_size, say=lambda text: None)
    gpt.fit_settings(settings, 10**9, 65, SPEED, seconds, machine)
    micro_batches = world_size * math.ceil(accumulation / world_size)
    assert settings.batch_size * accumulation % micro_batches == 0


# ---- In a run ----
@pytest.fixture
def unset(settings, monkeypatch):
    """Return `settings`, with everything left to be fitted, and a machine of a known speed."""
    settings(**dict.fromkeys(gpt.UNFITTED), max_minutes=0.05, eval_interval=1000, eval_iters=1)
    monkeypatch.setattr(gpt, "flops_per_second", lambda machine: 1e9)
    return settings


def test_a_run_is_fitted_and_its_checkpoint_holds_what_was_chosen(unset, capsys):
    figures = gpt.train()
    assert capsys.readouterr().out.startswith("fitted   block_size=")
    state = gpt.read_checkpoint(gpt.as_path(figures["out_dir"]) / "ckpt.pt")
    assert all(state["config"][name] is not None for name in gpt.UNFITTED)
    assert state["config"]["n_embd"] == state["model_args"]["n_embd"] == 64


def test_a_fitted_run_resumes_with_what_was_chosen_on_another_machine(unset, monkeypatch, capsys):
    """Nothing needs to be named again, and nothing is measured again."""
    first = gpt.train(max_minutes=0.02)
    chosen = gpt.read_checkpoint(gpt.as_path(first["out_dir"]) / "ckpt.pt")["config"]
    monkeypatch.setattr(gpt, "flops_per_second", lambda machine: 1e20)
    capsys.readouterr()
    for how in ("resume", "auto"):
        figures = gpt.train(init_from=how, max_minutes=0.06 if how == "auto" else 0.04)
        out = capsys.readouterr().out
        assert not out.startswith("fitted")
        assert "n_embd" not in out
        state = gpt.read_checkpoint(gpt.as_path(figures["out_dir"]) / "ckpt.pt")
        assert {n: state["config"][n] for n in gpt.UNFITTED} == {n: chosen[n] for n in gpt.UNFITTED}
    assert figures["step"] > first["step"]


def test_a_run_without_time_left_still_trains_for_a_second(unset, monkeypatch):
    """As when the data took longer to fetch than the minutes."""
    monkeypatch.setattr(gpt.Clock, "left_s", lambda self: 0.0)
    assert gpt.train()["step"] > 0


def test_a_run_of_an_earlier_version_resumes_without_being_fitted(unset, capsys):
    """Its checkpoint lacks a setting that is new since."""
    figures = gpt.train(max_minutes=0.02)
    path = gpt.as_path(figures["out_dir"]) / "ckpt.pt"
    state = gpt.read_checkpoint(path)
    for name in ("max_epochs", "train_temperature"):
        del state["config"][name]
    gpt.save_checkpoint(path, state)
    capsys.readouterr()
    gpt.train(init_from="resume", max_minutes=0.04)
    assert not capsys.readouterr().out.startswith("fitted")
    assert gpt.read_checkpoint(path)["config"]["train_temperature"] == 1.0


def test_a_run_ends_after_its_epochs(unset, capsys):
    """The schedule ends with them, and so does a run that is resumed; it says why."""
    chosen = gpt.UNFITTED | {"block_size": 16, "n_embd": 32, "n_layer": 1}
    for options in ({"max_minutes": 0.0, "max_iters": 10**6}, {"max_minutes": 60.0}):
        gpt.train(**chosen | {"max_epochs": 0.5}, **options)
        figures = gpt.train(**chosen | {"max_epochs": 1.0}, **options, init_from="resume")
        data = gpt.Data(gpt.as_path(gpt.data_dir) / "toy", 16)
        assert figures["step"] == math.ceil(data.n_rows("train") / 8)
        out = capsys.readouterr().out
        assert "at most 1 epochs" in out
        assert "the run ends here, because max_epochs is 1" in out
        assert [float(lr) for lr in re.findall(r"lr (\S+)", out)][-1] < 1e-3  # of 6e-3


def test_a_dry_run_plans_no_more_than_the_epochs(unset, capsys):
    figures = gpt.train(dry_run=True, max_minutes=60.0, max_epochs=2.0)
    assert "2.0 epochs" in capsys.readouterr().out
    data = gpt.Data(gpt.as_path(gpt.data_dir) / "toy", 64)
    assert figures["steps"] * figures["tokens_per_step"] < 2.1 * data.n_rows("train") * 64


def test_a_fitted_model_is_finetuned_with_its_own_context(unset, tmp_path):
    """It may be shorter than the usual one; nobody has to name it."""
    base = gpt.train(max_minutes=0.02)["out_dir"]
    for options in ({"max_minutes": 0.0, "max_iters": 1}, {"max_minutes": 0.02}):
        figures = gpt.train(init_from=base, out_dir=str(tmp_path / "tuned"), **options)
        config = gpt.read_checkpoint(gpt.as_path(figures["out_dir"]) / "ckpt.pt")["config"]
        assert config["block_size"] == 64
        usual = gpt.UNFITTED | {"block_size": 64}
        assert {name: config[name] for name in usual} == usual


def test_examples_keep_the_usual_context(unset, tmp_path, write_examples, capsys):
    """A shorter one would cut them."""
    text = [("abcd" * 40, 1)]
    write_examples(tmp_path / "data" / "toy", "abcd", train=[text] * 40, val=[text] * 4)
    figures = gpt.train(max_minutes=0.02)
    config = gpt.read_checkpoint(gpt.as_path(figures["out_dir"]) / "ckpt.pt")["config"]
    assert config["block_size"] == 256
    assert "of 10,240 tokens" in capsys.readouterr().out  # 40 rows, although they are not full


def test_a_run_of_fixed_length_is_not_fitted(unset, capsys):
    figures = gpt.train(max_minutes=0.0, max_iters=1)
    assert not capsys.readouterr().out.startswith("fitted")
    state = gpt.read_checkpoint(gpt.as_path(figures["out_dir"]) / "ckpt.pt")
    assert {name: state["config"][name] for name in gpt.UNFITTED} == gpt.UNFITTED


def test_settings_that_do_not_fit_together_are_refused_before_anything_is_written(unset, tmp_path):
    with pytest.raises(ValueError, match="n_head"):
        gpt.train(n_embd=100, n_head=3)
    with pytest.raises(ValueError, match="min_lr is 0.5"):
        gpt.train(min_lr=0.5)
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_has_its_settings(unset, monkeypatch):
    """A signal in the first step leaves a checkpoint that resumes."""
    autocast = gpt.Machine.autocast

    def stopping(self):
        if gpt.init_from == "scratch":
            signal.raise_signal(signal.SIGTERM)
        return autocast(self)

    monkeypatch.setattr(gpt.Machine, "autocast", stopping)
    assert gpt.train()["stopped_by"] == signal.SIGTERM
    unset(init_from="resume")
    assert gpt.train()["stopped_by"] is None


def test_the_machines_speed_is_that_of_its_steps(monkeypatch):
    """FLOPs of a step over its seconds, by a clock that each forward pass moves."""
    now = [0.0]
    monkeypatch.setattr(gpt, "time", SimpleNamespace(monotonic=lambda: now[0]))
    forward = gpt.GPT.forward

    def slow(self, *args, **options):
        now[0] += 2.0
        return forward(self, *args, **options)

    monkeypatch.setattr(gpt.GPT, "forward", slow)
    machine = gpt.set_up_machine(gpt.checked_settings(device="cpu", dtype="float32"))
    model = gpt.GPT(gpt.GPTConfig(vocab_size=256))
    expected = model.config.flops_per_token() * 8 * 256 / 2.0
    assert gpt.flops_per_second(machine) == pytest.approx(expected)


def test_the_earlier_of_max_iters_and_max_epochs_ends_a_run(settings):
    settings(max_iters=4, max_epochs=0.5)
    assert gpt.train()["step"] == 4


def test_a_second_of_training_is_the_least_that_a_schedule_spans(monkeypatch):
    """A run whose minutes are over as it begins must not take its first moment for the whole."""
    now = [100.0]
    monkeypatch.setattr(gpt, "time", SimpleNamespace(monotonic=lambda: now[0]))
    chosen = gpt.checked_settings(max_minutes=0.001)
    clock = gpt.Clock(chosen, gpt.Progress(), 0.0)
    clock.begin_loop()
    now[0] += 0.25
    assert clock.share_done(1, 0.0) == 0.25
