"""The drill: a ckpt.pt with a random change is refused in one line, or resumed completely."""

import copy
import functools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt import nanogpt
from tests.test_nanogpt import made, moments

ROOT = Path(__file__).parents[1]

DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.complex64]
STRANGE = [
    None, "x", [], {}, -1, 2.5, float("nan"), 10**30, True, torch.ones(3), torch.ones(()),
    torch.ones(16, 16).int(), torch.ones(16).expand(10**6, 16), torch.full((16,), float("inf")),
    -torch.ones(29, 16), torch.ones(16, 16, device="meta"),
]


def damage(content, rng):
    """One thing changed somewhere: an entry dropped, replaced, or exchanged with its neighbour."""
    node, depth = content, rng.randrange(1, 5)
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = rng.choice(list(keys))
        if depth > 1 and isinstance(node[key], dict | list) and node[key]:
            node, depth = node[key], depth - 1
            continue
        how = rng.choice(["drop", "strange", "exchange", "cut", "dtype"])
        other = rng.choice(list(keys))
        tensor = node[key] if isinstance(node[key], torch.Tensor) else None
        if how == "drop":
            del node[key]
        elif how == "exchange":
            node[key], node[other] = node[other], node[key]
        elif how == "cut" and tensor is not None and tensor.dim():
            node[key] = tensor[: rng.randrange(len(tensor))].clone()
        elif how == "dtype" and tensor is not None:
            node[key] = tensor.to(rng.choice(DTYPES))
        else:
            node[key] = rng.choice(STRANGE)
        return content


undamaged = functools.cache(lambda layout, kind: made(layout, kind)[0])


def drilled(seed):
    rng = random.Random(seed)
    kind = rng.choice(["adamw", "adamw", "sgd"])
    content = copy.deepcopy(undamaged(rng.choice(["dimension", "module"]), kind))
    for _ in range(rng.choice([1, 1, 2])):
        damage(content, rng)
    return content, kind


def check_pure(seeds):
    """A damaged file is refused in one line, or gives fp32 moments of the right shape, finite."""
    refused = 0
    for seed in seeds:
        content, kind = drilled(seed)
        try:
            complete = {"model", "model_args", "iter_num"} <= content.keys()
            found = moments(content, kind) if complete else {}
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 400, seed
            refused += 1
            continue
        weights = nanogpt._parsed(content).weights if found else {}
        for name, known in found.items():
            shape = weights[name].shape
            for key, tensor in known.items():
                assert tensor.shape == (() if key == "step" else shape), seed
                assert tensor.dtype == torch.float32, seed
                assert tensor.isfinite().all() and tensor.is_contiguous(), seed
    return refused


def check_runs(seeds, tiny_flags, tmp_path):
    """The same with runs, in a child process, where a crash is seen."""
    for seed in seeds:
        content, _ = drilled(seed)
        (tmp_path / str(seed)).mkdir()
        torch.save(content, tmp_path / str(seed) / "ckpt.pt")
    flags = [
        *tiny_flags, "--max_iters=4", "--eval_interval=100", "--eval_iters=1", "--weight_decay=0",
        "--optimizer=KIND", "--init_from=resume",
    ]
    program = f"""
import contextlib, io
from train import run
done = 0
for seed in {list(seeds)}:
    for kind in ("adamw", "sgd"):
        said = io.StringIO()
        flags = [f.replace("KIND", kind) for f in {flags}]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            there = f"{tmp_path}/{{seed}}"
            code = run.main([*flags, f"--resume_dir={{there}}", f"--out_dir={{there}}-{{kind}}"])
        done += code == 0
        assert code == 0 or code == 2 and said.getvalue().count("\\n") == 1, (seed, kind, code)
assert done  # some damage is none
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_drill():
    assert 100 < check_pure(range(150)) < 150


def test_drill_of_whole_runs(tiny_flags, tmp_path):
    check_runs(range(1000, 1010), tiny_flags, tmp_path)


@pytest.mark.slow
def test_long_drill(tiny_flags, tmp_path):
    assert check_pure(range(5000)) > 3000
    check_runs(range(2000, 2100), tiny_flags, tmp_path)
