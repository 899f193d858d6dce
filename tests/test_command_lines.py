"""Command lines nobody meant: of every entry point, with random flags and values; one line or none, and no harm."""

import importlib
import os
import random
import shutil
from functools import partial
from pathlib import Path
from typing import get_args, get_origin

import pytest
from tyro.conf import PositionalRequiredArgs

from data import cli, small
from data.cli import types_of
from gpt import export, predict, sample
from tests.conftest import TINY, write_tiny_data
from tests.drills import assert_ends_well, contents
from tests.test_encode import documents, write_lines
from train import doctor, evaluate, run
from train.config import Config

INTS = ["", "-1", "0", "1", "2", "3", "7", "x", "1.5", "1e3", "nan", "2147483648", "9223372036854775807", "9223372036854775808",
        "9" * 30, "9" * 5000, "-" + "9" * 30, "0x10", "1_0", " 2", "None", "True", "\u0663", "--1", "auto"]
TAKEN = {"int": ["0", "1", "2", "3", "9223372036854775807"], "float": ["0.0", "1e-300", "0.5", "1.0", "1e308"]}
FLOATS = [*INTS, "inf", "-inf", "-0.5", "0.5", "1e-300", "1e308", "1e999", "0.0", "1e-3", "infinity", "NaN"]
WORDS = ["", "x", "None", "train", "val", "cpu", "cuda", "cuda:7", "mps", "cpu:1", "torch", "reference", "resume", "scratch",
         "text", "é", "\ud800", "a\nb", "\x1b[2J", "x" * 300, "../x", "a/b", "float32", "bfloat16", "=", "--", "gloo", "124M",
         "\0", "merge", "stitch"]
# Of a run that is not there to be changed, and of the folder of the case; `trained` is what models are read from.
PATHS = ["", ".", "nowhere", "in.txt", "in.jsonl", "fifo", "zero", "folder", "a/b", "x" * 300, "new\nline", "/dev/null", "/dev/null/x",
         "FILE:fifo", "FILE:in.txt", "FILE:", "*.jsonl", "loop", "empty.txt"]
# What a value may cost: one between the two numbers, which is valid, is followed by the first.
COSTLY = {"max_iters": (2, 2**63), "n_layer": (2, 10_001), "n_embd": (32, 2**20 + 1), "block_size": (16, 2**20 + 1),
          "gradient_accumulation_steps": (2, 2**63), "max_new_tokens": (3, 2**63), "num_samples": (1, 2**63),
          "workers": (1, 1025), "megabytes": (1, 2**63), "repeats": (1, 2**63), "seam_iters": (1, 2**63)}


class Entry:
    """A command: its main, its options, what each line begins with, and what must not be chosen by chance."""

    def __init__(self, main, options, base=(), *, fixed=(), last=(), codes=(0, 2)):
        self.main, self.base, self.fixed, self.last, self.codes = main, base, fixed, last, codes
        self.types = {name: hint for name, hint in types_of(options).items() if name not in fixed}


