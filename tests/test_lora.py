"""Finetuning from other weights: LoRA and its checkpoints, full finetuning, evaluation of any text."""

import base64
import itertools
import json
import math

import pytest
import torch
from conftest import ROOT, TEXT
from torch.nn import functional as F

import configurator
import gpt
import prepare
import pretrained
import sample


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
        pretrained.add_lora(model, rank=3)
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
    pretrained.add_lora(model, rank=4)
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
        pretrained.merge_lora(model)
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


def test_only_the_adapters_are_trained_and_saved(settings, base, tmp_path, capsys):
    """The checkpoints hold the adapters alone; loaded they are merged, and figures, logits and samples follow."""
    settings(lora_rank=2, learning_rate=0.02, max_iters=12, eval_interval=4)
    figures = gpt.train()
    out = capsys.readouterr().out
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert all(".lora." in name for name in state["model"])
    n_trained = sum(tensor.numel() for name, tensor in state["model"].items() if name[-1] in "AB")
    assert n_trained == 2 * 2 * sum((32 + 64, 32 + 32, 32 + 192, 96 + 32))
    assert f"{n_trained:,} trained" in out
    assert len(state["optimizers"][0]["state"]) == 16 == len(state["model"]) * 2 / 3
    assert state["base"] == str(base.resolve())
    model, _, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    untouched, _, start = gpt.load_checkpoint(base)
    changed = {
        name
        for name, a in untouched.state_dict().items()
        if not torch.equal(a, model.state_dict()[name])
    }
    assert changed == {name for name in start["model"] if "c_" in name}
    settings(eval_only=True)
    assert gpt.train()["val_loss"] == pytest.approx(
        gpt.read_checkpoint(base)["best_val_loss"], abs=0.5
    )
    settings(eval_only=False, max_iters=0, eval_interval=4)
    assert figures["val_loss"] < gpt.read_checkpoint(base)["best_val_loss"]


def test_a_lora_run_resumes_bit_for_bit(settings, base, tmp_path):
    """Cut in two, and begun anew from init_from=resume, it ends with the same adapters."""
    settings(lora_rank=2, learning_rate=0.02, max_iters=10, eval_interval=5, dropout=0.1)
    gpt.train()
    whole = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")["model"]
    settings(out_dir=str(tmp_path / "cut"), lr_decay_iters=10, max_iters=5)
    gpt.train()
    settings(init_from="resume", max_iters=10)
    gpt.train()
    cut = gpt.read_checkpoint(tmp_path / "cut" / "ckpt.pt")["model"]
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    settings(lora_rank=3)
    with pytest.raises(ValueError, match="lora_rank is 3, in the checkpoint 2"):
        gpt.train()


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


def test_a_base_that_is_gone_or_unfit_is_named(settings, base, tmp_path):
    """LoRA without its base; a block longer than the base knows; LoRA from nothing or with Muon."""
    settings(lora_rank=2, max_iters=2, eval_interval=2)
    gpt.train()
    base.rename(tmp_path / "elsewhere.pt")
    with pytest.raises(FileNotFoundError, match="best.pt does not exist"):
        gpt.load_checkpoint(tmp_path / "out" / "best.pt")
    settings(init_from=str(tmp_path / "elsewhere.pt"), block_size=32)
    with pytest.raises(ValueError, match="block_size is 32: .*elsewhere.pt has 16 positions"):
        gpt.train()
    settings(block_size=16, optimizer="muon")
    with pytest.raises(ValueError, match="lora_rank is 2: it needs --optimizer=adamw, not muon"):
        gpt.train()
    settings(init_from="scratch")
    with pytest.raises(ValueError, match="lora_rank is 2: it needs init_from"):
        gpt.train()
    settings(lora_rank=-1)
    with pytest.raises(ValueError, match="lora_rank is -1"):
        gpt.train()


def test_a_base_that_has_changed_is_noticed(settings, base, tmp_path):
    """Adapters are not merged into, nor trained on beside, other weights than they were trained beside."""
    settings(lora_rank=2, max_iters=2, eval_interval=2)
    gpt.train()
    gpt.load_checkpoint(tmp_path / "out" / "best.pt")
    state = gpt.read_checkpoint(base)
    state["model"]["h.1.mlp.c_fc.weight"] *= 1.001
    gpt.save_checkpoint(base, state)
    with pytest.raises(ValueError, match="best.pt holds other weights than when LoRA began"):
        gpt.load_checkpoint(tmp_path / "out" / "best.pt")
    settings(init_from="resume", max_iters=4)
    with pytest.raises(ValueError, match="best.pt holds other weights than when LoRA began"):
        gpt.train()


