"""Two models joined: where every tensor comes from, what the seam starts as, and that it alone is
trained."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gpt import GPT, GPTConfig, sample
from gpt.generate import generate
from gpt.pretrained import fill, read_config
from gpt.run_folder import find_checkpoint, whole_checkpoints
from gpt.stitch import Trained, least_squares, merge, stitch, stream
from tests import ranks
from train import build, loop, run
from train.command_line import parse

CONFIG = GPTConfig(block_size=12, vocab_size=19, n_layer=3, n_head=2, n_embd=8, bias=True)
N = CONFIG.n_layer


def made(name, seed, **changes):
    """A model with weights far from their initialisation, norms and biases included."""
    config = replace(CONFIG, **changes)
    generator = torch.Generator().manual_seed(seed)
    weights = {k: 0.3 * torch.randn(p.shape, generator=generator)
               for k, p in GPT(config).named_parameters()}
    return Trained(name, config, weights)


A, B = made("A", 1), made("B", 2)
IDX = torch.randint(19, (8, 12), generator=torch.Generator().manual_seed(3))


def model_of(config, weights):
    model = GPT(config)
    fill(model, weights)
    return model.eval()


def logits(config, weights, idx=IDX):
    with torch.no_grad():
        return model_of(config, weights).predict(idx)


@pytest.mark.parametrize("i", range(N + 1))
@pytest.mark.parametrize("original_head", [True, False])
def test_every_tensor_comes_from_where_it_should(i, original_head):
    config, weights = merge(A, B, i, original_head)
    below = [f"transformer.h.{n}." for n in range(i)] + ["transformer.wte.", "transformer.wpe."]
    below += ["transformer.ln_f."] if original_head else []
    for name, tensor in weights.items():
        if name != "lm_head.weight":
            assert tensor is (A if name.startswith(tuple(below)) else B).weights[name], name
    assert config == replace(CONFIG, tie_weights=original_head)
    assert weights.keys() - A.weights.keys() == (set() if original_head else {"lm_head.weight"})
    model = model_of(config, weights)
    assert (model.lm_head.weight is model.transformer.wte.weight) == original_head
    assert torch.equal(model.transformer.wte.weight, A.weights["transformer.wte.weight"])
    assert torch.equal(model.lm_head.weight,
                       (A if original_head else B).weights["transformer.wte.weight"])


@pytest.mark.parametrize("i", range(N + 1))
def test_a_model_merged_with_itself_is_itself(i):
    config, weights = merge(A, A, i)
    assert config == CONFIG and weights.keys() == A.weights.keys()
    assert all(torch.equal(weights[name], A.weights[name]) for name in weights)
    assert torch.equal(logits(*merge(A, A, i, original_head=False)), logits(*A[1:3]))


def test_the_last_cut_under_its_own_head_is_a():
    config, weights = merge(A, B, N)
    assert config == A.config and all(torch.equal(weights[name], A.weights[name])
                                      for name in A.weights)
    assert not torch.equal(logits(*merge(A, B, N, original_head=False)), logits(*A[1:3]))


def test_a_head_of_its_own_goes_where_its_model_goes():
    """Merging what was merged with B's head: lm_head.weight is no longer the embedding."""
    untied = Trained("U", *merge(A, B, 1, original_head=False))
    for a, b, original_head, wanted in (
        (untied, A, True, B), (untied, A, False, A), (A, untied, True, A), (A, untied, False, B),
    ):
        config, weights = merge(a, b, 2, original_head)
        assert config.tie_weights == (a is A and original_head)
        assert torch.equal(model_of(config, weights).lm_head.weight,
                           wanted.weights["transformer.wte.weight"])


