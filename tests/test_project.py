"""The projection onto many GPUs (bench/steps/project.py), by hand."""

import json
from dataclasses import replace

import pytest

from bench import floors
from bench.steps.project import GPUS, Options, measured, model, project, ring_ms, table
from bench.timing import RESULTS

GIVEN = Options(node_gbs=300.0, network_gbs=40.0, results="nowhere.json")


def test_one_gpu_is_the_floor():
    c, rates = model("124M"), floors.Rates(790.0, 4300.0)
    step = project(c, 1, GIVEN)
    assert step.communication_ms == step.exposed_ms == 0
    assert step.total_ms == pytest.approx(floors.ns_per_token(c, rates) * 2**19 * 1e-6)


def test_fractions_lengthen_their_own_parts():
    c = model("124M")
    halves = dict.fromkeys(("matmul_fraction", "attention_fraction", "memory_fraction"), 0.5)
    whole, half = project(c, 1, GIVEN), project(c, 1, replace(GIVEN, **halves))
    assert half.passes_ms == pytest.approx(2 * whole.passes_ms)
    assert half.optimizer_ms == pytest.approx(2 * whole.optimizer_ms)
    parts = {p.category: 0.0 for p in floors.step_parts(c)}
    for p in floors.step_parts(c):
        parts[p.category] += p.ns(floors.Rates(790.0, 4300.0)) * 2**19 * 1e-6
    slower = project(c, 1, replace(GIVEN, attention_fraction=0.5))
    assert slower.passes_ms - whole.passes_ms == pytest.approx(parts["attention"])


def test_rings_by_hand():
    """8 GB over 4 GPUs of a node at 2 GB/s: 3/4 of it, 3 s.

    Over two such nodes also half of a quarter at 1 GB/s: 1 s.
    """
    o = replace(GIVEN, node_gbs=2.0, network_gbs=1.0, gpus_per_node=4)
    assert ring_ms(8.0, 1, o) == 0
    assert ring_ms(8.0, 4, o) == pytest.approx(3000)
    assert ring_ms(8.0, 8, o) == pytest.approx(4000)


def test_ddp_hides_its_all_reduce_behind_the_last_backward_pass_only():
    c = model("124M")
    o = replace(GIVEN, network_gbs=1.0)
    step = project(c, 16, o)  # 32 sequences each, two micro-steps
    assert step.communication_ms == pytest.approx(2 * ring_ms(floors.parameters(c) * 4e-9, 16, o))
    assert step.exposed_ms == pytest.approx(step.communication_ms - step.passes_ms / 2 * 2 / 3)
    bare = project(c, 16, replace(o, overlap=0.0))
    assert bare.exposed_ms == pytest.approx(step.communication_ms)
    assert project(c, 16, replace(o, network_gbs=1e6, node_gbs=1e6)).exposed_ms == 0


def test_fsdp_gathers_twice_in_each_micro_step_and_shares_the_optimizer():
    c = model("1558M")
    o = replace(GIVEN, parallel="fsdp")
    step, alone = project(c, 16, o), project(c, 1, o)
    gathers = 2 * 2 * ring_ms(floors.parameters(c) * 2e-9, 16, o)
    scatters = 2 * ring_ms(floors.parameters(c) * 4e-9, 16, o)
    assert step.communication_ms == pytest.approx(gathers + scatters)
    assert step.optimizer_ms == pytest.approx(alone.optimizer_ms / 16)


def test_the_table_says_that_it_is_a_projection_and_what_is_not_measured(tmp_path):
    lines = table(GIVEN).splitlines()
    assert lines[0].startswith("PROJECTION, not a measurement") and lines[2].count("projected") == 4
    rows = {int(line.split("|")[1]): line for line in lines[4:]}
    assert tuple(rows) == GPUS and "not measured" in rows[1] and "not measured" in rows[512]
    assert "n/a" in rows[1024], "512 sequences"
    result = tmp_path / "mfu.json"
    speeds = {"ours, torch": 4e5, "ours, triton, compiled": 6e5, "transformers": 9e5}
    variants = {name: {"tokens_per_s": speed} for name, speed in speeds.items()}
    result.write_text(json.dumps({"cases": {"124M": {"variants": variants}}}))
    assert measured("124M", result) == ("ours, triton, compiled", 6e5)
    assert measured("350M", result) is None
    ceiling = 2**19 / project(model("124M"), 1, GIVEN).total_ms * 1e3
    row = table(replace(GIVEN, results=str(result))).splitlines()[4]
    assert f"600,000 (ours, triton, compiled), {6e5 / ceiling:.0%} of the projection" in row


def test_another_file_is_no_measurement_and_a_damaged_one_is_refused(tmp_path):
    assert measured("124M", RESULTS / "stitch.json") is None
    damaged = tmp_path / "mfu.json"
    for text in ("[]", '{"cases": '):
        damaged.write_text(text)
        with pytest.raises(ValueError, match="mfu.json: .*; name a result of bench/mfu.py"):
            measured("124M", damaged)


@pytest.mark.parametrize("bad", [{"matmul_fraction": 0.0}, {"memory_fraction": 1.1},
                                 {"overlap": -0.1}, {"network_gbs": 0.0}])
def test_senseless_givens_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(GIVEN, **bad)
