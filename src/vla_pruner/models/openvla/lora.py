"""LoRA on the decoder's matrices (Hu et al., 2021): trained apart, merged into them to act."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Merged(torch.autograd.Function):
    """`x @ (weight + b @ a).T` whose backward pass never makes the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        merged = torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype))
        x = x.to(weight.dtype)
        ctx.save_for_backward(x, merged, a, b)
        return F.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, merged, a, b = ctx.saved_tensors
        grad = grad.to(merged.dtype)
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        to_a = (rows @ b.to(rows.dtype)).t() @ inputs
        to_b = rows.t() @ (inputs @ a.to(rows.dtype).t())
        return grad @ merged, None, to_a.to(a.dtype), to_b.to(b.dtype)


class LoRALinear(nn.Module):
    """A frozen matrix [out, in] and its low-rank change `scale * b @ a`, `a` [r, in], `b` [out, r].

    At the start `b` is 0.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.scale = change_scale(weight)
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return _Merged.apply(x, self.weight, self.a, self.scale * self.b)


def change_scale(weight: Tensor) -> float:
    """Size of a matrix's entries times sqrt(in).

    One learning rate then changes every matrix by the same share of itself.
    """
    return float(weight.float().square().mean().sqrt()) * weight.shape[1] ** 0.5


def add_lora(decoder: nn.Module, rank: int) -> None:
    """Freeze `decoder` and put a `LoRALinear` in the place of every matrix of its layers."""
    decoder.requires_grad_(False)
    for owner, name, linear in list(_linears(decoder)):
        setattr(owner, name, LoRALinear(linear.weight, rank))


def _linears(decoder: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for owner in decoder.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                yield owner, name, child
