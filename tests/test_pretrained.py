"""Weights in Hugging Face's format, in and out: transformers is the oracle."""

import json
import math
import subprocess
import sys
import types

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file

import gpt
import pretrained
import sample

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
VOCAB, BLOCK = 97, 32
CHARS = "".join(chr(32 + i) for i in range(95)) + "\n\té"[: VOCAB - 95]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llama(name="Llama", **changes):
    """Return the name and config of a small model of the Llama family."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": BLOCK,
        "eos_token_id": None,
        "bos_token_id": None,
    } | changes
    return f"{name}ForCausalLM", getattr(transformers, f"{name}Config")(**config)


def gpt2(**changes):
    config = {
        "vocab_size": VOCAB,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": BLOCK,
        "eos_token_id": None,
        "bos_token_id": None,
    } | changes
    return "GPT2LMHeadModel", transformers.GPT2Config(**config)


FAMILIES = {
    "GPT-2": gpt2(),
    "GPT-2, another MLP width": gpt2(n_inner=100),
    "GPT-2, untied": gpt2(tie_word_embeddings=False),
    "Llama, MHA": llama(),
    "Llama, GQA": llama(num_key_value_heads=2),
    "Llama, MQA": llama(num_key_value_heads=1),
    "Llama, tied": llama(num_key_value_heads=2, tie_word_embeddings=True),
    "Llama 3": llama(num_key_value_heads=2, rope_parameters=LLAMA3, rms_norm_eps=1e-5),
    "Llama, attention biases": llama(attention_bias=True),
    "Llama, all biases": llama(attention_bias=True, mlp_bias=True),
    "Mistral": llama("Mistral", num_key_value_heads=2, sliding_window=None),
    "Qwen2": llama("Qwen2", num_key_value_heads=2),
}
CASES = [(name, torch.float32) for name in FAMILIES] + [
    (name, torch.bfloat16) for name in ("GPT-2", "Llama, MQA", "Llama, tied", "Llama 3", "Mistral")
]


def save(folder, family, dtype=torch.float32):
    """Save a random model, sharded, whose norms and biases are random as well; return it in float32."""
    name, config = family
    torch.manual_seed(1)
    model = getattr(transformers, name)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def assert_same_logits(model, other):
    """Both models' logits agree for two rows of BLOCK tokens."""
    idx = torch.randint(0, VOCAB, (2, BLOCK), generator=torch.Generator().manual_seed(0))
    logits, expected = model(idx)[0], other(idx).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def assert_greedy(model, other, lengths, n_new=100):
    """Each of n_new greedy tokens after prompts of these lengths is transformers' for the same context."""
    prompts = [torch.randint(0, VOCAB, (n,)).tolist() for n in lengths]
    new = torch.stack(list(model.generate(prompts, n_new, temperature=0.0)), 1).tolist()
    texts = [prompt + more for prompt, more in zip(prompts, new, strict=True)]
    for step in range(n_new):
        kept = [gpt.context_length(n + step, BLOCK) for n in lengths]
        ends = [n + step for n in lengths]
        rows = [text[end - k : end] for text, end, k in zip(texts, ends, kept, strict=True)]
        padded = torch.tensor([row + [0] * (BLOCK - len(row)) for row in rows])
        logits = other(padded).logits[torch.arange(len(rows)), torch.tensor(kept) - 1]
        assert logits.argmax(-1).tolist() == [
            text[end] for text, end in zip(texts, ends, strict=True)
        ]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_a_model_of_transformers_is_read(tmp_path, family, dtype):
    """Logits agree to 1e-4 and 100 greedy tokens are the same, for short prompts and ones that fill the block."""
    other = save(tmp_path, FAMILIES[family], dtype)
    model = gpt.GPT.from_pretrained(tmp_path)
    assert_same_logits(model, other)
    lengths = (
        range(1, BLOCK + 1)
        if dtype == torch.float32 and family in ("GPT-2", "Llama 3")
        else (1, BLOCK)
    )
    assert_greedy(model, other, lengths)


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_and_back(tmp_path, family, dtype):
    """What is exported transformers loads, with the same logits; imported and exported again it has the same bytes."""
    other = save(tmp_path / "theirs", FAMILIES[family], dtype)
    tokenizer = gpt.Tokenizer("char", CHARS)
    for source, target in (("theirs", "once"), ("once", "twice")):
        model = gpt.GPT.from_pretrained(tmp_path / source, dtype=dtype)
        pretrained.export(model, tokenizer, {}, tmp_path / target)
    kind = {"G": "GPT2", "L": "Llama", "M": "Llama", "Q": "Llama"}[family[0]]
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "once", dtype=torch.float32
    ).eval()
    assert type(again).__name__.startswith(kind)
    assert_same_logits(gpt.GPT.from_pretrained(tmp_path / "once"), again)
    assert_same_logits(gpt.GPT.from_pretrained(tmp_path / "once"), other)
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    if kind == "Llama" and family[0] == "L":  # and the weights are theirs, bit for bit
        theirs = {
            k: v
            for path in (tmp_path / "theirs").glob("*.safetensors")
            for k, v in load_file(path).items()
        }
        ours = load_file(tmp_path / "once" / "model.safetensors")
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def random_model(**changes):
    """Return a small GPT of random weights."""
    shape = {
        "block_size": BLOCK,
        "vocab_size": VOCAB,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 64,
    }
    model = gpt.GPT(gpt.GPTConfig(**shape | {"dropout": 0.0} | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


GPT2_SWITCHES = {
    "use_rope": False,
    "use_rms_norm": False,
    "use_swiglu": False,
    "bias": True,
    "n_kv_head": 4,
}
EXPORTED = {
    "default": ({"tie_weights": False}, "LlamaForCausalLM"),
    "tied": ({"tie_weights": True}, "LlamaForCausalLM"),
    "bias": ({"bias": True}, "LlamaForCausalLM"),
    "qk_norm": ({"qk_norm": True, "tie_weights": False}, "Qwen3ForCausalLM"),
    "gpt2": (GPT2_SWITCHES, "GPT2LMHeadModel"),
    "gpt2, untied": (GPT2_SWITCHES | {"tie_weights": False}, "GPT2LMHeadModel"),
}


def test_a_model_card_tells_no_loss_where_there_was_none(tmp_path):
    model = random_model(**EXPORTED[next(iter(EXPORTED))][0])
    for loss, told in ((1.25, True), (math.inf, False)):
        state = {"step": 7, "best_val_loss": loss}
        pretrained.export(model, gpt.Tokenizer("char", CHARS), state, tmp_path / str(loss))
        card = (tmp_path / str(loss) / "README.md").read_text(encoding="utf-8")
        assert ("perplexity" in card) is told and ("| 1.2500 |" in card) is told


@pytest.mark.parametrize("case", EXPORTED)
def test_own_models_are_exported(tmp_path, case):
    """transformers loads them without code of ours, as the class that config.json names, with the same logits."""
    changes, architecture = EXPORTED[case]
    model = random_model(**changes)
    pretrained.export(
        model, gpt.Tokenizer("char", CHARS), {"step": 7, "best_val_loss": 1.25}, tmp_path / "new"
    )
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32
    ).eval()
    assert type(other).__name__ == architecture
    assert_same_logits(model, other)
    again = gpt.GPT.from_pretrained(tmp_path / "new")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer("to be").input_ids == [CHARS.index(c) for c in "to be"]
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "| steps | 7 |" in card
    assert "1.25" in card
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "new").do_sample


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_rms_norm": False}, "use_rms_norm"),
        ({"use_swiglu": False}, "use_swiglu"),
        ({"use_rope": False}, "use_rms_norm"),
        (GPT2_SWITCHES | {"qk_norm": True}, "qk_norm"),
        (GPT2_SWITCHES | {"n_kv_head": 2}, "n_kv_head"),
        (GPT2_SWITCHES | {"bias": False}, "bias"),
        ({"qk_norm": True, "bias": True}, "qk_norm and bias"),
    ],
)
def test_what_no_family_has_is_refused(tmp_path, changes, named):
    """The setting is named, and nothing written."""
    with pytest.raises(ValueError, match=f"^{named} "):
        pretrained.export(
            random_model(**changes), gpt.Tokenizer("char", CHARS), {}, tmp_path / "new"
        )
    assert not (tmp_path / "new").exists()