@pytest.mark.parametrize(("key", "value"), [
    ("n_layer", 2), ("n_embd", 16), ("n_head", 4), ("vocab_size", 20), ("block_size", 8),
    ("bias", False),
    ("activation", "gelu_tanh"), ("direction", "backward"), ("window", 4),
])
def test_unequal_architectures_are_named(key, value):
    with pytest.raises(ValueError, match=f"{key} is {getattr(CONFIG, key)} in A and {value} in "
                                         "other"):
        merge(A, made("other", 2, **{key: value}), 1)


def test_what_cannot_be_cut_is_refused():
    for i in (-1, N + 1):
        with pytest.raises(ValueError, match=f"stitch_layer_index={i}: choose 0 to n_layer=3"):
            merge(A, B, i)
    stitched = Trained("S", *stitch(A, B, 1, True, None))
    with pytest.raises(ValueError, match="S is stitched itself, at layer 1"):
        merge(A, stitched, 1)


@pytest.mark.parametrize("i", range(N + 1))
def test_the_seam_stands_before_its_block(i):
    """The model written out, with a seam of arbitrary weights, against the model."""
    config, weights = stitch(A, B, i, False, IDX)
    generator = torch.Generator().manual_seed(4)
    weights |= {k: torch.randn(v.shape, generator=generator)
                for k, v in weights.items() if "seam" in k}
    model = model_of(config, weights)
    part = model.transformer
    with torch.no_grad():
        x = part.wte(IDX) + part.wpe.weight
        for n in range(N + 1):
            if n == i:
                x = x @ weights["seam.weight"].T + weights["seam.bias"]
            if n < N:
                branch, residual = part.h[n](x)
                x = branch + residual
        expected = part.ln_f(x)[1] @ B.weights["transformer.wte.weight"].T
    torch.testing.assert_close(model.predict(IDX), expected)


