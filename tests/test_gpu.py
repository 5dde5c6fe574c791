"""What only a CUDA GPU can show: graphs, compiled or not, do what plain calls do. Skipped where there is none."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpt
import sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def prepared(settings, **values):
    """Return the data, model, machine and a step's parts, as gpt.py makes them from the settings."""
    settings(device="cuda", **values)
    machine = gpt.set_up_machine()
    data = gpt.Data(gpt.prepare_if_missing("toy"), gpt.block_size)
    model, forward, optimizers, scaler = gpt.build(data, machine, None)
    return (
        data,
        model,
        machine,
        forward,
        *gpt.make_step(model, forward, optimizers, scaler, machine, 1),
    )


def losses_of_a_run(settings, monkeypatch, graphs, **values):
    """Return loss and gradient norm of 12 steps with dropout, and the weights after them."""
    found = []
    with monkeypatch.context() as patch:
        if not graphs:
            patch.setattr(gpt.Replay, "__call__", lambda self, *inputs: self.function(*inputs))
        data, model, machine, forward, backward, update = prepared(settings, dropout=0.2, **values)
        for step in range(12):
            batch = data.get_batch("train", step, gpt.batch_size)
            if step == 0 and machine.compile:
                gpt.compile_model(model, machine, batch)
            loss = gpt.accumulate(backward, forward, [batch], step, batch[2].sum(), machine)
            found.append((float(loss), float(update(0.03 / (1 + step), 0.1 / (1 + step)))))
    assert not graphs or (backward.calls == update.calls == 12 and hasattr(update, "result"))
    return found, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_steps_are_the_plain_ones(settings, monkeypatch, dtype, compiled, optimizer):
    """Batches, dropout, rates and the clipping go on from step to step although nothing but replays happens."""
    values = {"dtype": dtype, "compile": compiled, "optimizer": optimizer}
    plain, weights = losses_of_a_run(settings, monkeypatch, False, **values)
    replayed, others = losses_of_a_run(settings, monkeypatch, True, **values)
    tolerance = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-3}[dtype]
    for (loss, norm), (other, other_norm) in zip(plain, replayed, strict=True):
        assert loss == pytest.approx(other, rel=tolerance) and norm == pytest.approx(
            other_norm, rel=10 * tolerance
        )
    assert plain[-1][0] < 0.9 * plain[0][0]
    for a, b in zip(weights, others, strict=True):
        assert (a - b).norm() <= 30 * tolerance * a.norm() + 1e-6


def test_a_recorded_step_with_a_gradient_that_is_not_finite_changes_nothing(settings):
    data, model, _, _, backward, update = prepared(settings, dtype="float32", compile=False)
    for step in range(6):
        batch = data.get_batch("train", step, 4)
        before = [p.detach().clone() for p in model.parameters()]
        if step == 4:
            batch[2][:] = torch.nan
        backward(*batch, 1.0)
        norm = update(0.01, 0.01)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert (same, bool(norm.isfinite())) == (step == 4, step != 4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_no_step_waits_for_the_gpu(settings, monkeypatch, compiled, graphs):
    """Python hands out a step's work and goes on; only the first steps, which set up and record, may wait."""
    monkeypatch.setattr(gpt, "cuda_graphs", graphs)
    data, model, machine, forward, backward, update = prepared(settings, compile=compiled)
    for step in range(6):
        batch = data.get_batch("train", step, gpt.batch_size)
        if step == 0 and compiled:
            gpt.compile_model(model, machine, batch)
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        try:
            gpt.accumulate(backward, forward, [batch], step, batch[2].sum(), machine)
            update(0.01, 0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {
        "block_size": 32,
        "vocab_size": 50,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 64,
    }
    model = gpt.GPT(gpt.GPTConfig(**sizes, tie_weights=False)).eval()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return sample.speed_up_rows(model.to("cuda", dtype))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 5}])
def test_recorded_generation_gives_the_same_ids(monkeypatch, compiled, options):
    """Also where the cache is full and refilled, for prompts of unequal lengths, and by the same draws."""
    model, prompts = small_model(), [[1, 2, 3], [4, 5, 6, 7, 8]]
    forward = torch.compile(model.forward, **sample.COMPILE) if compiled else None

    def ids():
        draws = torch.Generator("cuda").manual_seed(3)
        found = list(model.generate(prompts, 70, forward=forward, generator=draws, **options))
        return torch.stack(found).tolist()

    replayed = ids()
    again = ids()
    monkeypatch.setattr(gpt.Replay, "__call__", lambda self, *inputs: self.function(*inputs))
    assert replayed == again == ids()
    assert len({tuple(row) for row in replayed}) > 10


def test_a_sampler_of_ones_own_is_not_recorded():
    model = small_model()
    seen = []

    def pick(logits):
        seen.append(int(logits.argmax(-1)))
        return logits.argmax(-1)

    found = [int(i) for i in model.generate([[1, 2]], 20, pick=pick)]
    assert found == seen == [int(i) for i in model.generate([[1, 2]], 20, temperature=0)]


@pytest.mark.parametrize("size", [50, 64, 50257])
def test_losses_with_a_padded_head_are_near_those_in_float64(size):
    torch.manual_seed(0)
    x = torch.randn(64, 32, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(size, 32, device="cuda", requires_grad=True)
    y, w = torch.randint(size, (64,), device="cuda"), torch.rand(64, device="cuda")
    loss = gpt.HeadLoss.apply(x, weight, y, w, True, 2**20)
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = (
        torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, y, reduction="none") * w
    ).sum()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-2)
    for mine, other in zip((x, weight), exact, strict=True):
        assert (mine.grad - other.grad).norm() < 2e-2 * other.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize(("n_head", "n_kv_head", "d"), [(8, 2, 64), (4, 1, 32), (16, 4, 128)])
def test_groups_of_heads_attend_as_the_explicit_formula_says(
    dtype, cached, length, n_head, n_kv_head, d
):
    """Whichever kernel is taken for the dtype, with a mask and without; without, backwards, too."""
    torch.manual_seed(0)
    q = (
        torch.randn(2, length, n_head, d, device="cuda", dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
    )
    shape = 2, n_kv_head, 300 if cached else length, d
    k, v = (torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in "kv")
    mask = torch.ones(length, k.size(2), device="cuda", dtype=torch.bool).tril(20 if cached else 0)
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fast):  # the slow one would raise
        y = gpt.attention(q, k, v, mask.expand(2, 1, -1, -1) if cached else None)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wide = [t.repeat_interleave(n_head // n_kv_head, 1) for t in exact[1:]]
    scores = (exact[0] @ wide[0].mT * d**-0.5).masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1) @ wide[1]
    tolerance = 1e-2 if dtype == torch.float32 else 2e-2  # float32 may be TF32
    assert (y - expected).norm() < tolerance * expected.norm()
    if not cached:  # as training is
        y.float().square().sum().backward()
        expected.square().sum().backward()
        for mine, other in zip((q, k, v), exact, strict=True):
            assert (mine.grad - other.grad).norm() < 2 * tolerance * other.grad.norm() + 1e-3
