"""ckpt.pt files of every version of nanoGPT, and damaged ones: resumed rightly or refused in one line."""

import copy
import functools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt import GPT, GPTConfig, nanogpt
from gpt.tensors import shapes_of
from train import loop, run, start
from train.config import parse

ROOT = Path(__file__).parents[1]
SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=29)
SEAM = ("transformer.stitching.stitching.weight", "transformer.stitching.stitching.bias")
LAYERS = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "lm_head.weight")


def made(layout="dimension", kind="adamw", bias=False, weight_decay=0.1, seam=None):
    """(content of a ckpt.pt by nanoGPT's keys, its model, its optimizer) after two steps, made without our reader."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(**SHAPE, bias=bias, seam=-1 if seam is None else seam))
    named = {name.replace("seam.", "transformer.stitching.stitching."): p for name, p in model.named_parameters()}
    if layout == "dimension":  # nanoGPT since May 2023
        groups = [[p for p in named.values() if p.dim() >= 2], [p for p in named.values() if p.dim() < 2]]
    else:  # before: by the kind of module, in the order of the names
        groups = [[named[n] for n in sorted(named) if n.endswith((*LAYERS, SEAM[0])) == first] for first in (True, False)]
    groups = [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
    optimizer = {"adamw": lambda: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)),
                 "adam": lambda: torch.optim.Adam(groups, lr=1e-2, betas=(0.9, 0.95)),
                 "sgd": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9)}[kind]()
    if seam is not None:
        for name, p in named.items():
            p.requires_grad_(name in SEAM)
    for _ in range(2):
        model(torch.randint(29, (4, 16)), torch.randint(29, (4, 16))).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in named.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    content = {"model": weights, "optimizer": copy.deepcopy(optimizer.state_dict()), "model_args": SHAPE | {"bias": bias, "dropout": 0.0},
               "iter_num": 2, "best_val_loss": torch.tensor(3.0), "config": {"dataset": "nowhere", "weight_decay": weight_decay}}
    if seam is not None:
        content["model_args"] |= {"stitching": True, "stitching_layer": seam, "use_original_head": False, "use_original_wpe_wte": True}
    return content, model, optimizer


def moments(content, kind="adamw"):
    """As a run reads them."""
    found = nanogpt._parsed(content)
    shapes = shapes_of(found.config)
    trained = [name for name in shapes if found.config.seam < 0 or name.startswith("seam.")]
    nanogpt.progress(content)
    return nanogpt.moments(content.get("optimizer"), shapes, trained, kind)


@pytest.mark.parametrize("layout", ["dimension", "module"])
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("bias", [False, True])
def test_moments_of_each_layout_go_to_their_parameters(layout, kind, bias):
    content, model, optimizer = made(layout, kind, bias, weight_decay=0.0)
    found = moments(content, kind)
    for name, p in model.named_parameters():
        assert found[name].keys() == optimizer.state[p].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(found[name][key], value) and found[name][key].data_ptr() != value.data_ptr()


def resumed(content, tiny_flags, tmp_path, *flags):
    folder = tmp_path / "nano"
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "ckpt.pt")
    flags = ["--init_from=resume", f"--resume_dir={folder}", "--dropout=0.0", "--grad_clip=0", "--gradient_accumulation_steps=1",
             "--decay_lr=False", "--learning_rate=1e-2", *flags]
    return [*tiny_flags, *flags]


def refusal(flags, capsys):
    """What a run says that cannot begin: one line, and nothing written."""
    capsys.readouterr()
    assert run.main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(("layout", "kind", "seam"), [
    ("dimension", "adamw", None), ("module", "adamw", None), ("module", "sgd", None), ("module", "sgd", 1),
])
def test_the_steps_after_a_resume_are_the_optimizers_own(layout, kind, seam, tiny_flags, tmp_path):
    """The older layout, and SGD's state, ended in a crash or trained on with the moments of other parameters."""
    content, model, optimizer = made(layout, kind, weight_decay=0.0, seam=seam)
    flags = resumed(content, tiny_flags, tmp_path, f"--optimizer={kind}", "--weight_decay=0")
    model.config = nanogpt._parsed(content).config  # its GELU
    for block in model.transformer.h:
        block.mlp.config = model.config
    built, batches = start.build(parse(flags)), start.build(parse(flags)).batches
    assert (built.step, built.best_val_loss) == (2, 3.0)
    for _ in range(3):
        loop.train_step(built, lr=1e-2)
        model(*next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), (_, theirs) in zip(built.model.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)


def test_swapped_moments_are_refused_and_not_run(tiny_flags, tmp_path, capsys):
    """They were placed unlooked at, and the fused AdamW ran out of bounds: a segmentation fault."""
    content, *_ = made()
    state = content["optimizer"]["state"]
    state[0], state[1] = state[1], state[0]
    said = refusal(resumed(content, tiny_flags, tmp_path), capsys)
    assert "exp_avg of transformer.wte.weight is (16, 16); (29, 16) is needed" in said
    assert f"--init_from={tmp_path / 'nano'} starts from its weights alone" in said
    assert not (tmp_path / "out").exists()
    flags = resumed(content, tiny_flags, tmp_path)
    assert start.build(parse([*flags, f"--init_from={tmp_path / 'nano'}"])).step == 0


