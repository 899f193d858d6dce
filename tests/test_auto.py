"""--kernels=auto (train/auto.py): by a clock that the tests hold, then by the real one on a CPU."""

import json
import os
from dataclasses import replace

import pytest
import torch

from common.files import write_json
from gpt import GPTConfig
from kernels import FAMILIES, calls, launch, resolve
from kernels.calls import Case
from tests import ranks
from train import auto, parallel
from train.candidates import Asked, Candidate, asked_of, candidates, read_tuned, tuned_file
from train.command_line import parse
from train.config import Config
from train.parallel import World

ALONE = World(0, 1, 0, 1, 0)
CPU = torch.device("cpu")


class HeldClock:
    """A clock that stands, but for what steps add to it."""

    def __init__(self):
        self.device, self.seconds = CPU, 0.0

    def __call__(self):
        return self.seconds

    def takes(self, seconds):
        """A step that takes so long."""
        def step():
            self.seconds += seconds
        return step


@pytest.fixture
def clock():
    return HeldClock()


BASE, A, B = Candidate("torch"), Candidate("a"), Candidate("b")
ATTENTION = Asked("attention", ((Case("attention_qkv", (2, 8, 2, 4), torch.float32), 12),))


def timed(monkeypatch, clock, seconds, until=1e9, among=(BASE, A, B), preparing=0.0):
    """A trial in which each takes its `seconds`; an exception instead is raised at once."""
    def prepared(asked, candidate, device):
        clock.seconds += preparing
        found = seconds[candidate.backend]
        if isinstance(found, Exception):
            raise found
        return [clock.takes(found) for _ in asked.calls]

    monkeypatch.setattr(auto, "prepared", prepared)
    return tried(ATTENTION, list(among), clock, until)


def tried(asked, among, clock, until=1e9):
    trial = auto.Trial(asked, among)
    auto.prepare([trial], clock, until)
    auto.time_ready(trial, clock, until)
    return trial


def test_the_faster_candidate_is_taken_and_the_line_says_by_how_much(monkeypatch, clock):
    times = timed(monkeypatch, clock, {"torch": 0.003, "a": 0.002, "b": 0.0025})
    assert times.ms == pytest.approx({BASE: 36.0, A: 24.0, B: 30.0})  # 12 calls
    assert auto.fastest(times.ms) is A
    assert auto.line(A, times) == "a, 1.25 x as fast as b (24 ms a micro-step)"


@pytest.mark.parametrize(("a", "taken"), [(0.0029, BASE), (0.0028, A), (0.004, BASE)],
                         ids=["within the margin", "faster", "slower"])
def test_pytorchs_stays_unless_another_gains_the_margin(monkeypatch, clock, a, taken):
    times = timed(monkeypatch, clock, {"torch": 0.00295, "a": a}, among=(BASE, A))
    assert auto.fastest(times.ms) is taken
    assert ("within noise of a" in auto.line(taken, times)) == (a == 0.0029)


def test_a_candidate_that_fails_is_left_out_and_said(monkeypatch, clock):
    times = timed(monkeypatch, clock, {"torch": 0.003, "a": RuntimeError("no compiler\nhere"),
                                       "b": ValueError("forward tensor 0: error 1")})
    assert list(times.ms) == [BASE]
    told = auto.line(BASE, times)
    assert told == ("torch; a left out: RuntimeError: no compiler; "
                    "b left out: ValueError: forward tensor 0: error 1")


def test_where_pytorchs_fails_the_best_of_the_others_is_taken(monkeypatch, clock):
    times = timed(monkeypatch, clock, {"torch": RuntimeError("x"), "a": 0.003, "b": 0.002})
    assert auto.fastest(times.ms) is B
    none = timed(monkeypatch, clock, dict.fromkeys(("torch", "a", "b"), RuntimeError("x")))
    assert auto.fastest(none.ms).backend == "torch"


def test_what_cannot_be_measured_in_time_stays_pytorchs(monkeypatch, clock):
    """The last candidate is not begun; then no time is left for enough rounds."""
    times = timed(monkeypatch, clock, {"torch": 3.0, "a": 1.0, "b": 0.1}, until=5.0, preparing=3.0)
    assert auto.fastest(times.ms).backend == "torch"
    assert times.left_out == dict.fromkeys((BASE, A, B), "no time left")


