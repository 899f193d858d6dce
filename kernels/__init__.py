"""Fused operators for GPTs: one set of signatures, and several backends that implement it.

`load("triton")` gives the operators as a `Kernels` tuple; `resolve("auto", ...)` decides which
backend runs each family of operators. Definitions and signatures: kernels/reference.py.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from kernels.cpu_dropout import dropout as dropout
    from kernels.torch_ops import rotated_qkv as rotated_qkv


class Family(NamedTuple):
    """Operators that are replaced together."""

    operators: tuple[str, ...]
    modules: dict[str, tuple[str, ...]]
    """backend -> the modules with its functions of those names; the first that has one counts"""


# The registry. A new backend is one row; --help, `resolve`, `load` and bench/operators.py read it.
FAMILIES = {
    "attention": Family(("attention", "attention_qkv"), {
        "reference": ("kernels.reference",),
        "torch": ("kernels.torch_ops",),
        "triton": ("kernels.rotary", "kernels.attention"),
        "flash_attn": ("kernels.flash_attn",),
        "cudnn": ("kernels.cudnn",),
        "sdpa": ("kernels.sdpa",),
        "blocks": ("kernels.blocks",),
    }),
    "layernorm": Family(("layernorm", "add_layernorm", "rmsnorm", "add_rmsnorm"), {
        "reference": ("kernels.reference",),
        "torch": ("kernels.torch_ops",),
        "triton": ("kernels.layernorm", "kernels.rmsnorm"),
    }),
    "cross_entropy": Family(("cross_entropy", "linear_cross_entropy"), {
        "reference": ("kernels.reference",),
        "torch": ("kernels.torch_ops",),
        "triton": ("kernels.cross_entropy",),
    }),
}
# Backends that have every family: what --kernels= takes, besides auto.
BACKENDS = [name for name in FAMILIES["attention"].modules
            if all(name in family.modules for family in FAMILIES.values())]

# Backend -> the type of device that it needs.
NEEDS = {"flash_attn": "cuda", "cudnn": "cuda", "blocks": "cpu"}


class Kernels(NamedTuple):
    """All operators of the chosen backends; signatures in kernels/reference.py.

    The models call attention_qkv, the norms and linear_cross_entropy.
    """

    attention: Callable
    attention_qkv: Callable
    layernorm: Callable
    add_layernorm: Callable
    rmsnorm: Callable
    add_rmsnorm: Callable
    cross_entropy: Callable
    linear_cross_entropy: Callable


class Choice(NamedTuple):
    """The backend of each family of operators, and why it was chosen."""

    backends: dict[str, str]
    why: str
    measured: Mapping[str, Any] = {}
    """what train/auto.py decided: "lines", one for each family, and "settings" for `launch.use`"""

    def __str__(self) -> str:
        chosen = ", ".join(f"{family}={backend}" for family, backend in self.backends.items())
        lines = self.measured.get("lines", {})
        return "\n".join([f"{chosen} ({self.why})", *(f"  {f}: {lines[f]}" for f in lines)])


def resolve(kernels: str = "auto", device: "torch.device | str" = "cpu", **families: str) -> Choice:
    """Choose the backend of each family of operators, once, before the first step.

    `kernels`: one of BACKENDS for all families, or "auto": PyTorch's, unless a run measures
    (train/auto.py).
    `families`: the backends of single families, as `attention="torch"`; "" changes nothing.
    Raises ValueError, with the remedy, for a backend that cannot run on `device`.
    """
    import torch

    device = torch.device(device)
    if kernels == "auto":
        backends, why = dict.fromkeys(FAMILIES, "torch"), f"auto: PyTorch's on {device.type}"
    else:
        backends, why = dict.fromkeys(FAMILIES, kernels), f"--kernels={kernels}"
    for family, backend in families.items():
        if backend:
            backends, why = backends | {family: backend}, f"{why}, --{family}={backend}"
    for family, backend in backends.items():
        _check_name(family, backend)
        _check_device(family, backend, device)
    return Choice(backends, why)


def _check_name(family: str, backend: str) -> None:
    """Raise ValueError unless the family has such a backend."""
    if family not in FAMILIES:
        raise ValueError(f"no family of operators {family!r}; choose from {', '.join(FAMILIES)}")
    if backend not in FAMILIES[family].modules:
        known = ", ".join(FAMILIES[family].modules)
        raise ValueError(f"--{family}={backend}: no such implementation; choose from {known}")


def _check_device(family: str, backend: str, device: "torch.device") -> None:
    """Raise ValueError where the backend cannot run on `device`."""
    flag = f"--{family}={backend}"
    if (needed := NEEDS.get(backend, device.type)) != device.type:
        name = {"cuda": "a CUDA device", "cpu": "a CPU"}[needed]
        raise ValueError(f"{flag} needs {name}, this run is on {device.type}; use "
                         f"--{family}=torch")
    if backend == "flash_attn" and find_spec("flash_attn") is None:
        raise ValueError(f"{flag}: flash-attn is not installed; `pip install flash-attn`, or use "
                         f"--{family}=torch")
    if backend == "triton" and device.type != "cuda" and not _interpreting():
        raise ValueError(f"{flag} needs a CUDA device, this run is on {device.type}; use "
                         "--kernels=torch, or set TRITON_INTERPRET=1 to run the kernels in "
                         "Triton's slow interpreter")


def _interpreting() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return triton.knobs.runtime.interpret


def triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises for a kernel that does not compile; none where it is not installed."""
    if find_spec("triton") is None:
        return ()
    import triton

    return (triton.TritonError,)


def load(kernels: str = "torch", **families: str) -> Kernels:
    """The operators of a backend; `families` takes single families from other backends.

    Imports only the modules that it needs: triton only for the triton backend. Raises ValueError
    for an unknown name. `resolve` checks whether a backend runs on a device.
    """
    others = {family: backend for family, backend in families.items() if backend}
    chosen = dict.fromkeys(FAMILIES, kernels) | others
    operators: dict[str, Callable] = {}
    for family, backend in chosen.items():
        _check_name(family, backend)
        modules = [import_module(name) for name in FAMILIES[family].modules[backend]]
        operators |= {name: next(getattr(module, name) for module in modules
                                 if hasattr(module, name))
                      for name in FAMILIES[family].operators}
    return Kernels(**operators)


def __getattr__(name: str) -> Any:
    if name == "dropout":  # imported when asked for, so that configs do not wait for torch
        from kernels.cpu_dropout import dropout

        return dropout
    if name == "rotated_qkv":
        from kernels.torch_ops import rotated_qkv

        return rotated_qkv
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
