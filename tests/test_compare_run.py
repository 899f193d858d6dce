"""Curves in and out of band (bench/compare_run.py)."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from bench import compare_run
from bench.compare_run import Options, main
from bench.curves.band import SMOOTH_STEPS, WIDENING, Run, band, judge, read_reference
from bench.timing import RESULTS, ROOT


def curve(level, steps=range(0, 1000, 100)):
    return dict.fromkeys(steps, level)


def run_at(level, name="x", noise=0.0, **curves):
    """A run with its evaluations at `level`, and batch losses that alternate by `noise`."""
    losses = {s: level + noise * (-1) ** s for s in range(200)}
    found = {"train/loss": curve(level), "val/loss": curve(level), "loss": losses} | curves
    return Run(name, found, {"eval_iters": 4, "seed": level}, None)


def write_run(folder, run):
    folder.mkdir()
    entries = [{"iter": s, "loss": v} for s, v in run.curves["loss"].items()]
    entries += [{"iter": s, "train/loss": v, "val/loss": run.curves["val/loss"][s]}
                for s, v in run.curves["train/loss"].items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return str(folder)


def test_the_band_by_hand():
    """Three runs at 1, 2 and 3 have a standard deviation of 1: the band is [1 - 3, 3 + 3]."""
    low, high = band("val/loss", np.arange(0, 1000, 100),
                     [run_at(level) for level in (1.0, 2.0, 3.0)])
    np.testing.assert_allclose((low, high), (np.full(10, -2.0), np.full(10, 6.0)))
    low, high = band("loss", np.arange(200), [run_at(level) for level in (1.0, 2.0, 3.0)])
    np.testing.assert_allclose((low, high), (np.full(200, -2.0), np.full(200, 6.0)))


def test_seeds_that_agree_by_chance_do_not_make_a_band_narrower_than_sampling_noise():
    # successive losses differ by 1, so s = 1 / sqrt(2), and 4 batches
    runs = [run_at(1.0, noise=0.5) for _ in range(3)]
    low, high = band("val/loss", np.arange(0, 1000, 100), runs)
    np.testing.assert_allclose(high - 1, np.full(10, 3 / np.sqrt(2) / 2))
    np.testing.assert_allclose(1 - low, high - 1)


def test_one_run_is_a_reference_by_its_sampling_noise():
    _, high = band("val/loss", np.arange(0, 1000, 100), [run_at(1.0, noise=0.5)])
    np.testing.assert_allclose(high - 1, np.full(10, 3 * np.sqrt(2) * 2 / np.sqrt(2) / 2))
    _, high = band("loss", np.arange(200), [run_at(1.0, noise=0.5)])
    assert high[199] - 1 == pytest.approx(6 / np.sqrt(50)), "50 batches stand behind it"
    with pytest.raises(ValueError, match="2 steps logged"):
        band("val/loss", np.arange(3),
             [run_at(1.0, **{"loss": {0: 1.0, 1: 1.0}, "val/loss": curve(1.0, range(3))})])


def test_the_first_step_outside_and_the_excess_are_told():
    reference = [run_at(level) for level in (1.0, 2.0, 3.0)]  # the band is [-2, 6]
    val = curve(2.0) | {300: 6.25, 400: 9.0, 500: -4.0}
    verdict = next(v for v in judge(run_at(2.0, **{"val/loss": val}), reference)
                   if v.curve == "val/loss")
    assert not verdict.inside and (verdict.beyond != 0).sum() == 3
    told = ("OUT from step 300: 6.2500, band [-2.0000, 6.0000], 0.2500 above; worst at step 400, "
            "3.0000 above")
    assert told in str(verdict)


def test_a_loss_that_is_no_number_is_outside():
    reference = [run_at(level) for level in (1.0, 2.0, 3.0)]
    losses = dict.fromkeys(range(200), 2.0) | {7: float("nan")}
    verdict = next(v for v in judge(run_at(2.0, loss=losses), reference) if v.curve == "loss")
    assert "OUT from step 7: nan" in str(verdict) and "not a number" in str(verdict)
    assert verdict.beyond[57] == 0, "no longer in the mean of the last 50 steps"


def test_a_run_is_compared_on_the_steps_that_all_have():
    reference = [run_at(level) for level in (1.0, 2.0, 3.0)]
    short = run_at(2.0, **{"val/loss": curve(2.0, range(0, 500, 50)), "train/loss": {},
                           "loss": {20: 2.0, 40: 2.0}})
    found = {v.curve: v.steps.tolist() for v in judge(short, reference)}
    assert found == {"val/loss": [0, 100, 200, 300, 400], "loss": [20, 40]}
    with pytest.raises(ValueError, match="no step in common"):
        judge(run_at(2.0, **{"val/loss": {7: 1.0}, "train/loss": {}, "loss": {}}), reference)


def test_exit_codes_and_plot(tmp_path, capsys):
    runs = [write_run(tmp_path / f"r{level}", run_at(level, noise=0.1))
            for level in (1.0, 1.1, 1.2, 5.0)]
    assert main(Options((runs[0], *runs[1:3]), plot=str(tmp_path / "p" / "curves.png"))) == 0
    assert (tmp_path / "p" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(Options((runs[3], *runs[:3]))) == 1
    assert "OUT OF BAND" in capsys.readouterr().out


@pytest.mark.parametrize("bad, told", [
    (("nowhere", "nowhere"), "nowhere: no metrics.jsonl"),
    (("good",), "what to compare it with"),
    (("good", "--reference=quikstart"),
     "--reference=quikstart: there are quickstart, quickstart_gpt2, shakespeare"),
    (("torn", "good"), "torn/metrics.jsonl, line 2: no entry"),
    (("empty", "good"), "no losses in it yet"),
    (("good", "good/metrics.json"), "no reference of curves"),
    (("listed", "good"), "listed/config.json: .*list.*; give the out_dir of a run"),
])
def test_bad_input_is_one_clear_line(bad, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good", run_at(1.0))
    (tmp_path / "good" / "metrics.json").write_text("{}")
    write_run(tmp_path / "listed", run_at(1.0))
    (tmp_path / "listed" / "config.json").write_text("[]")
    for name, text in {"torn": '{"iter": 0, "loss": 1.0}\n{"iter": 1, "lo\n{}\n',
                       "empty": '{"iter": 3, "lo'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    folders = tuple(b for b in bad if not b.startswith("--"))
    reference = next((b.partition("=")[2] for b in bad if b.startswith("--")), "")
    with pytest.raises(ValueError, match=told) as error:
        main(Options(folders, reference=reference))
    assert "\n" not in str(error.value)


def test_bad_input_exits_with_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "bench" / "compare_run.py", tmp_path, tmp_path],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no metrics.jsonl" in done.stderr


@pytest.mark.parametrize("name", ["quickstart", "quickstart_gpt2", "shakespeare"])
def test_committed_references_are_three_seeds_with_the_band_of_the_rule(name):
    path = RESULTS / f"reference-{name}.json"
    told, runs = json.loads(path.read_text()), read_reference(path)
    assert len(runs) == 3 and told["environment"]["commit"]
    assert told["training"].startswith("train/run.py ")
    rule = {"smooth_steps": SMOOTH_STEPS, "widening": WIDENING, "told_in": ""}
    assert told["rule"] | {"told_in": ""} == rule
    for curve_name, stored in told["band"].items():
        low, high = band(curve_name, np.array(told["steps"][curve_name]), runs)
        # losses have four decimals
        np.testing.assert_allclose((stored["low"], stored["high"]), (low, high), atol=5e-4)
    assert all(v.inside for run in runs for v in judge(run, runs))


def test_a_reference_needs_seeds_of_one_recipe():
    one, two = ({"eval_iters": 4, "seed": s, "learning_rate": 1e-3} for s in (1, 2))
    runs = [replace(run_at(1.0), config=c) for c in (one, two | {"learning_rate": 2e-3})]
    told = r"b is another recipe than a: learning_rate=0.002 \(not 0.001\)"
    with pytest.raises(ValueError, match=told):
        compare_run.reference_of(runs, ["a", "b"])
    with pytest.raises(ValueError, match="each with a seed of its own; these are 1, 1"):
        compare_run.reference_of([replace(r, config=one) for r in runs], ["a", "b"])


def test_a_reference_from_before_there_were_architectures_is_gpt2s():
    old, gpt2, other = (replace(run_at(1.0), config={"seed": 1} | more) for more in (
        {}, {"architecture": "gpt2"}, {"architecture": "nanochat"}))
    assert compare_run.differences(other, old) == "architecture=nanochat (not gpt2)"
    assert compare_run.differences(gpt2, old) == ""


@pytest.fixture(scope="module")
def stdlib_data(tmp_path_factory):
    from data.python_stdlib.prepare import main as prepare

    folder = tmp_path_factory.mktemp("stdlib")
    prepare(folder)
    return folder


@pytest.mark.parametrize("flags, code", [([], 0), (["--muon_lr=2e-3"], 1)],
                         ids=["as it should be", "wrong learning rate"])
def test_the_first_steps_of_the_quickstart_tell_a_good_run_from_a_bad_one(
        flags, code, stdlib_data, tmp_path, capsys):
    """With a seed that is not in the reference."""
    from train.run import main as train

    out = tmp_path / "out"
    assert train([str(ROOT / "configs" / "quickstart.py"), f"--data_dir={stdlib_data}",
                  f"--out_dir={out}", "--seed=5", "--device=cpu", "--dtype=float32",
                  "--max_iters=80", "--log_interval=1", "--eval_iters=2", *flags]) == 0
    assert main(Options((str(out),), reference="quickstart")) == code
    assert ("muon_lr=0.002 (not 0.02)" in capsys.readouterr().out) == bool(code)
