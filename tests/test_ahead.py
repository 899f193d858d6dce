"""Ring 2: every kernel at GPT-2's shapes, compiled for absent GPUs; and the parts of the report.

The whole report comes from one `python bench/aot/ahead.py --quick=True`, a process of its own: the
tests' process has TRITON_INTERPRET set, in which nothing can be compiled.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.aot import ahead, sass
from bench.ops import cases
from kernels import calls, launch
from kernels.calls import Case

ROOT = Path(__file__).parents[1]
ARCHS = (80, 90, 100)


def python(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                          cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("ahead") / "ahead.json"
    printed = python("bench/aot/ahead.py", "--quick=True", "--arch=80,90,100", f"--out={out}")
    return json.loads(out.read_text()) | {"printed": printed}


# -- ring 2 --------------------------------------------------------------------


def test_every_kernel_compiles_at_gpt2s_shapes_on_every_architecture(report):
    assert not [row for row in report["kernels"] if "error" in row]
    compiled = {(case, row["arch"]) for row in report["kernels"] for case in row["cases"]}
    assert compiled == {(str(case), arch) for case in cases.quick() for arch in ARCHS}


def test_every_kernel_fits_the_shared_memory_of_a_block(report):
    for row in report["kernels"]:
        assert row["shared_bytes"] <= launch.SHARED_MEMORY_BYTES[divmod(row["arch"], 10)], row
        assert row["blocks_per_multiprocessor"] >= 1, row


def test_no_kernel_spills_at_gpt2s_shapes_on_sm_90(report):
    hopper = [row for row in report["kernels"] if row["arch"] == 90]
    assert not [row for row in hopper if row["spill_bytes"] or row["spill_instructions"]]


def test_attention_uses_the_matrix_units(report):
    # on sm_100 the tcgen05 instructions or, where blocks are small, HMMA
    names = {80: {"HMMA"}, 90: {"HGMMA"}}
    for row in report["kernels"]:
        if row["kernel"].startswith("attention_"):
            found = set(row["matrix_instructions"])
            assert found == names[row["arch"]] if row["arch"] in names else found, row


def test_memory_bound_kernels_move_at_most_a_tenth_more_than_the_floor(report):
    assert {(row["operator"], row["arch"]) for row in report["traffic"]} == {
        (operator, arch) for operator in (*ahead.MEMORY_BOUND, "attention_qkv") for arch in ARCHS}
    over = [row for row in report["traffic"] if not 0.99 < row["moved_over_floor"] <= 1.1]
    assert not over, over


def test_memory_bound_kernels_load_and_store_16_bytes_at_a_time(report):
    """Narrower accesses are for single values of a row: its target, that logit, its statistics.

    Regression: a loop that counted down hid the alignment of its start; it read logits by twos.
    """
    wide = {"LDG.128", "LDG.256", "LDGSTS.128", "UTMALDG"}, {"STG.128", "STG.256", "UTMASTG"}
    for row in report["kernels"]:
        if not row["kernel"].startswith("attention_"):
            accesses = row["global_accesses"]
            assert wide[0] & set(accesses), row
            assert wide[1] & set(accesses) or row["kernel"] == "cross_entropy_forward", row
            assert accesses.get("LDG.16", 0) <= 1 and "STG.16" not in accesses, row


def test_the_report_says_what_compiled_it_and_prints_both_tables(report):
    assert set(report["environment"]["ptxas"]) == {"ptxas", "ptxas_blackwell"}
    assert report["environment"]["triton"]
    assert "blocks/SM" in report["printed"] and "moved/floor" in report["printed"]


def test_importing_the_kernels_does_nothing(tmp_path):
    code = """