@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
def test_what_shapes_no_weight_is_as_the_settings_say(settings, tmp_path, use_rope, rank):
    """A shorter context is taken, and evaluated with, as a resumed run does; dropout and
    train_temperature reach the base."""
    settings(out_dir=str(tmp_path / "base"), use_rope=use_rope)
    gpt.train()
    settings(max_iters=2, eval_interval=2)
    settings(init_from=str(tmp_path / "base" / "best.pt"), optimizer="adamw", lora_rank=rank)
    settings(out_dir=str(tmp_path / "out"), block_size=8, dropout=0.25, train_temperature=0.9)
    figures = gpt.train()
    state = gpt.read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert (state["model_args"]["dropout"], state["config"]["block_size"]) == (0.25, 8)
    assert state["model_args"]["train_temperature"] == 0.9
    assert state["model_args"]["block_size"] == (8 if use_rope else 16)
    settings(eval_only=True, init_from="scratch", block_size=16)
    assert gpt.train()["val_loss"] == pytest.approx(figures["val_loss"], abs=1e-6)
    settings(init_from=str(tmp_path / "base" / "best.pt"))
    whole = gpt.train()["val_loss"]
    settings(block_size=8)
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "base" / "best.pt")
    ids = tokenizer.encode(TEXT[int(0.9 * len(TEXT)) :])
    model.config.block_size = 8
    assert gpt.train()["val_loss"] == pytest.approx(hand_loss(model, ids, 8), abs=1e-5) != whole
    settings(eval_only=False, init_from="resume", max_iters=3)
    assert gpt.train()["step"] == 3


def test_a_vocabulary_of_the_same_size_is_no_other_vocabulary(settings, base, tmp_path):
    """Finetuning on, and evaluating, data whose ids mean other characters is refused."""
    chars = "".join(sorted(set(TEXT)))
    gpt.write_dataset(
        tmp_path / "data" / "turned", TEXT, gpt.Tokenizer("char", chars[::-1]), "tests"
    )
    settings(dataset="turned")
    for eval_only in (False, True):
        settings(eval_only=eval_only)
        with pytest.raises(ValueError, match="turned has another tokenizer than the model"):
            gpt.train()


@pytest.mark.parametrize(
    "name", ["finetune_shakespeare", "finetune_chat", "finetune_rated", "eval_gpt2"]
)
def test_the_configs_run(settings, base, tmp_path, monkeypatch, name):
    """Each, with a small model and data in its tokens, and two steps."""
    script = {k: getattr(gpt, k) for k in gpt.SETTINGS} | {"__file__": str(ROOT / "gpt.py")}
    flags = [
        f"--init_from={base}",
        "--dataset=toy",
        "--block_size=16",
        "--max_iters=2",
        "--warmup_iters=1",
    ]
    configurator.configure(
        script,
        [str(ROOT / "config" / f"{name}.py"), *flags, f"--out_dir={tmp_path / 'out'}"],
        derive=lambda: {"device_type": "cpu", "native_bfloat16": False},
    )
    settings(**{k: script[k] for k in gpt.SETTINGS})
    assert gpt.train()["val_loss"] < 4


def test_init_from_a_hugging_face_folder(settings, base, tmp_path):
    """An exported model is finetuned, evaluated and sampled from by its folder's name."""
    model, tokenizer, state = gpt.load_checkpoint(base)
    pretrained.export(model, tokenizer, state, tmp_path / "folder")
    settings(eval_only=True)
    expected = gpt.train()["val_loss"]
    settings(init_from=str(tmp_path / "folder"))
    assert gpt.train()["val_loss"] == pytest.approx(expected, abs=1e-6)
    settings(eval_only=False, lora_rank=2, max_iters=3, eval_interval=3)
    gpt.train()
    merged, _, _ = gpt.load_checkpoint(tmp_path / "out" / "best.pt")
    assert merged.config.n_layer == model.config.n_layer


