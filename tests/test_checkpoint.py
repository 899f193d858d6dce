"""Saves that die, full disks, damaged files: the last complete checkpoint is kept and used."""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch

from gpt import GPT
from gpt.checkpoint_files import read_part, read_state, verify
from gpt.run_folder import LOCK, TEMPORARY, complete_checkpoints, find_checkpoint
from tests import ranks
from tests.conftest import every_architecture
from train import checkpoint, loop, run


@pytest.fixture
def trained(tiny_flags):
    """A finished run of 12 steps: its flags and its folder."""
    assert run.main(tiny_flags) == 0
    (out_dir,) = (f.partition("=")[2] for f in tiny_flags if f.startswith("--out_dir="))
    return tiny_flags, Path(out_dir)


@every_architecture
def test_a_save_that_died_does_not_count(trained):
    """kill -9 in a save leaves a temporary folder with anything in it, but no DONE in place."""
    flags, folder = trained
    dead = folder / f"{TEMPORARY}16"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    (folder / "step-00000016").mkdir()
    (folder / "step-00000016" / "model.safetensors").write_bytes(b"half")
    assert find_checkpoint(folder).name == "step-00000012"
    assert run.main([*flags, "--init_from=resume", "--max_iters=16"]) == 0
    assert find_checkpoint(folder).name == "step-00000016"
    verify(find_checkpoint(folder))
    assert not dead.exists()


def dying(flags, moments):
    """Train, but die (os._exit) after `moments` fsyncs and renames of the save."""
    left = iter(range(moments))

    def counted(real):
        def call(*args):
            if next(left, None) is None:
                os._exit(9)
            return real(*args)
        return call

    checkpoint.sync, Path.rename = counted(checkpoint.sync), counted(Path.rename)
    ranks.train(flags)


def test_a_kill_at_each_moment_of_a_save_leaves_a_whole_checkpoint(trained, tmp_path):
    flags, folder = trained
    deaths = 0
    for moment in range(0, 12, 3):
        (code,) = ranks.run(dying, ([*flags, "--init_from=resume", "--max_iters=13"], moment), 1,
                            tmp_path / f"logs{moment}")
        assert code in (0, 9)
        deaths += code == 9
        newest = find_checkpoint(folder)
        verify(newest)
        assert newest.name in ("step-00000012", "step-00000013")
    assert deaths >= 2


