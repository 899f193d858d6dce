"""Kills, signals, NaN, hanging ranks, damaged files, a second run: the run can always go on."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data import manifest
from data.small import write_dataset
from gpt import run_folder
from gpt.checkpoint_files import read_part, verify
from gpt.run_folder import complete_checkpoints, find_checkpoint
from tests import ranks
from tests.conftest import every_architecture
from train import build, doctor, loop, run, watchdog
from train.command_line import parse

ROOT = Path(__file__).parents[1]


def without(flags, *names):
    return [f for f in flags if not f.startswith(tuple(f"--{name}=" for name in names))]


@pytest.fixture
def flags(tiny_flags):
    """60 steps, a checkpoint every 10, on any number of ranks."""
    return [*without(tiny_flags, "max_iters", "lr_decay_iters", "eval_interval"), "--max_iters=60",
            "--lr_decay_iters=60",
            "--eval_interval=10", "--eval_iters=1", "--init_from=auto"]


def weights(folder):
    newest = complete_checkpoints(folder)[-1]
    parts = [read_part(newest, part) for part in ("model", "optimizer", "rng")]
    return newest.name, {f"{i}:{k}": v for i, part in enumerate(parts) for k, v in part.items()}


def assert_same_run(a, b):
    (name_a, a), (name_b, b) = weights(a), weights(b)
    assert name_a == name_b and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_signal_to_one_rank_saves_and_ends_all_and_nothing_is_lost(flags, tmp_path):
    """SIGTERM to rank 1 and, in the next part, SIGUSR1 to rank 0: all ranks exit with 0.

    The same command afterwards ends as a run without signals does.
    """
    assert ranks.run(ranks.train, ([*flags, f"--out_dir={tmp_path / 'whole'}"],), 2,
                     tmp_path / "logs") == [0, 0]
    asked = tmp_path / "asked"
    for rank, number in ((1, signal.SIGTERM), (0, signal.SIGUSR1)):
        saves = len(complete_checkpoints(asked)) and int(find_checkpoint(asked).name[5:])
        processes = ranks.start(ranks.train, ([*flags, f"--out_dir={asked}"],), 2,
                                tmp_path / "logs")
        until(lambda saves=saves: complete_checkpoints(asked)
              and int(find_checkpoint(asked).name[5:]) > saves)
        os.kill(processes[rank].pid, number)
        assert ranks.wait(processes) == [0, 0]
        assert int(find_checkpoint(asked).name[5:]) < 60
    assert ranks.run(ranks.train, ([*flags, f"--out_dir={asked}"],), 2, tmp_path / "logs") == [0, 0]
    assert_same_run(tmp_path / "whole", asked)
    evaluations = [json.loads(line) for line in (asked / "metrics.jsonl").read_text().splitlines()
                   if "val/loss" in line]
    assert [e["iter"] for e in evaluations] == list(range(0, 61, 10))
    assert "asked to stop (another rank was), at step" in (tmp_path / "logs" / "0.log").read_text()


def test_a_second_run_on_the_same_folder_is_refused(tiny_flags, tmp_path, capsys):
    folder = tmp_path / "out"
    with run_folder.lock(folder):
        assert run.main(tiny_flags) == 2
    said = capsys.readouterr().err
    assert f"another run is at work in {folder} (process {os.getpid()} on " in said
    assert said.count("\n") == 1
    assert run.main(tiny_flags) == 0


@every_architecture
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_used(
        tiny_flags, tmp_path, capsys):
    assert run.main(tiny_flags) == 0
    before = {k: v.clone() for k, v in weights(tmp_path / "out")[1].items()}
    file = complete_checkpoints(tmp_path / "out")[-1] / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert run.main([*tiny_flags, "--init_from=resume"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines()
                if line.startswith("resumed from"))
    assert "step-00000008, step 8" in line
    assert "not from" in line and "step-00000012/optimizer.safetensors" in line
    assert (tmp_path / "out" / "set-aside-1" / "step-00000012").is_dir()
    after = weights(tmp_path / "out")[1]
    assert all(torch.equal(after[k], before[k]) for k in before)


@every_architecture
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_step_without_a_finite_gradient_changes_nothing(optimizer, tiny_flags):
    """The very first step, too, whose moments do not exist before it."""
    built = build.build(parse([*tiny_flags, f"--optimizer={optimizer}"]))
    before = [p.detach().clone() for p in built.model.parameters()]
    weight = built.model.transformer.h[1].attn.c_attn.weight
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    assert loop.train_step(built, lr=0.1)[2] == 1
    hook.remove()
    assert all(torch.equal(p, b) for p, b in zip(built.model.parameters(), before, strict=True))
    moments = [v for state in built.optimizer.state.values()
               for v in state.values() if v is not None]
    assert moments and all((v == 0).all() for v in moments)
    numbers = loop.train_step(built, lr=0.1)
    assert numbers[2] == 0 and numbers.isfinite().all()
    assert all(p.isfinite().all() for p in built.model.parameters())


def crowded(flags, rank):
    """Train; one rank's files cannot grow beyond 20,000 bytes, as if its disk were full."""
    from train.run import main

    if int(os.environ["RANK"]) == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE,
                           (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    sys.exit(main(flags))


def test_a_full_disk_of_one_rank_ends_all_and_loses_nothing(tiny_flags, tmp_path):
    flags = [*without(tiny_flags, "n_embd"), "--n_embd=32", "--parallel=fsdp", "--init_from=auto"]
    assert ranks.run(ranks.train, ([*flags, "--max_iters=4"],), 2, tmp_path / "logs") == [0, 0]
    assert ranks.run(crowded, (flags, 1), 2, tmp_path / "full") == [2, 2]
    said = [(tmp_path / "full" / f"{rank}.log").read_text().splitlines()[-1] for rank in (0, 1)]
    assert all("checkpoint of step 8" in line and "not written" in line and "step-00000004" in line
               for line in said)
    assert [p.name for p in sorted((tmp_path / "out").glob("*step-*"))] == ["step-00000004"]
    verify(find_checkpoint(tmp_path / "out"))
    assert not list((tmp_path / "out").glob(".unfinished-*"))


def poisoned(flags, rank, at):
    """Train with a loss that is NaN on one rank in the steps `at`."""
    accumulate = loop.accumulate

    def poison(run):
        loss = accumulate(run)
        if run.world.rank == rank and run.step in at:
            run.model.transformer.ln_f.weight.grad.fill_(float("nan"))
            return loss * float("nan")
        return loss

    loop.accumulate = poison
    ranks.train(flags)


def test_nan_on_one_rank_skips_the_step_on_all_and_too_many_end_the_run(tiny_flags, tmp_path):
    """NaN after the gradients were reduced: rank 0's are finite, only the summed loss tells it."""
    flags = [*tiny_flags, "--max_skipped=3"]
    assert ranks.run(poisoned, (flags, 1, {2, 5}), 2, tmp_path / "logs") == [0, 0]
    entries = [json.loads(line)
               for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = {e["iter"]: e for e in entries if "tokens" in e}
    assert [i for i, e in steps.items() if e["loss"] is None] == [2, 5]
    assert steps[11]["skipped"] == 2
    assert (tmp_path / "logs" / "0.log").read_text().count("skipped, loss nan") == 2
    gone = [*without(flags, "out_dir"), f"--out_dir={tmp_path / 'gone'}"]
    assert ranks.run(poisoned, (gone, 1, set(range(4, 12))), 2, tmp_path / "gone-logs") == [2, 2]
    log = (tmp_path / "gone-logs" / "0.log").read_text()
    assert "3 steps in a row without a finite loss" in log
    dump = json.loads((tmp_path / "gone" / "not-finite.json").read_text())
    assert [entry["iter"] for entry in dump] == [4, 5, 6]


def asleep(flags, rank, at):
    """Train, but one rank sleeps for good before step `at`."""
    accumulate = loop.accumulate

    def sleep(run):
        if run.world.rank == rank and run.step == at:
            time.sleep(1000)
        return accumulate(run)

    loop.accumulate = sleep
    ranks.train(flags)


def test_a_rank_that_hangs_is_named_in_bounded_time(tiny_flags, tmp_path):
    began = time.monotonic()
    flags = [*tiny_flags, "--hang_timeout=2"]
    assert ranks.run(asleep, (flags, 1, 6), 2, tmp_path / "logs") == [watchdog.HUNG, watchdog.HUNG]
    assert time.monotonic() - began < 60
    said = (tmp_path / "logs" / "0.log").read_text()
    assert "rank 0 waited 2 s" in said and "rank 1 hangs, behind the others, in step 6" in said
    assert "in sleep" in (tmp_path / "logs" / "1.log").read_text()


def torchrun(flags, *options):
    return [sys.executable, "-m", "torch.distributed.run", *options,
            str(ROOT / "train" / "run.py"), *flags]


def test_two_agents_on_the_loopback_interface_train_together(tiny_data, tmp_path):
    """The quickstart, smaller, in nanoGPT's two-node form; and then the doctor's measurement."""
    port = ranks.free_port()
    flags = ["configs/quickstart.py", f"--data_dir={tiny_data}", f"--out_dir={tmp_path / 'out'}",
             "--gradient_accumulation_steps=2",
             "--device=cpu", "--dtype=float32", "--max_iters=6", "--eval_interval=6",
             "--eval_iters=2", "--compile=False", "--batch_size=2"]
    nodes = [subprocess.Popen(torchrun(flags, "--nproc_per_node=1", "--nnodes=2",
                                       f"--node_rank={rank}", "--master_addr=127.0.0.1",
                                       f"--master_port={port}"), cwd=tmp_path,
                              env=os.environ | {"OMP_NUM_THREADS": "1"},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for rank in (0, 1)]
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "parallel: DDP, 2 ranks on 2 node(s)" in said[0] and "iter" not in said[1]
    assert find_checkpoint(tmp_path / "out").name == "step-00000006"


def test_the_doctor_says_what_is_here_and_how_fast_ranks_exchange(auto_dtype, tmp_path, capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{what} " in f"\n{said}"
               for what in ("python", "torch", "triton", "GPUs", "kernels", "dtype"))
    assert doctor.main(["--dist=True"]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert ranks.run(doctor.main, (["--dist=True"],), 2, tmp_path / "logs") == [0, 0]
    assert (tmp_path / "logs" / "0.log").read_text().count("all-reduce of ") == 3


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_run_killed_again_and_again_ends_as_if_never_killed(flags, tmp_path, request):
    """kill -9 to one of two FSDP2 ranks at random moments, saves included; torchrun restarts them.

    `--kills=N` times. --init_from stays scratch: after a restart the run knows that the folder is
    its own.

    --init_from stays scratch: after a restart the run knows that the folder is its own.
    """
    kills = request.config.getoption("--kills")
    steps = 20 + 45 * kills  # about what it does between a restart and the next kill
    flags = [*without(flags, "init_from", "max_iters", "lr_decay_iters"), f"--max_iters={steps}",
             f"--lr_decay_iters={steps}",
             "--parallel=fsdp"]
    assert ranks.run(ranks.train, ([*flags, f"--out_dir={tmp_path / 'whole'}"],), 2,
                     tmp_path / "logs", seconds=900) == [0, 0]
    killed, done = tmp_path / "killed", 0
    options = ("--standalone", "--nproc_per_node=2", f"--max-restarts={kills}",
               "--monitor-interval=0.1")
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(torchrun([*flags, f"--out_dir={killed}"], *options), stdout=log,
                                 stderr=log, cwd="/", env=os.environ | {"OMP_NUM_THREADS": "1"})
        until(lambda: complete_checkpoints(killed) or agent.poll() is not None)
        while done < kills and agent.poll() is None:
            time.sleep(random.uniform(0.0, 0.5) if done == 0 else random.uniform(0.0, 15.0))
            if agent.poll() is None and (alive := children(agent.pid)):
                os.kill(random.choice(alive), signal.SIGKILL)
                done += 1
        assert agent.wait(600) == 0, (tmp_path / "log").read_text()[-2000:]
    print(f"{done} kills")
    assert done > kills / 2 and "resumed from: " in (tmp_path / "log").read_text()
    assert_same_run(tmp_path / "whole", killed)
    entries = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [e["iter"] for e in entries if "tokens" in e] == list(range(steps))


def test_the_doctor_finds_a_byte_that_a_run_would_not_read(tmp_path, monkeypatch, capsys):
    """A run compares 64 pieces of a large file; the doctor reads every byte."""
    monkeypatch.setattr(manifest, "_WHOLE_BYTES", 10)
    monkeypatch.setattr(manifest, "_PIECE_BYTES", 4)
    ids = np.zeros(10_000, np.uint16)
    write_dataset(tmp_path, {"train": ids, "val": ids}, {"name": "zeros"}, "bytes", 256)
    assert doctor.main([f"--data_dir={tmp_path}"]) == 0
    assert "2 files, 40,000 bytes, all as they were prepared" in capsys.readouterr().out
    with (tmp_path / "train.bin").open("r+b") as file:
        file.seek(150)  # the first two pieces begin at 0 and 317
        file.write(b"x")
    manifest.verify(tmp_path)
    assert doctor.main([f"--data_dir={tmp_path}"]) == 2
    assert "train.bin: its content is not what" in capsys.readouterr().err
    assert doctor.main([f"--data_dir={tmp_path / 'nothing'}"]) == 2
    assert "no manifest.json to compare with" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "limit_s"), [(0, 30.0), (1, 30.0), (2, 10.0)])
def test_the_watchdog_waits_three_times_as_long_for_the_first_step(steps, limit_s, monkeypatch,
                                                                   capfd):
    """It took the batches of the evaluation before it for steps, and ended a run that compiled."""
    now = [0.0]
    progress, store = watchdog.Progress(), dist.HashStore()
    progress.count, progress.steps = 200, steps

    class Ended(Exception):
        pass

    def wait(seconds):
        now[0] += seconds
        return False

    def end(code):
        assert code == watchdog.HUNG
        raise Ended

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(watchdog, "os", SimpleNamespace(_exit=end))
    with pytest.raises(Ended):
        watchdog._watch(progress, store, watchdog.World(size=2), 10.0, SimpleNamespace(wait=wait))
    assert limit_s < now[0] <= limit_s + 2 * 2.5
    assert f"waited {limit_s:.0f} s" in capfd.readouterr().err
