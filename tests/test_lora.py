"""Finetuning from other weights: LoRA and its checkpoints, full finetuning."""

import base64
import json
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, TEXT
from torch.nn import functional as F

import configurator
import gpt
import hub
import prepare
import sample
from extras.bpe import BYTES
from extras.hf_tokenizer import GPT2_PATTERN
from extras.lora import LoRA, add_lora, merge_lora


def small(**changes):
    """Return a model of random weights, c_proj's too, for `toy`'s characters."""
    shape = {
        "block_size": 16,
        "vocab_size": 40,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
    }
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(**shape | {"dropout": 0.0} | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


IDX = torch.arange(32).reshape(2, 16)


def adapters(model):
    return {name: p for name, p in model.named_parameters() if ".lora." in name}


def test_at_first_the_logits_are_the_bases():
    """B is 0: not a bit differs; and the adapters have the shapes that the rank says."""
    model = small()
    with torch.no_grad():
        before = model(IDX)[0]
        add_lora(model, rank=3)
        assert torch.equal(model(IDX)[0], before)
    shapes = {
        name.split(".", 2)[2]: tuple(p.shape)
        for name, p in adapters(model).items()
        if ".0." in name
    }
    assert shapes == {
        "attn.c_attn.lora.A": (3, 32),
        "attn.c_attn.lora.B": (64, 3),
        "attn.c_proj.lora.A": (3, 32),
        "attn.c_proj.lora.B": (32, 3),
        "mlp.c_fc.lora.A": (3, 32),
        "mlp.c_fc.lora.B": (192, 3),
        "mlp.c_proj.lora.A": (3, 96),
        "mlp.c_proj.lora.B": (32, 3),
    }
    assert all(p.requires_grad == (".lora." in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_merged_is_unmerged_is_the_formula(bias):
    """Adapters in use, merged ones, and W + 2 B A put in by hand give the same logits."""
    model, by_hand = small(bias=bias), small(bias=bias)
    add_lora(model, rank=4)
    weights = by_hand.state_dict()
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            torch.nn.init.normal_(parameter, std=0.2)
            if name.endswith("lora.B"):
                owner = name.removesuffix("lora.B")
                weights[owner + "weight"] += 2 * parameter @ model.state_dict()[owner + "lora.A"]
        unmerged = model(IDX)[0]
        assert (unmerged - small(bias=bias)(IDX)[0]).abs().max() > 0.1
        torch.testing.assert_close(by_hand(IDX)[0], unmerged, atol=1e-5, rtol=0)
        merge_lora(model)
        torch.testing.assert_close(model(IDX)[0], unmerged, atol=1e-5, rtol=0)
    assert not adapters(model)
    assert set(model.state_dict()) == set(small(bias=bias).state_dict())


@pytest.fixture
def base(settings, tmp_path):
    """Train a model for some steps and return its best.pt."""
    settings(out_dir=str(tmp_path / "base"), max_iters=8, eval_interval=8)
    gpt.train()
    settings(
        out_dir=str(tmp_path / "out"),
        init_from=str(tmp_path / "base" / "best.pt"),
        optimizer="adamw",
    )
    return tmp_path / "base" / "best.pt"


def test_only_the_adapters_are_trained_and_all_weights_are_saved(settings, base, tmp_path, capsys):
    """A checkpoint needs no base to be loaded, and is then W + 2 B A, merged."""
    start = gpt.read_checkpoint(base)
    settings(lora_rank=2, learning_rate=0.02, max_iters=12, eval_interval=4)
    figures = gpt.train()
    printed = capsys.readouterr().out
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    added = {name: w for name, w in state["model"].items() if ".lora." in name}
    n_trained = 2 * 2 * sum((32 + 64, 32 + 32, 32 + 192, 96 + 32))
    assert sum(w.numel() for w in added.values()) == n_trained
    assert f"{n_trained:,} of them trained" in printed
    assert len(state["optimizers"][0]["state"]) == len(added) == 16
    assert state["model"].keys() - added.keys() == start["model"].keys()
    assert all(torch.equal(w, state["model"][name]) for name, w in start["model"].items())
    assert (state["base"], state["lora_rank"]) == (str(base), 2)

    base.unlink()
    model, _, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    weights = model.state_dict()
    assert weights.keys() == start["model"].keys()
    for name, before in start["model"].items():
        A = added.get(name.replace("weight", "lora.A"))
        B = added.get(name.replace("weight", "lora.B"))
        expected = before if A is None else before + 2 * B @ A
        torch.testing.assert_close(weights[name], expected, atol=1e-6, rtol=0)
        assert (A is not None) == ("c_" in name)
    assert all(p.requires_grad for p in model.parameters())
    assert figures["val_loss"] < start["best_val_loss"]
    assert gpt.train(
        eval_only=True, init_from=str(tmp_path / "out" / "ckpt.pt"), out_dir=str(tmp_path / "eval")
    )["val_loss"] == pytest.approx(figures["val_loss"], abs=1e-5)


def test_a_lora_run_resumes_bit_for_bit(settings, base, tmp_path):
    """Cut in two, and without its base, it ends with the same weights."""
    settings(lora_rank=2, learning_rate=0.02, max_iters=10, eval_interval=5, dropout=0.1)
    gpt.train()
    whole = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["model"]
    settings(out_dir=str(tmp_path / "cut"), lr_decay_iters=10, max_iters=5)
    gpt.train()
    base.unlink()
    settings(init_from="resume", max_iters=10)
    gpt.train()
    cut = gpt.read_checkpoint(tmp_path / "cut" / "ckpt.pt")["model"]
    assert whole.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    with pytest.raises(ValueError, match="lora_rank is 3, but 2 in the run"):
        gpt.train(lora_rank=3)


def test_lora_on_lora_begins_at_the_merged_weights(settings, base, tmp_path):
    settings(lora_rank=2, learning_rate=0.02, max_iters=6, eval_interval=6)
    gpt.train()
    first, _, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    gpt.train(
        init_from=str(tmp_path / "out" / "ckpt.pt"),
        out_dir=str(tmp_path / "again"),
        lora_rank=3,
        max_iters=0,
    )
    again, _, state = gpt.load_checkpoint(tmp_path / "again" / "ckpt.pt")
    assert state["lora_rank"] == 3
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])


def test_full_finetuning_begins_at_the_base_and_resumes_without_it(settings, base, tmp_path):
    """The model's shape is init_from's, whatever the settings say; its first loss is the base's."""
    settings(n_layer=7, n_embd=64, max_iters=4, eval_interval=4, learning_rate=1e-3, eval_iters=100)
    gpt.train()
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    first = next(line["val_loss"] for line in lines if "val_loss" in line)
    settings(eval_only=True)
    assert first == pytest.approx(gpt.train()["val_loss"], abs=1e-6)
    model, _, state = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert (model.config.n_layer, model.config.n_embd) == (2, 32)
    assert not any(".lora." in name for name in state["model"])
    base.unlink()
    settings(eval_only=False, init_from="resume", max_iters=6)
    assert gpt.train()["step"] == 6


def test_a_base_that_does_not_fit_is_named(settings, base, tmp_path):
    """A block longer than the base knows, LoRA from scratch or with Muon, a rank below 0."""
    with pytest.raises(ValueError, match="block_size is 32: .*best.pt takes at most 16"):
        gpt.train(block_size=32)
    with pytest.raises(ValueError, match="lora_rank is 2: it needs --optimizer=adamw, not muon"):
        gpt.train(lora_rank=2, optimizer="muon")
    with pytest.raises(ValueError, match="lora_rank is 2, but there is no model to finetune"):
        gpt.train(lora_rank=2, init_from="scratch")
    with pytest.raises(ValueError, match="lora_rank is -1"):
        gpt.train(lora_rank=-1)
    for missing in ("gpt2", str(tmp_path)):  # tmp_path: as a folder of Hugging Face
        with pytest.raises(FileNotFoundError, match=f"with python hub.py get {missing}"):
            gpt.train(init_from=missing)


@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
def test_what_shapes_no_weight_is_as_the_settings_say(settings, tmp_path, use_rope, rank):
    """A shorter context, dropout and train_temperature are taken, and evaluated with."""
    settings(out_dir=str(tmp_path / "base"), use_rope=use_rope)
    gpt.train()
    base = str(tmp_path / "base" / "best.pt")
    settings(max_iters=2, eval_interval=2, init_from=base, optimizer="adamw", lora_rank=rank)
    settings(out_dir=str(tmp_path / "out"), block_size=8, dropout=0.25, train_temperature=0.9)
    figures = gpt.train()
    model, tokenizer, state = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert (model.config.dropout, model.config.train_temperature) == (0.25, 0.9)
    assert (model.config.block_size, state["config"]["block_size"]) == (8, 8)
    ids = tokenizer.encode(TEXT[int(0.9 * len(TEXT)) :])
    assert figures["val_loss"] == pytest.approx(hand_loss(model, ids, 8), abs=1e-5)
    assert gpt.train(init_from="resume", max_iters=3)["step"] == 3


def test_a_model_is_evaluated_in_the_windows_of_its_training(settings, base):
    """The settings' block_size, which may be the default, does not count."""
    state = gpt.read_checkpoint(base)
    state["model"] = small(vocab_size=25, qk_norm=True, tie_weights=False).state_dict()
    gpt.save_checkpoint(base, state)
    model, tokenizer, _ = gpt.load_checkpoint(base)
    ids = tokenizer.encode(TEXT[int(0.9 * len(TEXT)) :])
    figures = gpt.train(eval_only=True, block_size=8)
    assert figures["val_loss"] == pytest.approx(hand_loss(model, ids, 16), abs=1e-5)
    assert abs(hand_loss(model, ids, 8) - hand_loss(model, ids, 16)) > 1e-3


def test_a_vocabulary_of_the_same_size_is_no_other_vocabulary(settings, base, tmp_path):
    """Finetuning on, and evaluating, data whose ids mean other characters is refused."""
    chars = "".join(sorted(set(TEXT)))
    gpt.write_dataset(
        tmp_path / "data" / "turned", TEXT, gpt.Tokenizer("char", chars[::-1]), "tests"
    )
    settings(dataset="turned")
    for eval_only in (False, True):
        settings(eval_only=eval_only)
        with pytest.raises(ValueError, match="turned has a different tokenizer from the model"):
            gpt.train()


@pytest.mark.parametrize("name", ["finetune_shakespeare", "finetune_chat", "finetune_rated"])
def test_the_configs_run(settings, base, tmp_path, name):
    """Each, with a small model and data in its tokens, and two steps."""
    script = {k: getattr(gpt, k) for k in gpt.SETTINGS} | {"__file__": str(ROOT / "gpt.py")}
    flags = ["--dataset=toy", "--block_size=16", "--max_iters=2", "--warmup_iters=1"]
    flags += [f"--init_from={base}", f"--out_dir={tmp_path / 'out'}"]
    configurator.configure(
        script,
        [str(ROOT / "config" / f"{name}.py"), *flags],
        gpt.SETTINGS,
        gpt.check_setting,
        lambda: {"device_type": "cpu", "native_bfloat16": False},
    )
    assert gpt.train(**{k: script[k] for k in gpt.SETTINGS})["val_loss"] < 4


def test_a_model_of_hugging_face_is_finetuned(settings, base, tmp_path):
    """hub.get makes a checkpoint of its folder, which is evaluated and finetuned as any other."""
    hub.export(base, tmp_path / "folder")
    fetched = hub.get(tmp_path / "folder", tmp_path / "fetched")
    expected = gpt.train(eval_only=True)["val_loss"]
    settings(init_from=str(fetched))
    assert gpt.train(eval_only=True)["val_loss"] == pytest.approx(expected, abs=1e-6)
    gpt.train(lora_rank=2, max_iters=3, eval_interval=3)
    merged, _, state = gpt.load_checkpoint(tmp_path / "out" / "best.pt")
    assert (merged.config.n_layer, state["base"]) == (2, str(fetched))


def test_conversations_in_a_pretrained_models_tokens(settings, tmp_path):
    """Marks that its tokenizer lacks are spelled out, in the data as in --chat."""
    tokenizer = gpt.Tokenizer(
        "bpe",
        ranks=" ".join(base64.b64encode(byte).decode() for byte in BYTES),
        pattern=GPT2_PATTERN,
        special="<|im_start|> <|im_end|>",
        end="<|im_end|>",
    )
    model = small(vocab_size=258, block_size=64)
    state = {"model": model.state_dict(), "model_args": asdict(model.config)}
    path = tmp_path / "pretrained" / "best.pt"
    path.parent.mkdir()
    gpt.save_checkpoint(path, state | {"tokenizer": tokenizer.state})
    said = (("system", "be"), ("user", "hello"), ("assistant", "ok"))
    messages = [{"role": role, "content": content} for role, content in said]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    prepare.prepare(
        input=tmp_path / "chat.jsonl", data_dir=tmp_path / "data", tokenizer=path.parent
    )
    settings(dataset="chat", init_from=str(path), optimizer="adamw", block_size=64, max_iters=2)
    gpt.train()

    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    asked = sample.Chat(model, tokenizer, sample.Sampling(max_tokens=10), system="be").ask("hello")
    expected = b"be<|user|>hello<|assistant|>"
    assert tokenizer.decode_bytes(asked) == expected
    assert asked == [BYTES.index(bytes([byte])) for byte in expected]
    x, _, w = gpt.Data(tmp_path / "data" / "chat", 64).get_batch("train", 0, 1)
    assert x[0, : len(asked)].tolist() == asked
    assert w[0].tolist() == [0.0] * (len(asked) - 1) + [1.0] * 3 + [0.0] * (62 - len(asked))
    assert tokenizer.end_id == 257


def test_lora_learns_the_rated_examples(settings, tmp_path, write_examples):
    """A base that has learned one table answers another after LoRA; old answers have weight 0."""
    chars = "abcdefghij0123456789=\n"
    names = [a + b for a in "abcde" for b in "fghij"]
    first = {name: str(i * 7 % 90 + 10) for i, name in enumerate(names)}
    second = {name: str(i * 11 % 90 + 10) for i, name in enumerate(names)}

    def write(folder, answers, wrong):
        examples = [[(f"{name}=", 0), (answer, 255)] for name, answer in answers.items()]
        examples += [[(f"{name}=", 0), (answer, 0)] for name, answer in wrong.items()]
        write_examples(folder, chars, train=examples, val=examples[:3])

    write(tmp_path / "data" / "first", first, {})
    write(tmp_path / "data" / "second", second, first)
    settings(
        dataset="first", n_embd=64, block_size=8, batch_size=25, max_iters=80, eval_interval=80
    )
    settings(out_dir=str(tmp_path / "base"), optimizer="adamw", learning_rate=5e-3)
    gpt.train()
    settings(
        dataset="second",
        out_dir=str(tmp_path / "out"),
        init_from=str(tmp_path / "base" / "ckpt.pt"),
    )
    settings(lora_rank=8, batch_size=50, max_iters=150, eval_interval=150, learning_rate=1e-2)
    gpt.train()
    for path, expected in (("base", first), ("out", second)):
        model, tokenizer, _ = gpt.load_checkpoint(tmp_path / path / "ckpt.pt")
        for name, answer in expected.items():
            pieces = sample.generate_text(
                model, tokenizer, f"{name}=", 6, ["<|endoftext|>"], temperature=0.0
            )
            assert "".join(pieces) == answer


def hand_loss(model, ids, block):
    """Return the mean loss of ids[1:] in windows of `block` tokens, by plain arithmetic."""
    nats = 0.0
    for start in range(0, len(ids) - 1, block):
        window = torch.tensor(ids[start : start + block + 1])
        with torch.no_grad():
            logits = model(window[None, :-1])[0][0]
        nats += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return nats / (len(ids) - 1)


def test_the_first_matrix_is_drawn_by_the_width():
    """Its products then have the scale of their input."""
    linear = torch.nn.Linear(400, 8)
    A = LoRA(linear, 64).A
    assert float(A.detach().std()) == pytest.approx(400**-0.5, rel=0.05)
