"""Muon against singular value decompositions and torch.optim.Muon; who optimizes what."""

import pytest
import torch

import gpt

SHAPES = [(24, 24), (48, 16), (16, 48), (33, 20)]


def matrix_with(values, rows, cols, seed=0):
    """Return (G, U, V) with G = U diag(values) V^T and random orthogonal U, V."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, len(values), generator=generator, dtype=torch.float64))[0]
    return u @ torch.diag(values.double()) @ v.T, u, v


# ---- Newton-Schulz ----
@pytest.mark.parametrize(
    ("dtype", "low", "high", "off"),
    [
        (torch.float32, 0.65, 1.25, 1e-4),
        (torch.bfloat16, 0.6, 1.3, 6e-2),
        (torch.float16, 0.65, 1.25, 6e-2),
    ],
)
@pytest.mark.parametrize("condition", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalize_moves_singular_values_to_one(shape, condition, dtype, low, high, off):
    """For U S V^T the result has the same U and V, and singular values near one, at any scale."""
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), min(shape))
    made = [
        matrix_with(values * scale, *shape, seed) for seed, scale in enumerate((1.0, 1e-3, 50.0))
    ]
    found = gpt.orthogonalize(torch.stack([g for g, _, _ in made]).float(), dtype)
    assert found.shape == (3, *shape) and found.dtype == dtype
    for x, (_, u, v) in zip(found.double(), made):
        core = u.T @ x @ v
        assert torch.all((low < core.diagonal()) & (core.diagonal() < high))
        assert (core - core.diagonal().diag()).abs().max() < off
        assert (x - u @ core @ v.T).abs().max() < off
        singular = torch.linalg.svdvals(x)
        assert low < singular.min() and singular.max() < high


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalize_is_the_quintic_on_singular_values(shape):
    """Each singular value, over the Frobenius norm, goes through the quintic five times."""
    values = torch.logspace(0, -1, min(shape), dtype=torch.float64)
    g, u, v = matrix_with(values, *shape)
    s = values / (values**2).sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert (gpt.orthogonalize(g[None].float())[0] - u @ s.diag() @ v.T).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonalize_keeps_zeros(dtype):
    """A zero gradient gives a zero update, not a division by zero."""
    assert torch.equal(
        gpt.orthogonalize(torch.zeros(2, 4, 6), dtype), torch.zeros(2, 4, 6, dtype=dtype)
    )


# ---- Muon ----
@pytest.mark.parametrize(
    ("dtype", "native", "expected"),
    [
        (torch.float32, False, torch.float32),
        (torch.float16, False, torch.float16),  # a T4's choice
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),  # emulated, and slow
    ],
)
def test_newton_schulz_steps_run_in_what_the_hardware_multiplies(
    monkeypatch, dtype, native, expected
):
    monkeypatch.setattr(gpt, "native_bfloat16", lambda device: native)
    chosen = gpt.checked_settings(optimizer="muon", n_layer=1, n_embd=16)
    model = gpt.GPT(gpt.model_config(chosen, vocab_size=8))
    machine = gpt.Machine(torch.device("cpu"), dtype)
    assert gpt.make_optimizers(model, chosen, machine)[1].dtype == expected


def muon_steps(starts, gradients, parts, **settings):
    """Return the matrices after one step for each list of gradients, one group for all."""
    params = [torch.nn.Parameter(p.clone()) for p in starts]
    optimizer = gpt.Muon([{"params": params, "parts": parts}], **{"momentum": 0.95} | settings)
    for step in gradients:
        for p, g in zip(params, step):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.0},
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_equal_those_of_torch(shape, settings):
    """Three steps change a matrix as torch.optim.Muon changes it, up to bfloat16's rounding."""
    start = torch.randn(shape)
    gradients = [torch.randn(shape) for _ in range(3)]
    other = torch.nn.Parameter(start.clone())
    reference = torch.optim.Muon([other], adjust_lr_fn="original", nesterov=True, **settings)
    for g in gradients:
        other.grad = g.clone()
        reference.step()
    for dtype in (torch.bfloat16, torch.float32):
        found = muon_steps([start], [[g] for g in gradients], [shape[0]], dtype=dtype, **settings)[
            0
        ]
        assert relative(found - start, other.detach() - start) < 3e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_equal_the_definition(shape):
    """Nesterov's momentum, the quintic, sqrt(rows / cols) if tall, decoupled decay; in float64."""
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    lr, momentum, decay = 0.1, 0.9, 0.3
    found = muon_steps(
        [start], [[g] for g in gradients], [shape[0]], lr=lr, momentum=momentum, weight_decay=decay
    )[0]
    p, average = start.double(), torch.zeros(shape, dtype=torch.float64)
    for g in gradients:
        average = momentum * average + (1 - momentum) * g
        u, s, vt = torch.linalg.svd((1 - momentum) * g + momentum * average, full_matrices=False)
        s = s / (s**2).sum().sqrt()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        p = p * (1 - lr * decay) - lr * max(1, shape[0] / shape[1]) ** 0.5 * (u @ s.diag() @ vt)
    assert relative(found - start, p - start) < 1e-4


