"""Runs of every version of nanoGPT resume with their own moments, or are refused in one line."""

import copy
import math

import pytest
import torch

from gpt import GPT, nanogpt
from gpt.config import StitchedConfig, make_config
from gpt.tensors import shapes_of
from train import build, loop, run
from train.command_line import parse

SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=29)
WTE = "transformer.wte.weight"
SEAM = ("transformer.stitching.stitching.weight", "transformer.stitching.stitching.bias")
LAYERS = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "lm_head.weight")


def made(layout="dimension", kind="adamw", bias=False, weight_decay=0.1, seam=None):
    """(content of a ckpt.pt, its model, its optimizer) after two steps, without our reader."""
    torch.manual_seed(5)
    model = GPT(make_config(-1 if seam is None else seam, **SHAPE, bias=bias))
    named = {
        name.replace("seam.", "transformer.stitching.stitching."): p
        for name, p in model.named_parameters()
    }
    if layout == "dimension":  # nanoGPT since May 2023
        groups = [
            [p for p in named.values() if p.dim() >= 2],
            [p for p in named.values() if p.dim() < 2],
        ]
    else:  # before: by the kind of module, in the order of the names
        groups = [
            [named[n] for n in sorted(named) if n.endswith((*LAYERS, SEAM[0])) == first]
            for first in (True, False)
        ]
    groups = [
        {"params": groups[0], "weight_decay": weight_decay},
        {"params": groups[1], "weight_decay": 0.0},
    ]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)),
        "adam": lambda: torch.optim.Adam(groups, lr=1e-2, betas=(0.9, 0.95)),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    }[kind]()
    if seam is not None:
        for name, p in named.items():
            p.requires_grad_(name in SEAM)
    for _ in range(2):
        model(torch.randint(29, (4, 16)), torch.randint(29, (4, 16))).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in named.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    content = {
        "model": weights,
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "model_args": SHAPE | {"bias": bias, "dropout": 0.0},
        "iter_num": 2,
        "best_val_loss": torch.tensor(3.0),
        "config": {"dataset": "nowhere", "weight_decay": weight_decay},
    }
    if seam is not None:
        content["model_args"] |= {
            "stitching": True, "stitching_layer": seam, "use_original_head": False,
            "use_original_wpe_wte": True,
        }
    return content, model, optimizer


def moments(content, kind="adamw"):
    """A file's moments as a run reads them."""
    found = nanogpt._parsed(content)
    shapes = shapes_of(found.config)
    stitched = isinstance(found.config, StitchedConfig)
    trained = [name for name in shapes if not stitched or name.startswith("seam.")]
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
            assert torch.equal(found[name][key], value)


def test_moments_have_memory_of_their_own():
    """A file may hold one tensor twice; a step would then move both."""
    content, *_ = made()
    state = content["optimizer"]["state"]
    state[0]["exp_avg"] = state[0]["exp_avg_sq"]
    found = moments(content)["transformer.wte.weight"]
    assert len({found[key].data_ptr() for key in found} | {state[0]["exp_avg"].data_ptr()}) == 4


def resumed(content, tiny_flags, tmp_path, *flags):
    folder = tmp_path / "nano"
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "ckpt.pt")
    flags = [
        "--init_from=resume", f"--resume_dir={folder}", "--dropout=0.0", "--grad_clip=0",
        "--gradient_accumulation_steps=1", "--decay_lr=False", "--learning_rate=1e-2", *flags,
    ]
    return [*tiny_flags, *flags]


