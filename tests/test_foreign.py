"""hub.py reads nanoGPT's checkpoints and llama2.c's models: the same logits and the same ids."""

import itertools
import math
import os
import pickle
import random
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import gpt
import hub

TEXT = "the cat and the dog, é and 日本: a\n thé  end"


# ---- nanoGPT ----
def nanogpt_logits(weights, sizes, ids, approximate):
    """Return the logits (B, T, vocab_size) of nanoGPT's GPT, by its formulas."""
    w = {name.removeprefix("_orig_mod.transformer."): tensor for name, tensor in weights.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    B, T = ids.shape
    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    d = sizes["n_embd"] // sizes["n_head"]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    for layer in range(sizes["n_layer"]):
        qkv = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
        q, k, v = (part.view(B, T, -1, d).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = (q @ k.mT / math.sqrt(d)).masked_fill(~causal, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(y, f"h.{layer}.attn.c_proj")
        hidden = linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
        x = x + linear(F.gelu(hidden, approximate=approximate), f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.fixture
def nanogpt(tmp_path):
    """Return a function that writes a run as nanoGPT does: (ckpt.pt's path, weights, sizes)."""

    def write(bias, vocab_size=None, dataset="mine"):
        chars = sorted(set(TEXT))
        C, V = 32, vocab_size or len(chars)
        sizes = {"n_layer": 2, "n_head": 4, "n_embd": C, "block_size": 24, "bias": bias}
        sizes |= {"vocab_size": V, "dropout": 0.2}
        shapes = {"wte": (V, C), "wpe": (24, C), "ln_f": (C,)}
        for i in range(2):
            shapes |= {f"h.{i}.ln_1": (C,), f"h.{i}.ln_2": (C,), f"h.{i}.attn.c_attn": (3 * C, C)}
            shapes |= {f"h.{i}.attn.c_proj": (C, C), f"h.{i}.mlp.c_fc": (4 * C, C)}
            shapes |= {f"h.{i}.mlp.c_proj": (C, 4 * C)}
        torch.manual_seed(3)
        weights = {}
        for name, shape in shapes.items():
            weights[f"_orig_mod.transformer.{name}.weight"] = 0.3 * torch.randn(shape)
            if bias and name not in ("wte", "wpe"):
                weights[f"_orig_mod.transformer.{name}.bias"] = 0.3 * torch.randn(shape[0])
        weights["_orig_mod.lm_head.weight"] = weights["_orig_mod.transformer.wte.weight"]
        (tmp_path / "out").mkdir()
        path = tmp_path / "out" / "ckpt.pt"
        state = {"model": weights, "optimizer": {}, "model_args": sizes, "iter_num": 7}
        state |= {"best_val_loss": torch.tensor(1.5), "config": {"dataset": dataset}}
        torch.save(state, path)
        folder = tmp_path / "data" / dataset
        folder.mkdir(parents=True)
        names = {"vocab_size": len(chars), "itos": dict(enumerate(chars))}
        names["stoi"] = {c: i for i, c in enumerate(chars)}
        (folder / "meta.pkl").write_bytes(pickle.dumps(names))
        return path, weights, sizes

    return write


@pytest.mark.parametrize("bias", [True, False])
def test_a_run_of_nanogpt_is_read(nanogpt, bias, capsys):
    """GPT-2's GELU in place of the exact one changes these random weights' logits by 0.01."""
    hub.say_once.cache_clear()
    path, weights, sizes = nanogpt(bias)
    model, tokenizer, _ = hub.load_pretrained(path)
    assert "GELU" in capsys.readouterr().err
    stoi = {c: i for i, c in enumerate(sorted(set(TEXT)))}
    assert tokenizer.encode(TEXT) == [stoi[c] for c in TEXT]
    ids = torch.tensor([tokenizer.encode(TEXT)[:24], tokenizer.encode(TEXT)[5:29]])
    with torch.no_grad():
        ours, _ = model(ids)
    same = nanogpt_logits(weights, sizes, ids, "tanh")
    exact = nanogpt_logits(weights, sizes, ids, "none")
    torch.testing.assert_close(ours, same, atol=1e-4, rtol=0)
    assert 1e-4 < (ours - exact).abs().max() < 0.02
    assert same.std() > 0.3


def test_a_run_of_nanogpt_is_finetuned_and_sampled(nanogpt, settings, tmp_path):
    """As any other model: --init_from takes what `get` wrote."""
    path, weights, _ = nanogpt(bias=False)
    held = hub.get(path, tmp_path / "models" / "mine")
    before = gpt.read_checkpoint(held)["model"]["wte.weight"]
    assert torch.equal(before, weights["_orig_mod.transformer.wte.weight"])
    assert hub.short_name(path) == "out"
    os.utime(path, (0, 0))  # nanoGPT has written it anew
    with pytest.raises(ValueError, match="ckpt.pt has changed since .*: delete .*best.pt"):
        hub.get(path, tmp_path / "models" / "mine")
    with pytest.raises(ValueError, match="python hub.py get .*ckpt.pt reads it"):
        gpt.load_checkpoint(path)
    tokenizer = gpt.Tokenizer(**gpt.read_checkpoint(held)["tokenizer"])
    gpt.write_dataset(tmp_path / "data" / "again", TEXT * 40, tokenizer, "tests")
    settings(dataset="again", init_from=str(held), max_iters=2, block_size=None, n_layer=None)
    settings(n_head=None, n_kv_head=None, n_embd=None)
    assert gpt.train()["step"] == 2


def test_gpt2s_vocabulary_is_taken_where_there_is_no_meta_pkl(nanogpt, monkeypatch):
    """As nanoGPT's sample.py does; its weights are padded to 50,304."""
    path, _, _ = nanogpt(False, vocab_size=50304, dataset="openwebtext")
    (path.parent.parent / "data" / "openwebtext" / "meta.pkl").unlink()
    chars = gpt.Tokenizer("char", "abc").encoding
    monkeypatch.setattr(gpt, "load_encoding", lambda name: {"gpt2": chars}[name])
    model, tokenizer, _ = hub.load_pretrained(path)
    assert tokenizer.state["kind"] == "gpt2" and model.config.vocab_size == 50304


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_what_is_no_run_of_nanogpt_is_refused(nanogpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _, _ = nanogpt(False)
    meta = tmp_path / "data" / "mine" / "meta.pkl"
    names = meta.read_bytes()
    meta.write_bytes(pickle.dumps({"itos": Evil()}))
    with pytest.raises(ValueError, match="does not hold characters .*it asks for posix.system"):
        hub.load_model(path)
    assert not (tmp_path / "evil").exists()
    meta.write_bytes(names[:50])
    with pytest.raises(ValueError, match="does not hold characters"):
        hub.load_model(path)
    meta.unlink()
    with pytest.raises(ValueError, match="copy nanoGPT's data/mine/meta.pkl beside it"):
        hub.load_model(path)
    (path.parent / "meta.pkl").write_bytes(names)
    hub.load_model(path)
    state = torch.load(path)
    torch.save(state | {"model_args": {"n_layer": 1}}, path)
    with pytest.raises(ValueError, match="'n_head' is missing"):
        hub.load_model(path)
    (path.parent / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "b"}}))
    torch.save(state, path)
    with pytest.raises(ValueError, match="holds 2 characters, but .*: copy the meta.pkl of its"):
        hub.load_model(path)
    (path.parent / "meta.pkl").write_bytes(names)
    del state["model"]["_orig_mod.transformer.ln_f.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="does not fit gpt.py's GPT .*ln_f.weight"):
        hub.load_model(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        hub.load_model(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="'model_args' is missing"):
        hub.load_model(path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="name the folder that holds config.json"):
        hub.load_model(tmp_path / "model.safetensors")


# ---- llama2.c ----
def sentencepiece_tokens():
    """Return [(text, score), ...] as llama2.c writes them: special ones, bytes, pairs, characters."""
    pairs = [" t", "he", " a", "an", " the", "th", "nd", " and", "at", " c", " cat", "og", "  "]
    letters = [" ", *"abcdefghijklmnopqrstuvwxyz.,:é日"]
    tokens = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    tokens += [(f"<0x{i:02X}>", 0.0) for i in range(256)]
    tokens += [(pair, -float(i)) for i, pair in enumerate(pairs)]
    return tokens + [(letter, -1e3 - i) for i, letter in enumerate(letters)]


def encode_as_run_c(tokens, text):
    """Return the ids of a text: merge the neighbours whose union scores best, again and again."""
    index = {token: i for i, (token, _) in enumerate(tokens)}
    ids = []
    for c in " " + text:
        ids += [index[c]] if c in index else [byte + 3 for byte in c.encode()]
    while True:
        best = None
        for i, (a, b) in enumerate(itertools.pairwise(ids)):
            union = index.get(tokens[a][0] + tokens[b][0])
            if union is not None and (best is None or tokens[union][1] > tokens[best[1]][1]):
                best = i, union
        if best is None:
            return ids
        ids[best[0] : best[0] + 2] = [best[1]]


@pytest.fixture
def llama2c(tmp_path):
    """Return a function that writes a random Llama as llama2.c's export.py does: (path, Llama)."""
    tokens = sentencepiece_tokens()

    def write(version, tied, n_kv_head=2, dim=32):
        shape = {"hidden_size": dim, "intermediate_size": 44, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": n_kv_head}
        shape |= {"max_position_embeddings": 24, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        torch.manual_seed(5)
        config = LlamaConfig(vocab_size=len(tokens), tie_word_embeddings=tied, **shape)
        llama = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for p in llama.parameters():
                p.copy_(0.3 * torch.randn(p.shape) + (p.dim() == 1))
        w = {name: p.detach() for name, p in llama.named_parameters()}

        def layers(name, n_heads=0):
            found = [w[f"model.layers.{i}.{name}.weight"] for i in range(2)]
            if n_heads:  # the pairs that turn together lie side by side
                found = [
                    f.view(n_heads, 2, -1, dim).transpose(1, 2).reshape(f.shape) for f in found
                ]
            return found

        q, k = layers("self_attn.q_proj", 4), layers("self_attn.k_proj", n_kv_head)
        v, o = layers("self_attn.v_proj"), layers("self_attn.o_proj")
        first, second = layers("input_layernorm"), layers("post_attention_layernorm")
        mlp = [*layers("mlp.gate_proj"), *layers("mlp.down_proj"), *layers("mlp.up_proj")]
        embeddings, norm = [w["model.embed_tokens.weight"]], [w["model.norm.weight"]]
        head = [] if tied else [w["lm_head.weight"]]
        numbers = [dim, 44, 2, 4, n_kv_head, len(tokens), 24]
        if version == 0:
            numbers[5] *= 1 if tied else -1
            header = struct.pack("<7i", *numbers)
            angles = [torch.zeros(2, 24, dim // 8)]
            order = [*embeddings, *first, *q, *k, *v, *o, *second, *mlp, *norm, *angles, *head]
        else:
            header = struct.pack("<Ii7iB", 0x616B3432, version, *numbers, tied).ljust(256, b"\0")
            order = [*first, *second, *norm, *embeddings, *q, *k, *v, *o, *mlp, *head]
        path = tmp_path / "stories.bin"
        content = [t.contiguous().numpy().astype("<f4").tobytes() for t in order]
        path.write_bytes(header + b"".join(content))
        spelled = [struct.pack("<fi", score, len(t.encode())) + t.encode() for t, score in tokens]
        (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 9) + b"".join(spelled))
        return path, llama

    return write


@pytest.mark.parametrize(
    "version, tied, n_kv_head", [(0, True, 4), (0, False, 2), (1, True, 2), (1, False, 1)]
)
def test_a_model_of_llama2c_is_read(llama2c, tmp_path, version, tied, n_kv_head):
    """Also one whose width makes the file begin as a pickle does, beside another tokenizer."""
    path, llama = llama2c(version, tied, n_kv_head, dim=128 if tied else 32)
    whole = (tmp_path / "tokenizer.bin").read_bytes()
    (tmp_path / "tok304.bin").write_bytes(whole)
    (tmp_path / "tokenizer.bin").write_bytes(whole + struct.pack("<fi", -9.0, 1) + b"~")
    model, tokenizer, _ = hub.load_pretrained(path)
    ids = torch.randint(len(sentencepiece_tokens()), (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], llama(ids).logits, atol=1e-4, rtol=0)
    greedy = llama.generate(ids[:1, :4], max_new_tokens=20, do_sample=False, eos_token_id=None)
    ours = [int(i) for i in model.generate(ids[:1, :4], 20, temperature=0)]
    assert ours == greedy[0, 4:].tolist()
    assert hub.short_name(path) == "stories"
    assert (tokenizer.begin_id, tokenizer.end_id) == (1, 2)


def test_llama2cs_tokenizer_gives_run_cs_ids(llama2c):
    path, _ = llama2c(0, True)
    _, tokenizer, _ = hub.load_pretrained(path)
    tokens = sentencepiece_tokens()
    draw = random.Random(1)
    pieces = ["the", " ", "  ", "and", "cat", "dog", "a", "n", "é", "日", "ü", "😀", "\n", "."]
    texts = [TEXT, *("".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(500))]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == encode_as_run_c(tokens, text)
        assert tokenizer.decode(ids) == " " + text


@pytest.mark.parametrize("damage", ["short", "long", "rounded", "head", "pickle", "tokens", "none"])
def test_what_is_no_model_of_llama2c_is_refused(llama2c, tmp_path, damage):
    path, _ = llama2c(1, True)
    content = path.read_bytes()
    words = {
        "short": "is incomplete .* bytes instead of",
        "long": "is incomplete .* bytes instead of",
        "rounded": "version 2, whose weights are rounded",
        "head": "begins with .*, which are not sizes",
        "pickle": "is a pickle",
        "tokens": "304 tokens, but no tok.*tokenizer.bin is incomplete",
        "none": "copy the model's tokenizer.bin beside it",
    }
    changed = {
        "short": content[:-4],
        "long": content + b"\0",
        "rounded": content[:4] + struct.pack("<i", 2) + content[8:],
        "head": np.zeros(999, "<i4").tobytes(),
        "pickle": b"PK\x03\x04" + content,
    }
    path.write_bytes(changed.get(damage, content))
    beside = tmp_path / "tokenizer.bin"
    if damage == "tokens":
        beside.write_bytes(beside.read_bytes()[:-3])
    if damage == "none":
        beside.unlink()
    with pytest.raises(ValueError, match=words[damage]):
        hub.load_model(path)