@pytest.mark.parametrize("parts", [[32, 16, 16], [64, 64], [8, 24, 40]], ids=str)
def test_fused_parts_equal_matrices_of_their_own(parts):
    """Each part of each matrix moves as if it were alone in an optimizer of its own."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    starts = [torch.randn(sum(parts), 32) for _ in range(3)]
    gradients = [[torch.randn(sum(parts), 32) * scale for scale in (1, 10, 0.1)] for _ in range(3)]
    found = muon_steps(starts, gradients, parts, **settings)
    for i, start in enumerate(starts):
        alone = [
            muon_steps(
                [part], [[step[i].split(parts)[j]] for step in gradients], [rows], **settings
            )[0]
            for j, (part, rows) in enumerate(zip(start.split(parts), parts))
        ]
        assert (found[i] - torch.cat(alone)).abs().max() < 1e-5
    whole = muon_steps(starts, gradients, [sum(parts)], **settings)
    assert relative(whole[0], found[0]) > 1e-2


@pytest.mark.parametrize("most", [1, 2 * 24 * 16])
def test_few_matrices_at_a_time_move_as_all_do(monkeypatch, most):
    """The memory that a step takes does not grow with the number of layers."""
    starts = [torch.randn(24, 16) for _ in range(5)]
    gradients = [[torch.randn(24, 16) for _ in range(5)] for _ in range(3)]
    together = muon_steps(starts, gradients, [24], lr=0.1)
    taken = []
    orthogonalize = gpt.orthogonalize
    monkeypatch.setattr(
        gpt, "orthogonalize", lambda G, dtype: (taken.append(len(G)), orthogonalize(G, dtype))[1]
    )
    monkeypatch.setattr(gpt, "MUON_AT_ONCE", most)
    found = muon_steps(starts, gradients, [24], lr=0.1)
    assert taken == ([1] * 5 if most == 1 else [2, 2, 1]) * 3
    for a, b in zip(together, found):
        assert (a - b).abs().max() < 1e-5


def test_a_step_by_hand():
    """A 1 by 1 matrix: one step moves it by the quintic's value at 1, times the rate."""
    found = muon_steps([torch.ones(1, 1)], [[torch.full((1, 1), -5.0)]], [1], lr=0.1)[0]
    s = 1.0
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert float(found) == pytest.approx(1 + 0.1 * s, abs=1e-5)


def test_momentum_is_saved_and_restored():
    """The buffer is the gradients' decaying mean, is in the state dict, and goes on from there."""
    start, gradients = torch.randn(6, 4), [torch.randn(6, 4) for _ in range(4)]

    def advance(p, optimizer, steps):
        for g in steps:
            p.grad = g.clone()
            optimizer.step()

    def fresh(value):
        p = torch.nn.Parameter(value.clone())
        return p, gpt.Muon([{"params": [p], "parts": [6]}], lr=0.1, momentum=0.9, weight_decay=0.1)

    p, optimizer = fresh(start)
    advance(p, optimizer, gradients[:2])
    state = optimizer.state_dict()
    expected = 0.1 * (0.9 * gradients[0] + gradients[1])
    assert torch.allclose(state["state"][0]["momentum_buffer"], expected, atol=1e-6)
    resumed, other = fresh(p.detach())
    other.load_state_dict(
        {"state": {0: {"momentum_buffer": expected.clone()}}, "param_groups": state["param_groups"]}
    )
    advance(p, optimizer, gradients[2:])
    advance(resumed, other, gradients[2:])
    assert torch.allclose(p, resumed, atol=1e-6)
    forgetful, another = fresh(start)
    advance(forgetful, another, gradients[:2])
    another.state.clear()
    advance(forgetful, another, gradients[2:])
    assert not torch.allclose(p, forgetful, atol=1e-2)


# ---- Which optimizer gets what ----
MACHINE = gpt.Machine(torch.device("cpu"), torch.float32)
LEARNED = {
    "bias": True,
    "use_rope": False,
    "use_rms_norm": False,
    "use_swiglu": False,
    "n_kv_head": 4,
}


def model_and_optimizers(**changes):
    """Return (model, optimizers) for 11 ids, by gpt.py's settings and changes of them."""
    chosen = gpt.checked_settings(**changes)
    model = gpt.GPT(gpt.model_config(chosen, vocab_size=11))
    return model, gpt.make_optimizers(model, chosen, MACHINE)