def test_the_older_layout_says_that_embeddings_now_decay(tiny_flags, tmp_path):
    content, *_ = made("module")
    said = start.build(parse(resumed(content, tiny_flags, tmp_path, "--weight_decay=0.2"))).resumed
    assert "weight_decay was 0.1, is 0.2; the embeddings, which did not decay there, do here" in said


# -- what the file tells of the model --------------------------------------------------


def test_the_gelu_is_tanh_where_the_file_tells():
    """Before June 2023 it was; erf was taken, and the loss was another one."""
    def config(content, **args):
        content["model_args"] = content["model_args"] | args
        return nanogpt._parsed(content)

    today = config(made()[0])
    assert today.config.activation == "gelu" and today.untold == ("activation",)
    for told in (config(made("module")[0]), config(made()[0], backward=False), config(made()[0], stitching=False)):
        assert told.config.activation == "gelu_tanh" and told.untold == ()
    first = made()[0]
    del first["model_args"]["bias"], first["model_args"]["vocab_size"]
    assert config(first).config == told.config


def test_where_it_does_not_tell_it_is_asked_for(tiny_flags, tmp_path):
    flags = resumed(made()[0], tiny_flags, tmp_path)
    for beginning in ("resume", str(tmp_path / "nano")):
        for activation in ("gelu", "gelu_tanh"):
            built = start.build(parse([*flags, f"--init_from={beginning}", f"--activation={activation}"]))
            assert built.model.config.activation == activation


def test_a_backward_model_is_read_backwards():
    """Of Stitch-LLMs: its model_args say so, and were not looked at: a loss of 4.25 for 2.26."""
    content, *_ = made("module", "sgd")
    assert nanogpt._parsed(content | {"model_args": content["model_args"] | {"backward": True}}).config.direction == "backward"
    assert nanogpt._parsed(content).config.direction == "forward"


