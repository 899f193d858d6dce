"""Random command lines for every command: at most one line of error, and no other file touched."""

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
VALID = {"int": "0 1 2 3 9223372036854775807".split(), "float": "0.0 1e-300 0.5 1.0 1e308".split()}
WORDS = [
    *"x None train val cpu cuda cuda:7 mps cpu:1 torch reference resume scratch text é".split(),
    *"../x a/b float32 bfloat16 = -- gloo 124M merge stitch".split(),
    "", "\ud800", "a\nb", "\x1b[2J", "x" * 300, "\0",
]
PATHS = [
    *"nowhere in.txt in.jsonl empty.txt fifo zero loop folder a/b *.jsonl /dev/null".split(),
    *"/dev/null/x FILE:fifo FILE:in.txt FILE:".split(), "", ".", "x" * 300, "new\nline",
]
# Valid values that would take too long: one between the two numbers is replaced by the first.
ENDLESS = 2**63
COSTLY = {
    "max_iters": (2, ENDLESS), "gradient_accumulation_steps": (2, ENDLESS), "n_layer": (2, 10_001),
    "n_embd": (32, 2**20 + 1), "block_size": (16, 2**20 + 1), "max_new_tokens": (3, ENDLESS),
    "num_samples": (1, ENDLESS), "workers": (1, 1025), "seam_iters": (1, ENDLESS),
}


ROOT = Path(__file__).parents[1]
SETS = ("text", "openwebtext", "fineweb", "shakespeare", "shakespeare_char", "python_stdlib",
        "python_stdlib_bpe")


class Entry:
    """A command: its main, its options, and the flags that begin and end its command lines.

    Options in `fixed` are not drawn; `codes` are the exit codes that are allowed.
    """

    def __init__(self, main, options, base=(), *, fixed=(), last=(), codes=(0, 2)):
        self.main, self.base, self.fixed, self.last, self.codes = main, base, fixed, last, codes
        self.types = {name: hint for name, hint in types_of(options).items() if name not in fixed}


def entries(trained, data):
    model = [f"--out_dir={trained}", "--device=cpu"]
    training = [*TINY, f"--data_dir={data}", "--out_dir=out", "--max_iters=2"]
    evaluation = [*model, f"--data_dir={data}", "--dtype=float32"]
    sampling = [*model, "--num_samples=1", "--max_new_tokens=2", "--dtype=float32"]
    # Compiling a run, or trying the kernels, takes a minute; --dtype=auto differs between CPUs.
    fixed = ("compile", "kernels", "dtype", "data_dir", "dataset")
    exporting = [model[0], "--folder=exported"]
    commands = {
        "train/run.py": Entry(run.main, Config, training, fixed=fixed, last=["--kernels=torch"]),
        "train/evaluate.py": Entry(evaluate.main, evaluate.Evaluate, evaluation, fixed=("dtype",)),
        "train/doctor.py": Entry(parse_only(doctor.Doctor), doctor.Doctor),
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
        commands[f"data/{name}/prepare.py"] = Entry(partial(run_main, main), main, base, last=last)
    return commands | measurements(trained)


def measurements(trained):
    """The commands of bench/: their command lines are only parsed, but for two fast ones."""
    commands = {}
    for path in sorted((ROOT / "bench").rglob("*.py")):
        if "cli.run(" in path.read_text():
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            options = importlib.import_module(module).Options
            commands[module] = Entry(parse_only(options), options)
    main = partial(cli.run, project.main, project.Options)
    commands[project.__name__] = Entry(main, project.Options,
                                       ["--node_gbs=300", "--network_gbs=40"])
    main = partial(cli.run, compare_run.main, compare_run.Options,
                   markers=(PositionalRequiredArgs,))
    commands[compare_run.__name__] = Entry(main, compare_run.Options, [str(trained), str(trained)],
                                           codes=(0, 1, 2))
    return commands


def parse_only(options):
    return partial(cli.run, lambda _: 0, options)


def run_main(main, argv):
    return cli.run(main, argv=argv)


def values(name, hint, rng):
    """The values to draw from for a flag: for a number, in half of the cases only valid ones."""
    words = str(hint)
    for kind, valid in VALID.items():
        if kind in words and "Literal" not in words and rng.random() < 0.5:
            return valid
    if get_origin(hint) is not None and "Literal" in words and "int" not in words:
        return [*map(str, get_args(hint)), *WORDS[:4]]
    if "bool" in words:
        return ["True", "False", "yes", "", "1", "true"]
    if "float" in words:
        return FLOATS
    if "int" in words:
        return INTS
    return WORDS if name in ("device", "split", "backend") else [*PATHS, *WORDS]


def misspelt(name, rng):
    i = rng.randrange(len(name))
    return rng.choice([name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:],
                       name.replace("_", "-"), name.upper(), name + "x", ""])