def named_groups(model, optimizers):
    """Return {parameter name: (optimizer, group)}; every parameter must be there exactly once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found
                found[names[id(p)]] = (optimizer, group)
    assert sorted(found) == sorted(names.values())
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", [{}, LEARNED], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer(settings, name, family, tied):
    """Muon takes the blocks' matrices; norms and biases do not decay; numbers are the settings'."""
    model, optimizers = model_and_optimizers(
        optimizer=name,
        tie_weights=tied,
        weight_decay=0.07,
        learning_rate=0.003,
        muon_lr=0.02,
        beta1=0.8,
        beta2=0.9,
        **family,
    )
    assert [type(o) for o in optimizers] == [torch.optim.AdamW] + [gpt.Muon] * (name == "muon")
    groups = named_groups(model, optimizers)
    matrices = {
        f"h.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    embeddings = {"wte.weight"} | ({"wpe.weight"} if family else set())
    embeddings |= set() if tied else {"lm_head.weight"}
    for parameter, (optimizer, group) in groups.items():
        by_muon = name == "muon" and parameter in matrices
        assert isinstance(optimizer, gpt.Muon) == by_muon, parameter
        assert group["weight_decay"] == (0.07 if parameter in matrices | embeddings else 0.0), (
            parameter
        )
        assert group["lr"] == group["initial_lr"] == (0.02 if by_muon else 0.003), parameter
        if not by_muon:
            assert group["betas"] == (0.8, 0.9)
    if name == "muon":
        kv = 32 if family else 16
        assert groups["h.0.attn.c_attn.weight"][1]["parts"] == [32, kv, kv]
        hidden = model.config.mlp_hidden
        assert groups["h.1.mlp.c_fc.weight"][1]["parts"] == (
            [hidden] if family else [hidden, hidden]
        )
        for matrix in matrices:
            group = groups[matrix][1]
            assert all(p.size(0) == sum(group["parts"]) for p in group["params"])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_adamw_steps_equal_the_definition(settings, name):
    """An embedding and a norm take AdamW's steps with decoupled decay, in float64."""
    model, optimizers = model_and_optimizers(
        optimizer=name, weight_decay=0.5, learning_rate=0.02, beta1=0.8, beta2=0.9
    )
    tensors = [(model.wte.weight, 0.5), (model.ln_f.weight, 0.0)]
    starts = [p.detach().double() for p, _ in tensors]
    expected, means, squares = list(starts), [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for i, (p, decay) in enumerate(tensors):
            g = p.grad.double()
            means[i] = 0.8 * means[i] + 0.2 * g
            squares[i] = 0.9 * squares[i] + 0.1 * g**2
            mean, square = means[i] / (1 - 0.8**step), squares[i] / (1 - 0.9**step)
            expected[i] = expected[i] * (1 - 0.02 * decay) - 0.02 * mean / (square.sqrt() + 1e-8)
        for optimizer in optimizers:
            optimizer.step()
    for (p, _), value in zip(tensors, expected):
        assert torch.allclose(p.detach().double(), value, atol=1e-6)


@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
def test_learning_rates_are_set_in_proportion_to_their_peaks(settings, monkeypatch, as_tensors):
    """Also as tensors, as a GPU's recorded step needs them, which must stay where they are."""
    if as_tensors:
        monkeypatch.setattr(gpt, "as_rate", lambda lr, machine: torch.tensor(lr))
    _, optimizers = model_and_optimizers(learning_rate=0.003, muon_lr=0.02)
    groups = [group for o in optimizers for group in o.param_groups]
    before = [group["lr"] for group in groups]
    for scale in (0.5, 0.0, 1.0):
        gpt.set_learning_rates(optimizers, scale)
        for o, peak in zip(optimizers, (0.003, 0.02), strict=True):
            for group in o.param_groups:
                assert float(group["lr"]) == pytest.approx(peak * scale, rel=1e-6)
    if as_tensors:
        assert all(group["lr"] is lr for group, lr in zip(groups, before, strict=True))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_rates_as_tensors_give_the_steps_of_plain_numbers(settings, monkeypatch, name):
    """Four steps of a falling rate, in both forms."""
    weights = []
    for as_tensors in (False, True):
        if as_tensors:
            monkeypatch.setattr(gpt, "as_rate", lambda lr, machine: torch.tensor(lr))
        torch.manual_seed(0)
        model, optimizers = model_and_optimizers(optimizer=name, weight_decay=0.1)
        for step in range(4):
            gpt.set_learning_rates(optimizers, 1 / (1 + step))
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            for o in optimizers:
                o.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (weights[1] - weights[0]).norm() < 1e-5 * weights[0].norm()


def test_a_step_lowers_the_loss(settings):
    """Twenty steps of Muon and AdamW fit one batch far below the first loss."""
    model, optimizers = model_and_optimizers(learning_rate=0.01, muon_lr=0.05)
    ids = torch.randint(11, (4, 17))
    losses = []
    for _ in range(20):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
