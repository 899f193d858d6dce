"""Drills: a run that is ended in many ways, or whose checkpoints are damaged, at random.

It is killed, interrupted, taken back and made to diverge, and still ends bit for bit as a run that
never was. On a CPU in float32, with one process and one thread.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from gpt.checkpoint_files import read_part, read_state
from gpt.run_folder import complete_checkpoints, find_checkpoint, newest_sound, step_of
from tests import ranks
from tests.conftest import TINY, write_tiny_data
from train import loop, run
from train.report import read_metrics

STEPS = 240
ENDS = {"SIGKILL": {-9}, "SIGTERM": {0}, "SIGHUP": {0}, "SIGINT": {130}, "twice": {130},
        "diverge": {2}, "back": {-9}}


def slow(n):
    return pytest.param(n, marks=pytest.mark.slow)


@pytest.fixture
def flags(tiny_flags):
    """240 steps, a checkpoint every 10."""
    mine = ("max_iters", "lr_decay_iters", "eval_interval", "eval_iters", "out_dir")
    kept = [f for f in tiny_flags if not f.startswith(tuple(f"--{name}=" for name in mine))]
    return [*kept, f"--max_iters={STEPS}", f"--lr_decay_iters={STEPS}", "--eval_interval=10",
            "--eval_iters=1", "--max_skipped=3"]


def tensors(folder):
    newest = find_checkpoint(folder)
    found = {f"{part}:{k}": v for part in ("model", "optimizer", "rng")
             for k, v in read_part(newest, part).items()}
    return read_state(newest)["step"], found


def assert_same_end(a, b):
    (step_a, a), (step_b, b) = tensors(a), tensors(b)
    assert step_a == step_b and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- kills ------------------------------------------------------------------------------


def diverging(flags, after):
    """Train, but a weight becomes NaN after so many steps."""
    train_step, left = loop.train_step, iter(range(after))

    def poison(run, lr):
        numbers = train_step(run, lr)
        if next(left, None) is None:
            run.model.transformer.ln_f.weight.data[3] = float("nan")
        return numbers

    loop.train_step = poison
    ranks.train(flags)


def end_somehow(how, flags, folder, rng, logs):
    """One attempt at the run, ended like `how`; its exit code."""
    flags = [*flags, f"--out_dir={folder}", "--init_from=auto"]
    if how == "back":
        earlier = complete_checkpoints(folder)[0]
        flags = [*flags[:-1], "--init_from=resume", f"--resume_dir={earlier}"]
    target, args = ranks.train, (flags,)
    if how == "diverge":
        target, args = diverging, (flags, rng.randrange(30))
    (process,) = processes = ranks.start(target, args, 1, logs)
    if how != "diverge":
        while process.is_alive() and not (logs / "0.log").exists():
            time.sleep(0.001)
        if how not in ("SIGKILL", "back") or rng.random() < 0.5:
            until_training(process, logs / "0.log")
        time.sleep(rng.uniform(0.0, 0.4))
        number = {"back": signal.SIGKILL, "twice": signal.SIGINT}.get(how) or signal.Signals[how]
        os.kill(process.pid, number)
        if how == "twice":
            time.sleep(rng.uniform(1.0, 1.3))
            if process.is_alive():
                os.kill(process.pid, number)
    return ranks.wait(processes)[0]


def until_training(process, log):
    """Wait until the run trains; a signal before that just ends it, with nothing to save."""
    while process.is_alive() and "tokens per iteration" not in log.read_text():
        time.sleep(0.001)
    time.sleep(0.05)


@pytest.mark.parametrize("attempts", [7, slow(120)])
def test_a_run_that_is_often_ended_ends_as_one_that_never_was(attempts, flags, tmp_path, capsys):
    unbroken = [*flags, f"--out_dir={tmp_path / 'unbroken'}"]
    assert ranks.run(ranks.train, (unbroken,), 1, tmp_path / "logs") == [0]
    folder, rng, done = tmp_path / "out", random.Random(attempts), 0
    hows = [*ENDS] * (attempts // len(ENDS) + 1)
    for number, how in enumerate(hows[:attempts]):
        there = complete_checkpoints(folder) if folder.exists() else []
        if (there and step_of(there[-1]) >= STEPS - 60) or (how == "back" and not there):
            shutil.rmtree(folder, ignore_errors=True)  # the end was near: begin anew
            there, how = [], "SIGKILL"
        reached = read_state(newest_sound(folder)[0])["step"] if there else 0
        code = end_somehow(how, flags, folder, rng, logs := tmp_path / f"logs{number}")
        said = (logs / "0.log").read_text()
        at_the_end = code == 0 and find_checkpoint(folder).name == f"step-{STEPS:08d}"
        assert code in ENDS[how] or at_the_end, (how, code, said[-2000:])
        assert "Traceback" not in said, (how, code, said[-2000:])
        if complete_checkpoints(folder):
            newest, faults = newest_sound(folder)
            assert not faults, (how, faults)
            assert how == "back" or read_state(newest)["step"] >= reached, how
            if how in ("SIGTERM", "SIGHUP", "SIGINT"):
                assert read_state(newest)["step"] > reached, said[-2000:]
        else:
            assert not there, f"{how} lost the run"
        done += 1
    ended = [*flags, f"--out_dir={folder}", "--init_from=auto"]
    assert ranks.run(ranks.train, (ended,), 1, tmp_path / "logs") == [0]
    assert_same_end(tmp_path / "unbroken", folder)
    steps = [e["iter"] for e in read_metrics(folder / "metrics.jsonl") if "loss" in e]
    evaluated = [e["iter"] for e in read_metrics(folder / "metrics.jsonl") if "val/loss" in e]
    assert steps == list(range(STEPS)) and evaluated == list(range(0, STEPS + 1, 10))
    with capsys.disabled():
        print(f" {done} ends", end="")


# -- damages ----------------------------------------------------------------------------


def flip(file, rng):
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file, rng):
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def grow(file, rng):
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def swap(file, rng):
    """Put another file of the same checkpoint in its place."""
    root = file.parent if (file.parent / "DONE").exists() else file.parent.parent
    others = [f for f in sorted(root.rglob("*")) if f.is_file() and f != file]
    file.write_bytes(rng.choice(others).read_bytes())


def drop(file, _):
    file.unlink()


def replaced(make):
    def damage(file, _):
        file.unlink()
        make(file)
    return damage


DAMAGES = {
    "flip": flip, "cut": cut, "grow": grow, "swap": swap, "drop": drop,
    "folder": replaced(Path.mkdir), "fifo": replaced(os.mkfifo),
    "endless": replaced(lambda f: f.symlink_to("/dev/zero")),
    "json": replaced(lambda f: f.write_text('{"a": [{"b": 1e999, "c": "\\ud800"}]}')),
    "deep": replaced(lambda f: f.write_text("[" * 100_000)),
}


@pytest.fixture(scope="module", params=["auto", "fsdp"])
def finished(request, tmp_path_factory):
    """A run of 12 steps with checkpoints at 8 and 12, in one file or in shards."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [f"--data_dir={write_tiny_data(folder / 'tiny')}", *TINY, f"--parallel={request.param}"]
    assert run.main([*flags, f"--out_dir={folder / 'out'}"]) == 0
    return flags, folder / "out"


