"""The cases of bench/mfu.py and their variants, ours and the peers', on the same weights."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.ops.cases import GPT2
from bench.steps import peers
from bench.steps.peers import Variant
from gpt import GPTConfig
from kernels import FAMILIES, resolve

# name: (shape, batch). On a GPU GPT-2's sizes as nanoGPT trains them; on a CPU what people run
# there: the "macbook" command of nanoGPT's README, its shakespeare_char (12 to 16 s a step in
# nanoGPT), and one sequence of GPT-2.
GPU_CASES = {
    name: (replace(shape, vocab_size=50304, bias=False, activation="gelu"), 16)
    for name, shape in GPT2.items()
}
CPU_CASES = {
    "macbook": (GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128), 12),
    "shakespeare_char": (GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384,
                                   dropout=0.2), 64),
    "124M_one": (GPU_CASES["124M"][0], 1),
}
CASES = GPU_CASES | CPU_CASES
PEERS = ("transformers", "liger")


class Backend(NamedTuple):
    """One of --backends: its name, and the backends of single families that replace its own."""

    name: str
    backend: str
    families: dict[str, str]


def backends(given: str, device: torch.device) -> list[Backend]:
    """Each of --backends=`given`, or those that are measured by default.

    Raises ValueError for one that is not known, or cannot run here.
    """
    names = given.split(",") if given else ["torch"]
    if not given and device.type == "cuda":
        names += ["triton", *(f"triton+{family}=torch" for family in FAMILIES)]
    found = []
    for name in names:
        backend, *changes = name.split("+")
        families = dict(change.partition("=")[::2] for change in changes)
        if unknown := families.keys() - FAMILIES.keys():
            raise ValueError(f"--backends={name}: no family {min(unknown)!r}; write "
                             f"BACKEND+FAMILY=BACKEND with {', '.join(FAMILIES)}")
        resolve(backend, device, **families)
        found.append(Backend(name, backend, families))
    return found


class Variants:
    """Collects the variants of one case, all built on the same weights."""

    def __init__(self, config: GPTConfig, weights: dict, device: torch.device,
                 compile_ways: list[bool]) -> None:
        self.here, self.compile_ways = (config, weights, device), compile_ways
        self.built: list[Variant] = []

    def add(self, make: Callable[..., Variant], name: str, dtype: torch.dtype, compiled: bool,
            like: Variant | None = None, **more: Any) -> Variant:
        """Build a variant that shares the weights of `like`."""
        label = name + ", compiled" * compiled
        variant = make(*self.here, dtype, name=label, compiled=compiled, like=like, **more)
        variant.compiled = compiled
        self.built.append(variant)
        return variant

    def both(self, make: Callable[..., Variant], name: str, dtype: torch.dtype,
             like: Variant | None = None, **more: Any) -> None:
        """Build a variant eager and, where compiled ones are measured, compiled."""
        for compiled in self.compile_ways:
            like = self.add(make, name, dtype, compiled, like, **more)


def build_variants(config: GPTConfig, weights: dict, device: torch.device, dtype: torch.dtype, *,
                   ours: list[Backend], others: list[str], nanogpt: str,
                   compile_ways: list[bool]) -> list[Variant]:
    """Ours first, on each backend; then the others, in our dtype and in their own default.

    A backend with replaced families is measured compiled only, unless nothing is compiled.
    """
    found = Variants(config, weights, device, compile_ways)
    first: Variant | None = None
    for name, backend, families in ours:
        label = "ours" if len(ours) == 1 else f"ours, {name}"
        for compiled in compile_ways[-1:] if families else compile_ways:
            variant = found.add(peers.ours, label, dtype, compiled, first, kernels=backend,
                                **families)
            variant.backend = name
            first = first or variant
    if nanogpt:
        default = dtype if device.type == "cuda" else torch.float32  # it has no autocast on a CPU
        make = partial(peers.nanogpt, nanogpt)
        if dtype != default:
            found.add(make, f"nanoGPT, {str(dtype).removeprefix('torch.')}", dtype, False)
        found.both(make, "nanoGPT", default)
    if "transformers" in others and importlib.util.find_spec("transformers"):
        found.both(peers.transformers_gpt2, "transformers", dtype)
    if "liger" in others and device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        found.both(peers.ours, "Liger's kernels in ours", dtype, first,
                   kernels=peers.liger_kernels())
    return found.built


