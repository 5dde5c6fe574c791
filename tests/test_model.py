"""The model against formulas written out here, and against transformers' Llama and GPT-2."""

import contextlib
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import new_trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import gpt
import sample

SMALL = {
    "block_size": 12,
    "vocab_size": 17,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 4,
    "n_embd": 32,
    "mlp_ratio": 3.0,
    "dropout": 0.0,
    "qk_norm": False,
    "tie_weights": True,
}
LLAMA_LIKE = SMALL | {"n_kv_head": 2}
GPT2_LIKE = SMALL | {"bias": True, "use_rope": False, "use_rms_norm": False, "use_swiglu": False}
OWN_SIZES = LLAMA_LIKE | {"head_dim": 6, "mlp_hidden": 20}  # not by the usual rules
SWITCHES = ("use_rope", "use_rms_norm", "use_swiglu", "qk_norm", "tie_weights", "bias")


def random_model(seed=1, kind=gpt.GPT, **values):
    """Return a model in eval mode whose every weight, norms and biases too, is random."""
    model = kind(gpt.GPTConfig(**values)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator) + (p == 1).float())
    return model


def random_ids(config, rows, length, seed=2):
    return torch.randint(
        config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


# ---- The reference: float64, one head, one query and one pair at a time ----
def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def reference_norm(x, w, name, c):
    if c.use_rms_norm:
        return rms(x, w[f"{name}.weight"], c.norm_eps)
    centered = x - x.mean()
    y = centered / torch.sqrt((centered * centered).mean() + c.norm_eps) * w[f"{name}.weight"]
    return y + w[f"{name}.bias"] if c.bias else y


def reference_linear(x, w, name, c):
    y = torch.einsum("oi,i->o", w[f"{name}.weight"], x)
    return y + w[f"{name}.bias"] if c.bias else y


def reference_rope(x, position, theta):
    """Turn each pair (i, i + d/2) of the vector x, as a complex number, by position * angle."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned = complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = turned.real, turned.imag
    return out


def reference_attention(xs, w, name, c):
    """Return the attention output for the normed inputs xs, a list of vectors."""
    d, groups, outputs = c.head_dim, c.n_head // c.n_kv_head, []
    queries, keys, values = [], [], []
    for position, x in enumerate(xs):
        fused = reference_linear(x, w, f"{name}.c_attn", c)
        heads = [fused[i * d : (i + 1) * d] for i in range(c.n_head + 2 * c.n_kv_head)]
        q, k, v = (
            heads[: c.n_head],
            heads[c.n_head : c.n_head + c.n_kv_head],
            heads[c.n_head + c.n_kv_head :],
        )
        if c.qk_norm:
            q, k = ([rms(head, 1.0, c.norm_eps) for head in heads] for heads in (q, k))
        if c.use_rope:
            q = [reference_rope(head, position, c.rope_theta) for head in q]
            k = [reference_rope(head, position, c.rope_theta) for head in k]
        queries.append(q)
        keys.append(k)
        values.append(v)
    for t in range(len(xs)):
        mixed = []
        for head in range(c.n_head):
            shared = head // groups
            scores = [
                float(queries[t][head] @ keys[s][shared]) / math.sqrt(d) for s in range(t + 1)
            ]
            top = max(scores)
            shares = [math.exp(score - top) for score in scores]
            mixed.append(
                sum(share / sum(shares) * values[s][shared] for s, share in enumerate(shares))
            )
        outputs.append(reference_linear(torch.cat(mixed), w, f"{name}.c_proj", c))
    return outputs


def reference_mlp(x, w, name, c):
    h = reference_linear(x, w, f"{name}.c_fc", c)
    if c.use_swiglu:
        gate, up = h[: len(h) // 2], h[len(h) // 2 :]
        h = gate / (1 + torch.exp(-gate)) * up
    else:
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return reference_linear(h, w, f"{name}.c_proj", c)


def reference_logits(model, row):
    """Return the logits (T, vocab_size) of one row of ids, in float64."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    xs = [w["wte.weight"][i] for i in row.tolist()]
    if not c.use_rope:
        xs = [x + w["wpe.weight"][position] for position, x in enumerate(xs)]
    for layer in range(c.n_layer):
        normed = [reference_norm(x, w, f"h.{layer}.ln_1", c) for x in xs]
        xs = [x + y for x, y in zip(xs, reference_attention(normed, w, f"h.{layer}.attn", c))]
        normed = [reference_norm(x, w, f"h.{layer}.ln_2", c) for x in xs]
        xs = [x + reference_mlp(y, w, f"h.{layer}.mlp", c) for x, y in zip(xs, normed)]
    head = w["wte.weight"] if c.tie_weights else w["lm_head.weight"]
    return torch.stack([head @ reference_norm(x, w, "ln_f", c) for x in xs])


@pytest.mark.parametrize("n_kv_head", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("flipped", ["none", *SWITCHES])
@pytest.mark.parametrize("base", [LLAMA_LIKE, GPT2_LIKE], ids=["llama", "gpt2"])
def test_logits_equal_the_formulas(base, flipped, n_kv_head):
    """Each switch, flipped from either family, gives the logits that the papers' formulas give."""
    values = base | {"n_kv_head": n_kv_head}
    if flipped != "none":
        values[flipped] = not getattr(gpt.GPTConfig(**values), flipped)
    model = random_model(**values)
    ids = random_ids(model.config, 2, 10)
    with torch.no_grad():
        logits, loss = model(ids)
    assert loss is None
    expected = torch.stack([reference_logits(model, row) for row in ids])
    assert (logits - expected).abs().max() < 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_theta": 50.0},
        {"norm_eps": 0.1},
        {"norm_eps": 0.1, "qk_norm": True},
        {"norm_eps": 0.1, "use_rms_norm": False},
        {"head_dim": 6, "mlp_hidden": 20},
        {"head_dim": 18, "mlp_hidden": 7, "n_kv_head": 1, "qk_norm": True},
        {"head_dim": 5, "mlp_hidden": 50, "use_rope": False, "use_swiglu": False, "bias": True},
        {"head_dim": 6, "n_embd": 30},
    ],
    ids=str,
)
def test_constants_of_the_config_reach_the_formulas(changed):
    """rope_theta and norm_eps, in every norm, and sizes of their own are those of the config."""
    model = random_model(**LLAMA_LIKE | changed)
    ids = random_ids(model.config, 1, 12)
    with torch.no_grad():
        assert (model(ids)[0][0] - reference_logits(model, ids[0])).abs().max() < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_biases_are_where_the_setting_says(bias):
    """bias gives every linear layer but the head, and every LayerNorm, a bias; RMSNorm has none."""
    model = gpt.GPT(gpt.GPTConfig(**GPT2_LIKE | {"bias": bias}))
    found = {name for name in model.state_dict() if name.endswith(".bias")}
    layers = {
        f"h.{i}.{part}.bias"
        for i in range(2)
        for part in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert found == (layers | {"ln_f.bias"} if bias else set())
    rms_model = gpt.GPT(gpt.GPTConfig(**LLAMA_LIKE | {"bias": bias}))
    assert not any("ln_" in name and name.endswith(".bias") for name in rms_model.state_dict())


# ---- transformers ----
@pytest.mark.parametrize("base", [LLAMA_LIKE, OWN_SIZES], ids=["usual", "own-sizes"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_logits_equal_those_of_llama(n_kv_head, tied, base):
    """transformers' Llama gives the same logits and loss with the same weights."""
    model = random_model(**base | {"n_kv_head": n_kv_head, "tie_weights": tied})
    c, w = model.config, model.state_dict()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=c.mlp_hidden,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=n_kv_head,
            head_dim=c.head_dim,
            max_position_embeddings=c.block_size,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=tied,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    copied = {
        "model.embed_tokens.weight": w["wte.weight"],
        "model.norm.weight": w["ln_f.weight"],
        "lm_head.weight": w["lm_head.weight"],
    }
    rows = [n * c.head_dim for n in (c.n_head, n_kv_head, n_kv_head)]
    for i in range(c.n_layer):
        ours, theirs = f"h.{i}", f"model.layers.{i}"
        q, k, v = w[f"{ours}.attn.c_attn.weight"].split(rows)
        gate, up = w[f"{ours}.mlp.c_fc.weight"].split(c.mlp_hidden)
        copied |= {
            f"{theirs}.self_attn.q_proj.weight": q,
            f"{theirs}.self_attn.k_proj.weight": k,
            f"{theirs}.self_attn.v_proj.weight": v,
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.self_attn.o_proj.weight": w[f"{ours}.attn.c_proj.weight"],
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": w[f"{ours}.mlp.c_proj.weight"],
            f"{theirs}.input_layernorm.weight": w[f"{ours}.ln_1.weight"],
            f"{theirs}.post_attention_layernorm.weight": w[f"{ours}.ln_2.weight"],
        }
    llama.load_state_dict(copied)
    ids = random_ids(c, 3, 12)
    with torch.no_grad():
        result = llama(input_ids=ids, labels=ids)
        logits, loss = model(ids[:, :-1], ids[:, 1:])
    assert (logits - result.logits[:, :-1]).abs().max() < 1e-4
    assert abs(loss - result.loss) < 1e-4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_those_of_gpt2(tied):
    """transformers' GPT-2, whose matrices are stored transposed, gives the same logits and loss."""
    model = random_model(**GPT2_LIKE | {"tie_weights": tied, "mlp_ratio": 4.0})
    c, w = model.config, model.state_dict()
    other = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_inner=c.mlp_hidden,
            activation_function="gelu_new",
            layer_norm_epsilon=c.norm_eps,
            tie_word_embeddings=tied,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    other.load_state_dict(
        {
            name if name.startswith("lm_head") else f"transformer.{name}": tensor.T
            if name.endswith(transposed)
            else tensor
            for name, tensor in w.items()
        }
    )
    ids = random_ids(c, 3, 12)
    with torch.no_grad():
        result = other(input_ids=ids, labels=ids)
        logits, loss = model(ids[:, :-1], ids[:, 1:])
    assert (logits - result.logits[:, :-1]).abs().max() < 1e-4
    assert abs(loss - result.loss) < 1e-4


# ---- Causality, attention ----
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("values", [LLAMA_LIKE, GPT2_LIKE], ids=["llama", "gpt2"])
def test_no_logit_depends_on_later_tokens(values, autocast):
    """Changing token t leaves every earlier logit as it was, bit by bit, and changes later ones."""
    model = random_model(**values)
    ids = random_ids(model.config, 2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model(ids)[0]
        for t in range(12):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % model.config.vocab_size
            after = model(changed)[0]
            assert torch.equal(before[:, :t], after[:, :t])
            for later in range(t, 12):
                assert not torch.equal(before[:, later], after[:, later])


@pytest.mark.parametrize(
    "values", [LLAMA_LIKE, GPT2_LIKE, LLAMA_LIKE | {"qk_norm": True, "n_kv_head": 1}]
)
def test_bfloat16_logits_are_near_those_of_float32(values, monkeypatch):
    """Under autocast residual stream and attention are bfloat16; logits keep its precision."""
    model = random_model(**values)
    ids = random_ids(model.config, 2, 12)
    dtypes = []
    attend = gpt.attend

    def watched(q, k, v, mask):
        dtypes.extend((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, mask)

    with torch.no_grad():
        expected = model(ids)[0]
        model.h[1].register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
        monkeypatch.setattr(gpt, "attend", watched)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)[0]
    assert dtypes == [torch.bfloat16] * 7
    assert 0 < (logits.float() - expected).norm() / expected.norm() < 3e-2


def explicit_attention(q, k, v, mask):
    """Return softmax(q k^T / sqrt(d) + mask) v in float64, head by head.

    mask: (B or 1, n_head or 1, T or 1, S); bool, True where a query may look, or what is added.
    """
    B, n_head, T, d = q.shape
    q, k, v = q.double(), k.double(), v.double()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    mask = mask.double().expand(B, n_head, T, -1)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(B):
        for head in range(n_head):
            shared = head // (n_head // k.size(1))
            scores = q[b, head] @ k[b, shared].T / math.sqrt(d) + mask[b, head]
            out[b, head] = scores.softmax(-1) @ v[b, shared]
    return out


def causal_mask(T):
    return torch.ones(1, 1, T, T, dtype=torch.bool).tril()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("n_kv_head", [6, 3, 2, 1])
@pytest.mark.parametrize("T", [1, 9, 128, 129, 256, 257, 300])
def test_attention_equals_the_formula(T, n_kv_head, dtype, tolerance):
    """All branches of attend give the formula's result within their dtype's precision."""
    q = torch.randn(2, 6, T, 8).to(dtype)
    k, v = torch.randn(2, 2, n_kv_head, T, 8).to(dtype)
    expected = explicit_attention(q, k, v, causal_mask(T))
    y = gpt.attend(q, k, v)
    assert y.dtype == dtype and y.shape == q.shape
    assert (y - expected).abs().max() < tolerance
    assert (gpt.attend(q, k, v, causal_mask(T)) - expected).abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_attention_has_the_gradients_of_the_formula(n_kv_head, dtype, tolerance):
    """Also where bfloat16 attends chunk by chunk, of inputs that lie as the model's do."""
    q = torch.randn(2, 150, 4, 8).to(dtype).requires_grad_()
    k, v = (torch.randn(2, 150, n_kv_head, 8).to(dtype).requires_grad_() for _ in "kv")
    upstream = torch.randn(2, 4, 150, 8)
    y = gpt.attend(*(t.transpose(1, 2) for t in (q, k, v)))
    found = torch.autograd.grad((y * upstream).sum(), (q, k, v))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    y = explicit_attention(*(t.transpose(1, 2) for t in exact), causal_mask(150))
    expected = torch.autograd.grad((y * upstream).sum(), exact)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine - other).norm() < tolerance * other.norm()


@pytest.mark.parametrize("size", [1, 4, 7, 128, 1000])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_attention_by_chunks_is_attention_in_one_piece(n_kv_head, size):
    """However long the chunks are, also if the last one is short."""
    q = torch.randn(2, 4, 30, 8)
    k, v = torch.randn(2, 2, n_kv_head, 30, 8)
    y = gpt.attend_by_chunks(q, k, v, size)
    assert (y - explicit_attention(q, k, v, causal_mask(30))).abs().max() < 1e-6
    kernel = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (y - kernel).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(2, 1, 3, 7), (1, 1, 3, 7), (2, 6, 3, 7), (1, 6, 1, 7)], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("n_kv_head", [6, 3, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_masks_of_every_shape_are_obeyed(shape, added, n_kv_head, dtype, tolerance):
    """For one row, head, query or for each of them; over more keys than queries."""
    q = torch.randn(2, 6, 3, 8).to(dtype)
    k, v = torch.randn(2, 2, n_kv_head, 7, 8).to(dtype)
    mask = torch.rand(shape) < 0.5
    mask[..., 0] = True
    if added:
        mask = torch.randn(shape).masked_fill(~mask, -math.inf)  # float32, whatever q is
    y = gpt.attend(q, k, v, mask)
    assert y.dtype == dtype
    assert (y - explicit_attention(q, k, v, mask)).abs().max() < tolerance


def test_one_mask_for_all_heads_is_not_copied_for_each(monkeypatch):
    """A group's rows need it as often as the group has heads, which with a long prompt is much."""
    seen = []
    kernel = F.scaled_dot_product_attention

    def watched(q, k, v, mask, **options):
        seen.append(tuple(mask.shape))
        return kernel(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q, k, v = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    gpt.attend(q, k, v, causal_mask(9))
    assert seen == [(1, 1, 3 * 9, 9)]


def test_one_query_attends_by_groups_whatever_the_layout_of_the_result(monkeypatch):
    """A single query of each head, over a filled cache; some kernels return theirs transposed."""
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    allowed = torch.rand(2, 1, 1, 7) < 0.5
    allowed[..., 0] = True
    kernel = torch.nn.functional.scaled_dot_product_attention

    def transposed(*args, **kwargs):
        return kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", transposed)
    y = gpt.attend(q, k, v, mask=allowed)
    assert (y - explicit_attention(q, k, v, allowed)).abs().max() < 1e-6


class Windowed(gpt.GPT):
    """A GPT whose queries see three tokens only: themselves and the two before."""

    def attention_mask(self, positions, cache):
        keys = positions
        if cache is not None:
            keys = torch.arange(self.config.block_size)[None]
        distance = positions[:, None, :, None] - keys[:, None, None, :]
        return (distance >= 0) & (distance < 3)


def test_a_mask_of_ones_own_holds_in_training_and_with_a_cache():
    """One layer sees through a window of three what the plain model makes of three tokens alone."""
    windowed = random_model(kind=Windowed, **LLAMA_LIKE | {"n_layer": 1})
    plain = random_model(**LLAMA_LIKE | {"n_layer": 1})
    ids = random_ids(plain.config, 2, 12)
    cache = gpt.KVCache(plain.config, 2)
    with torch.no_grad():
        whole = windowed(ids)[0]
        parts = [windowed(part, cache=cache)[0] for part in ids.split([5, 1, 1, 4, 1], dim=1)]
        for t in range(12):
            alone = plain(ids[:, max(0, t - 2) : t + 1])[0][:, -1]  # rotary: distances count
            assert (whole[:, t] - alone).abs().max() < 1e-5
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5
    assert (whole - plain(ids)[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_model_makes_lies_where_its_inputs_do(dtype):
    """Were a device left to chance, it would be this default one here, and the CPU on a GPU."""
    model = gpt.GPT(
        gpt.GPTConfig(
            vocab_size=8, block_size=8, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, dropout=0.0
        )
    ).to(dtype)
    x = torch.randint(8, (2, 8))
    expected = model(x, x)[1]
    with torch.device("meta"):
        assert torch.equal(model(x, x)[1], expected)
        cache = gpt.KVCache(model.config, 2, "cpu", dtype)
        assert model(x[:, :3], cache=cache)[0].device.type == cache.pos.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_of_single_rows(dtype, bias):
    """A single row without gradients goes another way than many rows do, with the same result."""
    layer = sample.RowLinear(24, 40, bias=bias).to(dtype)
    x = torch.randn(5, 24).to(dtype)
    with torch.no_grad():
        rows = torch.cat([layer(row[None, None]) for row in x])[:, 0]
        expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    assert rows.dtype == dtype
    assert (rows - expected).abs().max() < (3e-2 if dtype == torch.bfloat16 else 1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert sample.RowLinear(24, 40)(x[:2].float()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_linear_layers_of_single_rows(dtype, bias):
    """Compiled, a single row takes a third way, with the same result."""
    skip_without_compiler()
    layer, x = sample.RowLinear(24, 40, bias=bias).to(dtype), torch.randn(1, 1, 24).to(dtype)
    with torch.no_grad():
        y = torch.compile(layer, fullgraph=True, dynamic=False)(x)
        expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    assert y.dtype == dtype
    assert (y - expected).abs().max() < (3e-2 if dtype == torch.bfloat16 else 1e-5)


# ---- The loss of part by part, against cross_entropy in float64 ----
@pytest.fixture
def logits_at_once(monkeypatch):
    """Return a function that sets how many logits may stand at a time, on the CPU."""

    def change(most):
        monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", {"cpu": most})

    return change


@pytest.fixture
def parts_of_logits(monkeypatch):
    """Return the list of the numbers of rows of the logits that are made from now on."""
    rows = []
    linear = F.linear

    def watched(x, *others):
        rows.append(len(x))
        return linear(x, *others)

    monkeypatch.setattr(F, "linear", watched)
    return rows


def exact_loss(x, head, targets, weights, temperature=1.0):
    """Return (loss, gradient of x, gradient of head) by plain cross_entropy in float64."""
    x, head = (t.detach().double().requires_grad_() for t in (x, head))
    logits = x @ head.T / temperature
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=-1)
    loss = (losses * weights.double()).sum()
    return loss.detach(), *torch.autograd.grad(loss, (x, head))


def loss_at(x, head, targets, weights, temperature=1.0, summed_loss=gpt.summed_loss):
    """Return gpt's summed_loss in training, at this train_temperature."""
    config = gpt.GPTConfig(train_temperature=temperature)
    return summed_loss(x, head, targets, weights, config, True)


def loss_inputs(n=11, n_embd=5, vocab_size=7, dtype=torch.float32):
    """Return x, head, targets and weights; one target is -1, with weight 0."""
    x = torch.randn(n, n_embd).to(dtype).requires_grad_()
    head = torch.randn(vocab_size, n_embd, requires_grad=True)
    targets = torch.randint(vocab_size, (n,))
    weights = torch.rand(n)
    targets[3] = -1
    weights[3] = 0
    return x, head, targets, weights


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize(("most", "n_parts"), [(1, 11), (30, 3), (76, 2), (77, 1), (10**6, 1)])
def test_losses_in_parts_are_those_of_the_whole(
    most, n_parts, temperature, logits_at_once, parts_of_logits
):
    """However few logits stand at a time, loss and gradients are cross_entropy's."""
    logits_at_once(most)
    inputs = loss_inputs()
    x, head, _, _ = inputs
    loss = loss_at(*inputs, temperature)
    (3 * loss).backward()
    assert len(parts_of_logits) == n_parts and sum(parts_of_logits) == 11
    expected, grad_x, grad_head = exact_loss(*inputs, temperature)
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5)
    assert torch.allclose(x.grad.double(), 3 * grad_x, atol=1e-5)
    assert torch.allclose(head.grad.double(), 3 * grad_head, atol=1e-5)


def test_a_cpu_holds_at_most_128_mebibytes_of_logits(parts_of_logits):
    """The number that is set in gpt.py, in float32: one row more, and there are two parts."""
    rows, vocab_size = 2**10, 2**15
    for n, n_parts in ((rows, 1), (rows + 1, 2)):
        parts_of_logits.clear()
        x, head = torch.zeros(n, 1), torch.zeros(vocab_size, 1)
        with torch.no_grad():
            loss_at(x, head, torch.zeros(n, dtype=torch.long), torch.ones(n))
        assert len(parts_of_logits) == n_parts
        assert 4 * max(parts_of_logits) * vocab_size <= 128 * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_heads_gradient_in_many_parts_is_summed_exactly(dtype, logits_at_once):
    """Sums over 4,096 tokens: in bfloat16 they would lose small terms, in float16 overflow."""
    logits_at_once(7 if dtype == torch.bfloat16 else 7 * 128)
    x, head, targets, weights = loss_inputs(4096, dtype=dtype)
    with torch.no_grad():
        x[:] = x.abs() * 40 + 20 if dtype == torch.float16 else x
    targets[:] = 2
    loss_at(x, head, targets, weights).backward()
    head_as_used = head.detach().to(dtype)
    _, _, expected = exact_loss(x, head_as_used, targets, weights)
    assert (head.grad - expected).norm() < 1e-2 * expected.norm()


def test_the_loss_in_parts_has_no_second_derivative(logits_at_once):
    """It would be wrong, because the gradients are constants of the first backward pass."""
    for logits, works in ((7, False), (10**6, True)):
        logits_at_once(logits)
        x, head, targets, weights = loss_inputs()
        loss = loss_at(x, head, targets, weights)
        if works:
            grad = torch.autograd.grad(loss, x, create_graph=True)[0]
            assert torch.autograd.grad(grad.square().sum(), head)[0].abs().max() > 0
            continue
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_few_parts_are_compiled(logits_at_once, parts_of_logits, monkeypatch):
    """Each part is compiled by itself."""
    logits_at_once(7)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    loss_at(*loss_inputs(64))
    assert len(parts_of_logits) == 8


def test_a_compiled_loss_in_parts_is_the_same(logits_at_once):
    skip_without_compiler()
    logits_at_once(14)
    inputs = loss_inputs()
    compiled = torch.compile(gpt.summed_loss, fullgraph=True, dynamic=False)
    loss_at(*inputs, 0.7, compiled).backward()
    _, grad_x, grad_head = exact_loss(*inputs, 0.7)
    assert torch.allclose(inputs[0].grad.double(), grad_x, atol=1e-5)
    assert torch.allclose(inputs[1].grad.double(), grad_head, atol=1e-5)


@pytest.mark.parametrize("most", [1, 30, 10**6])
def test_losses_without_gradients_are_the_same(most, logits_at_once):
    """Under no_grad, in inference mode, and for a head that is frozen or an input that is."""
    logits_at_once(most)
    inputs = loss_inputs()
    x, head, _, _ = inputs
    expected, grad_x, grad_head = exact_loss(*inputs, 0.7)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = loss_at(*inputs, 0.7)
        assert not loss.requires_grad
        assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    for learned, frozen, grad in ((x, head, grad_x), (head, x, grad_head)):
        frozen.requires_grad_(False)
        loss_at(*inputs, 0.7).backward()
        assert torch.allclose(learned.grad.double(), grad, atol=1e-5)
        assert frozen.grad is None
        frozen.requires_grad_(True)
        learned.grad = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("most", [19, 100, 10**6])
def test_losses_in_half_precision_are_near_those_in_float64(dtype, most, logits_at_once):
    """Also added up in 40 parts, of one row each; the head and its gradient stay float32."""
    logits_at_once(most)
    inputs = loss_inputs(40, 32, 19, dtype)
    x, head, _, _ = inputs
    loss = loss_at(*inputs, 0.8)
    loss.backward()
    expected, *grads = exact_loss(*inputs, 0.8)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-2)
    for mine, other in zip((x, head), grads, strict=True):
        assert mine.grad.dtype == mine.dtype
        assert (mine.grad - other).norm() < 1e-2 * other.norm()


def test_parts_of_a_gradient_are_added_up_in_float32(logits_at_once):
    """2,000 rows, part by part, give the head a gradient as good as all at once."""
    inputs = loss_inputs(2000, 8, 19, torch.bfloat16)
    _, head, _, _ = inputs
    _, _, expected = exact_loss(*inputs)
    errors = []
    for most in (19, 10**6):
        logits_at_once(most)
        loss_at(*inputs).backward()
        errors.append(float((head.grad - expected).norm() / expected.norm()))
        head.grad = None
    assert errors[0] < 2 * errors[1] + 1e-3


@pytest.mark.parametrize("most", [60, 10**6])
@pytest.mark.parametrize(
    ("learn", "frozen", "products"), [(False, False, 1), (True, True, 2), (True, False, 3)]
)
def test_only_gradients_that_somebody_takes_are_computed(
    learn, frozen, products, most, logits_at_once
):
    """By the count of products: the logits, the gradients of what goes into the head, the head's.

    Nor is memory kept for the gradient of a frozen head.
    """
    logits_at_once(most)
    x, head = torch.randn(12, 8, requires_grad=True), torch.randn(20, 8, requires_grad=not frozen)
    y, w = torch.randint(20, (12,)), torch.ones(12)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learn):
        loss = loss_at(x, head, y, w)
        if learn and most == 60:
            kept = [t.numel() for t in loss.grad_fn.saved_tensors]
            assert kept == [x.numel(), 0 if frozen else head.numel()]
        if learn:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * 12 * 8 * 20
    assert (x.grad is None, head.grad is None) == (not learn, not learn or frozen)


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_gradients_do_not_depend_on_the_parts(tied, logits_at_once):
    """A tied matrix, too, gets the sum of its gradients as embedding and as head."""
    model = random_model(**LLAMA_LIKE | {"tie_weights": tied})
    ids, targets = random_ids(model.config, 3, 12), random_ids(model.config, 3, 12, seed=3)
    expected = torch.autograd.grad(
        F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten()), list(model.parameters())
    )
    for most in (17, 100, 10**6):
        logits_at_once(most)
        found = torch.autograd.grad(model(ids, targets)[1], list(model.parameters()))
        for mine, other in zip(found, expected, strict=True):
            assert torch.allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_evaluation_computes_no_gradients():
    model = random_model(**LLAMA_LIKE)
    ids = random_ids(model.config, 2, 12)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, ids, loss_only=True)
        loss = counter.get_total_flops()
        model(ids)
    assert counter.get_total_flops() == 2 * loss


def test_only_the_last_positions_logits_are_made_in_generating(monkeypatch):
    """Of a prompt, too, in which each row has its own last position; they are those of all."""
    model, prompts = random_model(**LLAMA_LIKE), [[1, 2, 3, 4, 5, 6], [3, 1]]
    seen, ends = [], torch.tensor([5, 1])
    with torch.no_grad():
        ids = torch.tensor([prompts[0], prompts[1] + [0] * 4])
        assert torch.allclose(
            model(ids, at=ends)[0], model(ids)[0][torch.arange(2), ends][:, None], atol=1e-5
        )
    model.lm_head.register_forward_hook(lambda module, inputs, y: seen.append(tuple(y.shape)))
    assert len(list(model.generate(prompts, 4))) == 4
    assert seen == [(2, 1, model.config.vocab_size)] * 4


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_norms_that_autocast_makes_float32_leave_the_rest_in_bfloat16(monkeypatch, norm):
    """CUDA's autocast lets layer_norm, and from torch 2.12 on rms_norm, return float32."""
    model = random_model(**LLAMA_LIKE | {"use_rms_norm": norm == "RMSNorm", "qk_norm": True})
    seen = []
    for name in ("rms_norm", "layer_norm"):
        function = getattr(F, name)
        monkeypatch.setattr(
            F, name, lambda x, *others, f=function: f(x.float(), *others_in_float(others))
        )
    attend = gpt.attend
    loss_in_parts = gpt.summed_loss

    def watched_attend(q, k, v, mask):
        seen.extend((q, k, v))
        return attend(q, k, v, mask)

    def watched_loss(x, *others):
        seen.append(x)
        return loss_in_parts(x, *others)

    monkeypatch.setattr(gpt, "attend", watched_attend)
    monkeypatch.setattr(gpt, "summed_loss", watched_loss)
    ids = random_ids(model.config, 2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, ids, loss_only=True)[1].backward()
    assert len(seen) > 4 and {t.dtype for t in seen} == {torch.bfloat16}


def others_in_float(others):
    return [t.float() if isinstance(t, torch.Tensor) else t for t in others]


def test_logits_and_loss_come_together_unless_the_loss_is_all_that_is_wanted():
    model = gpt.GPT(
        gpt.GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
    )
    x, y = torch.randint(11, (2, 2, 8))
    logits, loss = model.eval()(x, y)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    none, weighted = model(x, y, loss_only=True)
    assert none is None and float(weighted.detach()) == pytest.approx(
        float(expected.detach()), abs=1e-6
    )


# ---- Rotary positions ----
def rotary_at(positions, head_dim=8, block_size=64):
    table = gpt.rotary_table(
        gpt.GPTConfig(block_size=block_size, n_embd=head_dim, n_head=1, n_kv_head=1)
    )
    return table[:, positions][:, None, :, None]


def test_rotary_scores_depend_on_the_distance_only():
    """q.k after rotation is Re sum q_i conj(k_i) exp(1j (m - n) theta_i), whatever m and n are."""
    q, k = torch.randn(2, 8)
    a, b = torch.complex(q[:4], q[4:]), torch.complex(k[:4], k[4:])
    theta = torch.tensor([10000 ** (-2 * i / 8) for i in range(4)])
    for m, n in ((0, 0), (5, 0), (0, 5), (45, 40), (40, 45), (63, 1), (17, 13)):
        turned_q = gpt.rotate(q.expand(1, 1, 1, 8), rotary_at([m])).flatten()
        turned_k = gpt.rotate(k.expand(1, 1, 1, 8), rotary_at([n])).flatten()
        expected = (a * b.conj() * torch.exp(1j * (m - n) * theta)).sum().real
        assert turned_q @ turned_k == pytest.approx(float(expected), abs=2e-5)


def test_rotation_keeps_norms_and_position_zero():
    """Every pair keeps its length, and position 0 its components."""
    x = torch.randn(2, 64, 3, 8)
    y = gpt.rotate(x, rotary_at(list(range(64))))
    assert torch.equal(y[:, 0], x[:, 0])
    assert not torch.allclose(y[:, 1:], x[:, 1:], atol=0.1)
    assert torch.allclose(
        y[..., :4] ** 2 + y[..., 4:] ** 2, x[..., :4] ** 2 + x[..., 4:] ** 2, atol=1e-5
    )


# ---- Initial weights and loss ----
CHAR = {
    "vocab_size": 65,
    "block_size": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 128,
    "dropout": 0.0,
    "qk_norm": True,
}


@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        (CHAR, 2e-2),
        (CHAR | {"n_layer": 6, "n_head": 6, "n_kv_head": 6, "n_embd": 384}, 2e-2),
        (CHAR | {"vocab_size": 50257, "block_size": 64, "n_layer": 2, "n_embd": 64}, 2e-2),
        (CHAR | {"tie_weights": False}, 1e-6),
    ],
    ids=["char", "char-wide", "bpe-narrow", "untied"],
)
def test_first_loss_is_that_of_a_uniform_guess(values, tolerance):
    """Before training the mean loss over all targets is ln(vocab_size)."""
    model = gpt.GPT(gpt.GPTConfig(**values)).eval()
    ids = random_ids(model.config, 2, model.config.block_size)
    with torch.no_grad():
        logits = model(ids)[0].double()
    loss = float((logits.logsumexp(-1) - logits.mean(-1)).mean())
    assert loss == pytest.approx(math.log(values["vocab_size"]), rel=tolerance)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_layer", [2, 8])
def test_initial_standard_deviations(n_layer, tied):
    """Weights have the standard deviations of init_weights' table; norms are 1, biases 0.

    With a tied head c_proj has 0.02 / sqrt(2 n_layer), embeddings 0.01, other matrices 0.02. With a
    head of its own, which is 0 at first, c_proj is 0, embeddings 0.3, others 1 / sqrt(columns).
    """
    c = gpt.GPTConfig(
        vocab_size=500,
        block_size=64,
        n_layer=n_layer,
        n_embd=192,
        n_head=6,
        bias=True,
        use_rms_norm=False,
        use_rope=False,
        tie_weights=tied,
    )
    for name, p in gpt.GPT(c).state_dict().items():
        if name.endswith("bias"):
            assert torch.all(p == 0), name
        elif "ln_" in name:
            assert torch.all(p == 1), name
        elif name == "lm_head.weight":
            assert tied or torch.all(p == 0)
        else:
            std = 0.02 if tied else p.size(1) ** -0.5
            if name.startswith(("wte", "wpe")):
                std = 0.01 if tied else 0.3
            if "c_proj" in name:
                std = 0.02 / math.sqrt(2 * n_layer) if tied else 0.0
            assert float(p.std()) == pytest.approx(std, rel=0.05), name
            assert abs(float(p.mean())) <= 5 * std / math.sqrt(p.numel()), name


# ---- Loss, gradients ----
def test_loss_is_the_mean_over_targets_that_count():
    """The loss is the mean of -log softmax at the targets, without those of -1."""
    model = random_model(**LLAMA_LIKE)
    ids, targets = random_ids(model.config, 3, 9), random_ids(model.config, 3, 9, seed=3)
    targets[0, 2:5] = targets[2, 8] = -1
    with torch.no_grad():
        logits, loss = model(ids, targets)
    total = count = 0.0
    for row, wanted in zip(logits.double(), targets):
        for scores, target in zip(row.tolist(), wanted.tolist()):
            if target >= 0:
                total += math.log(sum(math.exp(s) for s in scores)) - scores[target]
                count += 1
    assert count == 23
    assert float(loss) == pytest.approx(total / count, abs=1e-6)


def explicit_loss(logits, targets, weights):
    """Return the weighted mean of -log softmax at the targets, summed in float64 one by one."""
    total = weight = 0.0
    for scores, target, w in zip(
        logits.double().flatten(0, 1), targets.flatten(), weights.flatten()
    ):
        if target >= 0:
            total += float(w) * float(-scores.log_softmax(-1)[target])
            weight += float(w)
    return total / weight


WEIGHTINGS = {
    "eighths": lambda: torch.randint(9, (3, 9)) / 8,
    "bytes": lambda: torch.randint(256, (3, 9)) / 255,
    "masks": lambda: (torch.rand(3, 9) < 0.3).float(),
    "a-row-of-none": lambda: torch.tensor([[0.0], [1.0], [0.25]]).expand(3, 9),
    "one": lambda: F.one_hot(torch.tensor(13), 27).view(3, 9) * 0.004,
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_loss_is_the_weighted_mean(name):
    """The loss is the weighted mean of -log softmax at the targets, whatever the weights sum to."""
    model, weights = random_model(**LLAMA_LIKE), WEIGHTINGS[name]()
    ids, targets = random_ids(model.config, 3, 9), random_ids(model.config, 3, 9, seed=3)
    with torch.no_grad():
        logits, plain = model(ids, targets)
        loss = model(ids, targets, weights=weights)[1]
    assert float(loss) == pytest.approx(explicit_loss(logits, targets, weights), abs=1e-5)
    assert abs(float(loss) - float(plain)) > 1e-3
    with torch.no_grad():
        assert float(model(ids, targets, weights=torch.ones(3, 9))[1]) == pytest.approx(
            float(plain), abs=1e-6
        )


def test_targets_of_minus_one_do_not_count_whatever_they_weigh():
    """Among weighted targets, too, those of -1 add neither loss nor weight."""
    model, weights = random_model(**LLAMA_LIKE), torch.rand(3, 9)
    ids, targets = random_ids(model.config, 3, 9), random_ids(model.config, 3, 9, seed=3)
    targets[0, 2:5] = targets[2, 8] = -1
    with torch.no_grad():
        logits, loss = model(ids)[0], model(ids, targets, weights=weights)[1]
    assert float(loss) == pytest.approx(explicit_loss(logits, targets, weights), abs=1e-5)


def test_nothing_that_counts_is_a_loss_of_zero():
    """Where all weights are 0, or all targets -1, the loss is 0 and so are all gradients."""
    model = random_model(**LLAMA_LIKE)
    ids, targets = random_ids(model.config, 2, 9), random_ids(model.config, 2, 9, seed=3)
    for y, w in (
        (targets, torch.zeros(2, 9)),
        (targets * 0 - 1, torch.zeros(2, 9)),
        (targets * 0 - 1, None),
    ):
        model.zero_grad()
        loss = model(ids, y, weights=w)[1]
        loss.backward()
        assert float(loss.detach()) == 0
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_gradients_of_a_weighted_loss_are_the_weighted_sum_of_those_of_its_targets():
    """Linear in the weights: each target's own gradient by its share in the weight."""
    model = random_model(**LLAMA_LIKE)
    ids, targets = random_ids(model.config, 1, 6), random_ids(model.config, 1, 6, seed=3)
    weights = torch.tensor([[0.0, 1.0, 0.2, 0.0, 0.7, 0.1]])
    model.zero_grad()
    model(ids, targets, weights=weights)[1].backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = torch.zeros_like(found)
    for t, w in enumerate(weights[0].tolist()):
        model.zero_grad()
        F.cross_entropy(model(ids)[0][0, t : t + 1], targets[0, t : t + 1]).backward()
        expected += w / 2 * torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast_is_summed_in_float32(dtype):
    """Autocast rounds the logits, but not their loss, nor does the sum of many losses overflow."""
    model = random_model(**LLAMA_LIKE)
    ids, targets = random_ids(model.config, 1000, 12), random_ids(model.config, 1000, 12, seed=3)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        logits, loss = model(ids, targets)
        heavy = model(ids, targets, weights=torch.full((1000, 12), 20.0))[1]
    expected = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.to(dtype).float())
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert float(heavy) == pytest.approx(float(expected), abs=1e-5)


def test_loss_of_bfloat16_logits_is_summed_in_float32():
    """A model all in bfloat16 rounds its logits, but not their loss."""
    model = random_model(**LLAMA_LIKE).bfloat16()
    ids, targets = random_ids(model.config, 3, 12), random_ids(model.config, 3, 12, seed=3)
    with torch.no_grad():
        logits, loss = model(ids, targets)
    expected = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float())
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def gradients(model, ids, targets, forward=None):
    """Return the gradients of the loss as one vector."""
    model.zero_grad()
    loss = model(ids, targets)[1] if forward is None else forward(ids, targets)[1]
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone()