def test_export_overwrites_nothing(tmp_path):
    """A folder that holds something is refused."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        pretrained.export(random_model(), gpt.Tokenizer("char", CHARS), {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def edit(folder, **changes):
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def llama_folder(tmp_path):
    """Return the folder of a Llama of transformers, in one file, with no tokenizer."""
    name, config = llama(num_key_value_heads=2)
    getattr(transformers, name)(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("head_dim", 16),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        ("quantization_config", {"bits": 4}),
        ("intermediate_size", 100),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_what_the_model_cannot_be_is_refused_by_its_key(llama_folder, key, value):
    """The message names config.json's key and its value."""
    edit(llama_folder, **{key: value})
    named = "rope_type is 'yarn'" if key.startswith("rope") else f"{key} is {value!r}"
    with pytest.raises(ValueError) as e:
        gpt.GPT.from_pretrained(llama_folder)
    assert named in str(e.value)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        (llama("Mistral", sliding_window=8), "sliding_window is 8"),
        (
            llama("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0),
            "sliding_window is 8",
        ),
        (gpt2(activation_function="relu"), "activation_function is 'relu'"),
        (gpt2(activation_function="gelu"), "activation_function is 'gelu'"),
        (gpt2(add_cross_attention=True), "add_cross_attention is True"),
        (gpt2(scale_attn_weights=False), "scale_attn_weights is False"),
        (gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    ],
)
def test_other_things_it_cannot_be(tmp_path, family, key):
    """Windows, other activations, another scale of the scores."""
    save(tmp_path, family)
    with pytest.raises(ValueError) as e:
        gpt.GPT.from_pretrained(tmp_path)
    assert key in str(e.value)


