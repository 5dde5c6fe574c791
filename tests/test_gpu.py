"""What only a CUDA GPU can show: graphs, compiled or not, do what plain calls do."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import new_trainer
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpt
import sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


# ---- Training ----
def new_gpu_trainer(**changes):
    """Return a Trainer on the GPU that has warmed up, and compiled if it shall."""
    trainer = new_trainer(device="cuda", learning_rate=0.03, muon_lr=0.1, **changes)
    trainer.get_ready()
    return trainer


def step_and_norm(trainer, step, spoil=False):
    """Take one step; return its loss and the norm of its gradient. spoil: by a weight of NaN."""
    row = step * trainer.rows_per_step
    if spoil:
        batch = trainer.read_rows(row)
        batch[2][0, 0] = torch.nan
        trainer.read_ahead = {row: batch}
    gpt.set_learning_rates(trainer.optimizers, 1 / (1 + step))
    loss = trainer.gradients(row)
    return float(loss), trainer.update()["grad_norm"]


def run_of_twelve_steps(**changes):
    """Return loss and gradient norm of 12 steps with dropout, and the weights after them.

    In between, the model is evaluated and generates, as in a run.
    """
    trainer = new_gpu_trainer(dropout=0.2, **changes)
    found = []
    for step in range(12):
        found.append(step_and_norm(trainer, step))
        if step == 6:
            gpt.evaluate(trainer.model, trainer.data, trainer.machine, 2, 4)
            gpt.print_sample(trainer, gpt.checked_settings(sample_tokens=5))
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    return found, weights, trainer


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_steps_are_the_plain_ones(settings, dtype, compiled, optimizer):
    """Batches, dropout, learning rates and clipping differ in each step, though all are replays."""
    values = {"dtype": dtype, "compile": compiled, "optimizer": optimizer}
    plain, weights, trainer = run_of_twelve_steps(cuda_graphs=False, **values)
    assert not trainer.first_backward.enabled and not trainer.take_steps.enabled
    recorded, others, trainer = run_of_twelve_steps(cuda_graphs=True, **values)
    taken = sum(math.isfinite(norm) for _, norm in recorded)
    assert trainer.first_backward.calls == 12 and trainer.take_steps.calls == taken
    assert trainer.first_backward.graph is not None and trainer.take_steps.graph is not None
    tolerance = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-3}[dtype]
    for (loss, norm), (other, other_norm) in zip(plain, recorded, strict=True):
        assert loss == pytest.approx(other, rel=tolerance)
        assert norm == pytest.approx(other_norm, rel=10 * tolerance, nan_ok=True)
    assert plain[-1][0] < 0.9 * plain[0][0]
    for a, b in zip(weights, others, strict=True):
        assert (a - b).norm() <= 30 * tolerance * a.norm() + 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_recorded_step_with_a_gradient_that_is_not_finite_changes_nothing(settings, dtype):
    """And the next one goes on, with half the loss scale if the dtype has one."""
    trainer = new_gpu_trainer(dtype=dtype, compile=False)
    for step in range(8):
        before = [p.detach().clone() for p in trainer.model.parameters()]
        scale = trainer.scaler.get_scale()
        _, norm = step_and_norm(trainer, step, spoil=step == 5)
        pairs = zip(before, trainer.model.parameters(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        assert same == (not math.isfinite(norm))
        if step == 5:
            assert same
            assert dtype == "float32" or trainer.scaler.get_scale() == scale / 2
    assert math.isfinite(norm)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_python_waits_for_the_gpu_once_a_step(settings, compiled, graphs):
    """It reads the gradient's norm; the rest it hands out. The first steps set up and record."""
    trainer = new_gpu_trainer(compile=compiled, cuda_graphs=graphs)
    for step in range(6):
        row = step * trainer.rows_per_step
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        try:
            gpt.set_learning_rates(trainer.optimizers, 1 / (1 + step))
            trainer.gradients(row)
            torch.cuda.set_sync_debug_mode("default")
            trainer.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_micro_batches_that_do_not_fit_are_made_smaller(settings, monkeypatch):
    """Until one fits; the step's rows stay, and so does its loss."""
    small = new_trainer(device="cuda", dtype="float32", batch_size=8, compile=False)
    backward = small.backward

    def full_above_two_rows(x, *others):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(x, *others)

    monkeypatch.setattr(small, "backward", full_above_two_rows)
    small.warm_up()
    assert small.micro_rows == 2
    assert not small.first_backward.enabled
    large = new_trainer(device="cuda", dtype="float32", batch_size=8, compile=False)
    for step in range(3):
        (loss, norm), (other, other_norm) = (step_and_norm(t, step) for t in (small, large))
        assert loss == pytest.approx(other, rel=1e-3)
        assert norm == pytest.approx(other_norm, rel=1e-3)


