"""Choosing launch settings by measurement (bench/tune.py); here on a CPU, in the interpreter."""

import json
from pathlib import Path

import pytest
import torch
import triton

from bench import tune
from bench.aot.offline import offline
from bench.ops import cases
from bench.timing import Timing, write_result
from bench.tune import candidates, choose, fastest
from kernels import calls, launch
from kernels.calls import Case
from tests.numerics import DEVICE


@pytest.fixture(scope="module")
def todays():
    """What the models ask of launch.py on an H100, and what they are given: {Call: settings}."""
    launch.use({})
    with offline((9, 0), lambda *launched: None):
        for case in cases.models("124M"):
            dict(calls.run(calls.operator(case, "triton"), calls.arguments(case, "meta"),
                           calls.options(case, "meta")))
    return launch.given()


def test_every_tunable_function_of_launch_is_tuned_and_used(todays):
    tunable = {name for name, value in vars(launch).items() if hasattr(value, "__wrapped__")}
    assert {call.function for call in todays} == set(tune.KNOBS) == tunable


def test_candidates_begin_with_todays_and_are_all_different(todays):
    for call, current in todays.items():
        settings = list(candidates(call, current).values())
        assert settings[0] == current and len(settings) > 3, call
        assert all(a != b for i, a in enumerate(settings) for b in settings[:i]), call
        assert all(type(s) is type(current) for s in settings), call


def test_layernorm_candidates_cover_the_row(todays):
    for call, current in todays.items():
        if call.function in ("layernorm_forward", "rmsnorm_forward", "rmsnorm_backward"):
            assert {s["CHUNKS"] * s["LANES"] for s in candidates(call, current).values()} == {1024}
        if call.function == "layernorm_backward":
            for s in candidates(call, current).values():
                assert (s["CHUNKS"] - 1) * s["LANES"] < 768 <= s["CHUNKS"] * s["LANES"]


def timings(**medians):
    return {name: Timing((ms,)) for name, ms in medians.items()}


@pytest.mark.parametrize(("times", "chosen"), [
    (timings(now=1.0, a=0.9, b=0.8), "b"),
    (timings(now=1.0, a=0.995), "now"),  # within what two runs differ by
    (timings(now=1.0, a=1.1), "now"),
    (timings(a=2.0, b=3.0), "a"),  # today's does not run on this GPU
], ids=["faster", "margin", "slower", "broken"])
def test_the_fastest_is_chosen_if_it_is_worth_a_change(times, chosen):
    assert choose(times, "now") == chosen


def test_medians_decide_and_not_the_best_sample():
    samples = {"now": (1.0, 1.0, 1.0), "lucky": (0.1, 1.2, 1.2), "steady": (0.9, 0.9, 0.9)}
    assert choose({name: Timing(times) for name, times in samples.items()}, "now") == "steady"


def peer(size, family, triton_ms, torch_ms):
    return {"size": size, "family": family,
            "step": {"triton": Timing((triton_ms,)), "torch": Timing((torch_ms,))}}


def test_triton_is_fastest_only_where_it_wins_at_every_size():
    rows = [peer("124M", "attention", 1, 2), peer("350M", "attention", 3, 2),
            peer("124M", "layernorm", 1, 2), peer("350M", "layernorm", 1, 3)]
    assert fastest(rows) == {"attention": "torch", "layernorm": "triton"}


def test_a_familys_operators_count_together():
    rows = [peer("124M", "layernorm", 3, 2), peer("124M", "layernorm", 1, 4)]
    assert fastest(rows) == {"layernorm": "triton"}


def test_results_are_kept_per_gpu_in_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert tune.tuned_file("NVIDIA H200") == Path("/c/ridgegpt/tune-NVIDIA-H200.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tune.tuned_file("A (b)") == Path.home() / ".cache/ridgegpt/tune-A-b.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="measures on a GPU"):
        tune.main(tune.Options())


SMALL = Case("layernorm", (5, 96), torch.float32)
RUNS = torch.cuda.is_available() or triton.knobs.runtime.interpret
needs_kernels = pytest.mark.skipif(not RUNS, reason="nothing runs the Triton kernels here")


@needs_kernels
def test_inaccurate_operators_are_told():
    def off(*args):
        return calls.operator(SMALL, "reference")(*args) * 1.001

    assert calls.fault(calls.operator(SMALL, "triton"), SMALL, DEVICE) == ""
    assert "forward tensor 0: error" in calls.fault(off, SMALL, DEVICE)
    assert "error nan" in calls.fault(lambda *args: off(*args) * float("nan"), SMALL, DEVICE)


@needs_kernels
def test_only_settings_with_right_results_are_timed_and_all_is_written(
        monkeypatch, tmp_path, capsys):
    """A tile of half the row forgets elements; one whose size is no power of two does not run."""
    good, forgetful, broken = [{"CHUNKS": 1, "ROWS": r, "LANES": n, "num_warps": 4}
                               for r, n in ((1, 128), (1, 64), (3, 96))]
    tried = {"layernorm_backward": ("step", lambda call, current: [good, forgetful, broken])}
    monkeypatch.setattr(tune, "KNOBS", tried)
    result = tune.tune([("tiny", SMALL, SMALL)], DEVICE, repeats=2, compiled=lambda fn: fn)
    (row,) = result["rows"]
    assert set(row["failed"]) == {str(forgetful), str(broken)}
    assert "backward tensor" in row["failed"][str(forgetful)]
    assert set(row["times"]) == {str(good), str(row["before"])}
    assert row["settings"] in (good, row["before"])
    write_result(tmp_path / "r.json", result)
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["peers"][0]["step"]["torch"]["median_ms"] > 0
    assert f"layernorm_backward(96): {row['settings']}" in capsys.readouterr().out