def test_mistrals_window(tmp_path):
    """One that holds the whole context is none; one that is not named is 4,096 tokens."""
    save(tmp_path, llama("Mistral", sliding_window=BLOCK, num_key_value_heads=2))
    assert gpt.GPT.from_pretrained(tmp_path).config.block_size == BLOCK
    theirs = json.loads((tmp_path / "config.json").read_text())
    del theirs["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(theirs | {"max_position_embeddings": 8192}))
    with pytest.raises(ValueError, match="sliding_window is 4096"):
        gpt.GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 97.5),
        ("max_position_embeddings", 10**12),
        ("rms_norm_eps", "1e-5"),
        ("num_hidden_layers", -1),
    ],
)
def test_damaged_numbers(llama_folder, key, value):
    """A number of another kind or size is one sentence."""
    edit(llama_folder, **{key: value})
    with pytest.raises(ValueError):
        gpt.GPT.from_pretrained(llama_folder)


def test_learned_qk_norms_are_refused(tmp_path):
    """Qwen3's norms have weights, gpt.py's have none: other than ones are named."""
    save(tmp_path, llama("Qwen3", num_key_value_heads=2, head_dim=8))
    with pytest.raises(ValueError, match=r"self_attn\.[kq]_norm\.weight has no place"):
        gpt.GPT.from_pretrained(tmp_path)


