"""Weights in Hugging Face's format, in and out: transformers is the oracle."""

import copy
import json
import math
import subprocess
import sys
import types
from dataclasses import asdict, dataclass

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from forks import run_jobs
from safetensors.torch import load_file, save_file

import gpt
import hub
import sample

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
VOCAB, BLOCK = 97, 32
CHARS = "".join(chr(32 + i) for i in range(95)) + "\n\té"[: VOCAB - 95]
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# transformers 5 writes these settings as rope_parameters, transformers 4 as they stand here.
LLAMA3 = {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING}


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
    "Llama, wide heads": llama(num_key_value_heads=2, head_dim=16),
    "Llama, odd MLP": llama(num_key_value_heads=4, intermediate_size=100),
    "Llama, tied": llama(num_key_value_heads=2, tie_word_embeddings=True),
    "Llama 3": llama(num_key_value_heads=2, rms_norm_eps=1e-5, **LLAMA3),
    "Llama, attention biases": llama(attention_bias=True),
    "Llama, all biases": llama(attention_bias=True, mlp_bias=True),
    "Mistral": llama("Mistral", num_key_value_heads=2, sliding_window=None),
    "Qwen2": llama("Qwen2", num_key_value_heads=2),
    "Qwen2, odd widths": llama(
        "Qwen2", hidden_size=72, num_attention_heads=4, num_key_value_heads=4, intermediate_size=200
    ),
    "Llama, widths of 172 and 200": llama(
        hidden_size=200, num_attention_heads=4, num_key_value_heads=4, intermediate_size=172
    ),
    "Qwen3": llama("Qwen3", num_key_value_heads=2, head_dim=8),
    "Qwen3, wide heads": llama("Qwen3", num_key_value_heads=1, head_dim=32),
    "Qwen3, odd MLP, tied": llama(
        "Qwen3", head_dim=16, intermediate_size=172, tie_word_embeddings=True
    ),
}
CASES = [(name, torch.float32) for name in FAMILIES] + [
    (name, torch.bfloat16) for name in ("GPT-2", "Llama, MQA", "Llama, tied", "Llama 3", "Mistral")
]


def save(folder, family, dtype=torch.float32, max_shard_size="40KB"):
    """Save a random model whose norms and biases are random as well; return it in float32."""
    name, config = family
    torch.manual_seed(1)
    model = getattr(transformers, name)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    assert len(list(folder.glob("*.safetensors"))) > 1 or max_shard_size == "1GB"
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def export(folder, model, dtype=torch.float32, tokenizer=None, **state):
    """Save a model as a checkpoint beside the folder, and export that into the folder."""
    tokenizer = tokenizer or gpt.Tokenizer("char", CHARS)
    state |= {
        "model": model.state_dict(),
        "model_args": asdict(model.config),
        "tokenizer": tokenizer.state,
    }
    path = folder.with_suffix(".pt")
    gpt.save_checkpoint(path, state)
    hub.export(path, folder, dtype)


