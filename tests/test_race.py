"""Races to a validation loss (bench/race.py). On a CPU, one thread or more, in float32."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from bench import race, report
from bench.curves import contestants, race_picture
from bench.curves.contestants import SEED, read_log
from bench.race import Options

ROOT = Path(__file__).parents[1]

# nanoGPT's part of a race: its flags, its config files, its lines, and a checkpoint that is ours.
# It notes when it ran, and the seed that torch was given.
FAKE = """
import json, sys, time
from pathlib import Path
class torch:
    def manual_seed(seed): torch.seed = seed
began = time.time()
max_iters, eval_interval, out_dir, dataset, losses = 0, 0, "", "", 3.0
for arg in sys.argv[1:]:
    if arg.startswith("--"):
        key, _, value = arg[2:].partition("=")
        globals()[key] = int(value) if value.isdigit() else value
    else:
        exec(open(arg).read())
torch.manual_seed(1337)
print(f"tokens per iteration will be: {batch_size * block_size:,}")
print("number of parameters: 0.01M")
for step in range(max_iters + 1):
    if step % eval_interval == 0:
        print(f"step {step}: train loss 3.0, val loss {4 - step / max_iters:.4f}")
        print(f"saving checkpoint to {out_dir}")
    ms = 5000 if step % eval_interval == 0 else 10
    print(f"iter {step}: loss 3.1000, time {ms:.2f}ms, mfu -100.00%")
Path(out_dir).mkdir()
Path(out_dir, "told.json").write_text(json.dumps(
    {"seed": torch.seed, "began": began, "ended": time.time(), "cwd": str(Path.cwd())}))
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder like nanoGPT's, whose train.py only prints."""
    folder = tmp_path / "nanoGPT"
    (folder / "config").mkdir(parents=True)
    (folder / "train.py").write_text(FAKE)
    (folder / "config" / "train_shakespeare_char.py").write_text(
        "gradient_accumulation_steps = 1\nbatch_size = 64\nblock_size = 256\nwarmup_iters = 100\n")
    return folder


OURS = ("configs/shakespeare_char.py --dtype=float32 --compile=False --block_size=16 "
        "--batch_size=4 --n_layer=1 --n_head=2 --n_embd=16 --dropout=0.0")


@pytest.fixture
def data(tiny_data):
    """With the vocabulary for nanoGPT, too."""
    chars = json.loads((tiny_data / "meta.json").read_text())["chars"]
    ids = {char: i for i, char in enumerate(chars)}
    (tiny_data / "meta.pkl").write_bytes(pickle.dumps(
        {"vocab_size": len(chars), "stoi": ids, "itos": dict(enumerate(chars))}))
    return tiny_data


@pytest.fixture
def options(tmp_path, data, checkout):
    return Options(nanogpt=str(checkout), ours=OURS, data_dir=str(data), smoke=True,
                   work=str(tmp_path / "work"))


@pytest.fixture
def theirs_ends_at(monkeypatch):
    """The fake has no weights: say the final loss of nanoGPT's; ours is evaluated."""
    measure = contestants.final_loss

    def set_to(loss):
        monkeypatch.setattr(contestants, "final_loss", lambda contestant, data, out: loss if
                            contestant.nanogpt else measure(contestant, data, out))
    return set_to


def result_of(options):
    return json.loads((Path(options.work) / options.case / "smoke.json").read_text())


def test_a_race_end_to_end(options, theirs_ends_at, capsys):
    """Turns, seeds, code left as it is, the ratios, the picture; and the table made of it."""
    theirs_ends_at(9.0)
    race.main(options)
    found, work = result_of(options), Path(options.work) / "macbook"
    turns = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()
             if " of 4: " in line]
    assert turns == ["nanoGPT, seed 1337", "ours, seed 1337", "nanoGPT, seed 1338",
                     "ours, seed 1338"]
    told = [json.loads(next(work.glob(f"nanogpt-{seed}-*/out/told.json")).read_text())
            for seed in (1337, 1338)]
    assert [t["seed"] for t in told] == [1337, 1338], "the second by a config file of the race"
    assert told[0]["cwd"] == options.nanogpt and told[0]["ended"] <= told[1]["began"]
    assert (work / "smoke.png").read_bytes().startswith(b"\x89PNG")
    ours, theirs = found["contestants"]["ours"], found["contestants"]["nanoGPT"]
    assert (ours["steps"], ours["tokens_per_step"]) == (20, 64)
    assert (theirs["steps"], theirs["tokens_per_step"]) == (20, 768)
    for run in ours["runs"].values():
        assert run["curve"]["tokens"] == [0, 640, 1280]
        assert run["curve"]["val_loss"][-1] < run["curve"]["val_loss"][0] < 4
        assert run["final_loss"] == pytest.approx(run["curve"]["val_loss"][-1], abs=0.1)
        assert 0 < run["training_s"] < run["total_s"]
    # 20 steps of 10 ms: the two that took 5 s are those with an evaluation
    assert theirs["runs"]["1338"]["training_s"] == pytest.approx(0.2)
    won = found["verdicts"]["nanoGPT"]
    assert (won["target"], won["reached_by"], won["steps"], won["tokens"]) == (9.0, "ours", 1, 12)
    assert str(options.work) not in ours["command"] + theirs["command"]
    assert "| nanoGPT | 20 | 0.015 |" in report.race(found)