def test_wrong_folders(llama_folder, tmp_path):
    """Each mistake is one sentence that names what is wrong."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match="run is a run's folder: name the checkpoint, .*best.pt"
    ):
        gpt.GPT.from_pretrained(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="empty has no config.json"):
        gpt.GPT.from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder and no Hugging Face hub id"):
        gpt.GPT.from_pretrained(tmp_path / "does not exist")
    edit(llama_folder, architectures=["BertForMaskedLM"])
    with pytest.raises(
        ValueError, match="architecture is BertForMaskedLM: gpt.py's GPT can be GPT2LMHeadModel"
    ):
        gpt.GPT.from_pretrained(llama_folder)
    edit(llama_folder, architectures=None)
    with pytest.raises(ValueError, match="its model_type 'llama'"):
        gpt.GPT.from_pretrained(llama_folder)
    edit(llama_folder, architectures=["LlamaForCausalLM"], hidden_size="64")
    with pytest.raises(ValueError, match="config.json is damaged"):
        gpt.GPT.from_pretrained(llama_folder)
    (llama_folder / "config.json").write_text('{"architectures": ')
    with pytest.raises(ValueError, match="config.json is damaged"):
        gpt.GPT.from_pretrained(llama_folder)


def test_wrong_weights(llama_folder):
    """Missing, misshapen and unknown tensors are named; a damaged file is named; a pickle is not read."""
    path = llama_folder / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.self_attn.k_proj.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"lacks the tensor {name}, which"),
        (
            tensors | {name: tensors[name][:-1].clone()},
            rf"{name} is \(15, 64\), by config.json \(16, 64\)",
        ),
        (tensors | {"model.extra.weight": torch.ones(1)}, "model.extra.weight has no place"),
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            gpt.GPT.from_pretrained(llama_folder)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        gpt.GPT.from_pretrained(llama_folder)
    path.unlink()
    torch.save(tensors, llama_folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="pytorch_model.bin is a pickle, which could run any code"
    ):
        gpt.GPT.from_pretrained(llama_folder)


def test_a_missing_shard_and_one_elsewhere(tmp_path):
    """A shard that the index names must lie in the folder."""
    save(tmp_path / "m", FAMILIES["Llama, GQA"])
    index = tmp_path / "m" / "model.safetensors.index.json"
    first = min((tmp_path / "m").glob("*.safetensors"))
    first.rename(tmp_path / "outside.safetensors")
    with pytest.raises(FileNotFoundError, match=f"has no {first.name}"):
        gpt.GPT.from_pretrained(tmp_path / "m")
    index.write_text(index.read_text().replace(first.name, "../outside.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"has no \.\./outside"):
        gpt.GPT.from_pretrained(tmp_path / "m")


def test_tokenizer_and_weights_must_fit(llama_folder, tmp_path):
    """load_checkpoint wants both; a tokenizer of another size is refused."""
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        gpt.load_checkpoint(llama_folder)
    pretrained.export(random_model(), gpt.Tokenizer("char", CHARS), {}, tmp_path / "new")
    model, tokenizer, state = gpt.load_checkpoint(tmp_path / "new")
    assert (tokenizer.encode("be"), state["model_args"]["n_embd"]) == ([66, 69], 64)
    assert not model.training
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_folder / name).write_bytes((tmp_path / "new" / name).read_bytes())
    edit(llama_folder, vocab_size=VOCAB + 3)
    with pytest.raises(ValueError, match="tokenizer has 97 tokens, its weights 100"):
        gpt.load_checkpoint(llama_folder)


@pytest.mark.parametrize("library", ["safetensors", "huggingface_hub"])
def test_a_missing_library_is_named(llama_folder, monkeypatch, library):
    """The sentence says what to install."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"pip install {library}"):
        gpt.GPT.from_pretrained(llama_folder if library == "safetensors" else "gpt2")


def test_hub_ids(llama_folder, monkeypatch):
    """An id is downloaded by huggingface_hub, GPT-2's short names by their owner; offline is one sentence."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        if "gpt2" in name:
            raise OSError("no network in the tests")
        return str(llama_folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert gpt.GPT.from_pretrained("someone/llama-tiny").config.n_kv_head == 2
    with pytest.raises(FileNotFoundError, match="gpt2 is no folder here, nor to be had"):
        gpt.GPT.from_pretrained("gpt2")
    assert asked == ["someone/llama-tiny", "openai-community/gpt2"]


PEAK = """
import sys, gpt, pretrained, safetensors.torch
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
before = peak()
model = gpt.GPT.from_pretrained(sys.argv[1])
print(peak() - before, 4 * model.n_params() / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_peak_memory_is_the_model_and_a_shard(tmp_path):
    """Reading 96 MB in shards of 12 MB takes no more than both, and 8 MB for what else is imported."""
    name, config = llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    with torch.no_grad():
        getattr(transformers, name)(config).save_pretrained(tmp_path, max_shard_size="12MB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 8
    command = [sys.executable, "-c", PEAK, tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    taken, size = map(float, result.stdout.split())
    assert size > 90
    assert 0.9 * size < taken < size + 12 + 8


def test_sampling_from_a_folder_caps_the_context(tmp_path, monkeypatch, capsys):
    """sample.py --init_from=FOLDER takes a context of --block_size at most, but exports the model's own."""
    pretrained.export(random_model(), gpt.Tokenizer("char", CHARS), {}, tmp_path / "new")
    for name, value in {"init_from": str(tmp_path / "new"), "block_size": 8}.items():
        monkeypatch.setattr(sample, name, value)
    assert sample.load_model(torch.device("cpu"))[0].config.block_size == 8
    monkeypatch.setattr(sample, "export", str(tmp_path / "again"))
    sample.main()
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["max_position_embeddings"]
        == BLOCK
    )
    assert "again, in Hugging Face's format" in capsys.readouterr().err
