"""Clocks, interleaving, and result files (bench/timing.py)."""

import json
import os
import sys
import time

import pytest
import torch

from bench import timing
from bench.ops import flush
from bench.timing import Timing, clock, environment, measure, write_result
from kernels.calls import Case
from tests.numerics import DEVICE


class FakeClock:
    """Lets tests say how long each call takes: a variant advances `now` itself."""

    def __init__(self):
        self.now, self.prepared, self.samples = 0.0, 0, []

    def prepare(self, host_ms):
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
    monkeypatch.setattr(timing, "clock", lambda *_: fake)
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


# -- a GPU's clock, on a GPU that is made up -------------------------------------


class FakeGpu:
    """The host's time and the device's, in ms: a launch takes both, and the host runs ahead."""

    def __init__(self):
        self.host, self.device, self.slept = 0.0, 0.0, []

    def launch(self, host_ms, device_ms):
        self.host += host_ms
        self.device = max(self.device, self.host) + device_ms

    def sleep(self, cycles):
        self.slept.append(cycles / timing.CYCLES_PER_MS)
        self.launch(0.0, self.slept[-1])

    def synchronize(self, _):
        self.host = max(self.host, self.device)

    def operator(self, launches, host_ms, device_ms):
        return lambda: [self.launch(host_ms, device_ms) for _ in range(launches)]


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(fake.host, fake.device)

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", fake.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(time, "perf_counter", lambda: fake.host / 1e3)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    return fake


def timed(gpu, variants, stopwatch=None, **options):
    stopwatch = stopwatch or timing.CudaClock(torch.device("cpu"))
    options = {"warmup": 2, "repeats": 3, "min_time_ms": 0.0} | options
    return {name: t.samples for name, t in timing._measure(variants, stopwatch, **options).items()}


def test_a_slow_host_is_not_in_a_kernels_time(gpu, monkeypatch):
    """Forward and backward of a custom operator: four launches, 0.3 ms of the host each.

    A head start that does not follow from the call's host time leaves gaps between the kernels.
    """
    variants = {"slow host": gpu.operator(4, 0.3, 0.05), "quick": gpu.operator(1, 0.01, 2.0)}
    assert timed(gpu, variants)["slow host"] == pytest.approx([0.2] * 3)
    assert timed(gpu, variants)["quick"] == pytest.approx([2.0] * 3)
    monkeypatch.setattr(timing, "HEAD_START_MS", (0.5, 0.5))
    assert max(timed(gpu, variants)["slow host"]) > 0.7, "the made-up GPU shows the gaps"


@pytest.mark.parametrize(("host_ms", "head_start"), [(0.0, 0.5), (0.4, 0.8), (3.0, 6.0),
                                                     (500.0, 20.0)])
def test_the_head_start_is_twice_the_hosts_time_within_bounds(gpu, host_ms, head_start):
    timed(gpu, {"x": gpu.operator(1, host_ms, 0.1)})
    assert gpu.slept == pytest.approx([head_start] * 3)


def test_a_call_that_compiles_first_has_the_head_start_of_the_others(gpu):
    took = iter((900.0, 0.6, 0.7, *[0.6] * 3))
    timed(gpu, {"x": lambda: gpu.launch(next(took), 0.1)}, warmup=3)
    assert gpu.slept == pytest.approx([1.2] * 3)


@pytest.mark.parametrize(("way", "left"), [("read", 3.0), ("write", 0.0)])
def test_the_cache_is_flushed_by_reading_all_of_a_buffer(gpu, way, left):
    """Writing leaves changed lines, whose way to memory the next kernel pays for."""
    stopwatch = timing.CudaClock(torch.device("cpu"), flush=way)
    stopwatch._flush.fill_(3.0)
    stopwatch.prepare(0.0)
    assert stopwatch._flush.tolist() == [left] * 16
    assert stopwatch._sum.item() == (48.0 if way == "read" else 0.0)


def test_end_to_end_has_the_gaps_and_waits_only_at_the_ends(gpu):
    """Steps of 3 ms for the host and 2 for the device, or 1 and 5; a sample lasts 29 ms or more."""
    stopwatch = timing.clock("cuda", end_to_end=True)
    steps = {"host": gpu.operator(1, 3.0, 2.0), "device": gpu.operator(1, 1.0, 5.0)}
    found = timed(gpu, steps, stopwatch, min_time_ms=29.0)
    assert found["host"] == pytest.approx([(6 * 3 + 2) / 6] * 3), "ceil(29 / 5) calls"
    assert found["device"] == pytest.approx([(1 + 5 * 5) / 5] * 3), "ceil(29 / 6) calls"
    assert not gpu.slept


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_the_two_flushes_are_compared_on_a_gpu_alone(monkeypatch):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        flush.main(flush.Options())
    ways = []
    monkeypatch.setattr(flush, "measure", lambda variants, flush, **_: (
        ways.append(flush), variants[""](), {"": Timing((1.0, 2.0))})[-1])
    found = flush.compare(Case("rmsnorm", (4, 8)), torch.device("cpu"), 2)
    assert ways == ["read", "write"] * 2
    assert {way: t.samples for way, t in found.items()} == dict.fromkeys(ways, (1.0, 2.0) * 2)