def test_a_head_of_its_own_is_kept():
    """Until 14 January 2023 nanoGPT did not tie the two; the head was dropped."""
    content, *_ = made()
    content["model"]["lm_head.weight"] = torch.randn(29, 16)
    found = nanogpt._parsed(content)
    assert not found.config.tie_weights and torch.equal(found.weights["lm_head.weight"], content["model"]["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_kinds_are_converted(dtype, tiny_flags, tmp_path):
    content, *_ = made()
    content["model"] = {name: tensor.to(dtype) for name, tensor in content["model"].items()}
    for values in content["optimizer"]["state"].values():
        values |= {key: values[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")}
    built = start.build(parse(resumed(content, tiny_flags, tmp_path)))
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}
    assert {t.dtype for state in built.optimizer.state.values() for t in state.values()} == {torch.float32}
    assert math.isfinite(loop.train_step(built, lr=1e-2)[0])


WTE = "transformer.wte.weight"


@pytest.mark.parametrize(("where", "value", "message"), [
    ("model_args", None, "model_args is a NoneType"), ("model_args.n_layer", 3, "model_args says n_layer=3, its weights 2"),
    ("model_args.n_layer", 10**12, "n_layer=1000000000000, its weights 2"), ("model_args.n_head", None, "n_head=a NoneType, and int"),
    ("model_args.n_head", 5, "n_head=5 does not divide n_embd=16"), ("model_args.n_embd", "16", "n_embd='16', and int is needed"),
    ("model_args.bias", 1, "bias=1, and bool is needed"), ("model_args.dropout", float("nan"), "dropout=nan"),
    ("model_args.rotary", True, "model_args has 'rotary', which nanoGPT's models do not"),
    ("model_args.stitching_layer", 7, ""), ("iter_num", -1, "iter_num=-1: a step below"), ("iter_num", "2", "iter_num='2'"),
    ("iter_num", 10**400, "iter_num=a int"), ("best_val_loss", float("nan"), "best_val_loss=nan"), ("best_val_loss", "low", "'low'"),
    ("best_val_loss", torch.tensor(float("nan")), "best_val_loss is not finite"), ("best_val_loss", torch.ones(2), "best_val_loss is (2,)"),
    ("model", [], "'model' is no dict"), (f"model.{WTE}", None, f"{WTE} is missing"), ("model.extra", torch.ones(2), "'extra' is no parameter"),
    (f"model.{WTE}", torch.ones(29), f"{WTE} has 1 dimensions"), (f"model.{WTE}", torch.ones(30, 16), "vocab_size=29, its weights 30"),
    (f"model.{WTE}", torch.ones(29, 16, dtype=torch.int64), f"{WTE} holds int64"), (f"model.{WTE}", torch.ones(29, 16, dtype=torch.complex64), "complex64"),
    (f"model.{WTE}", torch.full((29, 16), float("nan")), "is not finite"), (f"model.{WTE}", torch.ones(29, 16).to_sparse(), "meta or sparse"),
    (f"model.{WTE}", torch.ones(29, 16, device="meta"), "meta or sparse"), (f"model.{WTE}", torch.ones(1).expand(29, 16), "share memory"),
    ("optimizer", None, "optimizer's groups are of no parameters"), ("optimizer.state", {}, "has no moments of"),
    ("optimizer.param_groups", [{"params": [0]}] * 2, "groups are of 1 and 1 parameters; 10 and 5 or 8 and 7 are known"),
])
def test_every_value_of_a_stranger_is_looked_at(where, value, message, tiny_flags, tmp_path, capsys):
    content, *_ = made()
    part, _, key = where.partition(".")
    if key:
        content[part][key] = value
    else:
        content[part] = value
    if message:
        assert message in refusal(resumed(content, tiny_flags, tmp_path), capsys)
    else:  # an argument of a seam that is not there
        assert nanogpt._parsed(content).config.seam == -1


def test_files_that_are_none_are_one_line(tiny_flags, tmp_path, capsys):
    flags, file = resumed(made()[0], tiny_flags, tmp_path), tmp_path / "nano" / "ckpt.pt"
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], b"not a zip", json.dumps({"model": 1}).encode()):
        file.write_bytes(damaged)
        assert f"{file}: not a nanoGPT checkpoint" in refusal(flags, capsys)
    file.unlink()
    os.mkfifo(file)
    assert f"{file}: no regular file" in refusal(flags, capsys)


# -- the drill ----------------------------------------------------------------------------

STRANGE = [None, "x", [], {}, -1, 2.5, float("nan"), 10**30, True, torch.ones(3), torch.ones(()), torch.ones(16, 16).int(),
           torch.ones(16).expand(10**6, 16), torch.full((16,), float("inf")), -torch.ones(29, 16), torch.ones(16, 16, device="meta")]


def damage(content, rng):
    """One thing changed somewhere: an entry dropped, replaced, or exchanged with its neighbour."""
    node, depth = content, rng.randrange(1, 5)
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = rng.choice(list(keys))
        if depth > 1 and isinstance(node[key], dict | list) and node[key]:
            node, depth = node[key], depth - 1
            continue
        how, other = rng.choice(["drop", "strange", "exchange", "cut", "dtype"]), rng.choice(list(keys))
        tensor = node[key] if isinstance(node[key], torch.Tensor) else None
        if how == "drop":
            del node[key]
        elif how == "exchange":
            node[key], node[other] = node[other], node[key]
        elif how == "cut" and tensor is not None and tensor.dim():
            node[key] = tensor[: rng.randrange(len(tensor))].clone()
        elif how == "dtype" and tensor is not None:
            node[key] = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.complex64]))
        else:
            node[key] = rng.choice(STRANGE)
        return content


whole = functools.cache(lambda layout, kind: made(layout, kind)[0])


def drilled(seed):
    rng = random.Random(seed)
    kind = rng.choice(["adamw", "adamw", "sgd"])
    content = copy.deepcopy(whole(rng.choice(["dimension", "module"]), kind))
    for _ in range(rng.choice([1, 1, 2])):
        damage(content, rng)
    return content, kind


def check_pure(seeds):
    """A damaged file is refused in one line, or what it gives is whole: of its shape, finite, in fp32."""
    refused = 0
    for seed in seeds:
        content, kind = drilled(seed)
        try:
            found = moments(content, kind) if {"model", "model_args", "iter_num"} <= content.keys() else {}
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 400, seed
            refused += 1
            continue
        weights = nanogpt._parsed(content).weights if found else {}
        for name, known in found.items():
            shape = weights[name].shape
            for key, tensor in known.items():
                assert tensor.shape == (() if key == "step" else shape) and tensor.dtype == torch.float32, seed
                assert tensor.isfinite().all() and tensor.is_contiguous(), seed
    return refused


def check_runs(seeds, tiny_flags, tmp_path):
    """The same of whole runs, in a process of their own, in which a crash is seen."""
    for seed in seeds:
        content, _ = drilled(seed)
        (tmp_path / str(seed)).mkdir()
        torch.save(content, tmp_path / str(seed) / "ckpt.pt")
    flags = [*tiny_flags, "--max_iters=4", "--eval_interval=100", "--eval_iters=1", "--weight_decay=0", "--optimizer=KIND"]
    program = f"""
import contextlib, io
from train import run
for seed in {list(seeds)}:
    for kind in ("adamw", "sgd"):
        said = io.StringIO()
        flags = [f.replace("KIND", kind) for f in {flags}]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = run.main([*flags, "--init_from=resume", f"--resume_dir={tmp_path}/{{seed}}", f"--out_dir={tmp_path}/{{seed}}-{{kind}}"])
        assert code == 0 or code == 2 and said.getvalue().count("\\n") == 1, (seed, kind, code, said.getvalue())
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