import os, sys
before = dict(os.environ)
import kernels
assert "triton" not in sys.modules, "kernels alone needs no triton"
import kernels.cross_entropy, kernels.layernorm, kernels.rmsnorm, kernels.rotary, torch, triton
assert not torch.cuda.is_initialized(), "a device was asked for"
assert triton.runtime.driver._active is None, "a device was asked for"
assert dict(os.environ) == before, "the environment was written to"
"""
    assert python("-c", code, TRITON_CACHE_DIR=str(tmp_path)) == ""
    assert not list(tmp_path.iterdir()), "something was compiled"


@pytest.mark.parametrize(("flag", "value", "known"), [
    ("arch", "75", "90"), ("arch", "hopper", "90"), ("family", "norms", "layernorm"),
])
def test_unknown_architectures_and_families_are_named(flag, value, known):
    with pytest.raises(ValueError, match=f"--{flag}={value}.*{known}"):
        ahead.main(ahead.Options(**{flag: value}))


# -- blocks per multiprocessor, instructions -------------------------------------


@pytest.mark.parametrize(("arch", "warps", "registers", "shared", "expected"), [
    (90, 4, 32, 0, (16, "threads")),
    (90, 4, 128, 0, (4, "registers")),
    # 136 registers: 15 warps' worth, but three in each of four partitions
    (90, 1, 129, 0, (12, "registers")),
    (90, 8, 255, 0, (1, "registers")),
    (90, 4, 32, 113 * 1024, (2, "shared memory")),  # 114 kB with the reserved one; two are 228
    (80, 4, 32, 113 * 1024, (1, "shared memory")),
    (90, 8, 168, 227 * 1024, (1, "registers")),
    (90, 1, 16, 0, (32, "blocks")),
])
def test_blocks_per_multiprocessor(arch, warps, registers, shared, expected):
    assert sass.blocks_per_multiprocessor(arch, warps, registers, shared) == expected


def test_tensor_memory_limits_blocks():
    found = sass.blocks_per_multiprocessor(100, 4, 32, 0, tensor_memory_columns=256)
    assert found == (2, "tensor memory")


def test_instructions_are_told_apart():
    text = """
      @!P1 LDG.E.128 R4, desc[UR6][R16.64] ;    LDG.E.U16 R1, [R2] ;
           LDG.E.EL.64.CONSTANT R3, [R2] ;
           LDG.E R1, [R2] ;    LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2] ;    LDGDEPBAR ;
           STG.E.ENL2.256 [R2], R8, R12 ;
           UTMALDG.2D [UR8], [UR4] ;    REDUX.SUM UR4, R3 ;
           HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
           UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
           HMMA.16816.F32.BF16 R4, R8, R12, R4 ;    STL.64 [R1], R2 ;
    """
    assert sass._accesses(text) == {"LDG.128": 1, "LDG.16": 1, "LDG.64": 1, "LDG.32": 1,
                                    "LDGSTS.128": 1, "STG.256": 1, "UTMALDG": 1}
    assert sass.MATRIX.findall(text) == ["HGMMA", "UTCHMMA", "HMMA"]
    assert len(sass.SPILL.findall(text)) == 1


# -- cases and fake tensors ------------------------------------------------------


@pytest.mark.parametrize("case", [*{c.operator + c.variant: c for c in cases.full()}.values()],
                         ids=str)
def test_cases_are_calls_the_definitions_accept(case):
    from kernels import reference

    small = {"attention_qkv": (2, 9, 2, 8), "linear_cross_entropy": (6, 8, 11)}
    case = Case(case.operator, small.get(case.operator, (6, 8)), case.dtype, case.variant)
    args = calls.arguments(case)
    phases = dict(calls.run(getattr(reference, case.operator), args, calls.options(case)))
    assert list(phases) == ["forward", "gradients", "backward"]
    assert [g.shape for g in phases["backward"]] == [a.shape for a in calls.leaves(args)]


def test_some_case_is_given_each_setting_that_launch_has():
    attention = [c for c in cases.full() if c.operator == "attention_qkv"]
    reported = ((8, 0), (8, 6), (9, 0), (10, 0))
    for settings in (launch.attention_forward, launch.attention_backward_q,
                     launch.attention_backward_kv):
        given = [settings(c.shape[-1], c.dtype, capability) for c in attention
                 for capability in reported]
        for D in range(8, 264, 8):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                assert all(settings(D, dtype, capability) in given
                           for capability in launch.SHARED_MEMORY_BYTES), (D, dtype)
    norms = [c for c in cases.full() if c.operator == "layernorm" and not c.variant]
    forward = [launch.layernorm_forward(c.shape[1], c.dtype.itemsize) for c in norms]
    backward = [launch.layernorm_backward(c.shape[1]) for c in norms]
    assert {c.shape[1] for c in norms} == {
        c.shape[1] for c in cases.full() if c.operator == "rmsnorm"}, "it has the same settings"
    for N in range(64, launch.LAYERNORM_WIDEST + 1):
        assert launch.layernorm_backward(N) in backward, N
        assert all(launch.layernorm_forward(N, itemsize) in forward for itemsize in (2, 4)), N


def test_two_compilers_reports_are_compared_where_they_differ():
    def report(triton, **registers):
        return {"environment": {"triton": triton}, "traffic": [], "kernels": [
            {"kernel": name, "arch": 90, "cases": [f"{name} small", f"{name} large"],
             "registers": count, "spill_bytes": 0} for name, count in registers.items()]}

    here, other = report("3.7.1", a=40, b=32, c=50), report("3.6.0", a=40, b=242)
    lines = [re.split("  +", line) for line in ahead.comparison(here, other).splitlines()]
    assert lines == [["kernel", "sm", "triton 3.7.1", "triton 3.6.0", "case"],
                     ["b", "90", "32 registers, 0 B of spills", "242 registers, 0 B of spills",
                      "b small"],
                     ["c", "90", "50 registers, 0 B of spills", "not reported", "c small"]]


ALTERNATIVES = """
import json, sys
from bench.aot.ahead import compile_cases
from bench.ops import cases
from kernels import launch
rows = []
for family, sets in launch.ALTERNATIVES.items():
    batch = [case for case in cases.models("124M") if case.family == family]
    for settings in sets:
        launch.use(settings)
        rows += [row | {"settings": settings} for row in compile_cases(batch, 90)]
json.dump(rows, sys.stdout)
"""


def test_the_other_settings_that_auto_tries_compile_without_spills():
    """For sm_90, at the shapes of both architectures at 124M, by the installed Triton."""
    rows = json.loads(python("-c", ALTERNATIVES))
    assert {row["family"] for row in rows} == set(launch.ALTERNATIVES)
    assert not [row for row in rows if "error" in row or row["spill_bytes"]]
