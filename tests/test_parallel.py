"""Any number of ranks is one process: the same losses, weights, evaluation and checkpoints."""

import json
import os
import shutil
from functools import partial
from importlib import import_module

import pytest
import torch

from gpt import GPT, export
from gpt.checkpoint_files import read_part, saved_shapes, verify
from gpt.config import ARCHITECTURES
from gpt.run_folder import complete_checkpoints
from tests import ranks
from tests.conftest import TINY, every_architecture, write_tiny_data
from train import build, loop, parallel, run
from train.command_line import parse

STEPS = 20


def without(flags, *names):
    return [f for f in flags if not f.startswith(tuple(f"--{name}=" for name in names))]


# 20 steps of 6 micro-batches over all ranks, clipped, without dropout, on a vocabulary of 29, which
# 2 and 3 do not divide
CURVE = [*without(TINY, "dropout", "gradient_accumulation_steps", "max_iters", "lr_decay_iters",
                  "eval_interval", "batch_size", "learning_rate"),
         "--dropout=0.0", "--gradient_accumulation_steps=6", f"--max_iters={STEPS}",
         f"--lr_decay_iters={STEPS}", "--eval_interval=10", "--batch_size=2",
         "--grad_clip=0.5", "--learning_rate=3e-3", "--init_from=auto"]
SHORT = [*without(CURVE, "max_iters", "eval_interval"), "--max_iters=3", "--eval_interval=3"]
SPREADS = ("ddp", "fsdp")
OTHERS = [name for name in ARCHITECTURES if name != "gpt2"]
KINDS = {  # what else is trained, compared with one process after three steps
    "triton": ["--kernels=triton", "--n_embd=32", "--n_layer=1", "--gradient_accumulation_steps=2",
               "--max_iters=1", "--eval_interval=9", "--eval_iters=1"],
    "backward": ["--direction=backward", "--kernels=reference"],
    "merge": ["--init_from=merge", "--stitch_layer_index=1"],
    # stitched with the upper model's head, so untied, and frozen but for the seam
    "stitch": ["--init_from=stitch", "--stitch_layer_index=1", "--use_original_head=False",
               "--batch_size_alignment=8"],
} | {name: [f"--architecture={name}"] for name in OTHERS}
DROPPING = [("ddp", "gpt2"), *(("fsdp", name) for name in ARCHITECTURES)]
BOTH = ["--parallel=fsdp", "--compile=True", "--activation_checkpointing=True"]
KEYS = {  # what else may change a parameter's name, and the run that it is compared with
    "compiledddp": (["--parallel=ddp", "--compile=True"], "eager1"), "bothfsdp": (BOTH, "eager1"),
} | {f"{name}both": ([*KINDS[name], *BOTH], f"{name}1") for name in OTHERS}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder with all runs of this file, by name; each number of ranks is started once."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_tiny_data(folder / "tiny")
    command = partial(flags_of, folder, data)
    torch.use_deterministic_algorithms(False)
    alone = [command(CURVE, "one"), command(CURVE, "mixed", "--max_iters=5"),
             command(SHORT, "a", "--seed=5"), command(SHORT, "b", "--seed=6")]
    alone += [command(SHORT, f"{kind}1", *joined(folder, flags)) for kind, flags in KINDS.items()]
    alone += [command(CURVE, "evaluated1", *EVALUATION), command(SHORT, "eager1")]
    for name in OTHERS:
        muon = [*KINDS[name], "--optimizer=muon"]
        alone += [command(SHORT, f"{name}muon1", *muon),
                  command(SHORT, f"{name}mixed", *muon, "--max_iters=1")]
    for flags in alone:
        assert run.main(flags) == 0
    start(folder, 2, two_ranks(folder, command))
    start(folder, 3, [command(CURVE, f"{how}3", f"--parallel={how}") for how in SPREADS])
    start(folder, 4,
          [command(CURVE, f"evaluated{how}4", f"--parallel={how}", *EVALUATION) for how in SPREADS])
    longer = ["--init_from=resume", "--max_iters=22"]
    for flags in (command(CURVE, "mixed"),
                  *(command(SHORT, f"{name}mixed", *KINDS[name], "--optimizer=muon")
                    for name in OTHERS),
                  *(command(CURVE, f"{name}longer", *longer, f"--resume_dir={folder / name}")
                    for name in ("one", "fsdp2"))):
        assert run.main(flags) == 0
    return folder


