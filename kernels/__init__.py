"""Fused operators for GPTs: one set of signatures, several implementations ("suites").

`load("triton")` gives the operators as a `Kernels` tuple; `resolve("auto", ...)` decides which
suite each family of operators comes from. The definitions, and the signatures, are in
kernels/reference.py.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

from kernels.dropout import dropout as dropout

FAMILIES = {
    "attention": ("attention", "attention_qkv"),
    "layernorm": ("layernorm", "add_layernorm"),
    "cross_entropy": ("cross_entropy", "linear_cross_entropy"),
}

# Where each suite keeps each family. A family that a suite lacks is not in its row.
_HOMES = {
    "reference": dict.fromkeys(FAMILIES, "kernels.reference"),
    "torch": dict.fromkeys(FAMILIES, "kernels.torch_ops"),
    "triton": {family: f"kernels.{family}" for family in FAMILIES},
    "flash_attn": {"attention": "kernels.flash_attn"},
}

# What `auto` takes on a GPU, by its name. A row enters with a measurement (bench/results/) in which
# it was fastest.
_MEASURED: dict[str, dict[str, str]] = {}


class Kernels(NamedTuple):
    """The operators a model calls; signatures in kernels/reference.py."""

    attention: Callable
    attention_qkv: Callable
    layernorm: Callable
    add_layernorm: Callable
    cross_entropy: Callable
    linear_cross_entropy: Callable


class Choice(NamedTuple):
    """Which suite each family of operators comes from, and why."""

    attention: str
    layernorm: str
    cross_entropy: str
    why: str

    @property
    def suites(self) -> dict[str, str]:
        """What `load` takes."""
        return {family: getattr(self, family) for family in FAMILIES}

    def __str__(self) -> str:
        return f"attention={self.attention}, layernorm={self.layernorm}, cross_entropy={self.cross_entropy} ({self.why})"


def resolve(kernels: str = "auto", device: torch.device | str = "cpu", *, attention: str = "",
            layernorm: str = "",
            cross_entropy: str = "") -> Choice:
    """Decide, once and before the first step, which suite each family of operators comes from.

    `kernels` names a suite for all of them ("auto": by measurement on this device); the others
    replace one family. Raises ValueError, with the remedy, where a suite cannot run on `device`.
    """
    device = torch.device(device)
    if kernels == "auto":
        suites, why = _automatic(device)
    else:
        suites, why = dict.fromkeys(FAMILIES, kernels), f"--kernels={kernels}"
    for family, suite in {"attention": attention, "layernorm": layernorm,
                          "cross_entropy": cross_entropy}.items():
        if suite:
            suites, why = suites | {family: suite}, f"{why}, --{family}={suite}"
    for family, suite in suites.items():
        _check(family, suite, device)
    return Choice(**suites, why=why)


def _automatic(device: torch.device) -> tuple[dict[str, str], str]:
    fused = dict.fromkeys(FAMILIES, "torch")
    if device.type != "cuda":
        return fused, f"auto: PyTorch's operators on {device.type}"
    name = torch.cuda.get_device_name(device)
    if name in _MEASURED:
        return _MEASURED[name], f"auto: measured on {name}"
    return fused, f"auto: no measurement for {name}; `python bench/tune.py` would decide by measuring"


def _check(family: str, suite: str, device: torch.device) -> None:
    if suite not in _HOMES or family not in _HOMES[suite]:
        known = ", ".join(name for name, homes in _HOMES.items() if family in homes)
        raise ValueError(f"--{family}={suite}: no such implementation; choose from {known}")
    if suite == "flash_attn" and device.type != "cuda":
        raise ValueError(f"--{family}=flash_attn needs a CUDA device, this run is on "
                         f"{device.type}; use --{family}=torch")
    if suite == "flash_attn" and find_spec("flash_attn") is None:
        raise ValueError(f"--{family}=flash_attn: flash-attn is not installed; `pip install "
                         f"flash-attn`, or use --{family}=torch")
    if suite == "triton" and device.type != "cuda" and not _interpreting():
        raise ValueError(
            f"--{family}=triton needs a CUDA device, this run is on {device.type}; use "
            "--kernels=torch, or set TRITON_INTERPRET=1 to run the kernels in Triton's slow "
            "interpreter"
        )


def _interpreting() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return triton.knobs.runtime.interpret


def load(kernels: str = "torch", *, attention: str = "", layernorm: str = "",
         cross_entropy: str = "") -> Kernels:
    """The operators of a suite ("reference", "torch", "triton"), with single families taken from
    another one.

    Imports the files it needs, and so triton only for the triton suite. Raises ValueError for an
    unknown name.
    """
    operators: dict[str, Callable] = {}
    chosen = {"attention": attention, "layernorm": layernorm, "cross_entropy": cross_entropy}
    for family, names in FAMILIES.items():
        suite = chosen[family] or kernels
        # the name alone; whether it runs here is `resolve`'s question
        _check(family, suite, torch.device("cuda"))
        module = import_module(_HOMES[suite][family])
        operators |= {name: getattr(module, name) for name in names}
    return Kernels(**operators)
