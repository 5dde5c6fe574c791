"""GGUF files, read by llama.cpp: the same ids, the same greedy tokens, the same loss."""

import json
import random
import unicodedata
import urllib.request
from dataclasses import asdict
from functools import cache

import numpy as np
import pytest
import torch
from test_hf_tokenizer import LLAMA3_PATTERN, SPECIALS, TOPICS, own_bpe

import gpt
import hub
from extras import gguf, hf_tokenizer
from extras.bpe import count_words, train_bpe
from extras.hf_tokenizer import GPT2_PATTERN, SMOLLM2_PATTERN

WORDS = ["the", "don't", "WE'LL", "x1", "2024", "  ", "\n\n", " \t ", "\r\n", "na\xefve", "e\u0301"]
WORDS += ["日本語。", "\U0001f600", "שלום", "नमस्ते", "--", "?!", "\xa0", "\u3000", "<|user|>", "I'm"]
CHARS = "".join(sorted(set("".join(WORDS) + TOPICS[:20_000])))
FAMILIES = {
    "llama": {"qk_norm": False},
    "qwen3": {"qk_norm": True},
    "gpt2": {
        "use_rope": False,
        "use_rms_norm": False,
        "use_swiglu": False,
        "qk_norm": False,
        "bias": True,
        "n_kv_head": 4,
    },
}
# Further shapes of a Llama and a Qwen3
SHAPES = {
    "weights of the norms of q and k": {"qk_norm": True, "qk_norm_weights": True},
    "biases": {"qk_norm": False, "bias": True},
    "wide heads, tied": {"qk_norm": False, "head_dim": 32, "tie_weights": True},
    "Llama 3's positions": {
        "qk_norm": False,
        "rope_theta": 5e5,
        "rope_scaling": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


@cache
def tokenizer_of(kind):
    """Return a Tokenizer; a BPE is trained on pydoc's texts and cuts words by a pattern."""
    if kind == "char":
        return gpt.Tokenizer("char", CHARS)
    patterns = {"bpe": GPT2_PATTERN, "smollm2": SMOLLM2_PATTERN, "llama3": LLAMA3_PATTERN}
    texts = [TOPICS[:50_000] + CHARS]
    tokens = train_bpe(count_words(texts, patterns[kind]), 600)
    return own_bpe(tokens, patterns[kind], special=SPECIALS)


def random_text(draw):
    return "".join(draw.choice(WORDS) + draw.choice(["", " "]) for _ in range(draw.randint(1, 30)))


@pytest.fixture
def write_model(tmp_path):
    """Return a function that writes a random model's checkpoint, whose predictions are distinct."""

    def write(tokenizer, **changes):
        torch.manual_seed(1)
        shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "block_size": 128}
        config = gpt.GPTConfig(**shape | changes, vocab_size=tokenizer.vocab_size)
        model = gpt.GPT(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
        state = {"model_args": asdict(config), "tokenizer": tokenizer.state, "model": {}}
        state["model"] = model.state_dict()
        gpt.save_checkpoint(tmp_path / "best.pt", state | {"step": 1})
        return model

    return write


class Engine:
    """llama.cpp's server, which has read a file."""

    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.port = 128, 1, 0
        parameters.fit_params = parameters.warmup = False
        parameters.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(parameters)

    def ask(self, route, **body):
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + route, content, headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def encode(self, text):
        return self.ask("/tokenize", content=text, parse_special=False)["tokens"]

    def continue_greedily(self, ids, n):
        return self.ask("/completion", prompt=ids, n_predict=n, top_k=1, return_tokens=True)[
            "tokens"
        ]

    def log_probs(self, ids, n_vocab):
        """Return {id: log-probability} of the token after ids."""
        options = {"n_predict": 1, "n_probs": n_vocab, "temperature": 1.0, "top_k": 0}
        found = self.ask("/completion", prompt=ids, **options)["completion_probabilities"][0]
        return {entry["id"]: entry["logprob"] for entry in found["top_logprobs"]}


def as_float16(model):
    """Round a model's matrices as a GGUF file of this type does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.startswith("wpe"):
                parameter.copy_(parameter.half().float())


def greedy(model, ids, n):
    return [int(i) for i in model.generate([ids], n, temperature=0)]


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_gives_the_same_ids_and_greedy_tokens(write_model, tmp_path, family, kind):
    """50 tokens, unless two are so close that rounding decides. No sample ends early.

    The engine multiplies float16 weights by activations that it rounds to float16, too, and looks
    GELU up in a table in float16.
    """
    tokenizer = tokenizer_of(kind)
    model = write_model(tokenizer, **FAMILIES[family])
    draw = random.Random(1)
    for dtype in ("f32", "f16"):
        closest = 2e-2 if dtype == "f16" or family == "gpt2" else 5e-4
        hub.write_gguf(tmp_path, tmp_path / f"{dtype}.gguf", dtype)
        engine = Engine(tmp_path / f"{dtype}.gguf")
        for _ in range(100):
            text = random_text(draw)
            assert engine.encode(text) == tokenizer.encode(text), repr(text)
        if dtype == "f16":
            as_float16(model)
        for _ in range(3):
            ids = tokenizer.encode(random_text(draw))[:20]
            theirs = engine.continue_greedily(ids, 50)
            assert len(theirs) == 50
            assert_same_but_for_ties(model, ids, theirs, closest)


def assert_same_but_for_ties(model, ids, theirs, closest):
    """Assert that `theirs` are the greedy tokens after ids, up to a tie of our two best logits.

    closest: how far apart two logits must be for their order to be the same in both programs.
    """
    ours = greedy(model, ids, len(theirs))
    n = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
    if n < len(ours):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids + ours[:n]]))
        best = logits[0, -1].topk(2)
        assert set(best.indices.tolist()) == {ours[n], theirs[n]}
        assert best.values.diff().abs() < closest, (n, best)
    assert n >= 10


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_other_shapes_of_a_llama(write_model, tmp_path, shape):
    tokenizer = tokenizer_of("bpe")
    model = write_model(tokenizer, **SHAPES[shape])
    hub.write_gguf(tmp_path, tmp_path / "model.gguf")
    engine = Engine(tmp_path / "model.gguf")
    ids = tokenizer.encode("The quick brown fox")
    assert engine.continue_greedily(ids, 50) == greedy(model, ids, 50)


@pytest.mark.parametrize("kind", ["smollm2", "llama3"])
def test_llama_cpp_cuts_words_by_the_pattern_of_the_tokenizer(write_model, tmp_path, kind):
    tokenizer = tokenizer_of(kind)
    write_model(tokenizer, **FAMILIES["llama"])
    hub.write_gguf(tmp_path, tmp_path / "model.gguf")
    engine = Engine(tmp_path / "model.gguf")
    draw = random.Random(2)
    for _ in range(200):
        text = random_text(draw)
        assert engine.encode(text) == tokenizer.encode(text), repr(text)


@pytest.mark.parametrize(("dtype", "most"), [("f32", 1e-3), ("q8_0", 0.01)])
def test_the_loss_by_llama_cpp_is_the_same(write_model, tmp_path, dtype, most):
    """Of each token in a text, by the log-probabilities that the engine gives; in float32 up to
    the share of the end token that a vocabulary of characters is given."""
    tokenizer = tokenizer_of("char")
    model = write_model(tokenizer, **FAMILIES["llama"])
    hub.write_gguf(tmp_path, tmp_path / "model.gguf", dtype)
    engine = Engine(tmp_path / "model.gguf")
    ids = tokenizer.encode(TOPICS[:40])
    theirs = [-engine.log_probs(ids[:n], tokenizer.vocab_size)[ids[n]] for n in range(1, 40)]
    with torch.no_grad():
        _, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    # The first target has no context that the engine could be given alone.
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids]))
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]))
    assert float(losses) == pytest.approx(float(loss), rel=1e-5)
    assert np.mean(theirs) == pytest.approx(float(loss), rel=most + 1e-2 * (dtype == "f32"))


def test_int8_blocks_are_near_the_weights():
    """Each block of 32 has its own scale; no weight is off by more than half a step."""
    weights = torch.randn(64, 96) * torch.logspace(-1, 4, 64)[:, None]
    weights[3] = 0
    content = np.frombuffer(gguf.q8_0_bytes(weights.numpy()), np.uint8).reshape(-1, 34)
    scales = np.ascontiguousarray(content[:, :2]).view("<f2").astype(np.float32)
    read = scales * np.ascontiguousarray(content[:, 2:]).view(np.int8)
    largest = abs(weights.numpy().reshape(-1, 32)).max(1, keepdims=True)
    assert (abs(read - weights.numpy().reshape(-1, 32)) <= largest * 0.0046).all()


def test_what_llama_cpp_cannot_be_given_is_refused(write_model, tmp_path):
    path = tmp_path / "model.gguf"
    tokenizer = tokenizer_of("bpe")
    for changes, message in (
        ({"use_swiglu": False}, "use_swiglu"),
        ({"qk_norm": True, "bias": True}, "qk_norm and bias"),
        (
            {"qk_norm": True} | {"rope_scaling": SHAPES["Llama 3's positions"]["rope_scaling"]},
            "rope_scaling",
        ),
    ):
        write_model(tokenizer, **changes)
        with pytest.raises(ValueError, match=message):
            hub.write_gguf(tmp_path, path)
        assert not path.exists()
    write_model(own_bpe(sorted({bytes([i]) for i in range(256)}), r"\p{L}+|\P{L}+"), qk_norm=False)
    with pytest.raises(ValueError, match="split texts"):
        hub.write_gguf(tmp_path, path)
    model = write_model(tokenizer)
    state = gpt.read_checkpoint(tmp_path)
    state["model"]["lm_head.weight"] = model.lm_head.weight.data * 1e6
    gpt.save_checkpoint(tmp_path / "best.pt", state)
    with pytest.raises(ValueError, match="too large for f16"):
        hub.write_gguf(tmp_path, path, "f16")
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="exists"):
        hub.write_gguf(tmp_path, path)


def test_a_qwen2_vocabulary_normalizes_and_has_tokens_in_any_text(write_model, tmp_path):
    """llama.cpp finds tokens such as <tool_call> in a text, too; it does not normalize."""
    state = tokenizer_of("llama3").state
    data = json.loads(hub.tokenizer_files(tokenizer_of("llama3"), 0)["tokenizer.json"])
    pattern = hf_tokenizer.write_pattern(hf_tokenizer.QWEN2_PATTERN)
    n = len(data["model"]["vocab"])
    call = {"id": n, "content": "<tool_call>", "special": False, "normalized": False}
    call |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    data |= {"pre_tokenizer": pattern, "normalizer": {"type": "NFC"}}
    data["added_tokens"].append(call)
    tokenizer = gpt.Tokenizer("tokenizers", json=json.dumps(data), end=state["end"])
    write_model(tokenizer, qk_norm=False)
    hub.write_gguf(tmp_path, tmp_path / "model.gguf")
    engine = Engine(tmp_path / "model.gguf")
    draw = random.Random(3)
    for _ in range(200):
        text = unicodedata.normalize("NFC", random_text(draw)) + draw.choice(["", "<tool_call>x"])
        assert engine.encode(text) == tokenizer.encode(text), repr(text)