# of the initial weights, on 7 batches, which 2 and 4 do not divide
EVALUATION = ["--max_iters=0", "--gradient_accumulation_steps=4", "--eval_iters=7"]


def flags_of(folder, data, base, name, *more):
    replaced = [flag[2:].partition("=")[0] for flag in more]
    return [*without(base, *replaced), f"--data_dir={data}", f"--out_dir={folder / name}", *more]


def joined(folder, flags):
    if "--stitch_layer_index=1" not in flags:
        return flags
    return [*flags, f"--resume_dir={folder / 'a'}", f"--merge_dir={folder / 'b'}"]


def two_ranks(folder, command):
    runs = [command(CURVE, f"{how}2", f"--parallel={how}") for how in SPREADS]
    runs += [command(CURVE, f"evaluated{how}2", f"--parallel={how}", *EVALUATION)
             for how in SPREADS]
    runs += [command(CURVE, "mixed", "--max_iters=13"),
             (command(CURVE, "hsdp2", "--parallel=hsdp"), {"LOCAL_WORLD_SIZE": 1})]
    for how in SPREADS:
        for name in ARCHITECTURES:
            each = [f"--parallel={how}", f"--architecture={name}"]
            runs.append(command(SHORT, f"{name}{how}bf16", *each, "--dtype=bfloat16"))
            dropping = ["--dropout=0.1", *each, "--max_iters=6"]
            if (how, name) in DROPPING:
                runs += [command(SHORT, f"{name}{how}whole", *dropping),
                         command(SHORT, f"{name}{how}parts", *dropping[:-1]),
                         command(SHORT, f"{name}{how}parts", *dropping)]
        runs += [command(SHORT, f"{kind}{how}", *joined(folder, flags), f"--parallel={how}")
                 for kind, flags in KINDS.items()]
    runs += [command(SHORT, f"{name}mixed", *KINDS[name], "--optimizer=muon", "--parallel=fsdp",
                     "--max_iters=2") for name in OTHERS]
    return runs + [command(SHORT, name, *flags) for name, (flags, _) in KEYS.items()]


def start(folder, size, runs):
    """Train them one after the other on as many ranks; each meets at a port of its own."""
    runs = [r if isinstance(r, tuple) else (r, {}) for r in runs]
    settled = [(flags, {"MASTER_PORT": ranks.free_port(), "LOCAL_WORLD_SIZE": size} | more)
               for flags, more in runs]
    codes = ranks.run(ranks.train_each, (settled,), size, folder / f"logs{size}", seconds=300)
    assert codes == [0] * size, (folder / f"logs{size}" / "0.log").read_text()[-3000:]


def leave_first_step(runs, folder):
    """A rank that writes NAME.pt for each run: first loss, whole gradients, an evaluation.

    Also the dtypes of the rotations that attention was called with. What starts at 0, or nearly,
    starts at 0.02: behind it there would be no gradient.
    """
    for name, flags, port in runs:
        os.environ["MASTER_PORT"] = str(port)
        config, dtypes = parse(flags), set()
        kind = import_module(ARCHITECTURES[config.model.architecture].module).Transformer
        drawn = kind.initial_std
        kind.initial_std = lambda self, name, drawn=drawn: max(drawn(self, name), 0.02)
        built = build.build(config)
        for block in built.model.transformer.h:
            block.attn.register_forward_pre_hook(
                lambda _, args, seen=dtypes: seen.add(getattr(args[1].rotation, "dtype", None)))
        loss = parallel.sum_over_ranks(loop.accumulate(built))
        gradients = {name: parallel.full_tensor(p.grad)
                     for name, p in built.model.named_parameters()}
        evaluation = loop.evaluate(built)["val"]
        if built.world.rank == 0:
            torch.save((loss.item(), evaluation, gradients, dtypes), folder / f"{name}.pt")
        kind.initial_std = drawn
        parallel.stop()


@pytest.fixture(scope="module")
def first_step(tmp_path_factory):
    """Reads what `leave_first_step` wrote: of one process (auto), and of DDP and FSDP2.

    By architecture and dtype. DDP and FSDP2 have two ranks.
    """
    folder = tmp_path_factory.mktemp("first")
    data = write_tiny_data(folder / "tiny")
    for size, hows in ((1, ["auto"]), (2, SPREADS)):
        runs = [(f"{how} {dtype} {name}",
                 [*flags_of(folder, data, CURVE, "none"), f"--parallel={how}", f"--dtype={dtype}",
                  f"--architecture={name}"], ranks.free_port())
                for how in hows for dtype in ("float32", "bfloat16") for name in ARCHITECTURES]
        assert ranks.run(leave_first_step, (runs, folder), size,
                         folder / f"logs{size}") == [0] * size
    return lambda how, dtype, name: torch.load(folder / f"{how} {dtype} {name}.pt")


