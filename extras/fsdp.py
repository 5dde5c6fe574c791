"""fsdp.py: shard a model over several GPUs by PyTorch's FSDP2, for models that one GPU cannot hold.

    torchrun --standalone --nproc_per_node=8 gpt.py config/train_1b.py --fsdp=True

Each process holds its share of the weights, the gradients and the optimizer state. A block's weights
are gathered only while it is at work. Checkpoints hold whole tensors, so any run resumes any other's.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._pytree import tree_map


def shard_model(model, device, dtype, world_size):
    """Shard a GPT in place: each block apart, and the rest as one.

    Matrices multiply in dtype; gradients are averaged in float32. Raises ValueError for float16,
    whose loss scaling FSDP does not share between processes.
    """
    if dtype == torch.float16:
        raise ValueError("dtype is float16, which does not go with fsdp: use bfloat16 or float32")
    mesh = dist.init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for part in (*model.h, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def shard_like(tensor, param):
    """Return this process's share of a whole tensor, cut as param is; of another shape, the tensor."""
    if tensor.shape != param.shape:
        return tensor
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def gather(state):
    """Return a nested state with whole tensors, on the CPU of the first process; all must call it."""

    def whole(value):  # one at a time, to spare memory
        if not hasattr(value, "full_tensor"):
            return value
        value = value.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None

    return tree_map(whole, state)