def entries(trained, data):
    model = [f"--out_dir={trained}", "--device=cpu"]
    found = {
        # A run of one step that is compiled, or that tries the kernels, costs a minute; auto differs between CPUs.
        "train/run.py": Entry(run.main, Config, [*TINY, f"--data_dir={data}", "--out_dir=out", "--max_iters=2"],
                              fixed=("compile", "kernels", "dtype", "data_dir", "dataset"), last=["--kernels=torch"]),
        "train/evaluate.py": Entry(evaluate.main, evaluate.Evaluate, [*model, f"--data_dir={data}", "--dtype=float32"], fixed=("dtype",)),
        "train/doctor.py": Entry(partial(cli.run, lambda _: 0, doctor.Doctor), doctor.Doctor),
        "gpt/sample.py": Entry(sample.main, sample.Sample, [*model, "--num_samples=1", "--max_new_tokens=2", "--dtype=float32"], fixed=("dtype",)),
        "gpt/predict.py": Entry(predict.main, predict.Predict, [*model, "--text=abc"]),
        "gpt/export.py": Entry(export.main, export.Export, [model[0], "--folder=exported"], fixed=("to",), last=["--to=safetensors"]),
    }
    for name in ("text", "openwebtext", "fineweb", "shakespeare", "shakespeare_char", "python_stdlib"):
        main = importlib.import_module(f"data.{name}.prepare").main
        takes_input = ["--input=in.jsonl" if "workers" in types_of(main) else "--input=in.txt"] * ("input" in types_of(main))
        found[f"data/{name}/prepare.py"] = Entry(
            partial(main_of, main), main, ["--out=made", *takes_input], last=["--workers=1"] * ("workers" in types_of(main)))
    for path in sorted((Path(__file__).parents[1] / "bench").glob("*.py")):
        if "cli.run(" in path.read_text():  # parsed and checked, and nothing measured
            options = importlib.import_module(f"bench.{path.stem}").Options
            found[f"bench/{path.name}"] = Entry(partial(cli.run, lambda _: 0, options), options)
    project, compare = (importlib.import_module(f"bench.{name}") for name in ("project", "compare_run"))
    found["bench/project.py"].base = ["--node_gbs=300", "--network_gbs=40"]
    found["bench/compare_run.py"].base = [str(trained), str(trained)]
    found["bench/project.py"].main = partial(cli.run, lambda options: print(project.table(options)), project.Options)
    found["bench/compare_run.py"].main = partial(cli.run, compare.main, compare.Options, markers=(PositionalRequiredArgs,))
    found["bench/compare_run.py"].codes = (0, 1, 2)
    return found


def main_of(main, argv):
    return cli.run(main, argv=argv)


def values(name, hint, rng):
    """What may be tried for a flag of this type: half of it extreme, half of it what it is not meant for."""
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
    paths = [p for p in PATHS if p not in ("", ".")] if name in ("out", "out_dir") else PATHS
    return [*paths, *WORDS] if "Path" in said or name not in ("device", "split", "backend") else WORDS


def misspelt(name, rng):
    i = rng.randrange(len(name))
    return rng.choice([name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:], name.replace("_", "-"), name.upper(), name + "x", ""])


def command_line(entry, rng):
    """A command line for `entry`, which costs a second at most."""
    argv = list(entry.base)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        if not entry.types or rng.random() < 0.05:
            argv.append(rng.choice(["stray", "-x", "--", "--help", "-h", "", "-", "--=1", "quickstart", "@file", "in.txt"]))
            continue
        name = rng.choice(list(entry.types))
        value = rng.choice(values(name, entry.types[name], rng))
        name = misspelt(name, rng) if rng.random() < 0.1 else name
        argv += rng.choice([[f"--{name}={value}"]] * 6 + [[f"--{name}", value], [f"--{name}"], [f"--{name}={value}"] * 2])
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
    assert run.main([*TINY, f"--data_dir={data}", f"--out_dir={folder / 'trained'}", "--max_iters=4"]) == 0
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
    for name in ("text", "openwebtext", "fineweb"):
        monkeypatch.setattr(importlib.import_module(f"data.{name}.prepare"), "Hub", no_network)
    before, ended = contents(ground), dict.fromkeys(known, ())
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(list(known)[:6] * 3 + list(known))
        lay(tmp_path / "case")
        monkeypatch.chdir(tmp_path / "case")
        ended[name] += (assert_ends_well(known[name].main, command_line(known[name], rng), capsys, known[name].codes),)
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / "case")
        assert before.items() <= contents(ground).items(), seed
    print({name: {code: codes.count(code) for code in (0, 1, 2) if code in codes} for name, codes in ended.items()})
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
        assert assert_ends_well(entry.main, base, capsys, entry.codes) in (0, 1), (name, capsys.readouterr())
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / "case")
