"""What --kernels=auto chooses from: the calls of a run's micro-step, and who could compute them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.files import cache_folder, check_json, read_json
from kernels import FAMILIES, launch
from kernels.calls import Case
from kernels.launch import Settings
from train.config import Config

BASE = "torch"  # the backend that is taken unless another one is faster


@dataclass(frozen=True, eq=False)
class Candidate:
    """A backend of a family of operators, in one form."""

    backend: str
    form: str = ""
    """where it is not the backend's usual one"""
    settings: Mapping[str, Settings] = field(default_factory=dict)
    """launch settings in place of the tables', as `launch.use` takes them"""
    compiled: bool = False
    """whether it is timed under torch.compile"""

    def __str__(self) -> str:
        return f"{self.backend} {self.form}".rstrip()


class Asked(NamedTuple):
    """A family's calls in a micro-step of a run."""

    family: str
    calls: tuple[tuple[Case, int], ...]
    """each, and how often"""

    def __str__(self) -> str:
        return ", ".join(f"{count} x {case}" for case, count in self.calls)


def asked_of(config: Config, dtype: torch.dtype) -> dict[str, Asked]:
    """The calls of each family in a micro-step of training in `dtype`: family -> its calls."""
    c, B = config.model, config.data.batch_size
    T, C, L = c.block_size, c.n_embd, c.n_layer
    modern = c.architecture == "nanochat"
    attention = Case("attention_qkv", (B, T, c.n_head, c.head_dim), dtype, _variant({
        "rotary": modern, f"window={c.window}": 0 < c.window < T,
        "documents": config.data.document_mask, f"dropout={c.dropout}": c.dropout > 0}))
    norm, nobias = "rmsnorm" if modern else "layernorm", not modern and not c.bias
    add_norm = Case(f"add_{norm}", (B * T, C), dtype, _variant({
        "nobias": nobias, "fp32 residual": dtype == torch.float16}))
    loss = Case("linear_cross_entropy", (B * T, C, c.vocab_size), dtype, _variant({
        f"capped={c.logit_cap}": modern and c.logit_cap > 0}))
    # The one norm without a residual add before it, the first, is left out.
    by_family = {"attention": ((attention, L),), "layernorm": ((add_norm, 2 * L),),
                 "cross_entropy": ((loss, 1),)}
    return {family: Asked(family, by_family[family]) for family in FAMILIES}


def _variant(parts: dict[str, bool]) -> str:
    """The variant of a Case: the names whose value is true."""
    return "+".join(name for name, present in parts.items() if present)


def small(case: Case) -> Case:
    """The case with at most two sequences of its length, or 256 rows: quickly computed in fp64."""
    rows, *rest = case.shape
    return replace(case, shape=(min(rows, 2 if case.family == "attention" else 256), *rest))


def candidates(family: str, device: torch.device, compiled: bool,
               tuned: Mapping[str, Settings]) -> list[Candidate]:
    """Who could compute a family on this device, BASE first.

    `compiled`: the run compiles. `tuned`: the launch settings of bench/tune.py, empty if none.
    """
    form = "compiled" if compiled else ""
    found = [Candidate(BASE, form, compiled=compiled)]
    if device.type == "cpu":
        return found + [Candidate(name) for name in ("sdpa", "blocks") if family == "attention"]
    if device.type != "cuda":
        return found
    found.append(Candidate("triton"))
    if tuned:
        found.append(Candidate("triton", "tuned", tuned))
    if family == "attention":
        found.append(Candidate("cudnn", form, compiled=compiled))
        found += [Candidate("flash_attn")] if find_spec("flash_attn") else []
    return found + [Candidate("triton", f"with settings {n}", settings)
                    for n, settings in enumerate(launch.ALTERNATIVES[family], 2)]


def tuned_file(gpu: str) -> Path:
    """The file in the user's cache with what bench/tune.py found on a GPU of this name."""
    return cache_folder() / f"tune-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"


def read_tuned(device: torch.device) -> dict[str, Settings]:
    """The launch settings that bench/tune.py found on this device; empty without its file.

    Raises ValueError where the file is damaged.
    """
    file = tuned_file(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if file is None or not file.exists():
        return {}
    remedy = "remove it, or run bench/tune.py again"
    rows = read_json(file, dict[str, Any], remedy).get("rows")
    rows = check_json(rows, list[dict[str, Any]], f"{file}: rows", remedy)
    return check_json({row.get("call"): row.get("settings") for row in rows}, dict[str, Settings],
                      f"{file}: rows", remedy)
