"""Which checkpoint a run resumes, and that none is lost: rollback, divergence, names, readers."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from gpt import run_folder, sample
from gpt.checkpoint_files import entry, read_part, read_state, save_tensors
from gpt.run_folder import (
    AGAIN,
    LOCK,
    complete_checkpoints,
    find_checkpoint,
    lock,
    newest_sound,
    reading,
)
from tests import ranks
from train import build, checkpoint, loop, run
from train.report import read_metrics


@pytest.fixture
def flags(tiny_flags):
    """12 steps, a checkpoint every 2."""
    return [*tiny_flags, "--eval_interval=2", "--keep_last=9"]


@pytest.fixture
def folder(flags, tmp_path):
    assert run.main(flags) == 0
    return tmp_path / "out"


def names(folder):
    return [f.name.removeprefix("step-000000") for f in complete_checkpoints(folder)]


def evaluations(folder):
    return [e["iter"] for e in read_metrics(folder / "metrics.jsonl") if "val/loss" in e]


def edit_state(folder, **values):
    """Change state.json, and its entry in DONE, as an older version could have written them."""
    file = folder / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    update_done(file)


def update_done(file):
    done = file.parent / "DONE"
    done.write_text(json.dumps(json.loads(done.read_text()) | {file.name: entry(file)}))


# -- going back -----------------------------------------------------------------------


def test_going_back_sets_later_checkpoints_aside(flags, folder, capsys):
    """Pruning keeps the latest steps: it once deleted all that a run saved after going back."""
    before = (folder / "metrics.jsonl").read_bytes()
    back = [*flags, "--init_from=resume", f"--resume_dir={folder / 'step-00000004'}",
            "--eval_interval=1", "--keep_last=2"]
    assert run.main([*back, "--max_iters=7"]) == 0
    assert "moved to" in capsys.readouterr().out
    assert names(folder)[-2:] == ["06", "07"]
    assert names(folder / "set-aside-1") == ["06", "08", "10", "12"]
    assert (folder / "set-aside-1" / "metrics.jsonl").read_bytes() == before
    assert evaluations(folder) == [0, 2, 4, 5, 6, 7]
    assert run.main([*flags, "--init_from=resume", "--max_iters=8"]) == 0
    assert "step-00000007, step 7" in capsys.readouterr().out


def test_a_run_is_not_mixed_with_another(flags, folder, tmp_path, capsys):
    """--resume_dir of one run and --out_dir of another once cut the other's metrics."""
    def contents():
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK}

    other, before = tmp_path / "other", contents()
    shutil.copytree(folder, other)
    assert run.main([*flags, "--init_from=resume", f"--resume_dir={other}", "--max_iters=14"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "already holds a run (step-00000012)" in said and "another --out_dir" in said
    assert contents() == before


# -- divergence -----------------------------------------------------------------------


def test_what_is_not_finite_is_neither_saved_nor_the_best(flags, folder, monkeypatch, capsys):
    """A diverged run's checkpoints were the newest, and one with a loss of NaN was the best."""
    train_step = loop.train_step

    def diverge(run, lr):
        numbers = train_step(run, lr)
        if run.step == 14:
            run.model.transformer.ln_f.weight.data.fill_(float("nan"))
        return numbers

    monkeypatch.setattr(loop, "train_step", diverge)
    assert run.main([*flags, "--init_from=resume", "--max_iters=40", "--max_skipped=7"]) == 2
    said = capsys.readouterr()
    assert "not saved: at step 16" in said.out and "7 steps in a row" in said.err
    assert names(folder)[-1] == "14"
    monkeypatch.setattr(loop, "train_step", train_step)
    assert run.main([*flags, "--init_from=resume", "--max_iters=16"]) == 0
    assert "step-00000014, step 14" in capsys.readouterr().out and names(folder)[-1] == "16"


def test_a_signal_after_a_weight_became_nan_saves_nothing(flags, folder, monkeypatch, capsys):
    """A save on a signal has no validation loss that would show it."""
    train_step = loop.train_step

    def diverge(run, lr):
        run.stop_request.reason = "a test"
        run.model.transformer.ln_f.weight.data[3] = float("nan")
        return train_step(run, lr)

    monkeypatch.setattr(loop, "train_step", diverge)
    assert run.main([*flags, "--init_from=resume", "--max_iters=40"]) == 0
    assert "not saved: at step 13" in capsys.readouterr().out and names(folder)[-1] == "12"


@pytest.mark.parametrize("what", ["loss", "weight", "moment"])
def test_a_run_does_not_go_on_from_what_is_not_finite(what, flags, folder, capsys):
    """As older versions saved it: the newest is passed over, and set aside."""
    newest = folder / "step-00000012"
    if what == "loss":
        edit_state(newest, val_loss=float("nan"))
    else:
        part = "model" if what == "weight" else "optimizer"
        tensors = read_part(newest, part)
        next(t for t in tensors.values() if t.dim()).view(-1)[3] = float("inf")
        save_tensors(tensors, newest / f"{part}.safetensors")
        update_done(newest / f"{part}.safetensors")
    assert run.main([*flags, "--init_from=resume", "--max_iters=12"]) == 0
    assert "step-00000010, step 10; not from" in capsys.readouterr().out
    assert (folder / "set-aside-1" / "step-00000012").is_dir() and names(folder)[-1] == "12"


def test_pruning_keeps_the_best_finite_one(flags, folder):
    losses = {4: 1.0, 6: float("nan"), 8: 2.0, 10: float("nan"), 12: None}
    for step, loss in losses.items():
        edit_state(folder / f"step-{step:08d}", val_loss=loss)
    checkpoint.prune(folder, keep_last=2, keep_every=0)
    assert names(folder) == ["04", "08", "12"]


def test_an_error_waits_for_the_checkpoint_that_is_being_written(flags, monkeypatch, tmp_path):
    """An error or Ctrl-C just after "saving checkpoint" lost that checkpoint, even the only one."""
    train_step, write, reached = loop.train_step, checkpoint._write_tensors, threading.Event()

    def fail(run, lr):
        if run.step == 2:
            reached.set()
            raise KeyboardInterrupt
        return train_step(run, lr)

    def late(*args):
        assert reached.wait(60)
        write(*args)

    monkeypatch.setattr(loop, "train_step", fail)
    monkeypatch.setattr(checkpoint, "_write_tensors", late)
    assert run.main(flags) == 130
    assert names(tmp_path / "out") == ["02"]


# -- names ------------------------------------------------------------------------------


def test_names_that_are_not_ours_are_left_alone(flags, folder):
    """A `step-00000004-old` ended every save with a traceback; a `step-best` was the newest."""
    for name in ("step-00000004-old", "step-best", "step-best.again", "step-4"):
        shutil.copytree(folder / "step-00000004", folder / name)
    (folder / "step-notes.txt").write_text("mine")
    moved = folder.parent / "moved"
    (folder / "step-00000004").rename(moved)
    (folder / "step-00000004").symlink_to(moved)
    assert find_checkpoint(folder).name == "step-00000012"
    assert run.main([*flags, "--init_from=resume", "--max_iters=16", "--keep_last=1"]) == 0
    assert names(folder)[-1] == "16" and len(names(folder)) <= 3
    assert {"step-00000004-old", "step-best", "step-best.again", "step-4",
            "step-notes.txt"} < {p.name for p in folder.iterdir()}
    assert (folder / "step-00000004").is_symlink() and read_state(moved)["step"] == 4


def test_a_linked_or_broken_step_makes_room_for_the_one_saved_again(flags, folder, tmp_path):
    """As a kill can leave it: a link to another disk, a folder without DONE."""
    (folder / "step-00000012").rename(tmp_path / "moved")
    (folder / "step-00000012").symlink_to(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", folder / f"step-00000012{AGAIN}")
    shutil.copytree(tmp_path / "moved", folder / f"step-00000010{AGAIN}")
    (folder / "step-00000010" / "DONE").unlink()
    assert run.main([*flags, "--init_from=resume", "--max_iters=13"]) == 0
    assert not (folder / "step-00000012").is_symlink() and (tmp_path / "moved" / "DONE").is_file()
    assert names(folder)[-3:] == ["10", "12", "13"]
    assert (folder / "set-aside-1" / "step-00000010").is_dir()


def test_steps_beyond_eight_digits_come_last(tmp_path):
    for step in (99_999_999, 100_000_000):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "DONE").write_text("{}")
    assert find_checkpoint(tmp_path).name == "step-100000000"


# -- saving a step again -----------------------------------------------------------------


def stopping(flags, at):
    """Train, asked to stop before step `at`, so that its checkpoint has no validation loss."""
    train_step = loop.train_step

    def ask(run, lr):
        if run.step == at - 1:
            run.stop_request.reason = "a test"
        return train_step(run, lr)

    loop.train_step = ask
    ranks.train(flags)


def dying(flags, moment):
    """Train, but die before the rename or removal number `moment` that touches a checkpoint."""
    left = iter(range(moment))

    def counted(real):
        def call(*args, **kwargs):
            if next(left, None) is None:
                os._exit(9)
            return real(*args, **kwargs)
        return call

    Path.rename, shutil.rmtree = counted(Path.rename), counted(shutil.rmtree)
    ranks.train(flags)


def test_saving_a_step_again_is_never_without_it(flags, tmp_path):
    """The older folder was removed before the new one was renamed: a kill between lost the step."""
    folder = tmp_path / "out"
    go_on = [*flags, "--init_from=resume", "--max_iters=4", "--keep_last=1"]
    assert ranks.run(stopping, ([*flags, "--keep_last=1"], 4), 1, tmp_path / "logs") == [0]
    assert evaluations(folder) == [0, 2] and names(folder)[-1] == "04"
    assert read_state(find_checkpoint(folder))["val_loss"] is None
    saved = tmp_path / "saved"
    shutil.copytree(folder, saved)
    for moment in range(20):
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
        (code,) = ranks.run(dying, (go_on, moment), 1, tmp_path / f"logs{moment}")
        newest, wrong = newest_sound(folder)
        assert read_state(newest)["step"] == 4 and not wrong
        assert run.main(go_on) == 0
        assert names(folder)[-1] == "04"
        assert read_state(find_checkpoint(folder))["val_loss"] is not None
        assert evaluations(folder) == [0, 2, 4]  # a kill after the line of 4 once left it twice
        assert not list(folder.glob(f"*{AGAIN}"))
        if code == 0:
            break
    assert moment >= 3 and code == 0


# -- beside others ------------------------------------------------------------------------


def test_a_checkpoint_that_is_read_is_not_removed(folder):
    """sample.py beside a run that saved fast failed: its checkpoint was pruned while it read it."""
    with reading(folder / "step-00000002") as held:
        checkpoint.prune(folder, keep_last=1, keep_every=0)
        assert held.is_dir() and names(folder)[0] == "02"
    checkpoint.prune(folder, keep_last=1, keep_every=0)
    assert not held.exists()


def test_a_checkpoint_that_goes_while_it_is_opened_is_looked_for_again(folder, monkeypatch):
    found = iter([folder / "step-00000002", folder / "step-00000012"])
    shutil.rmtree(folder / "step-00000002")
    monkeypatch.setattr(run_folder, "find_checkpoint", lambda path: next(found))
    with reading(folder) as held:
        assert held.name == "step-00000012"


def test_text_is_sampled_beside_a_run_that_prunes_at_every_step(flags, tmp_path, capsys):
    saving = [*flags, "--eval_interval=1", "--eval_iters=1", "--keep_last=1", "--max_iters=4000",
              "--log_interval=4000"]
    (busy,) = ranks.start(ranks.train, (saving,), 1, tmp_path / "logs")
    while not complete_checkpoints(tmp_path / "out"):
        assert busy.is_alive()
    ask = [f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--dtype=float32", "--num_samples=1",
           "--max_new_tokens=2", "--start=a"]
    codes = [sample.main(ask) for _ in range(6)]
    busy.kill()
    busy.join()
    assert codes == [0] * 6, capsys.readouterr().err


def test_the_folder_is_locked_before_it_is_read(flags, folder, monkeypatch, capsys):
    """A second run read what the first was about to prune, and ended with "No such file"."""
    monkeypatch.setattr(build, "resolve_init_from", lambda *_: pytest.fail("it was read"))
    with lock(folder):
        assert run.main([*flags, "--init_from=resume"]) == 2
    assert "another run is at work in" in capsys.readouterr().err


def test_a_refused_start_leaves_no_folder(tiny_flags, tmp_path):
    assert run.main([*tiny_flags, "--init_from=nothing-here"]) == 2
    assert not (tmp_path / "out").exists()


# -- metrics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "said"), [
    ("\n", ""),
    ("{", "line 3: not JSON"),
    ("[1]\n", "line 3: no object of numbers with iter"),
    ('{"iter": "5"}\n', "line 3: no object"),
    ('{"iter": 1, "loss": "low"}\n', "line 3: no object"),
])
def test_a_wrong_line_of_the_metrics_is_named(line, said, flags, folder, capsys):
    """A blank line blocked the resume with a message that named no file."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:2], line if line.endswith("\n") else line + "\n", *lines[2:]]))
    assert run.main([*flags, "--init_from=resume", "--max_iters=13"]) == (2 if said else 0)
    error = capsys.readouterr().err
    assert error.count("\n") == (1 if said else 0)
    assert not said or (said in error and str(log) in error)
