"""The files of a checkpoint: their modes, and tensors that are not those of the run."""

import stat

import pytest
import torch

from gpt import export
from gpt.checkpoint_files import read_part, save_tensors
from gpt.run_folder import find_checkpoint
from train import build, checkpoint, run
from train.command_line import parse

WPE = "transformer.wpe.weight"


@pytest.fixture
def folder(tiny_flags, tmp_path):
    assert run.main(tiny_flags) == 0
    return tmp_path / "out"


def test_files_have_the_mode_of_any_other_new_file(folder, tmp_path):
    """safetensors makes its files 0600: a colleague could not sample from the run."""
    (tmp_path / "usual").touch()
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in find_checkpoint(folder).iterdir()}
    assert set(modes.values()) == {stat.S_IMODE((tmp_path / "usual").stat().st_mode)}


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_so_have_exported_files(to, folder, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert export.main([f"--out_dir={folder}", f"--to={to}", f"--folder={tmp_path / to}"]) == 0
    (tmp_path / "usual").touch()
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / to).iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "usual").stat().st_mode)}


@pytest.mark.parametrize(("part", "change", "said"), [
    ("optimizer", lambda t: t.pop(f"{WPE}:exp_avg"),
     f"the shape of {WPE}:exp_avg is none in its optimizer"),
    ("optimizer", lambda t: t.update({f"{WPE}:exp_avg": torch.zeros(29, 16)}),
     "(29, 16) in its optimizer, this run's is (16, 16)"),
    ("optimizer", lambda t: [t.pop(k) for k in list(t) if k.endswith("sq")],
     "exp_avg_sq is none in its optimizer"),
    ("model", lambda t: t.update({WPE: torch.zeros(16, 17)}),
     "(16, 17) in its model, this run's is (16, 16)"),
    ("model", lambda t: t.pop("transformer.ln_f.weight"),
     "the shape of transformer.ln_f.weight is none in its model"),
])
def test_names_and_shapes_are_compared_before_anything_is_placed(
        part, change, said, tiny_flags, folder):
    newest = find_checkpoint(folder)
    tensors = read_part(newest, part)
    change(tensors)
    save_tensors(tensors, newest / f"{part}.safetensors")
    built = build.build(parse([*tiny_flags, "--out_dir=unused"]))
    before = {name: p.clone() for name, p in built.model.named_parameters()}
    with pytest.raises(ValueError) as caught:
        checkpoint.restore(newest, built.model, built.optimizer, built.world)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in built.model.named_parameters())
