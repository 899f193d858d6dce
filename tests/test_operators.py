"""The comparison of operators with their peers and the floor (bench/operators.py)."""

import json

import pytest
import torch

from bench import operators
from bench.floors import Rates, Work
from bench.ops.peers import OURS, implementations
from bench.timing import Timing
from kernels import calls
from kernels.accuracy import inaccuracy
from kernels.calls import Case

CPU = torch.device("cpu")
FP32 = torch.float32

try:
    from triton import TritonError
except ImportError:
    TRITON_ERRORS = []
else:
    TRITON_ERRORS = [TritonError("launch failed")]
SMALL = [Case("attention_qkv", (2, 16, 2, 8), FP32), Case("attention", (2, 16, 2, 8), FP32),
         Case("layernorm", (16, 16), FP32), Case("add_layernorm", (12, 16), FP32),
         Case("attention_qkv", (2, 16, 2, 16), FP32, "rotary"),
         Case("linear_cross_entropy", (12, 8, 30), FP32, "capped"),
         Case("rmsnorm", (16, 16), FP32), Case("add_rmsnorm", (12, 16), FP32),
         Case("cross_entropy", (12, 30), FP32), Case("linear_cross_entropy", (12, 8, 30), FP32)]
RATES = Rates(matmul_tflops=1.0, copy_gbs=1.0)


def off_by(factor, phase, case):
    """PyTorch's operator with its result, or its gradient alone, scaled a little."""
    fn = calls.operator(case, "torch")

    def scaled(t):
        return t * factor if phase == "forward" else t * factor + (t * (1 - factor)).detach()

    def broken(*args, **options):
        out = fn(*args, **options)
        return tuple(map(scaled, out)) if isinstance(out, tuple) else scaled(out)
    return broken


def test_twice_the_yardsticks_error_and_one_rounding_are_allowed():
    exact, yardstick = torch.tensor([1.0, -4.0]).double(), torch.tensor([1.0 + 2**-10, -4.0])
    allowed = 2 * 2**-10 + 4 * torch.finfo(FP32).eps
    for error, refused in ((0.99 * allowed, False), (1.01 * allowed, True), (float("nan"), True)):
        got = torch.tensor([1.0 + error, -4.0])
        assert bool(inaccuracy([got], [yardstick], [exact])) == refused
    got = torch.tensor([1.5, -4.0])
    assert "1.5 where 1 is right" in inaccuracy([exact, got], [exact, yardstick], [exact, exact])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_what_is_right_is_admitted(case):
    assert operators.wrong(calls.operator(case, "torch"), case, CPU) == ""
    assert operators.wrong(calls.operator(case, "reference"), case, CPU) == ""


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_what_is_wrong_is_refused_with_both_values(case, phase):
    said = operators.wrong(off_by(1.01, phase, case), case, CPU)
    assert "is right" in said and "allowed" in said


def test_attention_that_sees_its_future_is_refused():
    def seeing(*qkv):
        q, k, v = (t.transpose(1, 2) for t in qkv)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    assert operators.wrong(seeing, SMALL[1], CPU)


def test_a_result_of_nan_is_refused():
    assert operators.wrong(lambda *args: calls.operator(SMALL[2], "torch")(*args) * float("nan"),
                           SMALL[2], CPU)


def test_a_refused_one_is_not_timed(monkeypatch):
    case = SMALL[2]
    monkeypatch.setattr(operators, "implementations", lambda *_: {
        OURS: off_by(1.01, "forward", case), "torch": calls.operator(case, "torch"),
        "other": "not installed"})
    found = operators.measure_case(case, RATES, CPU, repeats=2)
    assert list(found["variants"]) == ["torch"] and OURS in found["refused"]
    assert found["skipped"] == {"other": "not installed"}


def test_a_backend_without_a_kernel_is_named():
    found = operators.admit(SMALL[1], CPU)
    assert {"torch", "reference", "SDPA flash"} <= set(found.right)
    assert {OURS, "flash-attn"} <= set(found.skipped) and all(found.skipped.values())
    assert not found.refused and not found.failed


