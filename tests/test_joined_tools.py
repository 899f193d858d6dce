"""The tools on models that other projects' GPT-2 cannot be: backward, stitched, untied."""

import math
from dataclasses import replace

import pytest
import torch

from gpt import GPT, export, predict
from gpt.config import StitchedConfig
from gpt.flops import flops_per_token
from gpt.run_folder import find_checkpoint
from tests.conftest import every_architecture
from train import evaluate, run


@pytest.mark.parametrize("flag", ["--tie_weights=False", "--direction=backward", "--window=4"])
@pytest.mark.parametrize("to", ["hf", "nanogpt"])
def test_export_refuses_what_gpt2_elsewhere_cannot_express(flag, to, tiny_flags, tmp_path, capsys):
    assert run.main([*tiny_flags, flag, "--max_iters=4"]) == 0
    capsys.readouterr()
    assert export.main([f"--out_dir={tmp_path / 'out'}", f"--to={to}"]) == 2
    err = capsys.readouterr().err
    assert flag[2:] in err and f"--to={to} cannot express" in err and err.count("\n") == 1
    assert not (tmp_path / "out" / to).exists()


@every_architecture
def test_a_backward_model_is_scored_from_the_end(tiny_flags, tiny_data, tmp_path, capsys):
    assert run.main([*tiny_flags, "--direction=backward", "--max_iters=8"]) == 0
    model = GPT.from_checkpoint(find_checkpoint(tmp_path / "out"))
    ids = torch.tensor(["abcdefghijklmnopqrstuvwxyz\n =.".index(c) for c in "acdfg"]).flip(0)
    with torch.no_grad():
        logits = model.logits(ids[None])[0]
    mean = torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).item()
    capsys.readouterr()
    assert predict.main([f"--out_dir={tmp_path / 'out'}", "--text=acdfg", "--top=1"]) == 0
    said = capsys.readouterr().out
    assert f"mean loss {mean:.4f}" in said and "token before:" in said
    assert f"{logits[-1].argmax().item()}  '" in said
    asked = evaluate.Evaluate(out_dir=str(tmp_path / "out"), data_dir=str(tiny_data),
                              device="cpu", dtype="float32")
    figures = evaluate.evaluate(asked)
    # What it has learnt shows only in the order in which it reads.
    assert figures["loss"] < math.log(29) - 0.2
    with pytest.raises(ValueError, match="this model has --direction=backward"):
        evaluate.evaluate(replace(asked, data_dir="", lambada="FILE"))


def test_a_frozen_model_needs_fewer_operations():
    """By hand: forward in all layers, activation gradients above the seam, its weight gradient."""
    c = StitchedConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=10, seam=1)
    block, head, norms, seam = 12 * 64, 80, 40, 72
    work = 2 * (2 * block + head + norms + seam) + 2 * (block + head + norms + seam) + 2 * 64
    attention = 4 * 2 * 8 * 4 + 8 * 1 * 8 * 4
    assert flops_per_token(c) == {"palm": work + attention, "causal": work + attention / 2}
