"""The contestants of bench/race.py: a trainer's command, run from one seed, and what it printed.

Both trainers take the same flags and print the same lines, `step N: train loss X, val loss Y` and
`iter N: loss X, time Yms`, so both are run and read alike. nanoGPT's code runs as it is shipped:
from its folder, with the data given as an absolute path. It always takes seed 1337. For another one
it reads a second config file, which lies in the work folder and wraps torch.manual_seed.
"""

import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench.timing import ROOT, Timing, environment, write_result
from common.files import read_json
from train.command_line import parse
from train.config import Config
from train.evaluate import Evaluate, evaluate

CONFIG = "config/train_shakespeare_char.py"  # nanoGPT's, which all its commands here start from
OUR_CODE = ("common", "kernels", "data", "gpt", "train", "configs")
SEED = 1337  # nanoGPT's
SEED_FILE = """# torch.manual_seed({nanogpt}) of train.py then sets {seed}
_manual_seed = torch.manual_seed
torch.manual_seed = lambda seed: _manual_seed(seed + {offset})
"""
EVALUATION = re.compile(r"^step (\d+): train loss \S+, val loss (\S+)$", re.MULTILINE)
STEP = re.compile(r"^iter (\d+): loss \S+, time ([\d.]+)ms", re.MULTILINE)
MACHINE = ("commit", "cpu", "threads", "torch")


@dataclass(frozen=True)
class Contestant:
    """A trainer's command, without seed and places: the config file and flags after the script."""

    name: str
    words: tuple[str, ...]
    nanogpt: Path | None = None
    """nanoGPT's checkout; None: the trainer is train/run.py"""

    @cached_property
    def config(self) -> Config:
        """The settings. Those of nanoGPT's config files are read, too, by train/run.py's reader."""
        file, *flags = self.words
        return parse([str(self.nanogpt / file) if self.nanogpt else file, *flags])

    @property
    def steps(self) -> int:
        return self.config.optim.max_iters

    @property
    def script(self) -> str:
        return "train.py" if self.nanogpt else "train/run.py"

    def command(self, seed: int, data: Path, out: Path) -> list[str]:
        """The command line for one seed; what it writes goes to `out`."""
        file, *flags = self.words
        if self.nanogpt is None:
            return [sys.executable, self.script, file, *flags, f"--seed={seed}",
                    f"--data_dir={data}", f"--out_dir={out}"]
        wrapped = [str(out.parent / f"seed-{seed}.py")] if seed != SEED else []
        return [sys.executable, self.script, file, *wrapped, *flags, f"--dataset={data}",
                f"--out_dir={out}"]

    def identity(self, seed: int, data: Path, machine: dict[str, Any]) -> dict[str, Any]:
        """What a finished run must have in common with this one to be taken for it."""
        command = self.command(seed, data, Path("out"))
        folders = [self.nanogpt] if self.nanogpt else [ROOT / name for name in OUR_CODE]
        files = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(data.glob("*"))]
        return {"command": command, "sources": fingerprint(folders), "data": files,
                **{key: machine[key] for key in MACHINE},
                "gpu": machine["gpu"] and machine["gpu"]["name"]}

    def described(self) -> dict[str, Any]:
        """What the result says of it, without folders of this machine."""
        told = {"command": shlex.join(["python", self.script, *self.words]), "steps": self.steps,
                "tokens_per_step": self.config.tokens_per_iter}
        if self.nanogpt is None:
            return told
        return told | {"nanogpt_commit": commit_of(self.nanogpt)}


def commit_of(folder: Path) -> str | None:
    """The commit of a checkout, None where it has no .git."""
    if not (folder / ".git").exists():
        return None
    return subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True,
                          text=True).stdout.strip() or None


def fingerprint(folders: list[Path]) -> str:
    """SHA-256 of the names and contents of all Python files in the folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def folder_name(name: str, seed: int, identity: dict[str, Any]) -> str:
    """The folder of a run in the work folder: another identity has another one."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}-{seed}-{key}"


# -- running -------------------------------------------------------------------


