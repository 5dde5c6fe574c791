"""scaling.py: when one GPU is not enough: DDP, FSDP2, smaller micro-batches, and the plan of a run.

torchrun --standalone --nproc_per_node=8 gpt.py config/train_1b.py --fsdp=True
python gpt.py config/train_1b.py --dry_run=True          memory, time and FLOPs of a run
python scaling.py                                        from which size on to use FSDP: README's table
"""

import gc
import math
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map


def join_processes(machine):
    """Join torchrun's other processes; also when it has started all of them again."""
    store = next(dist.rendezvous("env://"))[0]
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):  # it still holds the ended ones' addresses
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if machine.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=machine.rank, world_size=machine.world_size)
    machine.reduce, machine.first, machine.leave = reduce, call_first, leave
    machine.divide, machine.prepare = (
        partial(divide, machine.world_size),
        partial(distributed, machine),
    )
    machine.gather = gather if machine.sharded else machine.gather


def leave():
    gc.collect()  # DDP's reference cycles hold gloo's threads, which would abort the process at its end
    dist.destroy_process_group()


def reduce(values, op):
    values = torch.tensor([float(v) for v in values], dtype=torch.float64)
    dist.all_reduce(values, getattr(dist.ReduceOp, op))
    return values.tolist()


def call_first(function, *arguments):
    found = [function(*arguments) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def divide(world_size, n_micro, rows):
    """Return a process's part of a step of n_micro micro-batches of `rows`: its own such numbers."""
    mine = math.ceil(n_micro / world_size)
    rows, odd = divmod(rows * n_micro, n := world_size * mine)
    if odd:
        raise ValueError(
            f"{world_size} processes: {n} must divide batch_size * gradient_accumulation_steps"
        )
    return mine, rows


# ---- Several processes: DDP, or FSDP2, by which each holds a share of weights, gradients, averages ---------
def distributed(machine, model):
    """Return what is called to train the model on all processes, which average its gradients."""
    if machine.sharded:
        return fully_sharded(model, machine)
    forward = DistributedDataParallel(model.to(machine.device), gradient_as_bucket_view=True)
    forward.broadcast_buffers = (
        False  # none changes, and a process that repeats a forward must not wait
    )
    return forward


def fully_sharded(model, machine):
    """Return the model, sharded in place. A block's weights are gathered, in the machine's dtype, only while
    it is at work; gradients are averaged in float32. Raises ValueError."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if machine.dtype == torch.float16:
        raise ValueError(
            "dtype is float16, whose scaling does not go with fsdp: use bfloat16 or float32"
        )
    mesh = dist.init_device_mesh(machine.device.type, (machine.world_size,))
    policy = MixedPrecisionPolicy(machine.dtype, torch.float32, cast_forward_inputs=False)
    for part in (*model.h, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def shard(tensor, param):
    """Return this process's share of a whole tensor as it has one of param; of another shape, the tensor."""
    from torch.distributed.tensor import distribute_tensor

    if tensor.shape != param.shape:
        return tensor
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def gather(state):
    """Return a nested state with whole tensors, on the CPU of the first process. All processes call it."""

    def whole(value):  # one at a time
        if not hasattr(value, "full_tensor"):
            return value
        value = value.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None

    return tree_map(whole, state)


# ---- Memory ------------------------------------------------------------------------------------------------
def memory(model, rows, machine, optimizer, n_micro=1, **changes):
    """Return the bytes that a process takes: for weights, gradients, averages; and, about, for activations.

    Weights and gradients are float32, 4 bytes a parameter each, so are AdamW's two averages, and Muon's one,
    of the blocks' matrices. The activations are what the backward pass of `rows` sequences needs, 2 bytes a
    number, 4 in float32: the residual stream, what goes into and comes out of each matrix; then the head's
    gradient, and some logits at a time (see HeadLoss), 16 bytes each; compiled it is less. With
    gradient_checkpointing only the stream stays, and what one block adds. FSDP divides all but activations by
    the processes, gradients only if a step is one micro-batch. With several, DDP holds the gradients twice.
    Not counted: Muon under FSDP gathers the matrices of one kind of all blocks. changes: of model.config.
    """
    c, size = replace(model.config, **changes), 4 if machine.dtype == torch.float32 else 2
    state = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
    if optimizer == "muon":
        state -= 4 * sum(p.numel() for p in model.h.parameters() if p.ndim == 2)
    block = 12 * c.n_embd + 4 * c.n_kv_head * c.head_dim + (4 if c.use_swiglu else 2) * c.mlp_hidden
    blocks = c.n_layer * c.n_embd + block if c.gradient_checkpointing else c.n_layer * block
    gradients = (
        4 * sum(p.numel() for p in model.parameters() if p.requires_grad) if n_micro > 1 else 0
    )
    if machine.sharded:
        state = (state - gradients) / machine.world_size + gradients
    elif machine.world_size > 1:
        state += gradients
    logits = min(
        rows * c.block_size * c.vocab_size, 2**27 if machine.device.type == "cuda" else 2**25
    )
    head = 4 * c.vocab_size * c.n_embd + 16 * logits
    return state, rows * c.block_size * size * (blocks + 2 * c.n_embd) + head


def spelled(size):
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def cut(batches, model, forward, machine, optimizer):
    """Return a step's micro-batches, for which memory was short, cut in two or the fewest equal parts.

    Raises ValueError where that does not help: at one sequence, or while other processes wait for this one's
    gradients, as they do in the step's last micro-batch.
    """
    model.zero_grad(set_to_none=True)
    if machine.device.type != "cpu":
        getattr(torch, machine.device.type).empty_cache()
    rows = len(batches[0][0])
    waiting = machine.world_size > 1 and (machine.sharded or forward.require_backward_grad_sync)
    if rows == 1 or waiting:
        raise ValueError(out_of_memory(model, machine, rows, optimizer, len(batches)))
    parts = next(n for n in range(2, rows + 1) if rows % n == 0)
    print(
        f"memory is full: from here on a step has {len(batches) * parts} micro-batches of {rows // parts}"
    )
    return [part for batch in batches for part in zip(*(tensor.chunk(parts) for tensor in batch))]


def out_of_memory(model, machine, rows, optimizer, n_micro=1):
    """Return the sentence for a user whose memory is full with micro-batches of `rows` sequences."""
    config, n = model.config, max(machine.world_size, 2)
    state, activations = memory(model, rows, machine, optimizer, n_micro)
    shared = SimpleNamespace(world_size=n, sharded=True, dtype=machine.dtype, device=machine.device)

    def spared(**changes):
        return activations - memory(model, rows, machine, optimizer, **changes)[1]

    ways = []
    if rows > 1:
        ways.append(
            f"half the batch_size, twice the gradient_accumulation_steps {spelled(activations / 2)}"
        )
    if not config.gradient_checkpointing:
        ways.append(f"--gradient_checkpointing=True {spelled(spared(gradient_checkpointing=True))}")
    if config.block_size > 1:
        half = config.block_size // 2
        ways.append(f"--block_size={half} {spelled(spared(block_size=half))}")
    if not machine.sharded:
        share = memory(model, rows, shared, optimizer, n_micro)[0]
        ways.append(f"--fsdp=True on {n} GPUs {spelled(state - share)}")
    return (
        f"memory is full with micro-batches of {rows} x {config.block_size} tokens: weights, gradients and "
        f"averages take {spelled(state)}, activations about {spelled(activations)}; savings, about: "
        + ", ".join(ways)
    )


# ---- The plan of a run -------------------------------------------------------------------------------------
def timed_steps(gpt, data, machine, model, forward, optimizers, scaler):
    """Return the seconds of each of three training steps, after some that do not count."""
    n_micro, rows = machine.divide(gpt.gradient_accumulation_steps, gpt.batch_size)
    backward, update = gpt.make_step(model, forward, optimizers, scaler, machine, n_micro)
    warm, seconds = 4 if machine.device.type == "cuda" else 2, []
    for step in range(warm + 3):
        if machine.stopping():
            raise KeyboardInterrupt
        began = time.time()
        first = (step * machine.world_size + machine.rank) * n_micro
        batches = [data.get_batch("train", i, rows) for i in range(first, first + n_micro)]
        if step == 1 and machine.compile:
            gpt.compile_model(model, machine, batches[0])
        weight = sum(batch[2].sum() for batch in batches)
        if gpt.accumulate(backward, forward, batches, step, weight, machine) is None:
            raise ValueError(out_of_memory(model, machine, rows, gpt.optimizer))
        norm = update(0.0, 0.0)
        float(norm)  # waits for the GPU
        seconds.append(time.time() - began)
    return seconds[warm:]


def dry_run(gpt, machine):
    """Print what a run would be, its time by three steps; write nothing; return the figures."""
    with tempfile.TemporaryDirectory() as made:
        known = gpt.data_dir
        missing = not (Path(known or gpt.HERE / "data") / gpt.dataset / "meta.json").exists()
        if missing and gpt.dataset in ("shakespeare", "pydoc"):  # what gpt.py prepares by itself
            gpt.data_dir = made
        try:
            data = gpt.Data(machine.first(gpt.prepare_if_missing, gpt.dataset), gpt.block_size)
        finally:
            gpt.data_dir = known
        out = Path(gpt.out_dir or gpt.HERE / "out" / data.folder.name)
        model, forward, optimizers, scaler = gpt.build(data, machine, None, out)
        if machine.rank == 0:
            print(gpt.describe(machine, data, model, out, 0))
        seconds = sum(timed_steps(gpt, data, machine, model, forward, optimizers, scaler)) / 3
    n_micro, rows = machine.divide(gpt.gradient_accumulation_steps, gpt.batch_size)
    tokens = n_micro * rows * machine.world_size * gpt.block_size
    steps = int(60 * gpt.max_minutes / seconds) if gpt.max_minutes else gpt.max_iters
    epochs = steps * tokens / (len(data.starts["train"]) * gpt.block_size)
    flops = steps * tokens * model.flops_per_token()
    state, activations = memory(model, rows, machine, gpt.optimizer, n_micro)
    if machine.rank == 0:
        print(f"""\
memory   {spelled(state)} for weights, gradients and averages, about {spelled(activations)} for activations
         of each process, which takes {n_micro} x {rows} x {gpt.block_size} tokens a step
step     {seconds:.3g} s, {tokens / seconds:,.0f} tokens/s
in all   {steps:,} steps in {steps * seconds / 60:,.1f} minutes, {epochs:,.1f} epochs, {flops:.1e} FLOPs
         a dry run: nothing was written""")
    return {
        "step": 0,
        "steps": steps,
        "tokens_per_step": tokens,
        "seconds_per_step": seconds,
        "flops": flops,
    }


# ---- From which size on to shard ---------------------------------------------------------------------------
def main():
    import configurator
    import gpt

    on_gpu = {"device_type": "cuda", "native_bfloat16": True}
    defaults = {name: getattr(gpt, name) for name in gpt.SETTINGS}
    print("| config | parameters | one GPU, or each by DDP | each of 2 by FSDP | of 4 | of 8 |")
    print("|---|---|---|---|---|---|")
    for name in ("train_gpt2", "train_large", "gpt2_large", "train_1b", "gpt2_xl"):
        words = ["config/train_gpt2.py"] * name.startswith("gpt2") + [f"config/{name}.py"]
        vars(gpt).update(defaults)
        configurator.configure(vars(gpt), words, derive=lambda: on_gpu)
        with torch.device("meta"):
            model = gpt.GPT(gpt.model_config(50257))
        known = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
        machines = [SimpleNamespace(world_size=n, sharded=n > 1, **known) for n in (1, 2, 4, 8)]
        sizes = [spelled(memory(model, 1, machine, "adamw")[0]) for machine in machines]
        print(f"| `{name}.py` | {model.n_params() / 1e6:,.0f}M | {' | '.join(sizes)} |")


if __name__ == "__main__":
    main()