def test_conversations_in_a_pretrained_models_tokens(settings, tmp_path, monkeypatch):
    """With a tokenizer that lacks prepare.py's marks they are spelled out, in the data as in --chat."""
    ranks = " ".join(base64.b64encode(byte).decode() for byte in prepare.BYTES)
    special = "<|im_start|> <|im_end|>"
    tokenizer = gpt.Tokenizer(
        "bpe",
        ranks=ranks,
        pattern=prepare.GPT2_PATTERN,
        special=special,
        end="<|im_end|>",
        chat="%s||%s:||%s",
    )
    pretrained.export(small(vocab_size=258, block_size=64), tokenizer, {}, tmp_path / "folder")
    messages = [
        {"role": r, "content": c}
        for r, c in (("system", "be"), ("user", "hello"), ("assistant", "ok"))
    ]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    for name, value in {"input": str(tmp_path / "chat.jsonl"), "data_dir": gpt.data_dir}.items():
        monkeypatch.setattr(prepare, name, value)
    monkeypatch.setattr(prepare, "tokenizer", str(tmp_path / "folder"))
    prepare.main()
    settings(
        dataset="chat",
        init_from=str(tmp_path / "folder"),
        optimizer="adamw",
        block_size=64,
        max_iters=2,
    )
    gpt.train()
    model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    data = gpt.Data(tmp_path / "data" / "chat", 64)
    monkeypatch.setattr(sample, "system", "be")
    asked = sample.Chat(model, tokenizer, None, None).ask("hello")
    expected = b"be<|user|>hello<|assistant|>"
    assert tokenizer.decode_bytes(asked) == expected
    x, _, w = data.get_batch("train", 0, 1)
    assert (
        x[0, : len(asked)].tolist() == asked == [prepare.BYTES.index(bytes([b])) for b in expected]
    )
    assert w[0].tolist() == [0.0] * (len(asked) - 1) + [1.0] * 3 + [0.0] * (62 - len(asked))
    assert tokenizer.end == 257


def test_lora_learns_the_rated_examples(settings, tmp_path, write_examples):
    """A base that has learned one table answers another after LoRA; the wrong answers were rated 1."""
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
        dataset="first", n_embd=64, block_size=8, batch_size=25, max_iters=120, eval_interval=120
    )
    settings(out_dir=str(tmp_path / "base"), optimizer="adamw", learning_rate=5e-3)
    gpt.train()
    settings(
        dataset="second",
        out_dir=str(tmp_path / "out"),
        init_from=str(tmp_path / "base" / "ckpt.pt"),
    )
    settings(lora_rank=8, batch_size=50, max_iters=300, eval_interval=300, learning_rate=1e-2)
    gpt.train()
    for path, expected in (("base", first), ("out", second)):
        model, tokenizer, _ = gpt.load_checkpoint(tmp_path / path / "ckpt.pt")
        for name, answer in expected.items():
            pieces = sample.generate_text(
                model, tokenizer, f"{name}=", 6, ["<|endoftext|>"], temperature=0.0
            )
            assert "".join(pieces) == answer


# ---- Evaluation --------------------------------------------------------------------------------------------
def hand_loss(model, ids, stride):
    """Return the mean loss of ids[1:] in windows `stride` apart, each target counted once, by plain arithmetic."""
    block, nats, counted, start = model.config.block_size, 0.0, 0, 0
    while counted < len(ids) - 1:
        window = ids[start : start + block + 1]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]]))[0][0]
        losses = F.cross_entropy(logits, torch.tensor(window[1:]), reduction="none")
        new = start + len(window) - 1 - counted
        nats, counted, start = (
            nats + float(losses[-new:].double().sum()),
            counted + new,
            start + stride,
        )
    return nats / counted