@torch.no_grad()
def assert_same_logits(model, other):
    """Both models' logits agree for two rows of BLOCK tokens."""
    idx = torch.randint(0, VOCAB, (2, BLOCK), generator=torch.Generator().manual_seed(0))
    logits, expected = model(idx)[0], other(idx).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def assert_greedy(model, other, lengths, n_new=100):
    """Each of n_new greedy tokens is transformers' for the same context, after each prompt."""
    prompts = [torch.randint(0, VOCAB, (n,)).tolist() for n in lengths]
    new = torch.stack(list(model.generate(prompts, n_new, temperature=0.0)), 1).tolist()
    contexts, expected = [], []
    for prompt, more in zip(prompts, new, strict=True):
        text = prompt + more
        for end in range(len(prompt), len(text)):
            contexts.append(text[end - gpt.context_length(end, BLOCK) : end])
            expected.append(text[end])
    padded = torch.tensor([ids + [0] * (BLOCK - len(ids)) for ids in contexts])
    last = torch.tensor([len(ids) - 1 for ids in contexts])
    logits = other(padded).logits[torch.arange(len(contexts)), last]
    assert logits.argmax(-1).tolist() == expected


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_a_model_of_transformers_is_read(tmp_path, family, dtype):
    """Logits agree to 1e-4, and 100 greedy tokens are the same after short and long prompts."""
    other = save(tmp_path, FAMILIES[family], dtype)
    model = hub.load_model(tmp_path)
    assert_same_logits(model, other)
    lengths = (
        (*range(1, BLOCK, 6), BLOCK)
        if dtype == torch.float32 and family in ("GPT-2", "Llama 3")
        else (1, BLOCK)
    )
    assert_greedy(model, other, lengths)


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_and_back(tmp_path, family, dtype):
    """transformers loads the export, with the same logits; a second round gives the same bytes."""
    other = save(tmp_path / "theirs", FAMILIES[family], dtype)
    for source, target in (("theirs", "once"), ("once", "twice")):
        export(tmp_path / target, hub.load_model(tmp_path / source, dtype=dtype), dtype)
    kind = "GPT2" if family.startswith("GPT-2") else "Llama"
    kind = "Qwen3" if family.startswith("Qwen3") else kind
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "once", dtype=torch.float32
    ).eval()
    assert type(again).__name__.startswith(kind)
    assert_same_logits(hub.load_model(tmp_path / "once"), again)
    assert_same_logits(hub.load_model(tmp_path / "once"), other)
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
        "qk_norm": False,
        "tie_weights": True,
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
    "wide heads": ({"head_dim": 32, "mlp_hidden": 100}, "LlamaForCausalLM"),
    "qk_norm": ({"qk_norm": True, "tie_weights": False}, "Qwen3ForCausalLM"),
    "gpt2": (GPT2_SWITCHES, "GPT2LMHeadModel"),
    "gpt2, untied": (GPT2_SWITCHES | {"tie_weights": False}, "GPT2LMHeadModel"),
}


def test_a_model_card_tells_no_loss_where_there_was_none(tmp_path):
    model = random_model(**EXPORTED[next(iter(EXPORTED))][0])
    for loss, told in ((1.25, True), (math.inf, False)):
        state = {"step": 7, "best_val_loss": loss}
        export(tmp_path / f"loss_{told}", model, **state)
        card = (tmp_path / f"loss_{told}" / "README.md").read_text(encoding="utf-8")
        assert ("perplexity" in card) is told and ("| 1.2500 |" in card) is told


@pytest.mark.parametrize("case", EXPORTED)
def test_own_models_are_exported(tmp_path, case):
    """transformers loads them as the class that config.json names, with the same logits."""
    changes, architecture = EXPORTED[case]
    model = random_model(**changes)
    export(tmp_path / "new", model, step=7, best_val_loss=1.25, base="/a/models/gpt2/best.pt")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32
    ).eval()
    assert type(other).__name__ == architecture
    assert_same_logits(model, other)
    again = hub.load_model(tmp_path / "new")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer("to be").input_ids == [CHARS.index(c) for c in "to be"]
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert "| steps | 7 |" in card
    assert "| finetuned from | gpt2 |" in card
    assert "1.25" in card
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "new").do_sample


@pytest.mark.parametrize("case", ["default", "qk_norm", "gpt2"])
def test_exports_are_used_as_transformers_is(tmp_path, case, monkeypatch, capsys):
    """generate() with all that the tokenizer returns, pipeline(), and what the model card says."""
    model = random_model(**EXPORTED[case][0])
    export(tmp_path / "new", model)
    monkeypatch.chdir(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained("new")
    other = transformers.AutoModelForCausalLM.from_pretrained("new", dtype=torch.float32)
    given = tokenizer("to be", return_tensors="pt")
    ids = other.generate(**given, do_sample=False, max_new_tokens=9)[0, 5:].tolist()
    prompt = [CHARS.index(c) for c in "to be"]
    assert ids == [int(i) for i in model.generate([prompt], 9, temperature=0)]
    text = transformers.pipeline("text-generation", "new")("to be")[0]["generated_text"]
    assert text.startswith("to be")
    card = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    snippet = "\n".join(line[4:] for line in card.splitlines() if line.startswith("    "))
    assert "pipeline" in snippet
    exec(snippet.replace("Once upon a time", "to be"), {})  # noqa: S102
    assert capsys.readouterr().out.startswith("to be")


SLOWED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("case", [*EXPORTED, "slowed"])
def test_the_plain_form_computes_transformers_logits(tmp_path, case):
    """So that what is compared with it is compared with transformers."""
    changes, _ = EXPORTED.get(case, ({"rope_scaling": SLOWED}, ""))
    model = random_model(**changes)
    export(tmp_path / "new", model)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", dtype=torch.float32
    ).eval()
    ids = torch.randint(VOCAB, (BLOCK,), generator=torch.Generator().manual_seed(3))
    logits = hub.reference_logits(model.config, model.state_dict(), ids)
    with torch.no_grad():
        expected = other(input_ids=ids[None]).logits[0]
    assert (logits - expected).abs().max() < 1e-4