def test_a_full_disk_is_said_and_loses_nothing(trained, capsys):
    """A file size limit, in place of a full disk: the write fails there, with the real error."""
    flags, folder = trained
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "step-" in str(p)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = run.main([*flags, "--init_from=resume", "--max_iters=16"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1
    assert "checkpoint of step 16" in err and "not written" in err and "step-00000012" in err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()
            and "step-" in str(p)} == before
    assert not list(folder.glob(f"{TEMPORARY}*"))


def test_too_little_room_is_said_before_anything_is_written(trained, capsys, monkeypatch):
    flags, folder = trained
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_100_000))
    monkeypatch.setattr(checkpoint, "_write_tensors", None)
    assert run.main([*flags, "--init_from=resume", "--max_iters=16"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "MB and some are needed, 1.1 MB are free" in err and "step-00000012" in err
    assert not list(folder.glob(f"{TEMPORARY}*"))


def test_a_checkpoint_is_of_its_step_though_training_goes_on(tiny_flags, tmp_path, monkeypatch):
    """The save of step 4 begins to write after step 6, and writes the state after step 4."""
    flags = [*(f for f in tiny_flags if "--out_dir" not in f), "--keep_last=9"]
    assert run.main([*flags, f"--out_dir={tmp_path / 'usual'}"]) == 0
    steps, train_step, write = [], loop.train_step, checkpoint._write_tensors

    def step(run, lr):
        numbers = train_step(run, lr)
        steps.append(run.step)
        return numbers

    def wait(folder, snapshot, *rest):
        while snapshot.step == 4 and steps[-1] < 6:
            time.sleep(0.001)
        write(folder, snapshot, *rest)

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(checkpoint, "_write_tensors", wait)
    assert run.main([*flags, f"--out_dir={tmp_path / 'late'}"]) == 0
    for part in ("model", "optimizer", "rng"):
        usual, late = (read_part(tmp_path / name / "step-00000004", part)
                       for name in ("usual", "late"))
        assert usual.keys() == late.keys() and all(torch.equal(usual[k], late[k]) for k in usual)


def test_training_goes_on_while_a_checkpoint_is_written_and_ends_soon_after_one_that_fails(
        trained, capsys, monkeypatch):
    """The save of step 100 fails after two more steps: the run ends there, not at the next save."""
    flags, folder = trained
    steps, train_step = [], loop.train_step

    def step(run, lr):
        steps.append(run.step)
        return train_step(run, lr)

    def wait_and_fail(*_):
        while steps[-1] < 102:
            time.sleep(0.001)
        raise OSError("no space left on device")

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(checkpoint, "_write_tensors", wait_and_fail)
    assert run.main([*flags, "--init_from=resume", "--max_iters=300", "--lr_decay_iters=300",
                     "--eval_interval=100"]) == 2
    assert "checkpoint of step 100" in capsys.readouterr().err and steps[-1] < 190
    assert find_checkpoint(folder).name == "step-00000012"


def test_a_flipped_byte_is_found(trained, capsys):
    flags, folder = trained
    # in all there are: from one alone a run goes back to the one before
    for file in folder.glob("step-*/model.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        GPT.from_checkpoint(folder)
    assert run.main([*flags, "--init_from=resume", "--max_iters=16"]) == 2
    assert "model.safetensors: damaged" in capsys.readouterr().err
    file.write_bytes(content[:100])
    with pytest.raises(ValueError, match="100 bytes, was written with"):
        GPT.from_checkpoint(folder)


@every_architecture
def test_another_architecture_is_refused_with_both_values(trained, capsys):
    flags, folder = trained
    before = sorted(folder.rglob("*"))
    assert run.main([*flags, "--init_from=resume", "--n_layer=3", "--max_iters=16"]) == 2
    assert "another architecture: n_layer is 2 there and 3 here" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_new_run_does_not_write_over_an_old_one(trained, capsys):
    flags, folder = trained
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != LOCK}
    assert run.main(flags) == 2
    assert "already holds a run (step-00000012)" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != LOCK} == before


def test_nothing_to_resume_is_said(tiny_flags, tmp_path, capsys):
    assert run.main([*tiny_flags, "--init_from=resume"]) == 2
    assert "out has no complete checkpoint; train one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_changed_is_named_on_resume(trained, capsys):
    flags, _ = trained
    assert run.main([*flags, "--init_from=resume", "--max_iters=14", "--grad_clip=0.5"]) == 0
    said = capsys.readouterr().out
    assert "max_iters was 12, is 14" in said and "grad_clip was 1.0, is 0.5" in said


def test_the_last_the_best_and_every_mth_are_kept(tiny_flags, tmp_path):
    assert run.main([*tiny_flags, "--eval_interval=1", "--keep_last=2", "--keep_every=5"]) == 0
    kept = {int(f.name[5:]) for f in complete_checkpoints(tmp_path / "out")}
    losses = {e["iter"]: e["val/loss"]
              for e in map(json.loads,
                           (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
              if "val/loss" in e}
    best = min(range(1, 13), key=losses.get)
    assert kept == {11, 12, 5, 10, best}


def test_only_better_ones_are_saved_when_asked(tiny_flags, tmp_path, monkeypatch):
    losses = iter([3.0, 2.5, 2.7, 2.4])
    monkeypatch.setattr("train.loop.evaluate", lambda run: {"train": 1.0, "val": next(losses)})
    assert run.main([*tiny_flags, "--always_save_checkpoint=False", "--keep_last=9"]) == 0
    saved = [f.name for f in complete_checkpoints(tmp_path / "out")]
    assert saved == ["step-00000004", "step-00000012"]


@every_architecture
def test_checkpoint_keys_are_nanogpts_and_the_same_when_compiled(trained):
    _, folder = trained
    model = GPT.from_checkpoint(folder)
    names = set(model.state_dict()) - ({"lm_head.weight"} if model.config.tied else set())
    from safetensors import safe_open

    with safe_open(find_checkpoint(folder) / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert not any("_orig_mod" in n for n in names)
    model.compile()
    assert {n for n, _ in model.named_parameters()} == names


@every_architecture
def test_loaded_model_is_the_trained_one(trained):
    _, folder = trained
    a, b = GPT.from_checkpoint(folder), GPT.from_checkpoint(find_checkpoint(folder))
    idx = torch.randint(29, (1, 8))
    assert torch.equal(a.predict(idx), b.predict(idx))
    assert (a.lm_head.weight is a.transformer.wte.weight) == a.config.tied
    assert read_state(find_checkpoint(folder))["step"] == 12