# ---- Generation ----
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
def test_recorded_generation_gives_the_same_ids(compiled, options):
    """Also where the cache is full and refilled, for unequal prompts, and by the same draws."""
    model, prompts = small_model(), [[1, 2, 3], [4, 5, 6, 7, 8]]
    if compiled:
        options = options | {"forward": sample.compiled(model, cuda_graphs=True)}

    def ids(graphs):
        draws = torch.Generator("cuda").manual_seed(3)
        found = model.generate(prompts, 70, cuda_graphs=graphs, generator=draws, **options)
        return torch.stack(list(found)).tolist()

    replayed = ids(True)
    assert replayed == ids(True) == ids(False)
    assert len({tuple(row) for row in replayed}) > 10


def test_a_sampler_of_ones_own_is_not_recorded():
    model = small_model()
    seen = []

    def pick(logits):
        seen.append(int(logits.argmax(-1)))
        return logits.argmax(-1)

    found = [int(i) for i in model.generate([[1, 2]], 20, pick=pick)]
    assert found == seen == [int(i) for i in model.generate([[1, 2]], 20, temperature=0)]


# ---- Loss and attention ----
@pytest.mark.parametrize("n_parts", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [50, 64, 50257])
def test_losses_with_a_padded_head_are_near_those_in_float64(
    monkeypatch, size, dtype, compiled, n_parts
):
    torch.manual_seed(0)
    monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", {"cuda": math.ceil(64 * size / n_parts)})
    x = torch.randn(64, 32, device="cuda").to(dtype).requires_grad_()
    head = torch.randn(size, 32, device="cuda", requires_grad=True)
    y, w = torch.randint(size, (64,), device="cuda"), torch.rand(64, device="cuda")
    torch._dynamo.reset()
    config = gpt.GPTConfig(train_temperature=0.8)
    loss_of = gpt.summed_loss
    if compiled:
        loss_of = torch.compile(loss_of, dynamic=False, fullgraph=True)
    loss = loss_of(x, head, y, w, config, True)
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (x, head)]
    losses = F.cross_entropy(exact[0] @ exact[1].T / 0.8, y, reduction="none")
    expected = (losses * w).sum()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    for mine, other in zip((x, head), exact, strict=True):
        assert mine.grad.dtype == mine.dtype
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
    q = torch.randn(2, length, n_head, d, device="cuda", dtype=dtype)
    q = q.transpose(1, 2).requires_grad_()
    shape = 2, n_kv_head, 300 if cached else length, d
    k, v = (torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in "kv")
    mask = torch.ones(length, k.size(2), device="cuda", dtype=torch.bool).tril(20 if cached else 0)
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fast):  # the slow one would raise
        y = gpt.attend(q, k, v, mask.expand(2, 1, -1, -1) if cached else None)
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


@pytest.mark.parametrize("added", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_of_ones_own_are_obeyed(dtype, heads, added):
    """Of all heads or each, as True and False or as what is added to the scores."""
    torch.manual_seed(0)
    q = torch.randn(2, 8, 40, 64, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 2, 2, 56, 64, device="cuda", dtype=dtype)
    mask = torch.rand(2, heads, 40, 56, device="cuda") < 0.5
    mask[..., 0] = True
    scores = q.double() @ k.double().repeat_interleave(4, 1).mT / 8
    if added:
        mask = torch.randn(mask.shape, device="cuda").masked_fill(~mask, -math.inf)
        scores = scores + mask
    else:
        scores = scores.masked_fill(~mask, -math.inf)
    expected = scores.softmax(-1) @ v.double().repeat_interleave(4, 1)
    y = gpt.attend(q, k, v, mask)
    assert y.dtype == dtype
    assert (y - expected).norm() < 2e-2 * expected.norm()