def test_eval_text_is_sliding_windows(settings, base, tmp_path):
    """Loss, perplexity, tokens and bits per byte of texts of any length, for any stride."""
    model, tokenizer, _ = gpt.load_checkpoint(base)
    for n_chars, stride in itertools.product((2, 16, 17, 18, 33, 300), (0, 16, 5, 1)):
        text = TEXT[700 : 700 + n_chars]
        (tmp_path / "text.txt").write_text(text)
        settings(eval_text=str(tmp_path / "text.txt"), eval_stride=stride)
        figures = gpt.train()
        expected = hand_loss(model, tokenizer.encode(text), stride or 16)
        assert figures["val_loss"] == pytest.approx(expected, abs=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert figures["bits_per_byte"] == pytest.approx(expected / math.log(2), abs=1e-4)
        assert figures["tokens"] == n_chars


def test_eval_text_begins_as_texts_do(settings, base, tmp_path):
    """A tokenizer's begin token is seen first, so that the first character, too, is a target."""
    state, chars = gpt.read_checkpoint(base), "".join(sorted(set(TEXT)))
    state["tokenizer"] = gpt.Tokenizer("char", chars[:-1], special="<s>", begin="<s>").state
    gpt.save_checkpoint(base, state)
    text = "".join(c for c in TEXT[700:760] if c != chars[-1])
    (tmp_path / "text.txt").write_text(text)
    settings(eval_text=str(tmp_path / "text.txt"))
    figures, (model, tokenizer, _) = gpt.train(), gpt.load_checkpoint(base)
    ids = [tokenizer.begin, *tokenizer.encode(text)]
    assert (ids[0], figures["tokens"]) == (len(chars) - 1, len(text))
    assert figures["val_loss"] == pytest.approx(hand_loss(model, ids, 16), abs=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(figures["val_loss"] / math.log(2), abs=1e-6)


def test_eval_stride_of_the_validation_split(settings, base, tmp_path):
    """The split's own tokens, too, are taken in overlapping windows."""
    settings(eval_only=True, eval_stride=4)
    figures = gpt.train()
    model, tokenizer, _ = gpt.load_checkpoint(base)
    ids = tokenizer.encode(TEXT[int(0.9 * len(TEXT)) :])
    assert figures["val_loss"] == pytest.approx(hand_loss(model, ids, 4), abs=1e-5)


def test_bits_per_byte_do_not_depend_on_the_tokenizer(settings, tmp_path):
    """Models that give each character one chance in 40, by characters or by pairs, use the same bits."""
    text = "".join("abcdefgh"[i * i % 8] for i in range(200))
    pairs = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    ranks = " ".join(base64.b64encode(pair.encode()).decode() for pair in pairs)
    tokenizers = {
        "char": gpt.Tokenizer("char", "abcdefgh"),
        "pairs": gpt.Tokenizer("bpe", ranks=ranks, pattern="(?s:..)"),
    }
    found = {}
    for name, tokenizer in tokenizers.items():
        meta = gpt.write_dataset(tmp_path / "data" / name, text, tokenizer, "hand")
        data = gpt.Data(tmp_path / "data" / name, 4)
        loss = math.log(40) * meta["val_bytes"] / meta["val_tokens"]
        settings(device="cpu")
        found[name] = gpt.final_figures(loss, data, gpt.set_up_machine(), "")
    assert meta["val_tokens"] * 2 == meta["val_bytes"]
    assert found["char"]["bits_per_byte"] == pytest.approx(math.log2(40))
    assert found["pairs"]["bits_per_byte"] == pytest.approx(math.log2(40))
    assert found["pairs"]["perplexity"] == pytest.approx(1600)


def test_perplexity_is_transformers(settings, base, tmp_path):
    """The same windows through transformers, with its own loss, give the same perplexity."""
    import transformers

    model, tokenizer, state = gpt.load_checkpoint(base)
    pretrained.export(model, tokenizer, state, tmp_path / "folder")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    text, stride = TEXT[5000:5400], 8
    (tmp_path / "text.txt").write_text(text)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")(
        text, return_tensors="pt"
    ).input_ids
    nats, n, end = 0.0, 0, 1
    for begin in range(0, ids.size(1), stride):
        last = min(begin + 17, ids.size(1))
        window, labels = ids[:, begin:last], ids[:, begin:last].clone()
        labels[:, : max(1, end - begin)] = -100
        with torch.no_grad():
            new = last - max(end, begin + 1)
            nats, n, end = nats + float(other(window, labels=labels).loss) * new, n + new, last
        if last == ids.size(1):
            break
    settings(
        eval_text=str(tmp_path / "text.txt"), eval_stride=stride, init_from=str(tmp_path / "folder")
    )
    assert n == ids.size(1) - 1
    assert gpt.train()["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "text.txt"), (b"\xff\xfe", "text.txt"), (b"1", "text.txt"), (b"7 ~ 8", "lacks '~'")],
)
def test_texts_that_cannot_be_evaluated(settings, base, tmp_path, content, message):
    """No file, no UTF-8, no two tokens, an unknown character."""
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    settings(eval_text=str(tmp_path / "text.txt"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gpt.train()
