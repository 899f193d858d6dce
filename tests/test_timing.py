"""Clocks, interleaving, and result files (bench/timing.py)."""

import json
import os
import sys
import time

import pytest
import torch

from bench import timing
from bench.timing import Timing, clock, environment, measure, write_result
from tests.numerics import DEVICE


class FakeClock:
    """Lets tests say how long each call takes: a variant advances `now` itself."""

    def __init__(self):
        self.now, self.prepared, self.samples = 0.0, 0, []

    def prepare(self):
        self.prepared += 1
        self.now += 1000.0  # flushing takes long, and must not be counted

    def start(self):
        self.began = self.now

    def stop(self):
        self.samples.append(self.now - self.began)

    def elapsed_ms(self):
        samples, self.samples = self.samples, []
        return samples


@pytest.fixture
def fake_clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(timing, "clock", lambda device: fake)
    return fake


def variants_that_take(fake, durations, log):
    def variant(name, ms):
        def call():
            log.append(name)
            fake.now += ms
        return call
    return {name: variant(name, ms) for name, ms in durations.items()}


def test_each_variant_gets_its_own_samples_though_the_order_rotates(fake_clock):
    log = []
    times = measure(variants_that_take(fake_clock, {"a": 1, "b": 20, "c": 300}, log), device="cpu",
                    warmup=0, repeats=4)
    assert {name: t.samples for name, t in times.items()} == {"a": (1,) * 4, "b": (20,) * 4,
                                                              "c": (300,) * 4}
    assert "".join(log) == "abc" "bca" "cab" "abc"
    assert fake_clock.prepared == 12


def test_warmup_is_not_timed(fake_clock):
    log = []
    times = measure(variants_that_take(fake_clock, {"a": 1}, log), device="cpu", warmup=5,
                    repeats=2)
    assert len(log) == 7 and len(times["a"].samples) == 2


def test_short_calls_are_repeated_until_a_sample_is_long_enough(fake_clock):
    log = []
    times = measure(variants_that_take(fake_clock, {"a": 2}, log), device="cpu", warmup=0,
                    repeats=3, min_time_ms=9)
    assert times["a"].samples == (2, 2, 2), "a sample is per call"
    assert len(log) == 1 + 3 * 5, "one call to see how long it takes, then ceil(9 / 2) a sample"


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": -1}])
def test_measure_refuses_senseless_counts(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        measure({}, device="cpu", **bad)


def test_median_and_quartiles():
    t = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (t.q1_ms, t.median_ms, t.q3_ms) == (2.0, 3.0, 4.0)
    assert t.samples == (5.0, 1.0, 2.0, 4.0, 3.0), "in the order they were taken"
    once = Timing((7.0,))
    assert (once.q1_ms, once.median_ms, once.q3_ms) == (7.0, 7.0, 7.0)


def test_the_clock_of_this_machine_measures_time():
    def work():
        return time.sleep(0.02) if DEVICE == "cpu" else torch.cuda._sleep(40_000_000)  # at 2 GHz

    slow = measure({"work": work, "nothing": lambda: None}, device=DEVICE, warmup=1, repeats=3)
    assert 10 < slow["work"].median_ms < 200
    assert slow["nothing"].median_ms < 5


def test_no_clock_for_unknown_devices():
    with pytest.raises(ValueError, match="meta"):
        clock("meta")


def test_environment_names_versions_commit_and_hardware():
    env = environment(DEVICE)
    assert env["torch"] == torch.__version__ and env["cpu"] and env["date"].endswith("+00:00")
    assert (env["gpu"] is None) == (DEVICE == "cpu")
    json.dumps(env)


def test_environment_runs_where_there_is_no_git_and_no_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    env = environment("cpu")
    assert env["commit"] is None and env["dirty"] is None


def test_the_command_is_recorded_relative_to_the_checkout(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(timing.ROOT / "bench" / "x.py"), "--a=b c"])
    assert environment("cpu")["command"] == "bench/x.py '--a=b c'"


def test_a_result_is_written_with_its_quartiles(tmp_path):
    path = tmp_path / "deep" / "r.json"
    write_result(path, {"timing": Timing((1.0, 2.0, 3.0)), "dtype": torch.bfloat16})
    read = json.loads(path.read_text())
    assert read == {"timing": {"median_ms": 2.0, "q1_ms": 1.5, "q3_ms": 2.5,
                               "samples_ms": [1.0, 2.0, 3.0]},
                    "dtype": "torch.bfloat16"}


@pytest.mark.parametrize("bad", [object(), float("nan")], ids=["object", "nan"])
def test_a_result_that_fails_to_encode_leaves_the_old_file_whole(tmp_path, bad):
    path = tmp_path / "r.json"
    write_result(path, {"good": 1})
    with pytest.raises((TypeError, ValueError)):
        write_result(path, {"a": [1] * 10_000, "b": bad})
    assert json.loads(path.read_text()) == {"good": 1}
    assert os.listdir(tmp_path) == ["r.json"], "no partial file left behind"