def command_line(entry, rng):
    """A random command line for `entry` that takes a second at most."""
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
    return [*argv, *entry.last, *cheaper(argv)]


def cheaper(argv):
    """Flags that override valid values which would take too long."""
    overrides = []
    for flag, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = flag.lstrip("-").partition("=")
        cheap, limit = COSTLY.get(name.replace("-", "_"), (0, 0))
        try:
            if cheap < int(value if equals else following) < limit:
                overrides.append(f"--{name}={cheap}")
        except ValueError:
            pass
    return overrides


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A trained run, its data, and canary.txt, which must stay as it is."""
    folder = tmp_path_factory.mktemp("ground")
    data = write_tiny_data(folder / "tiny")
    flags = [*TINY, f"--data_dir={data}", f"--out_dir={folder / 'trained'}", "--max_iters=4"]
    assert run.main(flags) == 0
    (folder / "canary.txt").write_text("all I wrote")
    return folder


def make_case(folder):
    """Make a folder with the files that a command line may name."""
    folder.mkdir()
    (folder / "in.txt").write_text("To be, or not to be: that is the question.\n" * 9)
    (folder / "empty.txt").write_text("")
    write_lines(folder / "in.jsonl", documents(9))
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")


def drill(ground, tmp_path, capsys, monkeypatch, seeds):
    """Run a random command line for each seed; the exit codes of each command."""
    def no_network(*_, **__):
        raise ValueError("no network in a test")

    monkeypatch.setattr(small, "_download", no_network)
    commands = entries(ground / "trained", ground / "tiny")
    for name in SETS[:3]:
        monkeypatch.setattr(importlib.import_module(f"data.{name}.prepare"), "Hub", no_network)
    before, exit_codes = contents(ground), {name: [] for name in commands}
    for seed in seeds:
        rng = random.Random(seed)
        name = rng.choice(list(commands)[:6] * 3 + list(commands))
        make_case(tmp_path / "case")
        monkeypatch.chdir(tmp_path / "case")
        entry = commands[name]
        argv = command_line(entry, rng)
        exit_codes[name].append(assert_ends_well(entry.main, argv, capsys, entry.codes))
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / "case")
        assert before.items() <= contents(ground).items(), seed
    for name, codes in exit_codes.items():
        print(name, {code: codes.count(code) for code in (0, 1, 2) if code in codes})
    return exit_codes


def test_no_command_line_harms(ground, tmp_path, capsys, monkeypatch):
    exit_codes = drill(ground, tmp_path, capsys, monkeypatch, range(150))
    assert {0, 2} <= {code for codes in exit_codes.values() for code in codes}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_many_command_lines(part, ground, tmp_path, capsys, monkeypatch):
    drill(ground, tmp_path, capsys, monkeypatch, range(1000 * (part + 1), 1000 * (part + 2)))


def test_the_flags_that_begin_each_line_are_valid(ground, tmp_path, capsys, monkeypatch):
    """Otherwise every line would end with exit code 2, whatever is added."""
    for name, entry in entries(ground / "trained", ground / "tiny").items():
        if name.startswith("data/python_stdlib"):  # several seconds
            continue
        make_case(tmp_path / "case")
        monkeypatch.chdir(tmp_path / "case")
        base = [*entry.base, *entry.last] + ["--val_tokens=9"] * ("val_tokens" in entry.types)
        assert assert_ends_well(entry.main, base, capsys, entry.codes) in (0, 1), name
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / "case")