def test_every_familys_first_candidates_come_before_any_second_one(monkeypatch, clock):
    begun = []
    monkeypatch.setattr(auto, "prepared", lambda asked, candidate, device: begun.append(
        (asked.family, str(candidate))) or clock.takes(1.0)())
    norms = Asked("layernorm", ())
    trials = [auto.Trial(ATTENTION, [BASE, A, B]), auto.Trial(norms, [BASE, A])]
    auto.prepare(trials, clock, until=3.5)
    assert begun == [("attention", "torch"), ("layernorm", "torch"), ("attention", "a"),
                     ("layernorm", "a")]
    assert trials[0].left_out == {B: "no time left"}


def test_what_was_too_short_is_measured_again_by_the_next_run(cache, monkeypatch):
    monkeypatch.setattr(auto, "LIMIT_S", 0.0)
    short = decide(config())
    assert not short.measured["complete"] and short.backends["attention"] == "torch"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    monkeypatch.setattr(auto, "WORTH_MEASURING_FLOPS", 0.0)
    assert decide(config()).why == "auto: measured now"


def test_a_wrong_candidate_is_told(monkeypatch):
    real = calls.operator

    def operator(case, backend):
        if backend != "off":
            return real(case, backend)
        return lambda *args, **options: real(case, "torch")(*args, **options) * 1.01

    monkeypatch.setattr(calls, "operator", operator)
    times = tried(ATTENTION, [BASE, Candidate("off")], auto.Clock(CPU))
    (reason,) = times.left_out.values()
    assert reason.startswith("ValueError: forward tensor 0: error")


# -- what is asked for -----------------------------------------------------------


def config(*flags, **model):
    shape = {"block_size": 32, "vocab_size": 65, "n_layer": 3, "n_head": 2, "n_embd": 16} | model
    c = parse(["--dataset=shakespeare_char", "--batch_size=2", "--device=cpu", *flags])
    return replace(c, model=GPTConfig(**shape))


def test_the_calls_of_both_architectures():
    asked = asked_of(config(dropout=0.1, bias=False, window=7), torch.bfloat16)
    assert {family: str(wanted) for family, wanted in asked.items()} == {
        "attention": "3 x attention_qkv 2x32x2x8 bfloat16 window=7+dropout=0.1",
        "layernorm": "6 x add_layernorm 64x16 bfloat16 nobias",
        "cross_entropy": "1 x linear_cross_entropy 64x16x65 bfloat16"}
    asked = asked_of(config("--document_mask=True", architecture="nanochat"), torch.float32)
    assert {family: str(wanted) for family, wanted in asked.items()} == {
        "attention": "3 x attention_qkv 2x32x2x8 float32 rotary+documents",
        "layernorm": "6 x add_rmsnorm 64x16 float32",
        "cross_entropy": "1 x linear_cross_entropy 64x16x65 float32 capped=15.0"}


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_every_case_that_is_asked_can_be_computed_on_a_cpu(architecture):
    c = config("--document_mask=True", architecture=architecture, dropout=0.2, window=5)
    for family, asked in asked_of(c, torch.bfloat16).items():
        times = tried(asked, candidates(family, CPU, False, {}), auto.Clock(CPU))
        assert not times.left_out and len(times.ms) == (3 if family == "attention" else 1)


def test_on_a_gpu_there_are_ours_at_three_settings_and_cudnn(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "NVIDIA H200")
    gpu = torch.device("cuda")
    found = list(map(str, candidates("attention", gpu, True, read_tuned(gpu))))
    assert found[:3] == ["torch compiled", "triton", "cudnn compiled"]
    assert found[-2:] == ["triton with settings 2", "triton with settings 3"]
    file = tuned_file("NVIDIA H200")
    write_json(file, {"rows": [{"call": "rotary(64)", "settings": {"ROWS": 8}, "before": {}}]})
    tuned = candidates("layernorm", gpu, False, read_tuned(gpu))[2]
    assert str(tuned) == "triton tuned" and tuned.settings == {"rotary(64)": {"ROWS": 8}}
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"tune-NVIDIA-H200\.json.*run bench/tune.py again"):
        read_tuned(gpu)
    assert set(launch.ALTERNATIVES) == set(FAMILIES)
    assert all(len(rows) <= 2 for rows in launch.ALTERNATIVES.values())


# -- the whole, on a CPU -----------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Every run is long enough to measure; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "WORTH_MEASURING_FLOPS", 0.0)
    return tmp_path / "ridgegpt" / "auto"


def decide(c: Config, before=None):
    return auto.decide(c, resolve(c.kernel.kernels, "cpu", **c.kernel.families), CPU,
                       torch.float32, before, ALONE)


