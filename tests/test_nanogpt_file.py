"""What a ckpt.pt tells of its model, and wrong values anywhere in it."""

import json
import math
import os

import pytest
import torch

from gpt import GPTConfig, nanogpt
from tests.test_nanogpt import made, refusal, resumed
from train import build, loop
from train.command_line import parse


def test_the_gelu_is_tanh_where_the_file_tells():
    """It was before June 2023; the erf form was used, which gave another loss."""

    def config(content, **args):
        content["model_args"] = content["model_args"] | args
        return nanogpt._parsed(content)

    today = config(made()[0])
    assert today.config.activation == "gelu" and today.guessed == ("activation",)
    for told in (config(made("module")[0]), config(made()[0], backward=False),
                 config(made()[0], stitching=False)):
        assert told.config.activation == "gelu_tanh" and told.guessed == ()
    first = made()[0]
    del first["model_args"]["bias"], first["model_args"]["vocab_size"]
    assert config(first).config == told.config


def test_where_it_does_not_tell_it_is_asked_for(tiny_flags, tmp_path):
    flags = resumed(made()[0], tiny_flags, tmp_path)
    for beginning in ("resume", str(tmp_path / "nano")):
        for activation in ("gelu", "gelu_tanh"):
            asked = [*flags, f"--init_from={beginning}", f"--activation={activation}"]
            assert build.build(parse(asked)).model.config.activation == activation


def test_a_backward_model_is_read_backwards():
    """Stitch-LLMs' model_args say so; they were not read: a loss of 4.25 instead of 2.26."""
    content, *_ = made("module", "sgd")
    assert nanogpt._parsed(content).config.direction == "forward"
    content["model_args"]["backward"] = True
    assert nanogpt._parsed(content).config.direction == "backward"


def test_a_head_of_its_own_is_kept():
    """Until 14 January 2023 nanoGPT did not tie the two; the head was dropped."""
    content, *_ = made()
    content["model"]["lm_head.weight"] = torch.randn(29, 16)
    found = nanogpt._parsed(content)
    assert not found.config.tie_weights
    assert torch.equal(found.weights["lm_head.weight"], content["model"]["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_kinds_are_converted(dtype, tiny_flags, tmp_path):
    content, *_ = made()
    content["model"] = {name: tensor.to(dtype) for name, tensor in content["model"].items()}
    for values in content["optimizer"]["state"].values():
        values |= {key: values[key].to(dtype) for key in ("exp_avg", "exp_avg_sq")}
    built = build.build(parse(resumed(content, tiny_flags, tmp_path)))
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}
    states = built.optimizer.state.values()
    assert {t.dtype for state in states for t in state.values()} == {torch.float32}
    assert math.isfinite(loop.train_step(built, lr=1e-2)[0])


WTE = "transformer.wte.weight"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model_args", None, "model_args is a NoneType"),
        ("model_args.n_layer", 3, "model_args says n_layer=3, its weights 2"),
        ("model_args.n_layer", 10**12, "n_layer=1000000000000, its weights 2"),
        ("model_args.n_head", None, "n_head=a NoneType, and int"),
        ("model_args.n_head", 5, "n_head=5 does not divide n_embd=16"),
        ("model_args.n_embd", "16", "n_embd='16', and int is needed"),
        ("model_args.bias", 1, "bias=1, and bool is needed"),
        ("model_args.dropout", float("nan"), "dropout=nan"),
        ("model_args.rotary", True, "model_args has 'rotary', which nanoGPT's models do not"),
        ("model_args.stitching_layer", 7, ""),
        ("iter_num", -1, "iter_num=-1: a step below"),
        ("iter_num", "2", "iter_num='2'"),
        ("iter_num", 10**400, "iter_num=a int"),
        ("best_val_loss", float("nan"), "best_val_loss=nan"),
        ("best_val_loss", "low", "'low'"),
        ("best_val_loss", torch.tensor(float("nan")), "best_val_loss is not finite"),
        ("best_val_loss", torch.ones(2), "best_val_loss is (2,)"),
        ("model", [], "'model' is no dict"),
        (f"model.{WTE}", None, f"{WTE} is missing"),
        ("model.extra", torch.ones(2), "'extra' is no parameter"),
        (f"model.{WTE}", torch.ones(29), f"{WTE} has 1 dimensions"),
        (f"model.{WTE}", torch.ones(30, 16), "vocab_size=29, its weights 30"),
        (f"model.{WTE}", torch.ones(29, 16, dtype=torch.int64), f"{WTE} holds int64"),
        (f"model.{WTE}", torch.ones(29, 16, dtype=torch.complex64), "complex64"),
        (f"model.{WTE}", torch.full((29, 16), float("nan")), "is not finite"),
        (f"model.{WTE}", torch.ones(29, 16).to_sparse(), "meta or sparse"),
        (f"model.{WTE}", torch.ones(29, 16, device="meta"), "meta or sparse"),
        (f"model.{WTE}", torch.ones(1).expand(29, 16), "share memory"),
        ("optimizer", None, "optimizer's groups are of no parameters"),
        ("optimizer.state", {}, "has no moments of"),
        ("optimizer.param_groups", [{"params": [0]}] * 2,
         "groups are of 1 and 1 parameters; 10 and 5 or 8 and 7 are known"),
    ],
)
def test_every_value_is_checked(where, value, message, tiny_flags, tmp_path, capsys):
    content, *_ = made()
    part, _, key = where.partition(".")
    if key:
        content[part][key] = value
    else:
        content[part] = value
    if message:
        assert message in refusal(resumed(content, tiny_flags, tmp_path), capsys)
    else:  # stitching_layer without stitching
        assert type(nanogpt._parsed(content).config) is GPTConfig


def test_other_files_are_refused_in_one_line(tiny_flags, tmp_path, capsys):
    flags, file = resumed(made()[0], tiny_flags, tmp_path), tmp_path / "nano" / "ckpt.pt"
    whole = file.read_bytes()
    for damaged in (
        b"", whole[:100], whole[: len(whole) // 2], whole[:-1], b"not a zip",
        json.dumps({"model": 1}).encode(),
    ):
        file.write_bytes(damaged)
        assert f"{file}: not a nanoGPT checkpoint" in refusal(flags, capsys)
    file.unlink()
    os.mkfifo(file)
    assert f"{file}: no regular file" in refusal(flags, capsys)
