"""Command lines nobody meant, of every entry point: one line or none, and no harm."""

import importlib
import os
import random
import shutil
from functools import partial
from pathlib import Path
from typing import get_args, get_origin

import pytest
from tyro.conf import PositionalRequiredArgs

from bench import compare_run
from bench.steps import project
from common import cli
from common.cli import types_of
from data import small
from gpt import export, predict, sample
from tests.conftest import TINY, write_tiny_data
from tests.drills import assert_ends_well, contents
from tests.test_encode import documents, write_lines
from train import doctor, evaluate, run
from train.config import Config

INTS = [
    *"-1 0 1 2 3 7 x 1.5 1e3 nan 2147483648 9223372036854775807 9223372036854775808".split(),
    *"0x10 1_0 None True --1 auto \u0663".split(), "", " 2", "9" * 30, "9" * 5000, "-" + "9" * 30,
]
FLOATS = [*INTS, *"inf -inf -0.5 0.5 1e-300 1e308 1e999 0.0 1e-3 infinity NaN".split()]
TAKEN = {"int": "0 1 2 3 9223372036854775807".split(), "float": "0.0 1e-300 0.5 1.0 1e308".split()}
WORDS = [
    *"x None train val cpu cuda cuda:7 mps cpu:1 torch reference resume scratch text é".split(),
    *"../x a/b float32 bfloat16 = -- gloo 124M merge stitch".split(),
    "", "\ud800", "a\nb", "\x1b[2J", "x" * 300, "\0",
]
PATHS = [
    *"nowhere in.txt in.jsonl empty.txt fifo zero loop folder a/b *.jsonl /dev/null".split(),
    *"/dev/null/x FILE:fifo FILE:in.txt FILE:".split(), "", ".", "x" * 300, "new\nline",
]
# What a value may cost: one between the two numbers, which is valid, is followed by the first.
ENDLESS = 2**63
COSTLY = {
    "max_iters": (2, ENDLESS), "gradient_accumulation_steps": (2, ENDLESS), "n_layer": (2, 10_001),
    "n_embd": (32, 2**20 + 1), "block_size": (16, 2**20 + 1), "max_new_tokens": (3, ENDLESS),
    "num_samples": (1, ENDLESS), "workers": (1, 1025), "seam_iters": (1, ENDLESS),
}


SETS = ("text", "openwebtext", "fineweb", "shakespeare", "shakespeare_char", "python_stdlib")


class Entry:
    """A command: its main and options, what a line begins with, what is not chosen by chance."""

    def __init__(self, main, options, base=(), *, fixed=(), last=(), codes=(0, 2)):
        self.main, self.base, self.fixed, self.last, self.codes = main, base, fixed, last, codes
        self.types = {name: hint for name, hint in types_of(options).items() if name not in fixed}


def entries(trained, data):
    model = [f"--out_dir={trained}", "--device=cpu"]
    training = [*TINY, f"--data_dir={data}", "--out_dir=out", "--max_iters=2"]
    evaluation = [*model, f"--data_dir={data}", "--dtype=float32"]
    sampling = [*model, "--num_samples=1", "--max_new_tokens=2", "--dtype=float32"]
    # To compile a run, or to try the kernels, costs a minute; --dtype=auto differs between CPUs.
    kept = ("compile", "kernels", "dtype", "data_dir", "dataset")
    exporting = [model[0], "--folder=exported"]
    found = {
        "train/run.py": Entry(run.main, Config, training, fixed=kept, last=["--kernels=torch"]),
        "train/evaluate.py": Entry(evaluate.main, evaluate.Evaluate, evaluation, fixed=("dtype",)),
        "train/doctor.py": Entry(parsed(doctor.Doctor), doctor.Doctor),
        "gpt/sample.py": Entry(sample.main, sample.Sample, sampling, fixed=("dtype",)),
        "gpt/predict.py": Entry(predict.main, predict.Predict, [*model, "--text=abc"]),
        "gpt/export.py": Entry(export.main, export.Export, exporting, fixed=("to",),
                               last=["--to=safetensors"]),
    }
    for name in SETS:
        main = importlib.import_module(f"data.{name}.prepare").main
        is_large, base = "workers" in types_of(main), ["--out=made"]
        if "input" in types_of(main):
            base.append("--input=in.jsonl" if is_large else "--input=in.txt")
        last = ["--workers=1"] if is_large else []
        found[f"data/{name}/prepare.py"] = Entry(partial(main_of, main), main, base, last=last)
    return found | measurements(trained)


def measurements(trained):
    """The commands of bench/: parsed and checked; what costs nothing is also run."""
    found = {}
    root = Path(__file__).parents[1]
    for path in sorted((root / "bench").rglob("*.py")):
        if "cli.run(" in path.read_text():
            name = path.relative_to(root)
            options = importlib.import_module(".".join(name.with_suffix("").parts)).Options
            found[name.as_posix()] = Entry(parsed(options), options)
    found["bench/steps/project.py"].base = ["--node_gbs=300", "--network_gbs=40"]
    found["bench/compare_run.py"].base = [str(trained), str(trained)]
    found["bench/steps/project.py"].main = partial(
        cli.run, lambda options: print(project.table(options)), project.Options)
    found["bench/compare_run.py"].main = partial(
        cli.run, compare_run.main, compare_run.Options, markers=(PositionalRequiredArgs,))
    found["bench/compare_run.py"].codes = (0, 1, 2)
    return found