def test_a_later_run_takes_what_was_measured(cache):
    first, second = decide(config()), decide(config())
    assert first.why == "auto: measured now" and second.why.startswith("auto: measured before")
    assert first.measured == second.measured and first.backends == second.backends
    assert str(second).count("\n") == 1 and "\n  attention: " in str(second)
    other = decide(config(n_head=4))
    assert other.why == "auto: measured now"


def test_only_what_is_left_to_auto_is_measured(cache):
    assert decide(config("--kernels=torch")).why == "--kernels=torch"
    chosen = decide(config("--attention=reference"))
    assert chosen.backends["attention"] == "reference" and not chosen.measured["lines"]
    assert not list(cache.glob("*")) or chosen.measured["backends"].keys() == {
        "layernorm", "cross_entropy"}


def test_a_short_run_on_a_cpu_does_not_measure(cache, monkeypatch):
    monkeypatch.setattr(auto, "WORTH_MEASURING_FLOPS", 1e20)
    assert decide(config()).why == "auto: PyTorch's on cpu, as the run is too short to measure"
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"machine": 5}', b"[]"])
def test_a_damaged_cache_is_written_anew(cache, damage):
    decide(config())
    (file,) = cache.glob("*.json")
    file.write_bytes(damage)
    again = decide(config())
    assert again.why.startswith("auto: measured now; ") and str(file) in again.why
    assert json.loads(file.read_text())["backends"] == again.measured["backends"]


def test_a_damaged_file_of_tune_is_said_and_does_not_stop_the_run(cache, monkeypatch):
    def damaged(device):
        raise ValueError("tune-X.json: not JSON")

    monkeypatch.setattr(auto, "read_tuned", damaged)
    assert decide(config()).why == "auto: measured now; tune-X.json: not JSON"


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(cache, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(auto, "write_json", full)
    assert decide(config()).why.endswith("not kept: [Errno 28] No space left on device")
    assert not list(cache.glob("*.json"))


def test_another_version_of_the_kernels_is_measured_anew(cache, monkeypatch):
    first = decide(config())
    real = auto.machine
    monkeypatch.setattr(auto, "machine", lambda device: real(device) | {"kernels": "others"})
    assert decide(config()).why == "auto: measured now"
    assert len(list(cache.glob("*.json"))) == 2
    resumed = decide(config(), before=first.measured)
    assert resumed.why.endswith("so bits may change")


def test_a_resumed_run_keeps_what_it_had(cache):
    first = decide(config())
    had = json.loads(json.dumps(first.measured)) | {"backends": {"attention": "blocks"}}
    assert decide(config(), before=had).backends["attention"] == "blocks"
    for damaged in ({"machine": 5}, had | {"settings": []}):
        with pytest.raises(ValueError, match=r"state\.json of the checkpoint.*--kernels=torch"):
            decide(config(), before=damaged)
    unmeasured = decide(config(), before={})
    assert unmeasured.why == "auto: PyTorch's on cpu, as before" and not unmeasured.measured


# -- several ranks -------------------------------------------------------------------


def choose_on_a_rank(out, names, cache):
    """Write this rank's choice to `out`; its device is called `names[rank]`."""
    os.environ["XDG_CACHE_HOME"] = cache
    w = parallel.world()
    parallel.start(w, CPU, config().parallel)
    auto.WORTH_MEASURING_FLOPS = 0.0
    auto.hardware.device_name = lambda device: names[w.rank]
    measured = []
    auto.measured = lambda *args: measured.append(w.rank) or auto.Decision(
        **args[3], backends={"attention": "blocks"}, settings={}, lines={}, complete=True)
    c = config()
    choice = auto.decide(c, resolve("auto", "cpu"), CPU, torch.float32, None, w)
    (out / f"{w.rank}.json").write_text(json.dumps([choice.backends, choice.why, measured]))
    parallel.stop()


@pytest.mark.parametrize(("names", "backend", "who"), [
    (("H200", "H200"), "blocks", [[0], []]), (("H200", "H100"), "torch", [[], []])],
    ids=["alike", "different"])
def test_all_ranks_take_what_rank_0_measured(tmp_path, names, backend, who):
    assert ranks.run(choose_on_a_rank, (tmp_path, names, str(tmp_path)), 2, tmp_path) == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [measured for _, _, measured in found] == who
    assert found[0][:2] == found[1][:2] and found[0][0]["attention"] == backend
    if backend == "torch":
        assert found[0][1] == "auto: PyTorch's, as the ranks' devices differ: H100, H200"
