"""A linear layer that reads its matrix at the speed of memory when one text is decoded on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear with a faster product of one row, which is what each new token of a text is.

    It takes as long as reading the matrix, and the libraries behind F.linear are slow at that. On
    two cores of an EPYC, where memory gives 32 GB/s, MKL's in fp32 reads 12.5: it uses one core,
    and both, 22, for a batch of products. oneDNN's in bf16 reads 15; PyTorch's own, which runs
    where oneDNN is off, 30. Elsewhere nothing is measured.
    """

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
        """Row and matrix both in fp32 or both in bf16, on an x86 CPU, where PyTorch has MKL."""
        return (x.device.type == "cpu" and torch.backends.mkl.is_available()
                and x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
                and not torch.is_autocast_enabled("cpu"))


def row_times(x: Tensor, w: Tensor) -> Tensor:
    """x w^T of x (1, K) and w (N, K): (1, N). Each thread gets a share of w's rows, all equal."""
    threads = torch.get_num_threads()
    even = len(w) // threads * threads
    shares = w[:even].unflatten(0, (threads, -1)).mT  # views (threads, K, N / threads)
    y = torch.bmm(x.expand(threads, 1, -1), shares).view(1, -1)
    return y if even == len(w) else torch.cat([y, F.linear(x, w[even:])], dim=1)