def parsed(options):
    return partial(cli.run, lambda _: 0, options)


def main_of(main, argv):
    return cli.run(main, argv=argv)


def values(name, hint, rng):
    """What may be tried for a flag: half of it extreme, half of it what it is not meant for."""
    said = str(hint)
    for kind, taken in TAKEN.items():
        if kind in said and "Literal" not in said and rng.random() < 0.5:
            return taken
    if get_origin(hint) is not None and "Literal" in said and "int" not in said:
        return [*map(str, get_args(hint)), *WORDS[:4]]
    if "bool" in said:
        return ["True", "False", "yes", "", "1", "true"]
    if "float" in said:
        return FLOATS
    if "int" in said:
        return INTS
    return WORDS if name in ("device", "split", "backend") else [*PATHS, *WORDS]


def misspelt(name, rng):
    i = rng.randrange(len(name))
    return rng.choice([name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:],
                       name.replace("_", "-"), name.upper(), name + "x", ""])


def command_line(entry, rng):
    """A command line for `entry`, which costs a second at most."""
    argv = list(entry.base)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        if not entry.types or rng.random() < 0.05:
            strays = "stray -x -- --help -h - --=1 quickstart @file in.txt".split()
            argv.append(rng.choice(["", *strays]))
            continue
        name = rng.choice(list(entry.types))
        value = rng.choice(values(name, entry.types[name], rng))
        name = misspelt(name, rng) if rng.random() < 0.1 else name
        flag = f"--{name}={value}"
        argv += rng.choice([[flag]] * 6 + [[f"--{name}", value], [f"--{name}"], [flag] * 2])
    return [*argv, *entry.last, *too_costly(argv)]


def too_costly(argv):
    """Flags that take back what would cost too much, and is not refused."""
    back = []
    for flag, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = flag.lstrip("-").partition("=")
        cheap, limit = COSTLY.get(name.replace("-", "_"), (0, 0))
        try:
            if cheap < int(value if equals else following) < limit:
                back.append(f"--{name}={cheap}")
        except ValueError:
            pass
    return back


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A trained run, its data, and a file that is nobody's to touch."""
    folder = tmp_path_factory.mktemp("ground")
    data = write_tiny_data(folder / "tiny")
    flags = [*TINY, f"--data_dir={data}", f"--out_dir={folder / 'trained'}", "--max_iters=4"]
    assert run.main(flags) == 0
    (folder / "canary.txt").write_text("all I wrote")
    return folder


def lay(folder):
    """The files that a case may name."""
    folder.mkdir()
    (folder / "in.txt").write_text("To be, or not to be: that is the question.\n" * 9)
    (folder / "empty.txt").write_text("")
    write_lines(folder / "in.jsonl", documents(9))
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")


def drill(ground, tmp_path, capsys, monkeypatch, seeds):
    """Give a command line for each seed, entry after entry: how many ended with which code."""
    def no_network(*_, **__):
        raise ValueError("no network in a test")

    monkeypatch.setattr(small, "_download", no_network)
    known = entries(ground / "trained", ground / "tiny")
    for name in SETS[:3]:
        monkeypatch.setattr(importlib.import_module(f"data.{name}.prepare"), "Hub", no_network)
    before, ended = contents(ground), dict.fromkeys(known, ())
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(list(known)[:6] * 3 + list(known))
        lay(tmp_path / "case")
        monkeypatch.chdir(tmp_path / "case")
        argv = command_line(known[name], rng)
        ended[name] += (assert_ends_well(known[name].main, argv, capsys, known[name].codes),)
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / "case")
        assert before.items() <= contents(ground).items(), seed
    for name, codes in ended.items():
        print(name, {code: codes.count(code) for code in (0, 1, 2) if code in codes})
    return ended


def test_no_command_line_harms(ground, tmp_path, capsys, monkeypatch):
    ended = drill(ground, tmp_path, capsys, monkeypatch, range(150))
    assert {0, 2} <= {code for codes in ended.values() for code in codes}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_many_command_lines(part, ground, tmp_path, capsys, monkeypatch):
    drill(ground, tmp_path, capsys, monkeypatch, range(1000 * (part + 1), 1000 * (part + 2)))


def test_the_lines_begin_with_one_that_is_taken(ground, tmp_path, capsys, monkeypatch):
    """Else all ends with 2, whatever is added."""
    for name, entry in entries(ground / "trained", ground / "tiny").items():
        if name == "data/python_stdlib/prepare.py":  # several seconds
            continue
        lay(tmp_path / "case")
        monkeypatch.chdir(tmp_path / "case")
        base = [*entry.base, *entry.last] + ["--val_tokens=9"] * ("val_tokens" in entry.types)
        assert assert_ends_well(entry.main, base, capsys, entry.codes) in (0, 1), name
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / "case")