CODE_CHANGES = {
    "activation": lambda: (
        gpt.MLP,
        lambda self, x: self.c_proj(F.relu(self.c_fc(x).chunk(2, -1)[0]).square()),
    ),
    "residual": lambda: (
        gpt.Block,
        lambda self, x, *more: x + 0.9 * self.attn(self.ln_1(x), *more) + self.mlp(self.ln_2(x)),
    ),
}


@pytest.mark.parametrize("change", CODE_CHANGES)
def test_a_change_of_the_code_is_found_before_it_is_exported(tmp_path, monkeypatch, change):
    """A model whose code was changed in place would be another one in transformers."""
    module, forward = CODE_CHANGES[change]()
    monkeypatch.setattr(module, "forward", forward)
    with pytest.raises(ValueError, match="logits that differ by .* from those that transformers"):
        export(tmp_path / "new", random_model())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_rms_norm": False}, "use_rms_norm"),
        ({"use_swiglu": False}, "use_swiglu"),
        ({"use_rope": False}, "n_kv_head"),
        ({"use_rope": False, "n_kv_head": 4}, "bias"),
        (GPT2_SWITCHES | {"use_rms_norm": True}, "use_rms_norm"),
        (GPT2_SWITCHES | {"head_dim": 32}, "head_dim"),
        (GPT2_SWITCHES | {"qk_norm": True}, "qk_norm"),
        (GPT2_SWITCHES | {"n_kv_head": 2}, "n_kv_head"),
        (GPT2_SWITCHES | {"bias": False}, "bias"),
        ({"qk_norm": True, "bias": True}, "qk_norm and bias"),
    ],
)
def test_what_no_family_has_is_refused(tmp_path, changes, named):
    """The setting is named, and nothing written."""
    with pytest.raises(ValueError, match=f"^{named} "):
        export(tmp_path / "new", random_model(**changes))
    assert not (tmp_path / "new").exists()


def test_a_field_that_export_does_not_know_must_be_off():
    """Whoever adds an option to GPTConfig can export models without it, and hears of it with it."""

    @dataclass
    class Capped(gpt.GPTConfig):
        logit_limit: float = 0.0

    tokenizer = gpt.Tokenizer("char", CHARS)
    for switches in ({}, GPT2_SWITCHES | {"n_kv_head": 4, "qk_norm": False}):
        plain = hub.write_config(gpt.GPTConfig(**switches), tokenizer, torch.float32)
        assert hub.write_config(Capped(**switches), tokenizer, torch.float32) == plain
        with pytest.raises(ValueError, match="^logit_limit is 30.0: hub.py does not know this"):
            hub.write_config(Capped(logit_limit=30.0, **switches), tokenizer, torch.float32)


def test_export_overwrites_nothing(tmp_path):
    """A folder that holds something is refused."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        hub.export(tmp_path / "run", tmp_path)
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
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        ("quantization_config", {"bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_what_the_model_cannot_be_is_refused_by_its_key(llama_folder, key, value):
    """The message names config.json's key and its value."""
    edit(llama_folder, **{key: value})
    named = f"{key} is {value!r}"
    if key == "rope_parameters":
        named = "rope_type is 'yarn'" if "factor" in value else "have full_attention"
    with pytest.raises(ValueError) as e:
        hub.load_model(llama_folder)
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
        hub.load_model(tmp_path)
    assert key in str(e.value)