@pytest.fixture
def launched(monkeypatch):
    """No trainer runs: its log is written, and the names of the folders are noted."""
    folders = []

    def launch(command, folder, place):
        assert not any(place.iterdir()) or list(place.glob("seed-*.py"))
        folders.append(place.name.rsplit("-", 1)[0])
        lines = [f"iter {i}: loss 3.0, time {10:.2f}ms, mfu 1%" for i in range(20)]
        lines += [f"step {i}: train loss 3.0, val loss {3 - i / 20}" for i in (0, 10, 20)]
        (place / "log.txt").write_text("\n".join(lines))
        return 7.0

    monkeypatch.setattr(contestants, "launch", launch)
    monkeypatch.setattr(contestants, "final_loss", lambda contestant, data, out: 2.0)
    return folders


def test_a_finished_run_is_kept_and_one_of_other_code_or_flags_is_not(options, checkout, launched):
    def again(**changes):
        launched.clear()
        race.main(replace(options, **changes))
        return launched

    everything = ["nanogpt-1337", "ours-1337", "nanogpt-1338", "ours-1338"]
    assert again() == everything
    assert again() == []
    assert again(seeds="1337,1339") == ["nanogpt-1339", "ours-1339"]
    assert again(ours=OURS + " --n_embd=32") == ["ours-1337", "ours-1338"]
    assert again() == [], "a race with other flags in between loses nothing"
    (checkout / "train.py").write_text(FAKE + "\n# changed")
    assert again() == ["nanogpt-1337", "nanogpt-1338"]
    with (Path(options.data_dir) / "train.bin").open("ab") as file:
        file.write(b"\0\0")
    assert again() == everything


def test_the_shortest_of_ours_that_reaches_it_is_compared():
    def entry(steps, loss):
        run = {"final_loss": loss, "training_s": float(steps), "total_s": steps + 10.0}
        return {"steps": steps, "tokens_per_step": 10, "runs": {"1": run, "2": run}}

    result = {"ours": ["a", "b", "c"], "contestants": {
        "nanoGPT": entry(800, 2.0), "a": entry(100, 2.1), "b": entry(200, 2.0),
        "c": entry(400, 1.9)}}
    found = race.verdict(result, "nanoGPT")
    assert (found["reached_by"], found["tokens"], found["training_s"]) == ("b", 4.0, 4.0)
    assert found["total_s"] == pytest.approx(810 / 210)


def test_a_run_that_was_disturbed_is_told():
    runs = {"1": {"training_s": 10.0}, "2": {"training_s": 11.0}, "3": {"training_s": 12.0}}
    both = {"a": {"runs": runs}, "b": {"runs": {seed: runs[seed] for seed in "12"}}}
    (warning,) = race.disturbed({"contestants": both})
    assert warning.startswith("warning: a trained 12.0 s from seed 3 and 10.0 s from another one")


def test_rates_and_lengths_are_contestants_of_their_own(options):
    options = replace(options, rates="2e-3", smoke=False,
                      ours=f"{OURS} --max_iters=500; {OURS} --max_iters=130 --lr_decay_iters=130")
    case = race.CASES["macbook"]
    plain, fast = race.rivals_of(case, options)
    assert plain.config.optim.learning_rate != fast.config.optim.learning_rate == 2e-3
    assert fast.name == "nanoGPT, rate 0.002" and fast.config.optim.min_lr == 2e-4
    short, long = race.ours_of(case, options)
    assert (short.name, long.name) == ("ours, 130 steps", "ours, 500 steps")
    settings = [c.config.run for c in (plain, short, long)]
    evaluated = [(c.eval_interval, c.eval_iters) for c in settings]
    # 15,360 tokens each; the interval divides 2000, 130 and 500 into 20 parts or a few more
    assert evaluated == [(100, 20), (5, 240), (25, 240)]


