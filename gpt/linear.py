"""A linear layer that reads its matrix at memory speed when a CPU decodes one text."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear with a faster product of one row, the input that each new token gives.

    Such a product takes as long as reading the matrix. Two cores of an EPYC read 32 GB/s from
    memory. In fp32 MKL reads 12.5 GB/s, on one core; 22 in a batch of products, on both. In bf16
    oneDNN reads 15 GB/s and PyTorch's own product, used when oneDNN is off, 30. Other CPUs and
    dtypes were not measured and use nn.Linear's product.

    `packed`: how many matrices the weight holds, one below the other.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, packed: int = 1):
        super().__init__(in_features, out_features, bias)
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        one_row = x.numel() == self.in_features == x.shape[-1]
        if not one_row or torch.is_grad_enabled() or not self._measured(x):
            return super().forward(x)
        if x.dtype == torch.float32:
            y = row_times(x.reshape(1, -1), self.weight).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        onednn = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # typed as its descriptor
        try:
            return super().forward(x)
        finally:
            torch.backends.mkldnn.enabled = onednn

    def _measured(self, x: Tensor) -> bool:
        """Whether row and matrix are both fp32 or both bf16, on an x86 CPU with MKL."""
        return (x.device.type == "cpu" and torch.backends.mkl.is_available()
                and x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
                and not torch.is_autocast_enabled("cpu"))


def row_times(x: Tensor, w: Tensor) -> Tensor:
    """x w^T of x (1, K) and w (N, K): (1, N). Each thread reads an equal share of w's rows."""
    threads = torch.get_num_threads()
    even = len(w) // threads * threads
    shares = w[:even].unflatten(0, (threads, -1)).mT  # views (threads, K, N / threads)
    y = torch.bmm(x.expand(threads, 1, -1), shares).view(1, -1)
    return y if even == len(w) else torch.cat([y, F.linear(x, w[even:])], dim=1)
