"""What Inductor fuses by itself, so that no kernel of ours is needed."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_fw_bw_and_get_code

from gpt.nanochat import relu_squared


def relu_squared_mlp(x, up, down):
    return F.linear(relu_squared(F.linear(x, up)), down)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_relu_squared_is_one_pointwise_kernel_each_way(dtype):
    """Between two products forward, among four backward. On a CPU."""
    torch.compiler.reset()
    x, up, down = (torch.randn(shape, dtype=dtype, requires_grad=True)
                   for shape in ((64, 32), (128, 32), (32, 128)))
    compiled = torch.compile(relu_squared_mlp, fullgraph=True)
    _, codes = run_fw_bw_and_get_code(lambda: compiled(x, up, down))
    forward, backward = (re.findall(r"^ +(cpp_fused\w+|extern_kernels\.\w+)\(", code, re.M)
                         for code in codes)
    assert forward == ["extern_kernels.mm", "cpp_fused_pow_relu_0", "extern_kernels.mm"]
    assert len(backward) == 5 and backward.count("extern_kernels.mm") == 4
    (fused,) = set(backward) - {"extern_kernels.mm"}
    assert "relu" in fused and "mul" in fused
