"""common/hardware.py; and pytest's own --bf16-units, which must reach every process."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.timing import environment, machine
from common.hardware import (
    cpu_units,
    device_name,
    keep_freed_memory,
    now,
    read_later,
    resolve_dtype,
    seconds_between,
)
from tests import ranks
from tests.units import sitecustomize as units

CPU = torch.device("cpu")
PRINT_DTYPE = """
import torch
from common.hardware import resolve_dtype
print(resolve_dtype("auto", torch.device("cpu")))
"""


@pytest.mark.parametrize("unit", units.FEATURES)
def test_auto_is_bf16_on_a_cpu_with_any_of_the_units(unit, auto_dtype, monkeypatch):
    """And fp32 on one without."""
    for has_unit, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        features = {"avx2": True, unit: has_unit}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert resolve_dtype("auto", CPU) == dtype
    with pytest.raises(ValueError, match="--dtype=double: choose auto, float32, bfloat16, float16"):
        resolve_dtype("double", CPU)


@pytest.mark.parametrize(("claim", "has_units"), [("denied", False), ("claimed", True)])
def test_a_child_process_reports_the_units_that_the_option_says(claim, has_units, tmp_path):
    """With a fake torch, which is not imported for it; another sitecustomize still runs."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from torch import cpu\n")
    (tmp_path / "torch" / "cpu.py").write_text(
        "def get_capabilities():\n    return {'bf16': None, 'avx2': 3}\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nassert 'torch' not in sys.modules\nprint('as before')\n")
    env = os.environ | {"BF16_UNITS": claim,
                        "PYTHONPATH": os.pathsep.join([units.HERE, str(tmp_path)])}
    code = ("import sys; assert 'torch' not in sys.modules\n"
            "import torch; print(torch.cpu.get_capabilities())")
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/",
                          capture_output=True, text=True)
    features = {"bf16": has_units, "avx2": 3, "avx512_bf16": has_units, "amx_bf16": has_units}
    assert (done.stdout, done.stderr) == (f"as before\n{features}\n", "")


def print_dtype():
    print(resolve_dtype("auto", CPU))


def test_every_process_of_the_tests_has_the_same_units(auto_dtype, tmp_path):
    """This one, one that it starts, and a rank that is forked."""
    here = f"{resolve_dtype('auto', CPU)}\n"
    child = subprocess.run([sys.executable, "-c", PRINT_DTYPE], cwd="/", capture_output=True,
                           text=True)
    assert child.stdout == here
    assert ranks.run(print_dtype, (), 1, tmp_path) == [0]
    assert Path(tmp_path / "0.log").read_text() == here


def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def print_blocks_mapped():
    """How many of twenty blocks of 64 MB were mapped anew, before and after keep_freed_memory."""
    pages_per_block = 2**26 / resource.getpagesize()
    blocks = []
    for _ in range(2):
        before = page_faults()
        for _ in range(20):
            torch.empty(2**24).fill_(1.0)
        blocks.append((page_faults() - before) / pages_per_block)
        keep_freed_memory()
    print(*blocks)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again(tmp_path):
    """By default each such block is mapped anew. Runs in a process of its own, which it changes."""
    assert ranks.run(print_blocks_mapped, (), 1, tmp_path) == [0]
    by_default, kept = map(float, (tmp_path / "0.log").read_text().split())
    assert by_default > 15 and kept < 3


@pytest.mark.parametrize(("features", "units_name", "results"), [
    ({"avx512_f": True, "avx512_bf16": True, "avx2": True}, "AVX512, bf16 units", "cpu-bf16"),
    ({"avx512_f": False, "avx2": True}, "AVX2, no bf16 units", "cpu"),
])
def test_a_cpu_is_named_by_its_units(features, units_name, results, monkeypatch):
    """The model alone may say no more than "AMD EPYC"."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features | {"cpu_name": "X"})
    assert cpu_units() == units_name and device_name(CPU).startswith(f"X ({units_name}), ")
    assert machine(CPU) == results and environment(CPU)["cpu"].endswith(f"({units_name})")


def test_numbers_of_a_gpu_come_with_the_moment_when_it_had_them(monkeypatch):
    """By events, which a GPU reaches in turn; the host reads them later."""
    at = [1.0]

    class Event:
        def __init__(self, enable_timing=False):
            self.timed = enable_timing

        def record(self):
            self.at = at[0]

        def synchronize(self):
            assert self.at is not None

        def elapsed_time(self, end):
            assert self.timed and end.timed, "CUDA refuses events without timing"
            return 1e3 * (end.at - self.at)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    start = now(torch.device("cuda"))
    at[0] = 3.5
    read = read_later(torch.tensor([1.0, 2.0]).as_subclass(OnGpu))
    at[0] = 9.0
    values, end = read()
    assert values == [1.0, 2.0] and seconds_between(start, end) == 2.5


def test_numbers_of_a_cpu_come_with_the_moment_when_they_are_read():
    start = now(CPU)
    values, end = read_later(torch.tensor([1.0]))()
    assert values == [1.0] and 0 <= seconds_between(start, end) < 10
