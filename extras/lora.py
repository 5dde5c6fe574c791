"""lora.py: finetune small matrices beside a model's frozen ones (LoRA, arXiv:2106.09685).

gpt.py uses it if --lora_rank is above 0. A layer's output becomes W x + 2 B A x. A (rank, columns)
is drawn at random and B (rows, rank) starts at zero, so that training begins with the old model.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LoRA(nn.Module):
    """The term added to a linear layer's output: scale * B A x, with scale = alpha / rank = 2."""

    scale = 2.0

    def __init__(self, linear, rank):
        super().__init__()
        columns = linear.in_features
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.A = nn.Parameter(torch.randn(rank, columns, **like) / math.sqrt(columns))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))

    def forward(self, x):
        return F.linear(F.linear(x, self.A), self.B) * self.scale


class LinearWithLoRA(nn.Linear):
    """A linear layer with another one's frozen weight and bias, and LoRA's matrices beside them."""

    def __init__(self, linear, rank):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora = LoRA(linear, rank)

    def forward(self, x):
        return super().forward(x) + self.lora(x)


def add_lora(model, rank):
    """Freeze a GPT and add LoRA of this rank to all linear layers of its blocks, in place."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.startswith("h.") and type(module) is nn.Linear:
            model.set_submodule(name, LinearWithLoRA(module, rank))


@torch.no_grad()
def merge_lora(model):
    """Merge LoRA's matrices into the weights and make the layers plain again, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LinearWithLoRA):
            with_bias = module.bias is not None
            plain = nn.Linear(
                module.in_features, module.out_features, bias=with_bias, device="meta"
            )
            change = module.lora.scale * module.lora.B @ module.lora.A
            plain.weight = nn.Parameter(module.weight + change)
            plain.bias = module.bias
            model.set_submodule(name, plain)
    model.requires_grad_(True)
