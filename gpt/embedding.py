"""A table of vectors whose gradient is added up in one order, compiled or not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """nn.Embedding whose gradient is always PyTorch's operator.

    That operator has no atomic additions: on a GPU it sorts the ids and adds equal ones in the
    order of their positions, on a CPU each thread has rows of its own. Inductor would replace it by
    atomic additions, on a GPU and on a CPU with several threads, whose order and sum differ from
    run to run.
    """

    def forward(self, idx: Tensor) -> Tensor:
        return Lookup.apply(idx, self.weight)


class Lookup(torch.autograd.Function):
    """The rows of weight (V, C) for ids (...): (..., C). Has no second derivative."""

    @staticmethod
    def forward(ctx, idx: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.rows = len(weight)
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor]:
        (idx,) = ctx.saved_tensors
        return None, embedding_backward(dy, idx, ctx.rows)


@torch.library.custom_op("ridge::embedding_backward", mutates_args=())
def embedding_backward(dy: Tensor, idx: Tensor, rows: int) -> Tensor:
    """For each id below `rows` the sum of dy (..., C) where idx (...) is that id: (rows, C)."""
    return torch.ops.aten.embedding_dense_backward(dy, idx, rows, -1, False)


@embedding_backward.register_fake
def _embedding_gradient(dy, idx, rows):
    return dy.new_empty(rows, dy.shape[-1])