def test_theta_may_stand_beside_rope_parameters(tmp_path):
    """As in files that older and newer versions of transformers are meant to read."""
    other = save(tmp_path, llama(num_key_value_heads=2, **LLAMA3))
    edit(tmp_path, rope_parameters=LLAMA3_SCALING, rope_scaling=None, rope_theta=500)
    model = hub.load_model(tmp_path)
    assert model.config.rope_theta == 500.0
    assert_same_logits(model, other)
    edit(
        tmp_path,
        rope_parameters=None,
        rope_scaling=LLAMA3_SCALING | {"original_max_position_embeddings": None},
    )
    with pytest.raises(ValueError, match="has no original_max_position_embeddings"):
        hub.load_model(tmp_path)


def test_mistrals_window(tmp_path):
    """One that holds the whole context is none; one that is not named is 4,096 tokens."""
    save(tmp_path, llama("Mistral", sliding_window=BLOCK, num_key_value_heads=2))
    assert hub.load_model(tmp_path).config.block_size == BLOCK
    theirs = json.loads((tmp_path / "config.json").read_text())
    del theirs["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(theirs | {"max_position_embeddings": 8192}))
    with pytest.raises(ValueError, match="sliding_window is 4096"):
        hub.load_model(tmp_path)


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
        hub.load_model(llama_folder)


def test_a_padded_vocabulary_is_kept(tmp_path):
    """Weights may have more rows than the tokenizer has tokens; these ids stand for no text."""
    other = save(tmp_path / "theirs", llama(num_key_value_heads=2, vocab_size=VOCAB + 7))
    hub.write_tokenizer(gpt.Tokenizer("char", CHARS), tmp_path / "theirs", BLOCK)
    path = hub.get(tmp_path / "theirs", tmp_path / "got")
    model, tokenizer, _ = gpt.load_checkpoint(path)
    assert_same_logits(model, other)
    assert_greedy(model, other, (1, BLOCK))
    assert tokenizer.decode([0, VOCAB + 3, 1]) == CHARS[:2]
    hub.export(path, tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert_same_logits(model, again)
    assert again.config.vocab_size == VOCAB + 7


def test_wrong_folders(llama_folder, tmp_path):
    """Each mistake is one sentence that names what is wrong."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="run is already a run of gpt.py"):
        hub.load_model(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="model.safetensors is a file: name the folder"):
        hub.load_model(llama_folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="empty has no config.json"):
        hub.load_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="is neither a folder here nor an id"):
        hub.load_model(tmp_path / "does not exist")
    edit(llama_folder, architectures=["BertForMaskedLM"])
    with pytest.raises(
        ValueError, match="architecture is BertForMaskedLM: gpt.py supports GPT2LMHeadModel"
    ):
        hub.load_model(llama_folder)
    edit(llama_folder, architectures=None)
    with pytest.raises(ValueError, match="its model_type is 'llama'"):
        hub.load_model(llama_folder)
    edit(llama_folder, architectures=["LlamaForCausalLM"], hidden_size="64")
    with pytest.raises(ValueError, match="llama: config.json's hidden_size is '64': expected"):
        hub.load_model(llama_folder)
    edit(llama_folder, hidden_size=None)
    with pytest.raises(ValueError, match="config.json has no hidden_size"):
        hub.load_model(llama_folder)
    edit(llama_folder, hidden_size=64, rope_scaling=["yarn"])
    with pytest.raises(ValueError, match="config.json is damaged"):
        hub.load_model(llama_folder)
    (llama_folder / "config.json").write_text('{"architectures": ')
    with pytest.raises(ValueError, match="config.json is damaged"):
        hub.load_model(llama_folder)


def test_wrong_weights(llama_folder):
    """A missing, misshapen or unknown tensor and a damaged file are named; no pickle is read."""
    path = llama_folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"lacks the tensor {name}, which"),
        (
            tensors | {name: tensors[name][:-1].clone()},
            rf"{name} has shape \(15, 64\), but config.json implies \(16, 64\)",
        ),
        (tensors | {"model.extra.weight": torch.ones(1)}, "model.extra.weight has no place"),
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            hub.load_model(llama_folder)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        hub.load_model(llama_folder)
    path.unlink()
    torch.save(tensors, llama_folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle and is not read"):
        hub.load_model(llama_folder)


def test_a_missing_shard_and_one_elsewhere(tmp_path):
    """A shard that the index names must lie in the folder."""
    save(tmp_path / "m", FAMILIES["Llama, GQA"])
    index = tmp_path / "m" / "model.safetensors.index.json"
    first = min((tmp_path / "m").glob("*.safetensors"))
    first.rename(tmp_path / "outside.safetensors")
    with pytest.raises(FileNotFoundError, match=f"has no {first.name}"):
        hub.load_model(tmp_path / "m")
    index.write_text(index.read_text().replace(first.name, "../outside.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"has no \.\./outside"):
        hub.load_model(tmp_path / "m")


def test_tokenizer_and_weights_must_fit(llama_folder, tmp_path):
    """load_pretrained wants both; a tokenizer of more tokens than the weights have is refused."""
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        hub.load_pretrained(llama_folder)
    export(tmp_path / "new", random_model())
    model, tokenizer, state = hub.load_pretrained(tmp_path / "new")
    assert (tokenizer.encode("be"), state["model_args"]["n_embd"]) == ([66, 69], 64)
    assert not model.training
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_folder / name).write_bytes((tmp_path / "new" / name).read_bytes())
    edit(llama_folder, vocab_size=VOCAB - 3)
    with pytest.raises(ValueError, match="tokenizer has 97 tokens, but its weights have 94"):
        hub.load_pretrained(llama_folder)


@pytest.mark.parametrize("library", ["safetensors", "huggingface_hub"])
def test_a_missing_library_is_named(llama_folder, monkeypatch, library):
    """The sentence says what to install."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"pip install {library}"):
        hub.load_model(llama_folder if library == "safetensors" else "gpt2")


def test_hub_ids(llama_folder, monkeypatch):
    """huggingface_hub downloads an id, also by GPT-2's short names; offline is one sentence."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        if "gpt2" in name:
            raise OSError("no network in the tests")
        return str(llama_folder)

    library = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    assert hub.load_model("someone/llama-tiny").config.n_kv_head == 2
    with pytest.raises(
        FileNotFoundError,
        match="gpt2 is not a folder here, and the Hugging Face hub did not provide it",
    ):
        hub.load_model("gpt2")
    assert asked == ["someone/llama-tiny", "openai-community/gpt2"]


PEAK = """
import sys, hub, safetensors.torch
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
before = peak()
model = hub.load_model(sys.argv[1])
print(peak() - before, 4 * model.n_params() / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_peak_memory_is_the_model_and_a_shard(tmp_path):
    """Reading 96 MB in shards of 12 MB takes both, and at most 8 MB for further imports."""
    name, config = llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    with torch.no_grad():
        getattr(transformers, name)(config).save_pretrained(tmp_path, max_shard_size="12MB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 8
    command = [sys.executable, "-c", PEAK, tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    taken, size = map(float, result.stdout.split())
    assert size > 90
    assert 0.9 * size < taken < size + 12 + 8


# ---- get ----


@pytest.fixture
def whole_folder(tmp_path):
    """Return a Hugging Face folder with a tokenizer, as transformers saves a Llama in one file."""
    folder = tmp_path / "tiny"
    save(folder, llama(num_key_value_heads=2, tie_word_embeddings=True), max_shard_size="1GB")
    hub.write_tokenizer(gpt.Tokenizer("char", CHARS), folder, BLOCK)
    return folder


def test_get_makes_a_checkpoint_once(whole_folder, tmp_path, monkeypatch):
    """gpt.py loads it, with transformers' logits; a second call only returns the path."""
    monkeypatch.setattr(hub, "HERE", tmp_path / "here")
    path = hub.get(whole_folder)
    assert path == tmp_path / "here" / "models" / "tiny" / "best.pt"
    model, tokenizer, state = gpt.load_checkpoint(path.parent)
    other = transformers.AutoModelForCausalLM.from_pretrained(whole_folder, dtype=torch.float32)
    assert_same_logits(model, other)
    assert tokenizer.encode("be") == [66, 69]
    assert state["base"] == str(whole_folder.resolve())
    assert (state["version"], state["lora_rank"]) == (gpt.__version__, 0)
    monkeypatch.setattr(hub, "load_model", None)
    assert hub.get(str(whole_folder)) == path


def test_get_in_bfloat16(whole_folder, tmp_path):
    """The checkpoint is half as large, and its model has the rounded weights."""
    path = hub.get(whole_folder, tmp_path / "out", torch.bfloat16)
    assert {t.dtype for t in gpt.read_checkpoint(path)["model"].values()} == {torch.bfloat16}
    model, _, _ = gpt.load_checkpoint(path)
    expected = hub.load_model(whole_folder)
    for ours, given in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, given.bfloat16().float())


def test_get_replaces_nothing(whole_folder, tmp_path):
    """A checkpoint of another model, or a damaged one, is named and stays."""
    path = hub.get(whole_folder, tmp_path / "out")
    content = path.read_bytes()
    other = tmp_path / "other"
    whole_folder.rename(other)
    with pytest.raises(
        ValueError, match="best.pt does not hold .*/other: it holds a run or .*/tiny; choose"
    ):
        hub.get(other, tmp_path / "out")
    assert path.read_bytes() == content
    run = gpt.read_checkpoint(path) | {"base": str(other.resolve()), "step": 10}
    gpt.save_checkpoint(path, run)
    with pytest.raises(ValueError, match="does not hold .*/other: it holds a run or"):
        hub.get(other, tmp_path / "out")
    path.write_bytes(content[:-100])
    with pytest.raises(
        ValueError, match="best.pt is damaged: delete it, and hub.py will make it again"
    ):
        hub.get(other, tmp_path / "out")
    path.unlink()
    assert hub.get(other, tmp_path / "out") == path


def test_a_tilde_is_the_home(whole_folder, tmp_path, monkeypatch):
    """In every path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert hub.find_folder("~/tiny") == whole_folder
    assert hub.read_tokenizer("~/tiny").vocab_size == VOCAB
    path = hub.get("~/tiny", "~/out")
    assert path == tmp_path / "out" / "best.pt"
    hub.export("~/out", "~/again")
    assert (tmp_path / "again" / "config.json").exists()


def test_a_checkpoint_of_weights_that_were_got_is_exported_again(whole_folder, tmp_path):
    """To the same weights, as bfloat16 if that is asked for."""
    path = hub.get(whole_folder, tmp_path / "out")
    hub.export(path, tmp_path / "again", torch.bfloat16)
    theirs = load_file(whole_folder / "model.safetensors")
    ours = load_file(tmp_path / "again" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor.bfloat16()) for name, tensor in theirs.items())


# ---- merge: LoRA checkpoints of versions before 2.0.0 ----


def old_lora(path, model, base, rank=2):
    """Save a LoRA checkpoint as versions before 2.0.0 did; return the model that it stands for."""
    model = copy.deepcopy(model)
    adapters = {}
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            A = torch.randn(rank, linear.in_features) * 0.1
            B = torch.randn(linear.out_features, rank) * 0.1
            norm = linear.weight.detach().norm()
            adapters |= {f"{name}.lora.A": A, f"{name}.lora.B": B, f"{name}.lora.base": norm}
            with torch.no_grad():
                linear.weight += 2 * B @ A
    state = {
        "model": adapters,
        "model_args": asdict(model.config),
        "tokenizer": gpt.Tokenizer("char", CHARS).state,
        "base": str(base),
        "lora_rank": rank,
        "step": 5,
        "best_val_loss": 1.5,
        "config": {"lora_rank": rank},
        "optimizers": [{"state": {}}],
    }
    shape = state["model_args"]  # whose width of the MLP only mlp_ratio could tell
    shape["mlp_ratio"] = 1.5 * shape["mlp_hidden"] / shape["n_embd"]
    del shape["head_dim"], shape["mlp_hidden"]
    path.parent.mkdir(exist_ok=True)
    gpt.save_checkpoint(path, state)
    return model


@pytest.fixture
def base(tmp_path):
    """Return the path of a checkpoint, and its model."""
    model = random_model()
    path = tmp_path / "base" / "best.pt"
    path.parent.mkdir()
    tokenizer = gpt.Tokenizer("char", CHARS).state
    gpt.save_checkpoint(
        path,
        {"model": model.state_dict(), "model_args": asdict(model.config), "tokenizer": tokenizer},
    )
    return path, model


@torch.no_grad()
def assert_equal_models(path, expected):
    """The checkpoint's logits are those of the model, to float32's precision."""
    model, _, state = gpt.load_checkpoint(path)
    idx = torch.arange(VOCAB)[None, :BLOCK]
    torch.testing.assert_close(model(idx)[0], expected(idx)[0], atol=1e-5, rtol=0)
    return state


def test_merge_makes_an_old_lora_checkpoint_whole(base, tmp_path):
    """gpt.py names the command, and loads what it writes: the weights with 2 B A added."""
    path, model = base
    lora = tmp_path / "lora" / "best.pt"
    expected = old_lora(lora, model, path)
    with pytest.raises(ValueError, match=f"python hub.py merge {lora}"):
        gpt.load_checkpoint(lora)
    merged = hub.merge(tmp_path / "lora")
    assert merged == tmp_path / "lora-merged" / "best.pt"
    state = assert_equal_models(merged, expected)
    assert (state["step"], state["lora_rank"], state["base"]) == (5, 0, str(path))
    assert "optimizers" not in state
    with pytest.raises(ValueError, match="best.pt exists: choose another folder with --out"):
        hub.merge(lora)
    with pytest.raises(ValueError, match="already holds all weights: use it as it is"):
        hub.merge(merged, out=tmp_path / "twice")


def test_merge_where_the_base_is_elsewhere(base, tmp_path, monkeypatch):
    """A moved one is named by `base`, as a file or as a run; one with other weights is refused."""
    path, model = base
    lora = tmp_path / "lora" / "best.pt"
    expected = old_lora(lora, model, path)
    path.parent.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match="base/best.pt, the base model of LoRA, .* with --base"
    ):
        hub.merge(lora)
    named = torch.load(lora, weights_only=True)
    gpt.save_checkpoint(tmp_path / "hub.pt", named | {"base": "someone/model"})
    with monkeypatch.context() as patch:  # a file alone must not start a download
        patch.setattr(hub, "load_model", lambda name: pytest.fail("it was fetched"))
        with pytest.raises(FileNotFoundError, match="downloaded with --base=someone/model"):
            hub.merge(tmp_path / "hub.pt")
    assert_equal_models(hub.merge(lora, tmp_path / "moved", tmp_path / "a"), expected)
    assert_equal_models(hub.merge(lora, tmp_path / "moved" / "best.pt", tmp_path / "b"), expected)
    wrong = gpt.read_checkpoint(tmp_path / "moved")
    wrong["model"]["h.1.mlp.c_proj.weight"] *= 1.001
    gpt.save_checkpoint(path.parent.parent / "wrong.pt", wrong)
    with pytest.raises(ValueError, match="wrong.pt no longer holds the weights that LoRA was"):
        hub.merge(lora, tmp_path / "wrong.pt", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_merge_into_a_hugging_face_folder_and_into_another_lora(whole_folder, tmp_path):
    """The base may be a model of Hugging Face, or itself a LoRA checkpoint."""
    first = tmp_path / "first" / "best.pt"
    second = tmp_path / "second" / "best.pt"
    once = old_lora(first, hub.load_model(whole_folder), whole_folder)
    twice = old_lora(second, once, first)
    assert_equal_models(hub.merge(first), once)
    assert_equal_models(hub.merge(second), twice)


# ---- As a script ----


def test_the_script(run_script, whole_folder, base, tmp_path):
    """Each verb does its work and prints what to type next; mistakes are one sentence."""
    result = run_script("hub.py", "get", whole_folder, f"--out={tmp_path}/got")
    assert result.returncode == 0, result.stderr
    assert f"python gpt.py --init_from={tmp_path}/got" in result.stdout
    assert f"python sample.py --checkpoint={tmp_path}/got" in result.stdout
    result = run_script(
        "hub.py", "export", f"{tmp_path}/got", f"{tmp_path}/new", "--dtype=bfloat16"
    )
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    path, model = base
    expected = old_lora(tmp_path / "lora.pt", model, "lost.pt")
    result = run_script(
        "hub.py", "merge", f"{tmp_path}/lora.pt", f"--base={path}", f"--out={tmp_path}/merged"
    )
    assert result.returncode == 0, result.stderr
    assert_equal_models(tmp_path / "merged", expected)

    for words, message in (
        ([], "the first word is '': it must be one of get, export, gguf, merge"),
        (["fetch", "gpt2"], "the first word is 'fetch'"),
        (["get"], "'get' has too few or too many words: write python hub.py get ID_FOLDER_OR_FILE"),
        (["export", "out/mine"], "write python hub.py export RUN FOLDER"),
        (["get", "gpt2", "--dtype=int8"], "dtype is 'int8': it must be one of float32, bfloat16"),
        (["get", "gpt2", "--nam=x"], "unknown setting 'nam': did you mean name?"),
    ):
        result = run_script("hub.py", *words)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr


def test_several_processes_get_at_once(whole_folder, tmp_path):
    """As under torchrun, where each runs the config file: the checkpoint is whole for all."""
    words = ["get", whole_folder, f"--out={tmp_path}/got"]
    results = run_jobs(*[{"argv": [ROOT / "hub.py", *words]} for _ in range(4)])
    assert [result.returncode for result in results] == [0] * 4
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["best.pt"]
    gpt.load_checkpoint(tmp_path / "got")


# ---- What a file holds counts ----
def rewrite(folder, change):
    """Change the tensors of a folder's one safetensors file, given as a dict."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("own", [True, False])
def test_a_head_beside_a_tied_embedding(whole_folder, own):
    """If it differs, the file counts and not the config, for us as for transformers 5."""
    if own and transformers.__version__ < "5":
        pytest.skip("transformers 4 ties the two whatever the file holds")

    def add_head(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = -embedding + 0.5 if own else embedding.clone()

    rewrite(whole_folder, add_head)
    model = hub.load_model(whole_folder)
    assert model.config.tie_weights != own
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole_folder)
    assert_same_logits(model, theirs)


def test_a_tied_matrix_may_be_stored_as_the_head(whole_folder):
    before = hub.load_model(whole_folder).state_dict()

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(whole_folder, rename)
    after = hub.load_model(whole_folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_all_tokens_that_end_a_text_are_kept(whole_folder, tmp_path):
    """A Llama 3 lists two; a text ends at either, here and where the export is used."""
    special = "<|end_of_text|> <|eot_id|>"
    tokenizer = gpt.Tokenizer("char", CHARS, special=special)
    hub.write_tokenizer(tokenizer, whole_folder, BLOCK)
    ids = [tokenizer.special_tokens[name] for name in special.split()]
    values = json.loads((whole_folder / "generation_config.json").read_text())
    (whole_folder / "generation_config.json").write_text(json.dumps(values | {"eos_token_id": ids}))
    config = json.loads((whole_folder / "config.json").read_text()) | {"vocab_size": len(CHARS) + 2}
    (whole_folder / "config.json").write_text(json.dumps(config))
    rows = len(CHARS) + 2
    rewrite(
        whole_folder,
        lambda tensors: tensors.update(
            {"model.embed_tokens.weight": torch.randn(rows, config["hidden_size"])}
        ),
    )
    path = hub.get(whole_folder, tmp_path / "got")
    again = gpt.load_checkpoint(path)[1]
    assert again.end_ids == ids and again.end_id == ids[0]
    for end in ids:
        drawn = [CHARS.index("a"), end, CHARS.index("b")]
        assert "".join(sample.text_of_tokens(again, drawn, again.end_ids)) == "a"
    hub.export(path, tmp_path / "exported")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "exported" / name).read_text())["eos_token_id"] == ids