@pytest.mark.parametrize("error", [RuntimeError("launch failed"), *TRITON_ERRORS], ids=repr)
def test_a_failure_of_ours_fails_the_command_and_leaves_the_others(error, tmp_path, monkeypatch,
                                                                   capsys):
    def fails(*_):
        raise error

    case, out = SMALL[2], tmp_path / "o.json"
    found = {OURS: fails, "torch": calls.operator(case, "torch")}
    monkeypatch.setattr(operators, "implementations", lambda *_: found)
    monkeypatch.setattr(operators, "chosen_cases", lambda *_: [case])
    assert operators.main(operators.Options(device="cpu", repeats=2, out=str(out))) == 1
    row = json.loads(out.read_text())["cases"][str(case)]
    assert row["failed"] == {OURS: f"{type(error).__name__}: launch failed"}
    assert list(row["variants"]) == ["torch"] and not row["skipped"]
    assert "failed: " in capsys.readouterr().out


def test_speed_is_work_over_time():
    half = pytest.approx(0.5)
    row = operators.speed(Timing((2.0,)), Work(flops=1e9), RATES)
    assert (row["tflops"], row["gbs"], row["of_floor"]) == (half, None, half)
    row = operators.speed(Timing((2.0,)), Work(bytes=1e6), RATES)
    assert (row["tflops"], row["gbs"], row["of_floor"]) == (None, half, half)
    assert operators.speed(Timing((2.0,)), None, RATES)["of_floor"] is None


def test_more_than_the_device_can_do_is_refused():
    slow, fast = (operators.speed(Timing((ms,)), Work(bytes=1e6), RATES) for ms in (0.95, 0.5))
    assert operators.impossible("x", "forward", slow) == ""
    assert "x, forward: 0.5 ms is 200 %" in operators.impossible("x", "forward", fast)


def test_the_least_work_of_each_operator():
    """By hand, in bf16: attention has 2 products forward and 5 backward, over half of the scores.

    A loss reads its logits once.
    """
    scores = 2 * 3 * 64 * 64 / 2
    apart, packed = (operators.work(Case(name, (2, 64, 3, 8)))
                     for name in ("attention", "attention_qkv"))
    assert apart["forward"].flops == 4 * scores * 8
    assert packed["backward"].flops == 10 * scores * 8
    loss = operators.work(Case("cross_entropy", (10, 50)))
    assert loss["both"].bytes == 2 * 10 * 50 * 2 + 2 * 8 * 10 and loss["backward"] is None
    head = operators.work(Case("linear_cross_entropy", (10, 4, 50)))
    assert head["both"].flops == 6 * 10 * 4 * 50 and head["backward"] is None


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_implementations_are_callables_or_reasons(case):
    found = implementations(case, CPU)
    assert next(iter(found)) == OURS and isinstance(found[OURS], str)
    assert all(callable(fn) or fn for fn in found.values())


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operators, "implementations", lambda case, _: {
        "torch": calls.operator(case, "torch"), OURS: "no GPU"})
    monkeypatch.setattr(operators, "chosen_cases", lambda *_: SMALL[:3])
    out = tmp_path / "o.json"
    assert operators.main(operators.Options(device="cpu", repeats=2, out=str(out))) == 0
    result = json.loads(out.read_text())
    assert list(result["cases"]) == [str(case) for case in SMALL[:3]]
    row = result["cases"][str(SMALL[0])]["variants"]["torch"]["backward"]
    timing = row["timing"]
    assert row["of_floor"] > 0
    assert timing["q1_ms"] <= timing["median_ms"] <= timing["q3_ms"]
    assert result["environment"]["torch"] and result["rates"]["matmul_tflops"] > 0
    assert "no GPU" in capsys.readouterr().out


def test_out_of_time_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operators, "chosen_cases", lambda *_: SMALL[:2])
    out = tmp_path / "o.json"
    operators.main(operators.Options(device="cpu", minutes=1e-9, out=str(out)))
    assert json.loads(out.read_text())["left_out"] == [str(case) for case in SMALL[:2]]
    assert "left out" in capsys.readouterr().out


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="125M"):
        operators.chosen_cases(operators.Options(sizes="125M"), torch.device("cuda"))
    with pytest.raises(ValueError, match="'norms'"):
        operators.chosen_cases(operators.Options(families="norms"), CPU)


def test_families_are_chosen():
    chosen = operators.chosen_cases(operators.Options(families="layernorm,attention"), CPU)
    assert {case.family for case in chosen} == {"layernorm", "attention"}


def test_a_gpu_measures_four_sizes_and_six_lengths():
    chosen = operators.chosen_cases(operators.Options(), torch.device("cuda"))
    lengths = {case.shape[1] for case in chosen if case.operator == "attention"}
    assert lengths == {512, 1024, 2048, 4096, 8192, 16384}
    widths = {case.shape[-1] for case in chosen if case.operator == "add_layernorm"}
    assert widths == {768, 1024, 1280, 1600}