def test_gradients_equal_finite_differences():
    """The loss's gradient is its slope, along random directions, in float64."""
    model = random_model(**LLAMA_LIKE | {"qk_norm": True}).double()
    ids, targets = random_ids(model.config, 2, 8), random_ids(model.config, 2, 8, seed=3)
    slopes = gradients(model, ids, targets)
    at, step = torch.cat([p.detach().flatten() for p in model.parameters()]), 1e-4
    found = []  # the head's outputs, in float64
    model.lm_head.register_forward_hook(lambda module, inputs, output: found.append(output))
    for _ in range(3):
        direction = F.normalize(torch.randn_like(at), dim=0)
        losses = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(at + sign * step * direction, model.parameters())
            with torch.no_grad():
                model(ids)
            scores = found.pop().log_softmax(-1)
            losses.append(-scores.gather(-1, targets[..., None]).mean())
        slope = float(losses[0] - losses[1]) / 2 / step
        assert float(slopes @ direction) == pytest.approx(slope, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("values", [LLAMA_LIKE, GPT2_LIKE], ids=["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(values, dropout):
    """Blocks that run again in the backward pass draw the same dropout, and give the same."""
    plain = random_model(**values | {"dropout": dropout}).train()
    saving = random_model(**values | {"dropout": dropout, "gradient_checkpointing": True}).train()
    ids, targets = random_ids(plain.config, 3, 12), random_ids(plain.config, 3, 12, seed=3)
    runs = []
    saving.h[1].register_forward_pre_hook(lambda *_: runs.append(1))
    torch.manual_seed(5)
    expected = gradients(plain, ids, targets)
    torch.manual_seed(5)
    found = gradients(saving, ids, targets)
    assert len(runs) == 2
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert expected.norm() > 0.1
    saving.eval()
    gradients(saving, ids, targets)
    assert len(runs) == 3


def test_dropout_drops_whole_channels():
    """What a block adds loses a share of its channels at all positions; the rest grows for it."""
    model = random_model(
        **LLAMA_LIKE | {"dropout": 0.3, "n_embd": 64, "n_head": 4, "n_kv_head": 2}
    ).train()
    seen = []
    model.h[0].drop.register_forward_hook(
        lambda _, inputs, output: seen.append((inputs[0], output))
    )
    model(random_ids(model.config, 8, 12))
    assert len(seen) == 2
    for x, y in seen:
        dropped = (y == 0).all(1)  # (B, C)
        assert torch.allclose(y, x / 0.7 * ~dropped[:, None])
        assert 0.2 < dropped.float().mean() < 0.4 and not (dropped == dropped[:1]).all()


def test_dropout_acts_in_training_only():
    """eval mode gives the logits of a model without dropout; training gives others each time."""
    model = random_model(**LLAMA_LIKE | {"dropout": 0.3})
    bare = random_model(**LLAMA_LIKE)
    ids = random_ids(model.config, 2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], bare(ids)[0])
        model.train()
        assert not torch.allclose(model(ids)[0], model(ids)[0], atol=0.1)
        bare.train()
        assert torch.equal(bare(ids)[0], bare.eval()(ids)[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "values", [{}, {"tie_weights": False}, {"use_rms_norm": False, "bias": True}]
)
def test_train_temperature_divides_the_losses_logits_in_training_only(values, autocast):
    """Loss and gradients are those of divided logits; in use the model is what it is without."""
    model = random_model(**LLAMA_LIKE | values | {"train_temperature": 0.4})
    bare = random_model(**LLAMA_LIKE | values)
    ids, targets = random_ids(model.config, 2, 12), random_ids(model.config, 2, 12, seed=3)
    close = 0.05 if autocast else 1e-5
    for training in (False, True):
        model.train(training)
        bare.train(training)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = bare(ids)[0].float()
            temperature = 0.4 if training else 1
            loss = F.cross_entropy(logits.flatten(0, 1) / temperature, targets.flatten())
            found_logits, found = model(ids, targets)
        assert torch.allclose(found_logits.float(), logits, rtol=close, atol=close)
        assert torch.allclose(found, loss, rtol=close / 2)
        found.backward()
        loss.backward()
        grads, expected = (
            torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, bare)
        )
        assert (grads - expected).norm() < close * expected.norm()
        model.zero_grad()
        bare.zero_grad()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_where_dropout_acts(training):
    """Embeddings and both sublayers' outputs lose half of their channels, each for a whole row."""
    model = random_model(**LLAMA_LIKE | {"dropout": 0.5, "n_layer": 1}).train(training)
    seen = {}
    for name in ("ln_1", "ln_2", "attn", "mlp"):
        getattr(model.h[0], name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    model.ln_f.register_forward_hook(
        lambda _, inputs, output: seen.update(ln_f=(inputs[0], output))
    )
    ids = random_ids(model.config, 40, 12)
    with torch.no_grad():
        model(ids)
    embedded, middle, end = (seen[name][0] for name in ("ln_1", "ln_2", "ln_f"))
    for added, whole in (
        (embedded, model.wte.weight.detach()[ids]),
        (middle - embedded, seen["attn"][1]),
        (end - middle, seen["mlp"][1]),
    ):
        left = added.abs().amax(1, keepdim=True) > 1e-6  # channels of a row
        assert left.float().mean() == pytest.approx(0.5 if training else 1.0, abs=0.05)
        assert not training or not torch.equal(left[0], left[1])
        assert torch.allclose(added, left * (2 if training else 1) * whole, rtol=1e-3, atol=1e-5)


def test_accumulated_gradients_equal_those_of_one_batch():
    """The gradient of 16 rows is the mean of those of four times 4."""
    model = random_model(**LLAMA_LIKE)
    ids, targets = random_ids(model.config, 16, 12), random_ids(model.config, 16, 12, seed=3)
    whole = gradients(model, ids, targets)
    model.zero_grad()
    for x, y in zip(ids.split(4), targets.split(4)):
        (model(x, y)[1] / 4).backward()
    summed = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (summed - whole).norm() / whole.norm() < 1e-5


# ---- torch.compile ----
def skip_without_compiler():
    """Skip the test if torch.compile cannot build even one line."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(3))
    except Exception as e:
        pytest.skip(f"torch.compile finds no working C++ compiler ({type(e).__name__})")


@pytest.mark.parametrize(
    ("compiled", "autocast", "frozen", "most", "tolerance"),
    [
        (False, False, False, 10**6, 1e-4),
        (False, False, False, 2000, 1e-4),
        (False, True, False, 10**6, 3e-2),
        (False, True, True, 2000, 3e-2),
        (True, False, False, 2000, 1e-4),
        (True, True, False, 10**6, 3e-2),
        (True, True, True, 2000, 3e-2),
    ],
)
def test_gradients_of_training_as_it_runs_on_a_cpu(
    compiled, autocast, frozen, most, tolerance, logits_at_once, monkeypatch
):
    """Compiled or not, attention and loss by parts or not, the head learned or not."""
    sizes = {"n_layer": 1, "block_size": 150, "tie_weights": not frozen}
    model = random_model(**LLAMA_LIKE | sizes)
    model.lm_head.requires_grad_(not frozen)
    ids, targets = random_ids(model.config, 2, 150), random_ids(model.config, 2, 150, seed=3)
    trained = [p for p in model.parameters() if p.requires_grad]
    with monkeypatch.context() as patch:
        patch.setattr(
            gpt, "attend", lambda q, k, v, _: explicit_attention(q, k, v, causal_mask(150))
        )
        expected_loss = F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten())
        expected = torch.autograd.grad(expected_loss, trained)
    logits_at_once(most)
    torch._dynamo.reset()
    forward = torch.compile(model, dynamic=False, fullgraph=True) if compiled else model
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(ids, targets, weights=torch.ones(2, 150))[1]
        found = torch.autograd.grad(loss, trained)
    except Exception:
        skip_without_compiler()
        raise
    assert torch.allclose(loss, expected_loss, rtol=tolerance / 10)
    found, expected = (torch.cat([g.flatten() for g in grads]) for grads in (found, expected))
    assert (found - expected).norm() / expected.norm() < tolerance


def test_checkpoints_of_a_compiled_model_load_into_a_plain_one(settings, tmp_path):
    """What is saved of a model that is compiled for training has the plain names."""
    settings(dropout=0.0)
    namespace = gpt.checked_settings()
    data = gpt.Data(tmp_path / "data" / "toy", 16)
    model = gpt.GPT(gpt.model_config(namespace, data.meta["vocab_size"]))
    ids = random_ids(model.config, 2, 12)
    torch.compile(model, backend="eager")(ids, ids)[1].backward()
    saved = gpt.checkpoint_state(model, data, namespace, gpt.Progress())
    gpt.save_checkpoint(tmp_path / "best.pt", saved)
    assert set(saved["model"]) == {name for name, _ in gpt.GPT(model.config).named_parameters()}
    other, _, _ = gpt.load_checkpoint(tmp_path / "best.pt")
    with torch.no_grad():
        assert torch.equal(other(ids)[0], model.eval()(ids)[0])


# ---- Configuration, sizes, FLOPs ----
def test_a_config_has_the_settings_defaults():
    """One default for one setting: GPTConfig() is the model that gpt.py trains by default."""
    config = asdict(gpt.GPTConfig())
    shared = config.keys() & gpt.SETTINGS.keys()
    assert len(shared) == 15
    assert {n: config[n] for n in shared} == {n: gpt.default_of(n) for n in shared}


def test_fields_that_matter_only_in_training_change_no_logits():
    """A field that is declared training_only affects neither the weights nor evaluation."""
    assert set(gpt.TRAINING_ONLY) == {"dropout", "train_temperature", "gradient_checkpointing"}
    plain = random_model(**LLAMA_LIKE)
    ids = random_ids(plain.config, 2, 12)
    values = {"dropout": 0.5, "train_temperature": 0.5, "gradient_checkpointing": True}
    other = gpt.GPT(replace(plain.config, **values)).eval()
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for mine, theirs in zip(plain(ids, ids), other(ids, ids), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shape", [LLAMA_LIKE, GPT2_LIKE], ids=["rope", "learned"])
def test_a_cropped_model_computes_what_the_whole_one_does(shape):
    """Texts that fit have the same logits, with and without a cache; longer ones do not fit."""
    model = random_model(**shape)
    ids = random_ids(model.config, 2, 7)
    with torch.no_grad():
        expected, _ = model(ids)
        model.crop_block_size(7)
        logits, _ = model(ids)
        cached, _ = model(ids, cache=gpt.KVCache(model.config, 2))
    assert torch.equal(logits, expected)
    assert (cached - expected).abs().max() < 1e-4
    assert model.config.block_size == 7
    assert gpt.GPT(model.config).state_dict().keys() == model.state_dict().keys()
    gpt.GPT(model.config).load_state_dict(model.state_dict())
    with pytest.raises(AssertionError, match="8 tokens do not fit in block_size 7"):
        model(random_ids(model.config, 2, 8))
    with pytest.raises(AssertionError):
        model.crop_block_size(8)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"n_embd": 30, "n_head": 4, "n_kv_head": 4}, ["n_embd", "30", "n_head", "4"]),
        ({"n_embd": 24, "n_head": 6, "n_kv_head": 4}, ["n_head", "6", "n_kv_head", "4"]),
        ({"n_embd": 24, "n_head": 2, "n_kv_head": 4}, ["n_head", "2", "n_kv_head", "4"]),
        ({"n_embd": 28, "n_head": 4, "n_kv_head": 2}, ["n_embd", "n_head", "7", "even"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"dropout": -0.1}, ["dropout", "-0.1"]),
        ({"dropout": math.nan}, ["dropout", "nan"]),
        *(
            ({"train_temperature": value}, [f"train_temperature is {value}"])
            for value in (0.0, -1.0, math.inf, math.nan)
        ),
        *(
            ({name: value}, [name, str(value)])
            for value in (0, -3)
            for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
        ),
        ({"mlp_ratio": 0.0}, ["mlp_hidden is 0", "mlp_ratio 0.0"]),
        ({"mlp_hidden": -1}, ["mlp_hidden is -1"]),
        ({"head_dim": 0}, ["head_dim", "0"]),
        ({"head_dim": -2, "use_rope": False}, ["head_dim", "-2"]),
        ({"head_dim": 7}, ["head_dim", "7", "even"]),
    ],
)
def test_impossible_sizes_are_refused_by_name(values, named):
    """A config without meaning raises ValueError, which names the setting and its value."""
    with pytest.raises(ValueError) as caught:
        gpt.GPTConfig(**SMALL | values)
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize("swiglu", [True, False])
def test_sizes_that_are_not_given_follow_the_usual_rules(swiglu):
    """A head takes its share of n_embd, the MLP mlp_ratio; given, both are what is given."""
    usual = gpt.GPTConfig(**SMALL | {"use_swiglu": swiglu, "mlp_ratio": 4.0})
    assert usual.head_dim == 8
    assert usual.mlp_hidden == (96 if swiglu else 128)  # 2/3 of 128, in steps of 32
    own = gpt.GPTConfig(**SMALL | {"use_swiglu": swiglu, "head_dim": 10, "mlp_hidden": 3})
    assert (own.head_dim, own.mlp_hidden) == (10, 3)
    again = gpt.GPTConfig(**vars(own))
    assert again == own


def test_odd_heads_are_fine_without_rotary_positions():
    """Learned positions need no pairs, and give the formula's logits for a head of 7."""
    model = random_model(**GPT2_LIKE | {"n_embd": 28})
    ids = random_ids(model.config, 1, 6)
    with torch.no_grad():
        assert (model(ids)[0][0] - reference_logits(model, ids[0])).abs().max() < 1e-5


def test_more_tokens_than_block_size_are_refused():
    """A sequence beyond block_size is an error, not a wrong answer."""
    model = random_model(**LLAMA_LIKE)
    with pytest.raises(AssertionError, match="block_size"):
        model(random_ids(model.config, 1, 13))


def on_meta(**values):
    with torch.device("meta"):
        return gpt.GPT(gpt.GPTConfig(**values))


def test_parameter_count_of_gpt2():
    """GPT-2's smallest model has its 124,439,808 parameters."""
    model = on_meta(
        block_size=1024,
        vocab_size=50257,
        n_layer=12,
        n_head=12,
        n_kv_head=12,
        n_embd=768,
        bias=True,
        use_rope=False,
        use_rms_norm=False,
        use_swiglu=False,
        qk_norm=False,
        tie_weights=True,
    )
    assert model.n_params() == 124_439_808


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("n_embd", "n_head", "n_kv_head", "hidden"),
    [(384, 6, 2, 1024), (128, 4, 4, 352), (4096, 32, 8, 10912)],
)
def test_parameter_count_of_a_llama(n_embd, n_head, n_kv_head, hidden, tied):
    """Embedding; in a layer q, k, v, o, three MLP matrices and two norms; a norm at the end."""
    model = on_meta(
        block_size=64,
        vocab_size=1000,
        n_layer=3,
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=n_embd,
        tie_weights=tied,
    )
    kv = n_embd // n_head * n_kv_head
    layer = 2 * n_embd * n_embd + 2 * n_embd * kv + 3 * n_embd * hidden + 2 * n_embd
    assert model.config.mlp_hidden == hidden
    assert model.n_params() == (1 if tied else 2) * 1000 * n_embd + 3 * layer + n_embd
    normed = gpt.GPTConfig(**vars(replace(model.config, qk_norm=True)))
    with torch.device("meta"):
        assert gpt.GPT(normed).n_params() == model.n_params()  # these norms have no weights


def test_flops_per_token_of_sizes_of_their_own():
    """Attention costs by the width of its heads together, which need not be n_embd."""
    model = on_meta(**OWN_SIZES)
    heads = 4 * 6
    layer = 32 * (heads + 2 * 2 * 6) + heads * 32 + 32 * 2 * 20 + 20 * 32
    assert model.n_params() == 17 * 32 + 2 * layer + 5 * 32
    assert model.config.flops_per_token() == 6 * (17 * 32 + 2 * layer) + 12 * 2 * heads * 12


@pytest.mark.parametrize("swiglu", [True, False])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_are_those_that_torch_counts(tied, rope, swiglu):
    """A forward and a backward pass over whole rows; torch counts causal attention in full."""
    config = gpt.GPTConfig(
        block_size=12,
        vocab_size=17,
        n_layer=2,
        n_head=4,
        n_kv_head=4,
        n_embd=32,
        tie_weights=tied,
        use_rope=rope,
        use_swiglu=swiglu,
        bias=True,
    )
    rows = torch.zeros(3, 12, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # whose products the counter knows
        logits, _ = gpt.GPT(config)(rows)
        logits.sum().backward()
    assert counter.get_total_flops() == 3 * 12 * config.flops_per_token()


def test_rms_norm_follows_the_dtype_of_its_input():
    """RMSNorm returns bfloat16 for bfloat16, within its precision of the formula."""
    norm = gpt.RMSNorm(16, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
        x = torch.randn(5, 16).bfloat16()
        y = norm(x)
    expected = torch.stack([rms(row, norm.weight.double(), 1e-5) for row in x.double()])
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), expected, rtol=2e-2, atol=2e-2)
    assert torch.allclose(norm(x.float()), F.rms_norm(x.float(), (16,), norm.weight, 1e-5))


# ---- Replay, with a stand-in for the GPU; tests/test_gpu.py has a real one ----
@pytest.fixture
def recordings(monkeypatch):
    """Let Replay record on the CPU; return the list of the graphs made.

    A graph that is replayed calls the function again, on the tensors that were recorded.
    """
    made = []

    class Graph:
        def replay(self):
            self.replay_of.result.copy_(self.replay_of.function(*self.replay_of.inputs))

        def register_generator_state(self, generator):
            self.generator = generator

    @contextlib.contextmanager
    def graph(graph, stream):
        assert stream == "a stream of cuda:7"  # else it would record another GPU's
        made.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(gpt, "to_device", lambda t, device: t)
    return made


def replayed(function, **options):
    replay = gpt.Replay(function, torch.device("cuda:7"), **options)
    torch.cuda.CUDAGraph.replay_of = replay  # the stand-in's, for this test
    return replay


def test_a_function_is_recorded_once_for_each_shape_of_its_inputs(recordings):
    """Every call gives what the function gives, whatever the inputs hold, numbers too."""
    replay = replayed(lambda x, factor: (x * factor).sum(-1))
    for shape, count in (((2, 3), 1), ((4, 3), 2)):
        for call in range(6):
            x = torch.randn(shape)
            assert torch.allclose(replay(x, call / 2), (x * (call / 2)).sum(-1))
            assert len(recordings) == count - (call < 2)


def test_a_function_without_inputs_is_recorded_once(recordings):
    """As the optimizers' steps are, which work on what stands where it stood."""
    counter = torch.zeros(())
    replay = replayed(lambda: counter.add_(1).clone())
    assert [float(replay()) for _ in range(3)][:2] == [1, 2]
    for _ in range(4):
        replay()
    assert len(recordings) == 1


def test_a_generator_of_ones_own_is_made_known_to_the_graph(recordings):
    draws = torch.Generator()
    replay = replayed(lambda x: x + 1, generator=draws)
    for _ in range(4):
        replay(torch.ones(2))
    assert [graph.generator for graph in recordings] == [draws]


def test_without_cuda_graphs_or_off_the_gpu_the_function_itself_is_called(recordings):
    """With the very inputs that it is given."""
    for device, enabled in (("cpu", True), ("mps", True), ("cuda", False)):
        seen = []
        replay = gpt.Replay(seen.append, torch.device(device), enabled)
        for _ in range(5):
            replay(1.5)
        assert seen == [1.5] * 5
    assert not recordings


@pytest.mark.parametrize(
    ("world_size", "changes", "recorded"),
    [
        (1, {}, True),
        (1, {"cuda_graphs": False}, False),
        (1, {"gradient_accumulation_steps": 2}, False),
        (2, {}, False),
        (2, {"gradient_accumulation_steps": 2}, False),
        (1, {"gradient_checkpointing": True}, False),
    ],
)
def test_steps_of_one_micro_batch_on_one_gpu_are_recorded(
    settings, monkeypatch, tmp_path, world_size, changes, recorded
):
    """Whether a Trainer asks for both halves of a step to be recorded."""
    settings(**changes)
    namespace = gpt.checked_settings()
    data = gpt.Data(tmp_path / "data" / "toy", 16)
    model = gpt.GPT(gpt.model_config(namespace, data.meta["vocab_size"]))
    asked = []
    monkeypatch.setattr(gpt, "Replay", lambda function, device, enabled: asked.append(enabled))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, **_: model)
    machine = gpt.Machine(torch.device("cpu"), torch.float32, 0, world_size)
    gpt.Trainer(namespace, model, data, machine)
    assert asked == [recorded, recorded]


def test_room_is_tried_for_the_optimizer_state_of_what_is_trained(settings, monkeypatch):
    """Two tensors for each parameter that learns, none for a frozen one; no gradient stays.

    A resumed run, whose optimizers have their state already, needs no more.
    """
    trainer = new_trainer(optimizer="adamw")
    frozen = {"wte.weight", "ln_f.weight"}
    for name, p in trainer.model.named_parameters():
        p.requires_grad_(name not in frozen)
    trainer.optimizers = gpt.make_optimizers(trainer.model, trainer.settings, trainer.machine)
    asked = []
    empty_like = torch.empty_like

    def watched(p):
        asked.append(p)
        return empty_like(p)

    monkeypatch.setattr(torch, "empty_like", watched)
    trainer.try_micro_batch()
    trained = [p for name, p in trainer.model.named_parameters() if name not in frozen]
    assert sorted(map(id, asked)) == sorted(map(id, trained * 2))
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.gradients(0)
    trainer.update()
    asked.clear()
    trainer.try_micro_batch()
    assert asked == []


# ---- What stays float32 ----
@pytest.mark.parametrize(
    ("dtype", "stream"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_a_float16_run_has_a_float32_residual_stream(monkeypatch, dtype, stream):
    """Its sums would overflow; bfloat16 has the range of float32."""
    model = random_model(**LLAMA_LIKE)
    seen = []
    forward = gpt.Block.forward

    def watched(self, x, *others):
        seen.append(x.dtype)
        return forward(self, x, *others)

    monkeypatch.setattr(gpt.Block, "forward", watched)
    with torch.autocast("cpu", dtype), torch.no_grad():
        model(random_ids(model.config, 2, 12))
    assert set(seen) == {stream}


def test_the_cache_on_a_cpu_is_float32_whatever_the_weights_are(monkeypatch):
    """Attention in float32 is faster there, and more exact."""
    model = random_model(**LLAMA_LIKE).bfloat16()
    made = []
    cache = gpt.KVCache

    def watched(*arguments):
        made.append(cache(*arguments))
        return made[-1]

    monkeypatch.setattr(gpt, "KVCache", watched)
    list(model.generate([[1, 2]], 2))
    assert {k.dtype for k in made[0].k} == {torch.float32}
