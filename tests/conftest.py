import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test imports triton

import json
from pathlib import Path

import numpy as np
import pytest

from common import hardware
from gpt.config import ARCHITECTURES
from tests.units import sitecustomize as units

ROOT = Path(__file__).parents[1]
AUTOMATIC = hardware._automatic_on_a_cpu
# Each of these makes one thing for a minute and then looks at it.
SHARING = ("test_ahead.py", "test_parallel.py")
LONG = (*SHARING, "test_faults.py", "test_backends.py")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1,
                     help="how often tests/test_faults.py kills one run")
    parser.addoption("--bf16-units", choices=("detected", "denied", "claimed"), default="detected",
                     help="the bf16 units that this CPU reports, here and in child processes: "
                          "--dtype=auto depends on them")


def pytest_configure(config):
    if (there := config.getoption("bf16_units")) != "detected":
        before = os.environ.get("PYTHONPATH")
        os.environ |= {"BF16_UNITS": there,
                       "PYTHONPATH": os.pathsep.join([units.HERE, *([before] if before else [])])}
        units.claim(torch.cpu)
    # Several processes share the cores: threads would only wait for each other.
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    hardware._automatic_on_a_cpu = lambda: pytest.fail(
        "--dtype=auto, another one on another CPU: say which the test is about")


def pytest_collection_modifyitems(items):
    """The longest first, so that in the end no worker waits long for another one."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each worker takes the next test when it is done with one, but a file of SHARING as a whole.

    That would be --dist=loadgroup, but xdist 3.8.0 renames the tests of a group, which pytest 9.2
    no longer lets it.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.endswith(SHARING) else nodeid

    return Scheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture
def auto_dtype(monkeypatch):
    """For the tests that are about --dtype=auto; in all others nothing may ask for it."""
    monkeypatch.setattr(hardware, "_automatic_on_a_cpu", AUTOMATIC)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every fresh tensor with NaN, so that a kernel which forgets an element fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# Repeats a test, or a fixture's tests, for each architecture. They learn its name from the fixture
# `architecture`, and `tiny_flags` does.
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture
def architecture():
    """The architecture of a test without `every_architecture`."""
    return "gpt2"


@pytest.fixture
def tiny_data(tmp_path):
    return write_tiny_data(tmp_path / "tiny")


def write_tiny_data(folder):
    """4,000 training and 800 validation tokens, ids below 29: each is the last one plus 1 or 2."""
    folder.mkdir()
    steps = np.random.default_rng(0).integers(1, 3, 4800).cumsum() % 29
    steps[:4000].astype(np.uint16).tofile(folder / "train.bin")
    steps[4000:].astype(np.uint16).tofile(folder / "val.bin")
    meta = {"kind": "char", "vocab_size": 29, "chars": "abcdefghijklmnopqrstuvwxyz\n =."[:29]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def tiny_flags(tiny_data, tmp_path, architecture):
    """The command line of a run that takes a second: 2 layers, dropout and accumulation on."""
    return [f"--data_dir={tiny_data}", f"--out_dir={tmp_path / 'out'}", *TINY,
            f"--architecture={architecture}"]


TINY = [
    "--device=cpu", "--dtype=float32", "--compile=False", "--block_size=16",
    "--batch_size=4", "--n_layer=2", "--n_head=2", "--n_embd=16", "--dropout=0.1",
    "--gradient_accumulation_steps=2",
    "--max_iters=12", "--lr_decay_iters=12", "--warmup_iters=2", "--learning_rate=1e-2",
    "--eval_interval=4",
    "--eval_iters=3",
]
