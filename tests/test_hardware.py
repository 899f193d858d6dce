"""What runs where (common/hardware.py), and that the tests' own --bf16-units reaches every process."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.timing import environment, machine
from common.hardware import cpu_units, device_name, keep_freed_memory, resolve_dtype
from tests import ranks
from tests.units import sitecustomize as units

CPU = torch.device("cpu")
SAY = "import torch; from common.hardware import resolve_dtype; print(resolve_dtype('auto', torch.device('cpu')))"


@pytest.mark.parametrize("unit", units.FEATURES)
def test_auto_is_bf16_on_a_cpu_with_any_of_the_units_and_fp32_on_one_without(unit, auto_dtype,
                                                                             monkeypatch):
    for there, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu,
                            "get_capabilities", lambda there=there: {"avx2": True, unit: there})
        assert resolve_dtype("auto", CPU) == dtype
    with pytest.raises(ValueError, match="--dtype=double: choose auto, float32, bfloat16, float16"):
        resolve_dtype("double", CPU)


@pytest.mark.parametrize(("claim", "there"), [("denied", False), ("claimed", True)])
def test_a_child_process_says_of_its_units_what_it_is_told(claim, there, tmp_path):
    """Of a torch that knows of one of them. It is not imported for that, and a sitecustomize that
    was there before still runs."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from torch import cpu\n")
    (tmp_path / "torch" / "cpu.py").write_text("def get_capabilities():\n    return {'bf16': None, "
                                               "'avx2': 3}\n")
    (tmp_path / "sitecustomize.py").write_text("import sys\nassert 'torch' not in "
                                               "sys.modules\nprint('as before')\n")
    env = os.environ | {"BF16_UNITS": claim,
                        "PYTHONPATH": os.pathsep.join([units.HERE, str(tmp_path)])}
    code = "import sys; assert 'torch' not in sys.modules; import torch; print(torch.cpu.get_capabilities())"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/",
                          capture_output=True, text=True)
    told = {"bf16": there, "avx2": 3, "avx512_bf16": there, "amx_bf16": there}
    assert (done.stdout, done.stderr) == (f"as before\n{told}\n", "")


def say():
    print(resolve_dtype("auto", CPU))


def test_every_process_of_the_tests_has_the_same_units(auto_dtype, tmp_path):
    """This one, one that it starts, and a rank that is forked."""
    here = f"{resolve_dtype('auto', CPU)}\n"
    assert subprocess.run([sys.executable, "-c", SAY], cwd="/", capture_output=True,
                          text=True).stdout == here
    assert ranks.run(say, (), 1, tmp_path) == [0]
    assert Path(tmp_path / "0.log").read_text() == here


def faults_before_and_after():
    """Minor page faults of twenty blocks of 64 MB, in pages of one."""
    counts = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.empty(2**24).fill_(1.0)
        counts.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
                      * resource.getpagesize() / 2**26)
        keep_freed_memory()
    print(*counts)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again(tmp_path):
    """By default each such block is mapped anew. In a process of its own, as the setting is the
    process's."""
    assert ranks.run(faults_before_and_after, (), 1, tmp_path) == [0]
    by_default, kept = map(float, (tmp_path / "0.log").read_text().split())
    assert by_default > 15 and kept < 3


@pytest.mark.parametrize(("features", "said", "results"), [
    ({"avx512_f": True, "avx512_bf16": True, "avx2": True}, "AVX512, bf16 units", "cpu-bf16"),
    ({"avx512_f": False, "avx2": True}, "AVX2, no bf16 units", "cpu"),
])
def test_a_cpu_is_named_by_its_units(features, said, results, monkeypatch):
    """The model alone may say no more than "AMD EPYC"."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features | {"cpu_name": "X"})
    assert cpu_units() == said and device_name(CPU).startswith(f"X ({said}), ")
    assert machine(CPU) == results and environment(CPU)["cpu"].endswith(f"({said})")