def test_a_log_is_read_to_the_end(tmp_path):
    log = tmp_path / "log.txt"
    lines = ["step 0: train loss 4.0, val loss 4.1"]
    lines += [f"iter {i}: loss 3.0, time {900 if i in (0, 4) else 10 + i:.2f}ms, mfu 1%"
              for i in range(4)]
    lines += ["step 4: train loss 3.0, val loss 3.2"]
    log.write_text("\n".join(lines) + "\n")
    found = read_log(log, steps=4, tokens_per_step=8)
    assert found["curve"] == {"steps": [0, 4], "tokens": [0, 32], "seconds": [0, 0.048],
                              "val_loss": [4.1, 3.2]}
    assert found["step_ms"]["median"] == 12 and found["training_s"] == pytest.approx(0.048)
    with pytest.raises(ValueError, match="4 of 6 steps and 2 evaluations"):
        read_log(log, steps=6, tokens_per_step=8)
    log.write_text("\n".join([*lines[:-1], "step 4: train loss nan, val loss nan"]) + "\n")
    with pytest.raises(ValueError, match="the validation loss at step 4 is nan"):
        read_log(log, steps=4, tokens_per_step=8)


@pytest.mark.parametrize("flags, told", [
    (["--nanogpt="], "--nanogpt=: no train.py there"),
    (["--seeds=1"], "--seeds=1: give two or more"),
    (["--seeds=1,1"], "given once"),
    (["--rates=fast"], "--rates=fast: numbers with commas"),
    (["--case=quickstart"], "--case=quickstart has no nanoGPT in it"),
    (["--data_dir=nowhere"], "nowhere/val.bin: no such file"),
    (["--ours=configs/nothing.py"], "no config file 'configs/nothing.py'"),
    (["--ours=;"], "--ours= is empty"),
    ([f"--ours={OURS};{OURS}"], "two of the same number of steps"),
])
def test_what_is_wrong_is_one_line_and_code_2(flags, told, options, launched, capsys):
    given = [f"--{name}={getattr(options, name)}" for name in
             ("nanogpt", "data_dir", "smoke", "work")]
    assert race.cli.run(race.main, Options, [*given, f"--ours={OURS}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error


def test_nanogpt_is_not_left_with_a_vocabulary_that_is_not_the_datas(options, launched):
    (Path(options.data_dir) / "meta.pkl").unlink()
    with pytest.raises(ValueError, match="nanoGPT, seed 1337: .*: no meta.pkl, so"):
        race.main(options)
    assert not launched


def test_a_run_that_fails_is_told_and_not_kept(options, checkout):
    (checkout / "train.py").write_text("print('out of luck'); raise SystemExit(3)")
    with pytest.raises(ValueError, match=r"nanoGPT, seed 1337: exit code 3: out of luck \(.*log"):
        race.main(options)
    place = next((Path(options.work) / "macbook").iterdir())
    assert not (place / "run.json").exists()


def test_our_trainer_against_itself(options, launched):
    """The case without nanoGPT has the same flags and evaluations for both."""
    race.main(replace(options, case="quickstart", nanogpt=""))
    found = result_of(replace(options, case="quickstart"))
    assert found["rivals"] == ["configs/quickstart_gpt2.py"]
    rival, ours = (c["command"].split() for c in found["contestants"].values())
    assert rival[:3] == ["python", "train/run.py", "configs/quickstart_gpt2.py"]
    assert {"--eval_interval=10", "--log_interval=1", "--max_iters=20"} <= {*rival} & {*ours}
    assert "--eval_iters=20" in rival and "--eval_iters=320" in ours  # of 1,024 and of 64 tokens


def test_the_picture_shows_the_ends_of_the_curves():
    runs = {"1": {"final_loss": 2.0, "curve": {"val_loss": [4.0, 2.1]}}}
    low, high = race_picture.limits({"contestants": {"a": {"runs": runs}}})
    assert low < 2.0 and 2.5 < high < 4.0


def test_nanogpt_itself(tmp_path, data):
    """A checkout beside this one, if there is one: 20 steps of its trainer, and its checkpoint."""
    folder = ROOT.parent / "nanoGPT"
    if not (folder / "train.py").is_file():
        pytest.skip(f"no checkout of nanoGPT at {folder}")
    case = race.CASES["macbook"]
    options = Options(nanogpt=str(folder), smoke=True)
    contestant = race.rivals_of(case, options)[0]
    found = contestants.run(contestant, SEED + 1, data, tmp_path)
    assert 1 < found["final_loss"] < 3.5
    assert found["curve"]["val_loss"][-1] == pytest.approx(found["final_loss"], abs=0.2)