def run(contestant: Contestant, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """The contestant's run from this seed, trained now or kept in `work` from before.

    The parts: final_loss (of the whole validation split, in fp32), training_s, total_s, step_ms
    and curve. Raises ValueError, with the log's last line, where the run fails.
    """
    if contestant.nanogpt and (data / "meta.json").exists() and not (data / "meta.pkl").exists():
        raise ValueError(f"{data}: no meta.pkl, so nanoGPT would take GPT-2's vocabulary; prepare "
                         "the data again")
    device = contestant.config.run.device
    identity = contestant.identity(seed, data, environment(device))
    place = work / folder_name(contestant.name, seed, identity)
    kept = place / "run.json"
    if kept.is_file():
        print(f"    kept from before: {kept}", flush=True)
        return read_json(kept, dict[str, Any], "remove its folder")
    if place.exists():  # what a run that did not end well has left
        shutil.rmtree(place)
    place.mkdir(parents=True)
    command = contestant.command(seed, data, place / "out")
    if contestant.nanogpt and seed != SEED:
        (place / f"seed-{seed}.py").write_text(
            SEED_FILE.format(nanogpt=SEED, seed=seed, offset=seed - SEED))
    print(f"    {shlex.join(command)}\n    log: {place / 'log.txt'}", flush=True)
    total_s = launch(command, contestant.nanogpt or ROOT, place)
    config = contestant.config
    found = read_log(place / "log.txt", contestant.steps, config.tokens_per_iter)
    found |= {"total_s": total_s, "final_loss": final_loss(contestant, data, place / "out"),
              "identity": identity}
    write_result(kept, found)
    return json.loads(kept.read_text())


def launch(command: list[str], folder: Path, place: Path) -> float:
    """Run the command from `folder`, its output into log.txt; the seconds that it took.

    Nothing compiled before is at hand: each run has a folder of its own for what it compiles.
    """
    log = place / "log.txt"
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": str(place / "compiled"),
                        "TRITON_CACHE_DIR": str(place / "compiled" / "triton")}
    with log.open("w") as file:
        began = time.perf_counter()
        code = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=file,
                              stderr=subprocess.STDOUT).returncode
        seconds = time.perf_counter() - began
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "it printed nothing"
        raise ValueError(f"exit code {code}: {last} ({log})")
    return seconds


def final_loss(contestant: Contestant, data: Path, out: Path) -> float:
    """The loss of the last checkpoint on the whole validation split, in fp32 for all."""
    options = Evaluate(out_dir=str(out / f"step-{contestant.steps:08d}"), data_dir=str(data),
                       batch_size=32, device=contestant.config.run.device, dtype="float32")
    if contestant.nanogpt:
        options = replace(options, init_from=str(out))
        for meta in data.glob("meta.*"):  # the vocabulary, which evaluate looks for beside ckpt.pt
            shutil.copy(meta, out)
    with redirect_stdout(io.StringIO()):
        found = evaluate(options)
    return found["loss"]


# -- reading -------------------------------------------------------------------


def read_log(log: Path, steps: int, tokens_per_step: int) -> dict[str, Any]:
    """The curve that a run of so many steps printed, its training_s and step_ms.

    A step that follows an evaluation counts with the median of the others: nanoGPT's line has the
    evaluation and the save in it, and the first of all may compile. Raises ValueError for a run
    that ended early or whose loss is not finite.
    """
    text = log.read_text(errors="replace")
    losses = {int(step): float(loss) for step, loss in EVALUATION.findall(text)}
    times = {int(step): float(ms) for step, ms in STEP.findall(text) if int(step) < steps}
    if steps not in losses or len(times) < steps:
        raise ValueError(f"{len(times)} of {steps} steps and {len(losses)} evaluations in {log}; "
                         f"the last must be at step {steps}")
    if bad := [step for step, loss in losses.items() if not math.isfinite(loss)]:
        raise ValueError(f"the validation loss at step {bad[0]} is {losses[bad[0]]} ({log})")
    plain = [ms for step, ms in times.items() if step not in losses]
    if not plain:
        raise ValueError(f"an evaluation before each of the {steps} steps in {log}; take fewer")
    typical = statistics.median(plain)
    spent = [typical if step in losses else times[step] for step in range(steps)]
    reached = [0.0, *accumulate(ms / 1e3 for ms in spent)]
    at = sorted(step for step in losses if step <= steps)
    timing = Timing(tuple(plain))
    return {
        "training_s": reached[steps],
        "step_ms": {"median": typical, "q1": timing.q1_ms, "q3": timing.q3_ms},
        "curve": {"steps": at, "tokens": [step * tokens_per_step for step in at],
                  "seconds": [round(reached[step], 3) for step in at],
                  "val_loss": [losses[step] for step in at]},
    }