def outcome(folder):
    """Losses by step, evaluations by step, and the last checkpoint's tensors."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = {e["iter"]: (e["train/loss"], e["val/loss"]) for e in entries if "val/loss" in e}
    if not complete_checkpoints(folder):
        return {}, evaluations, {}
    newest = complete_checkpoints(folder)[-1]
    tensors = {f"{part}:{k}": v for part in ("model", "optimizer")
               for k, v in read_part(newest, part).items()}
    return {e["iter"]: e["loss"] for e in entries if "loss" in e}, evaluations, tensors


def assert_same(a, b, rel=1e-5):
    """Compare losses and evaluations, and the weights as a whole, within `rel`.

    Single weights are near zero.
    """
    assert a[0].keys() == b[0].keys()
    assert list(a[0].values()) == pytest.approx(list(b[0].values()), rel=rel)
    for step in a[1].keys() & b[1].keys():
        assert a[1][step] == pytest.approx(b[1][step], rel=rel)
    assert a[2].keys() == b[2].keys()
    for name in a[2]:
        difference = torch.linalg.norm(a[2][name] - b[2][name])
        # A moment is a gradient, which is a difference of sums: it loses digits that the weights
        # keep.
        allowed = rel if name.startswith("model:") else 100 * rel
        assert difference <= allowed * torch.linalg.norm(b[2][name]), name


def assert_equal(a, b):
    assert a[:2] == b[:2] and a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][name], b[2][name]) for name in a[2])


@every_architecture
@pytest.mark.parametrize(("how", "dtype"),
                         [("ddp", "float32"), ("fsdp", "float32"), ("ddp", "bfloat16")])
def test_the_gradients_of_shards_and_of_copies_are_those_of_one_process(
        first_step, how, dtype, architecture):
    """Under DDP, in bf16 as near as in fp32.

    Whoever computes a micro-batch rounds it in the same way (all have one thread here), and the six
    are added in fp32. Only the order differs, which is a few times 2**-24 of the sum of their
    sizes.
    """
    one, ours = (first_step(name, dtype, architecture) for name in ("auto", how))
    assert ours[:2] == pytest.approx(one[:2], rel=1e-6)
    assert all(gradient.any() for gradient in one[2].values())
    torch.testing.assert_close(ours[2], one[2], rtol=1e-5, atol=1e-7)


@every_architecture
def test_the_gradients_of_bf16_shards_are_those_of_one_process_but_for_rounding(
        first_step, architecture):
    """FSDP2 also rounds the embeddings and the weights of norms, which autocast leaves in fp32.

    So each rank rounds them for itself. The residual stream is bf16 in both.

    One rounding to 8 bits errs by at most u = 2**-8, and by u / sqrt(3) in the root mean square,
    whatever was rounded before; errors that do not know of each other add up in squares, and so do
    the terms of a sum that are not alike: it errs by no larger share of itself than they do. From
    the embedding to the logits 36 numbers are rounded: two tables and their sum; in each of two
    blocks four weights, four outputs of linear layers, two norms, two sums, gelu, the probabilities
    and attention's output (15); the last norm, the head, the logits. The way back rounds the
    gradient of each once. So the logits, and the loss, whose gradient by them has a norm below
    sqrt(2), differ from the exact ones by at most u * sqrt(36 / 3) times the size of the logits,
    and the gradients by u * sqrt(72 / 3) of theirs. Two roundings of one truth differ by sqrt(2) of
    that. nanochat has one rounding more (a table and its norm; queries and keys twice), and its
    square doubles an error; the measured difference is an eighth of the bound, as GPT-2's.
    """
    loss, evaluation, one, _ = first_step("auto", "bfloat16", architecture)
    *losses, shards, rotations = first_step("fsdp", "bfloat16", architecture)
    assert rotations in ({None}, {torch.float32})
    # a head of normal(0.02) times 16 normalised features; weights have their initial size
    u, logits = 2**-8, 0.02 * 16**0.5
    allowed = 2**0.5 * u * (36 / 3) ** 0.5 * 2**0.5 * logits
    assert losses == pytest.approx([loss, evaluation], abs=allowed, rel=0)
    assert shards.keys() == one.keys()
    flat, ours = (torch.cat([gradients[name].flatten() for name in one])
                  for gradients in (one, shards))
    assert (ours - flat).norm() <= 2**0.5 * u * (72 / 3) ** 0.5 * flat.norm()
    rounded = ours.bfloat16().float()
    assert not torch.equal(ours, rounded), "summed over micro-batches and ranks in fp32"


@pytest.mark.parametrize("name", ["ddp2", "fsdp2", "ddp3", "fsdp3", "hsdp2"])
def test_ranks_are_one_process(done, name):
    """HSDP as two nodes of one rank each."""
    one = outcome(done / "one")
    assert len(one[0]) == STEPS and one[0][0] > one[0][STEPS - 1] + 0.1
    assert_same(outcome(done / name), one)


@pytest.mark.parametrize(("name", "one"), [("mixed", "one"),
                                           *((f"{name}mixed", f"{name}muon1") for name in OTHERS)])
def test_one_two_one_ranks_is_the_uninterrupted_run(done, name, one):
    """GPT-2 by AdamW under DDP, the others by Muon under FSDP2."""
    mixed, one = outcome(done / name), outcome(done / one)
    assert_same((mixed[0], {}, mixed[2]), (one[0], {}, one[2]))  # it was evaluated at other steps
    log = (done / "logs2" / "0.log").read_text()
    assert "saved by 1 rank(s), so dropout draws new random numbers" in log


def test_shards_of_two_ranks_go_on_in_one_process(done):
    longer = outcome(done / "fsdp2longer")
    assert list(longer[0]) == [STEPS, STEPS + 1]
    assert_same(longer, outcome(done / "onelonger"))


@pytest.mark.parametrize(("how", "architecture"), DROPPING)
def test_resume_on_the_same_ranks_is_bit_equal_with_dropout(done, how, architecture):
    parts, whole = (outcome(done / f"{architecture}{how}{name}") for name in ("parts", "whole"))
    assert_equal(parts, whole)


def test_evaluation_is_the_same_on_1_2_and_4_ranks(done):
    one = outcome(done / "evaluated1")[1][0]
    for name in ("ddp2", "fsdp2", "ddp4", "fsdp4"):
        assert outcome(done / f"evaluated{name}")[1][0] == pytest.approx(one, rel=1e-6)


@every_architecture
def test_bf16_fsdp_tracks_ddp(done, architecture):
    """It keeps fp32 weights and reduces in fp32."""
    ddp, fsdp = (outcome(done / f"{architecture}{how}bf16") for how in SPREADS)
    assert list(fsdp[0].values()) == pytest.approx(list(ddp[0].values()), rel=0.02)
    assert {t.dtype for t in fsdp[2].values()} == {torch.float32}


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_and_every_kind_of_model_is_spread_the_same_way(done, kind, how):
    assert_same(outcome(done / f"{kind}{how}"), outcome(done / f"{kind}1"))


@pytest.mark.parametrize("name", KEYS)
def test_compiling_and_recomputing_change_no_key_and_no_number(done, name):
    assert_same(outcome(done / name), outcome(done / KEYS[name][1]))


WHOLE = "gpt2fsdpwhole"


def test_shards_are_read_as_the_model_that_was_trained(done):
    """WHOLE was saved by two ranks; what each part holds is listed without reading it."""
    folder = complete_checkpoints(done / WHOLE)[-1]
    assert len(list((folder / "model").iterdir())) == 2
    assert not (folder / "model.safetensors").exists()
    model = GPT.from_checkpoint(folder)
    shards, names = read_part(folder, "model"), sorted(name for name, _ in model.named_parameters())
    assert sorted(shards) == sorted(saved_shapes(folder, "model")) == names
    assert all(torch.equal(p, shards[name]) for name, p in model.named_parameters())
    assert export.main([f"--out_dir={folder}", "--to=safetensors",
                        f"--folder={done / 'gathered'}"]) == 0
    gathered = GPT.from_checkpoint(done / "gathered")
    assert all(torch.equal(p, shards[name]) for name, p in gathered.named_parameters())


def test_a_flipped_byte_in_a_shard_is_found(done, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(complete_checkpoints(done / WHOLE)[-1], folder)
    verify(folder)
    shard = sorted((folder / "optimizer").iterdir())[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"optimizer/{shard.name}: damaged"):
        verify(folder)
