"""The pictures of the results (bench/plots.py)."""

import json

import pytest
import torch

from bench import plots
from bench.ops.peers import implementations
from kernels.calls import Case

ENVIRONMENT = {"cpu": "X", "threads": 2, "gpu": None, "torch": "2", "python": "3",
               "commit": "0123456789", "date": "2026-01-01T", "command": "bench/x.py"}
STEP = {"median_ms": 10.0, "q1_ms": 9.0, "q3_ms": 11.0}
RATES = {"matmul_tflops": 100.0, "copy_gbs": 1000.0}  # the ridge is at 100 operations per byte


def measured(of_floor):
    return {"timing": STEP, "tflops": None, "gbs": None, "of_floor": of_floor}


OPERATORS = {"environment": ENVIRONMENT, "rates": RATES, "cases": {
    "attention": {"operator": "attention", "shape": [1, 64, 2, 8], "floor": {
        "forward": {"flops": 1e9, "bytes": 1e6}, "backward": {"flops": 2e9, "bytes": 2e6},
        "both": {"flops": 3e9, "bytes": 3e6}},
        "variants": {"ours": dict.fromkeys(plots.NOMINAL_PASSES, measured(0.5)),
                     "torch": {**dict.fromkeys(plots.NOMINAL_PASSES, measured(0.4)),
                               "backward": None}}},
    "cross_entropy": {"operator": "cross_entropy", "shape": [10, 100], "floor": {
        "forward": {"flops": 0.0, "bytes": 2000.0}, "backward": None,
        "both": {"flops": 0.0, "bytes": 4000.0}},
        "variants": {"ours": {**dict.fromkeys(plots.NOMINAL_PASSES, measured(0.5)),
                              "backward": measured(None)}}}}}
CATEGORIES = {"matmul": {"ms": 6.0, "floor_ms": 4.0}, "norm": {"ms": 1.0, "floor_ms": 1.5},
              "idle": {"ms": 3.0, "floor_ms": 0.0}}
TRAINING = {"environment": ENVIRONMENT, "cases": {"small": {
    "batch_size": 2, "config": {"block_size": 64},
    "variants": {"ours": {"dtype": "float32", "step": STEP, "tokens_per_s": 12_800.0}},
    "profile": {"variants": {"ours": {"step_ms": 10.0, "floor_ms": 5.5, "tokens": 128,
                                      "categories": CATEGORIES}}}}}}


def implementations_of_all():
    return [implementations(Case(operator, (4, 8, 2, 4)), torch.device("cpu"))
            for operator in plots.MARKERS]


@pytest.fixture
def figure():
    matplotlib = pytest.importorskip("matplotlib.figure")
    return matplotlib.Figure()


def test_a_point_is_as_far_below_the_roof_as_it_is_from_its_floor():
    flat = OPERATORS["cases"]["attention"]
    assert plots.intensity_and_speed(flat, "forward", 0.5, RATES) == pytest.approx((1000.0, 50.0))
    # 5 nominal operations for each of 1,000 elements of 2 bytes
    rising = OPERATORS["cases"]["cross_entropy"]
    assert plots.intensity_and_speed(rising, "forward", 0.5, RATES) == pytest.approx((2.5, 1.25))


def test_the_roofline_has_every_measured_phase_and_no_other(figure):
    plots.roofline(OPERATORS, figure)
    points = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert len(points) == 2 + 1 + 2, "ours two; torch one, without its backward; the loss two"
    assert {name for case in implementations_of_all() for name in case} <= set(plots.COLORS)


def test_the_waterfall_ends_at_what_was_measured(figure):
    plots.waterfall(TRAINING, figure)
    bars = figure.axes[0].patches
    assert bars[-1].get_width() == 10.0 and len(bars) == 2 + 3 + 1
    assert bars[-2].get_x() + bars[-2].get_width() == pytest.approx(10.0)


def test_tokens_per_second_by_variant(figure):
    plots.tokens(TRAINING, figure)
    assert [patch.get_width() for patch in figure.axes[0].patches] == [12_800.0]


def test_pictures_are_drawn_of_the_results_there_are(tmp_path):
    (tmp_path / "operators-cuda.json").write_text(json.dumps(OPERATORS))
    (tmp_path / "mfu-cpu.json").write_text(json.dumps(TRAINING))
    names = {path.name for path in plots.main(plots.Options(results=str(tmp_path)))}
    assert names == {"roofline-cuda.png", "tokens-cpu.png", "waterfall-cpu.png"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    with pytest.raises(ValueError, match=r"bench/suite\.py"):
        plots.main(plots.Options(results=str(tmp_path / "none")))


def test_a_result_without_a_profile_has_no_waterfall(tmp_path):
    case = {k: v for k, v in TRAINING["cases"]["small"].items() if k != "profile"}
    (tmp_path / "mfu-cpu.json").write_text(json.dumps(TRAINING | {"cases": {"small": case}}))
    assert plots.source("waterfall", "cpu", tmp_path) is None
    assert plots.source("tokens", "cpu", tmp_path) is not None
