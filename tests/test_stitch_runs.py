"""Runs of two joined models: evaluation, training, resume, ranks; the seam alone is trained."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gpt import GPT, GPTConfig, sample
from gpt.checkpoint_files import read_config
from gpt.run_folder import complete_checkpoints, find_checkpoint
from tests import ranks
from tests.conftest import every_architecture
from train import build, loop, run
from train.command_line import parse

STITCH = ["--init_from=stitch", "--use_original_head=False", "--stitch_layer_index=1"]


@pytest.fixture
def pair(tiny_flags, tmp_path):
    """Flags of a run that joins two trained ones, of 2 layers, 16 wide, but not how and where."""
    base = [f for f in tiny_flags if "--out_dir" not in f]
    a, b = (tmp_path / f"tiny-fw-adamw-{seed}" for seed in (1337, 1339))
    for folder in (a, b):
        flags = [*base, f"--out_dir={folder}", f"--seed={folder.name[-4:]}", "--eval_interval=12"]
        assert run.main(flags) == 0
    return [*base, f"--resume_dir={a}", f"--merge_dir={b}", f"--out_dir={tmp_path / 'joined'}"]


def evaluated(capsys, *flags):
    """The one evaluation line of the run."""
    capsys.readouterr()
    assert run.main([*flags, "--eval_only=True"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    return line.partition(": ")[2]


def tensors(folder, kind="model"):
    return load_file(find_checkpoint(folder) / f"{kind}.safetensors")


@every_architecture
def test_evaluating_a_merged_model_is_one_line_and_writes_nothing(pair, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    cut = [evaluated(capsys, *pair, "--init_from=merge", f"--stitch_layer_index={i}")
           for i in range(3)]
    assert len(set(cut)) == 3
    alone = [f for f in pair if "_dir=" not in f or "data_dir" in f]
    assert cut[2] == evaluated(capsys, *alone, f"--out_dir={tmp_path / 'tiny-fw-adamw-1337'}",
                               "--init_from=resume")
    theirs = evaluated(capsys, *pair, "--init_from=merge", "--stitch_layer_index=2",
                       "--use_original_head=False")
    assert theirs not in cut
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_the_model_from_out_dir_is_the_lower_one_by_default(pair, tmp_path, capsys):
    flags = [f for f in pair if "--resume_dir" not in f and "--out_dir" not in f]
    flags += [f"--out_dir={tmp_path / 'tiny-fw-adamw-1337'}", "--init_from=merge",
              "--stitch_layer_index=1"]
    assert evaluated(capsys, *flags) == evaluated(capsys, *pair, "--init_from=merge",
                                                  "--stitch_layer_index=1")
    assert run.main(flags) == 2
    assert "already holds a run" in capsys.readouterr().err


@every_architecture
def test_a_merged_model_trains_whole_from_step_0_and_resumes(pair, tmp_path, capsys):
    flags = [*pair, "--stitch_layer_index=1", "--use_original_head=False"]
    assert run.main([*flags, "--init_from=merge", "--max_iters=8"]) == 0
    said = capsys.readouterr().out
    assert "step 0: train loss" in said and "below block 1" in said
    built = build.build(parse([*flags, "--init_from=merge", f"--out_dir={tmp_path / 'fresh'}"]))
    assert built.step == built.batches.position == 0 and not built.optimizer.state
    after = tensors(tmp_path / "joined")
    assert all(not torch.equal(p, after[name]) for name, p in built.model.named_parameters())
    assert read_config(find_checkpoint(tmp_path / "joined")).tie_weights is False
    assert run.main([*flags, "--init_from=resume", f"--resume_dir={tmp_path / 'joined'}"]) == 0
    assert find_checkpoint(tmp_path / "joined").name == "step-00000012"
    model = GPT.from_checkpoint(tmp_path / "joined")
    assert model.lm_head.weight is not model.transformer.wte.weight


@every_architecture
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_seam_alone_is_trained_and_resumes_bit_equal(optimizer, pair, tmp_path):
    """20 steps at once, and 8 + 12: all but n_embd^2 + n_embd parameters keep every bit."""
    flags = [*pair, *STITCH, f"--optimizer={optimizer}", "--lr_decay_iters=20"]
    assert run.main([*flags, "--max_iters=20"]) == 0
    assert run.main([*flags, f"--out_dir={tmp_path / 'parts'}", "--max_iters=8"]) == 0
    parts = [*(f for f in flags if "--resume_dir" not in f), f"--out_dir={tmp_path / 'parts'}"]
    assert run.main([*parts, "--init_from=resume", "--max_iters=20"]) == 0
    for kind in ("model", "optimizer", "rng"):
        once, again = tensors(tmp_path / "joined", kind), tensors(tmp_path / "parts", kind)
        assert once.keys() == again.keys(), kind
        assert all(torch.equal(once[name], again[name]) for name in once), kind
    before = build.build(parse([*flags, f"--out_dir={tmp_path / 'fresh'}"]))
    after = tensors(tmp_path / "joined")
    moved = {name for name, p in before.model.named_parameters() if not torch.equal(p, after[name])}
    assert moved == {"seam.weight", "seam.bias"}
    groups = before.optimizer.param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == 16 * 16 + 16
    assert {name.partition(":")[0] for name in tensors(tmp_path / "joined", "optimizer")} == moved


@every_architecture
def test_training_the_seam_lowers_the_loss(pair):
    flags = [*pair, "--init_from=stitch", "--use_original_head=False", "--dropout=0",
             "--decay_lr=False"]
    for i in range(3):
        built = build.build(parse([*flags, f"--stitch_layer_index={i}"]))
        before = loop.evaluate(built)["train"]
        for _ in range(20):
            loop.train_step(built, lr=3e-3)
        assert loop.evaluate(built)["train"] < before


def test_the_fit_takes_as_many_sequences_as_it_is_told(pair, tmp_path, capsys):
    flags = [*pair, *STITCH]
    seams = [build.build(parse([*flags, f"--batch_size_alignment={n}"])).model.seam.weight
             for n in (4, 8, 8)]
    assert torch.equal(seams[1], seams[2]) and not torch.equal(seams[0], seams[1])
    assert run.main([*flags, "--batch_size_alignment=1"]) == 2
    assert "raise --batch_size_alignment" in capsys.readouterr().err
    assert run.main([*flags, "--batch_size_alignment=0"]) == 2


@pytest.mark.parametrize(("flags", "message"), [
    (["--merge_dir="], "give the upper one, --merge_dir=DIR"),
    (["--merge_dir=/nowhere"], "'/nowhere' is no folder"),
    ([], "stitch_layer_index=-1: choose 0 to n_layer=2"),
    (["--stitch_layer_index=1", "--n_layer=3"], "n_layer is 2 there and 3 here"),
    (["--stitch_layer_index=1", "--direction=backward"],
     "direction is forward there and backward here"),
])
def test_bad_input_is_one_line(flags, message, pair, tmp_path, capsys):
    capsys.readouterr()
    assert run.main([*pair, "--init_from=merge", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "joined").exists()


def test_a_checkpoint_tells_its_seam_and_older_ones_are_read(pair, tmp_path, capsys):
    flags = [*pair, *STITCH, "--max_iters=4"]
    assert run.main(flags) == 0
    saved = read_config(find_checkpoint(tmp_path / "joined"))
    assert (saved.seam, saved.tie_weights, saved.direction) == (1, False, "forward")
    capsys.readouterr()
    assert sample.main([f"--out_dir={tmp_path / 'joined'}", "--num_samples=1",
                        "--max_new_tokens=20", "--start=abc"]) == 0
    assert capsys.readouterr().out.startswith("abc")
    file = find_checkpoint(tmp_path / "tiny-fw-adamw-1337") / "model.json"
    old = {k: v for k, v in json.loads(file.read_text()).items()
           if k not in ("tie_weights", "direction", "architecture", "rope_theta", "logit_cap")}
    for of_its_time in (old, old | {"seam": -1}):  # every config had a seam once
        file.write_text(json.dumps(of_its_time))
        assert read_config(file.parent) == GPTConfig(**old, tie_weights=True, direction="forward")


def test_an_untied_model_trains_from_scratch(tiny_flags, tmp_path):
    assert run.main([*tiny_flags, "--tie_weights=False", "--max_iters=4"]) == 0
    weights = tensors(tmp_path / "out")
    assert not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
    built = build.build(parse([*tiny_flags, "--init_from=resume"]))
    assert torch.equal(built.model.lm_head.weight, weights["lm_head.weight"])


@every_architecture
def test_every_backend_evaluates_the_same_stitch(pair, capsys):
    flags = [*pair, *STITCH]
    fused, defined = (evaluated(capsys, *flags, f"--kernels={k}") for k in ("torch", "reference"))
    assert fused == defined


def test_two_ranks_train_the_seam_of_one(pair, tmp_path):
    flags = [*pair, *STITCH, "--dropout=0", "--eval_interval=12", "--learning_rate=1e-3"]
    assert run.main([*flags, f"--out_dir={tmp_path / 'one'}"]) == 0
    assert ranks.run(ranks.train, ([*flags, f"--out_dir={tmp_path / 'two'}"],), 2,
                     tmp_path / "logs") == [0, 0]
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert [c.name for c in complete_checkpoints(tmp_path / "two")] == ["step-00000012"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
        assert name.startswith("seam.") or torch.equal(two[name], one[name])
