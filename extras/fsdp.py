"""fsdp.py: shard a model over several GPUs with PyTorch's FSDP2, if one GPU cannot hold it.

    torchrun --standalone --nproc_per_node=8 gpt.py config/train_1b.py --fsdp=True

Each process holds its share of the weights, the gradients and the optimizer state. A block's
weights are gathered only while it computes. Checkpoints hold whole tensors, so that they can be
resumed with or without FSDP and with any number of processes.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._pytree import tree_map


def shard_model(model, device, dtype, world_size):
    """Shard a GPT in place: each block by itself, and the rest as one unit.

    Matrix products use dtype; gradients are averaged in float32. Raises ValueError for float16,
    whose loss scaling FSDP does not share between processes.
    """
    if dtype == torch.float16:
        raise ValueError("dtype is float16, which fsdp does not support: use bfloat16 or float32")
    mesh = dist.init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for part in (*model.h, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def shard_like(tensor, param):
    """Return this process's share of a tensor, cut like param, or all of it if shapes differ."""
    if tensor.shape != param.shape:
        return tensor
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def gather(state):
    """Return a state with whole tensors on the first process's CPU; all processes call this."""

    def whole(value):  # gathers one tensor at a time, to save memory
        if not hasattr(value, "full_tensor"):
            return value
        value = value.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None

    return tree_map(whole, state)