def refusal(flags, capsys):
    """The one line that a run prints if it cannot begin."""
    capsys.readouterr()
    assert run.main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("layout", "kind", "seam"),
    [
        ("dimension", "adamw", None),
        ("module", "adamw", None),
        ("module", "sgd", None),
        ("module", "sgd", 1),
    ],
)
def test_the_steps_after_a_resume_are_the_optimizers_own(layout, kind, seam, tiny_flags, tmp_path):
    """The older layout and SGD's state crashed, or gave the moments of other parameters."""
    content, model, optimizer = made(layout, kind, weight_decay=0.0, seam=seam)
    flags = resumed(content, tiny_flags, tmp_path, f"--optimizer={kind}", "--weight_decay=0")
    model.config = nanogpt._parsed(content).config  # its GELU
    for block in model.transformer.h:
        block.mlp.config = model.config
    built, batches = build.build(parse(flags)), build.build(parse(flags)).batches
    assert (built.step, built.best_val_loss) == (2, 3.0)
    for _ in range(3):
        loop.train_step(built, lr=1e-2)
        model(*next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), (_, theirs) in zip(
        built.model.named_parameters(), model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)


def test_swapped_moments_are_refused_and_not_run(tiny_flags, tmp_path, capsys):
    """They were placed unchecked, and the fused AdamW ran out of bounds: a segmentation fault."""
    content, *_ = made()
    state = content["optimizer"]["state"]
    state[0], state[1] = state[1], state[0]
    said = refusal(resumed(content, tiny_flags, tmp_path), capsys)
    assert "exp_avg of transformer.wte.weight is (16, 16); (29, 16) is needed" in said
    assert f"--init_from={tmp_path / 'nano'} starts from its weights alone" in said
    assert not (tmp_path / "out").exists()
    flags = resumed(content, tiny_flags, tmp_path)
    assert build.build(parse([*flags, f"--init_from={tmp_path / 'nano'}"])).step == 0


def test_the_older_layout_says_that_embeddings_now_decay(tiny_flags, tmp_path):
    content, *_ = made("module")
    said = build.build(parse(resumed(content, tiny_flags, tmp_path, "--weight_decay=0.2")))
    said = said.resumed_from
    assert "weight_decay was 0.1, is 0.2; " in said
    assert "; the embeddings, which did not decay there, do here" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, g: s[0].update(step=torch.tensor(3.0)), "is at step 2 and at step 3"),
        (lambda s, g: s[0].update(step=-1), f"step of {WTE} is negative"),
        (lambda s, g: s[0].update(step=10**400), f"step of {WTE} is a int"),
        (lambda s, g: s[0].pop("step"), f"has 'exp_avg' and 'exp_avg_sq' of {WTE}"),
        (lambda s, g: s[0]["exp_avg_sq"].neg_(), f"exp_avg_sq of {WTE} is negative"),
        (lambda s, g: s[0]["exp_avg"].fill_(math.nan), "is not finite everywhere"),
        (lambda s, g: s[0].update(exp_avg=torch.ones(1).expand(29, 16)), "share memory"),
        (lambda s, g: s.pop(3), "has no moments of transformer.h.0.attn.c_proj.weight"),
        (lambda s, g: s.update({99: s[0]}), "has moments of 99"),
        (lambda s, g: g[0].update(amsgrad=True), "amsgrad=True where --optimizer=adamw has False"),
        (lambda s, g: g[0].update(decoupled_weight_decay=False), "decoupled_weight_decay=False"),
        (lambda s, g: g[1].update(weight_decay=0.1), "weight_decay=0.1 where"),
        (lambda s, g: g[0]["params"].reverse(), "not numbered in order"),
    ],
)
def test_a_damaged_state_is_refused(change, message):
    """`change` gets the optimizer's state s and its groups g."""
    content, *_ = made()
    change(content["optimizer"]["state"], content["optimizer"]["param_groups"])
    with pytest.raises(ValueError, match=message):
        moments(content)


@pytest.mark.parametrize(
    ("kind", "other"), [("adamw", "sgd"), ("sgd", "adamw"), ("adam", "adamw"), ("adamw", "adam")]
)
def test_the_state_of_another_optimizer_is_refused(kind, other):
    """SGD's under AdamW was a KeyError, and Adam's weight decay is not ours."""
    with pytest.raises(ValueError, match=f"--optimizer={other}"):
        moments(made("module", kind)[0], other)
    with pytest.raises(ValueError, match="weight_decay=0.1 where --optimizer=adam has 0"):
        moments(made("module", "adam")[0], "adam")