@pytest.mark.parametrize("damages", [16, slow(160)])
def test_a_damaged_checkpoint_is_skipped_and_never_partly_read(damages, finished, tmp_path,
                                                               capsys):
    """The run resumes from the checkpoint before the damaged newest one, and ends the same.

    If that is damaged, too, the run says so in one line, and leaves every file as it was.
    """
    flags, undamaged = finished
    rng, done = random.Random(damages), 0
    newest = find_checkpoint(undamaged)
    files = sorted(f.relative_to(newest) for f in newest.rglob("*") if f.is_file())
    cases = [(how, file) for how in DAMAGES for file in files]
    rng.shuffle(cases)
    for number in range(damages):
        how, file = cases[number % len(cases)]
        both, out = number % 4 == 3, tmp_path / str(number)
        shutil.copytree(undamaged, out)
        for folder in complete_checkpoints(out)[0 if both else -1:]:
            DAMAGES[how](folder / file, rng)
        before = sorted(p.relative_to(out) for p in out.rglob("*"))
        code = run.main([*flags, f"--out_dir={out}", "--init_from=resume"])
        said = capsys.readouterr()
        assert "Traceback" not in said.err, (how, file)
        if code == 0:
            assert_same_end(out, undamaged)
        else:
            assert code == 2 and both and said.err.count("\n") == 1, (how, file, said.err)
            assert sorted(p.relative_to(out) for p in out.rglob("*")) == before
        shutil.rmtree(out)
        done += 1
    with capsys.disabled():
        print(f" {done} damages", end="")
