"""Every implementation of an operator that this machine could have: ours, PyTorch's, others'.

An implementation takes the arguments of our operator. Where one cannot run here, a sentence that
says why stands in its place.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import FAMILIES
from kernels.calls import CAP, Case, operator

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OURS = "ours"
# a backend of your own is added to them
SHIPPED = ("reference", "torch", "triton", "flash_attn", "cudnn", "sdpa", "blocks")


def implementations(case: Case, device: torch.device) -> dict[str, Callable | str]:
    """Every implementation of a case, ours first: a callable, or why it is left out."""
    cuda = device.type == "cuda"
    found: dict[str, Callable | str] = {
        OURS: f"the Triton kernels need a CUDA device, this is {device.type}"}
    if cuda:
        found[OURS] = operator(case, "triton")
    else:
        found["reference"] = operator(case, "reference")
    others = [name for name in FAMILIES[case.family].modules if name not in SHIPPED]
    found |= {name: operator(case, name) for name in others}
    torchs = found["torch"] = operator(case, "torch")
    # alone it is one call of scaled_dot_product_attention: nothing to fuse
    if case.operator != "attention":
        found["torch, compiled"] = compiled(torchs)
    if case.family == "attention":
        found |= {name: partial(_forced, backend, torchs) for name, backend in SDPA.items()}
        return found | {"flash-attn": _flash_attn(case, cuda)}
    return found | {"Liger": _liger(case, cuda)}


def compiled(fn: Callable) -> Callable:
    """torch.compile for one set of shapes.

    Earlier shapes are forgotten: else it compiles for all of them at once, which is slower.
    """
    torch.compiler.reset()
    return torch.compile(fn, dynamic=False)


def _forced(backend: SDPBackend, fn: Callable, *args: Tensor, **options) -> Tensor:
    with sdpa_kernel(backend):
        return fn(*args, **options)


def _flash_attn(case: Case, cuda: bool) -> Callable | str:
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return operator(case, "flash_attn") if cuda else "flash-attn needs a CUDA device"


def _liger(case: Case, cuda: bool) -> Callable | str:
    """Liger's operators in our precision: fp32 parameters, the head's weight in the dtype of x."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if not cuda:
        return "liger-kernel needs a CUDA device"
    capped = {"softcap": CAP} if case.variant == "capped" else {}
    if case.operator == "add_layernorm" or (case.variant and not capped):
        return f"liger-kernel has no {f'{case.operator} {case.variant}'.rstrip()}"
    if case.operator.endswith("rmsnorm"):
        return "liger-kernel's RMS norm takes a weight"
    from liger_kernel.transformers import functional as liger

    if case.operator == "layernorm":
        return lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-5)
    if case.operator == "cross_entropy":
        return lambda logits, targets: liger.liger_cross_entropy(logits, targets, ignore_index=-1)
    return lambda x, w, targets, cap=0: liger.liger_fused_linear_cross_entropy(
        x, w.to(x.dtype), targets, ignore_index=-1, **capped)