@pytest.mark.parametrize("i", range(N + 1))
def test_a_model_stitched_to_itself_gets_the_identity(i):
    _, weights = stitch(A, A, i, False, IDX)
    torch.testing.assert_close(weights["seam.weight"], torch.eye(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights["seam.bias"], torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(*stitch(A, A, i, False, IDX)), logits(*A[1:3]),
                               rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("i", range(N + 1))
def test_under_as_head_it_starts_as_the_merged_model(i):
    config, weights = stitch(A, B, i, True, None)
    assert config.seam == i and config.tie_weights
    assert torch.equal(logits(config, weights), logits(*merge(A, B, i)))


@pytest.mark.parametrize("i", [0, 1, N])
def test_the_start_is_the_least_squares_map_between_the_streams(i):
    """No other map fits better: the residual is orthogonal to A's stream and to the constant."""
    _, weights = stitch(A, B, i, False, IDX)
    x, y = stream(A, IDX, i), stream(B, IDX, i)
    assert x.shape == y.shape == (96, 8) and x.dtype == torch.float32
    residual = (x @ weights["seam.weight"].T + weights["seam.bias"] - y).double()
    assert residual.norm() > 1e-3
    assert (x.double().T @ residual).abs().max() < 1e-3 and residual.sum(0).abs().max() < 1e-3


def test_least_squares_finds_the_map_there_is():
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(shape, generator=generator) for shape in ((40, 5), (5, 5), (5,)))
    for found, true in zip(least_squares(x, x @ W.T + b), (W, b), strict=True):
        torch.testing.assert_close(found, true)
    flat = torch.cat([x[:, :4], x[:, :1]], dim=1)  # of rank 4: any map that fits will do
    weight, bias = least_squares(flat, flat)
    torch.testing.assert_close(flat @ weight.T + bias, flat)
    with pytest.raises(ValueError, match=r"5 tokens do not determine .* 5 \+ 1 inputs; raise "
                                         r"--batch_size_alignment"):
        least_squares(x[:5], x[:5])


def test_cached_text_crosses_the_seam():
    for i in (0, 2, N):
        model = model_of(*stitch(A, B, i, False, IDX))
        cached, plain = (torch.cat(list(generate(model, IDX[:, :3], 12, top_k=1, cached=c)), 1)
                         for c in (True, False))
        assert torch.equal(cached, plain)


def test_the_stream_after_the_seam_keeps_fp32_under_autocast():
    model, seen = model_of(*stitch(A, B, 1, True, None)), []
    model.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.append(args[1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.features(IDX)
    assert seen == [torch.float32]


def test_the_seam_is_part_of_one_graph():
    model = model_of(*stitch(A, B, 1, False, IDX))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(IDX, IDX), model(IDX, IDX))


def test_parameters_are_counted_once():
    whole = sum(w.numel() for w in A.weights.values())
    tied, untied = (model_of(*merge(A, B, 1, head)) for head in (True, False))
    assert (tied.num_params(), untied.num_params()) == (whole, whole + 19 * 8)
    assert tied.num_params(True) == untied.num_params(True) == whole - 12 * 8
    assert model_of(*stitch(A, B, 1, True, None)).num_params() == whole + 8 * 8 + 8


@pytest.fixture
def pair(tiny_flags, tmp_path):
    """Flags of a run that joins two trained ones, of 2 layers, 16 wide; add --init_from and
    --stitch_layer_index."""
    base = [f for f in tiny_flags if "--out_dir" not in f]
    for seed in (1337, 1339):
        flags = [*base, f"--out_dir={tmp_path / f'tiny-fw-adamw-{seed}'}", f"--seed={seed}"]
        assert run.main([*flags, "--eval_interval=12"]) == 0
    return [*base, f"--resume_dir={tmp_path / 'tiny-fw-adamw-1337'}",
            f"--merge_dir={tmp_path / 'tiny-fw-adamw-1339'}",
            f"--out_dir={tmp_path / 'joined'}"]


def evaluated(capsys, *flags):
    """The one evaluation line of the run."""
    capsys.readouterr()
    assert run.main([*flags, "--eval_only=True"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    return line.partition(": ")[2]


def tensors(folder, kind="model"):
    return load_file(find_checkpoint(folder) / f"{kind}.safetensors")


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


def test_a_merged_model_trains_whole_from_step_0_and_resumes(pair, tmp_path, capsys):
    flags = [*pair, "--stitch_layer_index=1", "--use_original_head=False"]
    assert run.main([*flags, "--init_from=merge", "--max_iters=8"]) == 0
    said = capsys.readouterr().out
    assert "step 0: train loss" in said and "below block 1" in said
    built = build.build(parse([*flags, "--init_from=merge", f"--out_dir={tmp_path / 'fresh'}"]))
    assert built.step == built.batches.position == 0 and not built.optimizer.state
    after = tensors(tmp_path / "joined")
    assert all(not torch.equal(p, after[name]) for name, p in built.model.named_parameters())
    assert json.loads((find_checkpoint(tmp_path / "joined")
                       / "model.json").read_text())["tie_weights"] is False
    assert run.main([*flags, "--init_from=resume", f"--resume_dir={tmp_path / 'joined'}"]) == 0
    assert find_checkpoint(tmp_path / "joined").name == "step-00000012"
    model = GPT.from_checkpoint(tmp_path / "joined")
    assert model.lm_head.weight is not model.transformer.wte.weight


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_seam_alone_is_trained_and_resumes_bit_equal(optimizer, pair, tmp_path):
    """20 steps at once, and 8 + 12: all but n_embd^2 + n_embd parameters are bit for bit as they
    were."""
    flags = [*pair, "--stitch_layer_index=1", "--use_original_head=False",
             f"--optimizer={optimizer}", "--lr_decay_iters=20"]
    assert run.main([*flags, "--init_from=stitch", "--max_iters=20"]) == 0
    parts = [*(f for f in flags if "--resume_dir" not in f), f"--out_dir={tmp_path / 'parts'}"]
    assert run.main([*flags, f"--out_dir={tmp_path / 'parts'}", "--init_from=stitch",
                     "--max_iters=8"]) == 0
    assert run.main([*parts, "--init_from=resume", "--max_iters=20"]) == 0
    for kind in ("model", "optimizer", "rng"):
        once, again = tensors(tmp_path / "joined", kind), tensors(tmp_path / "parts", kind)
        assert once.keys() == again.keys() and all(torch.equal(once[name], again[name])
                                                   for name in once), kind
    before = build.build(parse([*flags, "--init_from=stitch", f"--out_dir={tmp_path / 'fresh'}"]))
    after = tensors(tmp_path / "joined")
    moved = {name for name, p in before.model.named_parameters() if not torch.equal(p, after[name])}
    assert moved == {"seam.weight", "seam.bias"}
    assert sum(p.numel() for group in before.optimizer.param_groups
               for p in group["params"]) == 16 * 16 + 16
    assert {name.partition(":")[0] for name in tensors(tmp_path / "joined", "optimizer")} == moved


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
    flags = [*pair, "--init_from=stitch", "--use_original_head=False", "--stitch_layer_index=1"]
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
    (["--stitch_layer_index=1", "--direction=backward"], "direction is forward there and backward "
                                                         "here"),
    (["--init_from=scratch", "--seam=1"], "--seam=1: it is made by --init_from=stitch"),
])
def test_what_is_missing_is_said_in_one_line(flags, message, pair, tmp_path, capsys):
    capsys.readouterr()
    assert run.main([*pair, "--init_from=merge", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "joined").exists()


def test_a_checkpoint_says_what_it_is_and_one_without_is_as_ever(pair, tmp_path, capsys):
    flags = [*pair, "--init_from=stitch", "--use_original_head=False", "--stitch_layer_index=1",
             "--max_iters=4"]
    assert run.main(flags) == 0
    saved = read_config(find_checkpoint(tmp_path / "joined"))
    assert (saved.seam, saved.tie_weights, saved.direction) == (1, False, "forward")
    capsys.readouterr()
    assert sample.main([f"--out_dir={tmp_path / 'joined'}", "--num_samples=1",
                        "--max_new_tokens=20", "--start=abc"]) == 0
    assert capsys.readouterr().out.startswith("abc")
    file = find_checkpoint(tmp_path / "tiny-fw-adamw-1337") / "model.json"
    old = {k: v for k, v in json.loads(file.read_text()).items()
           if k not in ("tie_weights", "direction", "seam")}
    file.write_text(json.dumps(old))
    assert read_config(file.parent) == GPTConfig(**old, tie_weights=True,
                                                 direction="forward", seam=-1)


def test_an_untied_model_trains_from_scratch(tiny_flags, tmp_path):
    assert run.main([*tiny_flags, "--tie_weights=False", "--max_iters=4"]) == 0
    weights = tensors(tmp_path / "out")
    assert not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
    built = build.build(parse([*tiny_flags, "--init_from=resume"]))
    assert torch.equal(built.model.lm_head.weight, weights["lm_head.weight"])


def test_every_suite_evaluates_the_same_stitch(pair, capsys):
    flags = [*pair, "--init_from=stitch", "--use_original_head=False", "--stitch_layer_index=1"]
    assert evaluated(capsys, *flags, "--kernels=torch") == evaluated(capsys, *flags,
                                                                     "--kernels=reference")


def test_two_ranks_train_the_seam_of_one(pair, tmp_path):
    flags = [*pair, "--init_from=stitch", "--use_original_head=False", "--stitch_layer_index=1",
             "--dropout=0",
             "--eval_interval=12", "--learning_rate=1e-3"]
    assert run.main([*flags, f"--out_dir={tmp_path / 'one'}"]) == 0
    assert ranks.run(ranks.train, ([*flags, f"--out_dir={tmp_path / 'two'}"],), 2,
                     tmp_path / "logs") == [0, 0]
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert [c.name for c in whole_checkpoints(tmp_path / "two")] == ["step-00000012"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
        assert name.startswith("seam.") or torch.equal(two[name], one[name])
