"""Any number of ranks is one process: the same losses, weights, evaluation, checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gpt import GPT, GPTConfig
from gpt.pretrained import whole_checkpoints
from tests import ranks
from train import parallel
from train.config import ParallelConfig
from train.parallel import World

STEPS = 20


@pytest.fixture
def flags(tiny_flags):
    """20 steps of 12 micro-batches over all ranks, clipped, without dropout, on a vocabulary of 29 (2 and 3 do not divide it)."""
    gone = ("--out_dir", "--dropout", "--gradient_accumulation_steps", "--max_iters", "--lr_decay_iters", "--eval_interval",
            "--batch_size")
    kept = [f for f in tiny_flags if not f.startswith(gone)]
    return [*kept, "--dropout=0.0", "--gradient_accumulation_steps=12", f"--max_iters={STEPS}", f"--lr_decay_iters={STEPS}",
            "--eval_interval=10", "--batch_size=2", "--grad_clip=0.5", "--init_from=auto"]


def trained(flags, folder, size, *more, **environment):
    """Losses by step, evaluations by step, and the last checkpoint's tensors of a run on `size` ranks."""
    codes = ranks.run(ranks.train, ([*flags, f"--out_dir={folder}", *more],), size, folder / "logs", **environment)
    assert codes == [0] * size, (folder / "logs" / "0.log").read_text()[-3000:]
    return outcome(folder)


def outcome(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    newest = whole_checkpoints(folder)[-1]
    tensors = {f"{part}:{k}": v for part in ("model", "optimizer") for k, v in load_file(newest / f"{part}.safetensors").items()}
    losses = {e["iter"]: e["loss"] for e in entries if "loss" in e}
    return losses, {e["iter"]: (e["train/loss"], e["val/loss"]) for e in entries if "val/loss" in e}, tensors


def assert_same(a, b, rel=1e-5):
    """Losses, evaluations and weights within `rel`; the weights as a whole, since single ones are near zero."""
    assert a[0].keys() == b[0].keys() and len(a[0]) == STEPS
    assert list(a[0].values()) == pytest.approx(list(b[0].values()), rel=rel)
    assert a[1].keys() == b[1].keys()
    for step, losses in a[1].items():
        assert losses == pytest.approx(b[1][step], rel=rel)
    assert a[2].keys() == b[2].keys()
    for name in a[2]:
        difference = torch.linalg.norm(a[2][name] - b[2][name])
        # A moment is a gradient, which is a difference of sums: it loses digits that the weights keep.
        assert difference <= (rel if name.startswith("model:") else 100 * rel) * torch.linalg.norm(b[2][name]), name


def assert_equal(a, b):
    assert a[:2] == b[:2] and a[2].keys() == b[2].keys()
    assert all(torch.equal(a[2][name], b[2][name]) for name in a[2])


def test_two_three_ranks_are_one_process(flags, tmp_path):
    one = trained(flags, tmp_path / "one", 1)
    assert one[0][0] > one[0][STEPS - 1] + 0.3
    for size, how in ((2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")):
        assert_same(trained(flags, tmp_path / f"{how}{size}", size, f"--parallel={how}"), one)


def test_one_two_one_ranks_is_the_uninterrupted_run(flags, tmp_path):
    """Through checkpoints, DDP and FSDP2 in turn; on the same number of ranks bit for bit."""
    one = trained(flags, tmp_path / "one", 1)
    for size, limit in ((1, 5), (2, 13), (1, STEPS)):
        mixed = trained(flags, tmp_path / "mixed", size, f"--max_iters={limit}")
    assert_same((mixed[0], {}, mixed[2]), (one[0], {}, one[2]))  # it was evaluated at other steps
    for how in ("ddp", "fsdp"):
        dropping = [*flags, "--dropout=0.1", f"--parallel={how}"]
        whole = trained(dropping, tmp_path / f"{how}whole", 2)
        for limit in (10, STEPS):
            parts = trained(dropping, tmp_path / f"{how}parts", 2, f"--max_iters={limit}")
        assert_equal(parts, whole)
    log = (tmp_path / "mixed" / "logs" / "0.log").read_text()
    assert "saved by 1 rank(s), so dropout draws new random numbers" in log


def test_evaluation_is_the_same_on_1_2_and_4_ranks(flags, tmp_path):
    """7 batches, which 2 and 4 do not divide, of the initial weights."""
    said = set()
    for size, how in ((1, "auto"), (2, "ddp"), (4, "ddp"), (4, "fsdp")):
        folder = tmp_path / f"{size}{how}"
        more = ["--eval_only=True", "--eval_iters=7", f"--parallel={how}", f"--out_dir={folder}"]
        assert ranks.run(ranks.train, ([*flags, *more],), size, folder) == [0] * size
        said |= {line for line in (folder / "0.log").read_text().splitlines() if line.startswith("step 0: train loss")}
    assert len(said) == 1


def test_bf16_fsdp_tracks_ddp_and_hsdp_is_fsdp(flags, tmp_path):
    """HSDP as two nodes of one rank each; FSDP2 in bf16 keeps fp32 weights and reduces in fp32."""
    ddp = trained(flags, tmp_path / "ddp", 2, "--dtype=bfloat16", "--parallel=ddp")
    fsdp = trained(flags, tmp_path / "fsdp", 2, "--dtype=bfloat16", "--parallel=fsdp")
    assert list(fsdp[0].values()) == pytest.approx(list(ddp[0].values()), rel=0.02)
    assert {t.dtype for t in fsdp[2].values()} == {torch.float32}
    hsdp = trained(flags, tmp_path / "hsdp", 2, "--parallel=hsdp", LOCAL_WORLD_SIZE=1)
    assert_same(hsdp, trained(flags, tmp_path / "fp32", 2, "--parallel=fsdp"))


def tiny(dropout=0.0):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=2, n_embd=16, dropout=dropout))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient_and_no_name(dropout):
    idx = torch.randint(29, (2, 16))
    gradients = []
    for on in (False, True):
        model = tiny(dropout)
        parallel.place(model, ParallelConfig(activation_checkpointing=on), World(), torch.device("cpu"), torch.float32, False)
        torch.manual_seed(1)
        model(idx, idx).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_attention_is_not_computed_again():
    """Counted in backward: the norms run again, attention does not."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    model = tiny()
    parallel.place(model, ParallelConfig(activation_checkpointing=True), World(), torch.device("cpu"), torch.float32, False)
    idx = torch.randint(29, (2, 16))
    loss = model(idx, idx)
    with Count() as count:
        loss.backward()
    assert "aten::native_layer_norm" in count.seen
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" not in count.seen


def test_auto_shards_when_the_state_would_fill_half_a_gpu(monkeypatch):
    model, cuda = torch.nn.Linear(1000, 1000, bias=False), torch.device("cuda")
    for memory, how in ((40e6, "ddp"), (30e6, "fsdp")):
        device = type("Properties", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, device=device: device)
        assert parallel.strategy(ParallelConfig(), World(size=2), model, cuda) == how
    assert parallel.strategy(ParallelConfig(), World(), model, torch.device("cpu")) == "none"


def test_an_accumulation_that_ranks_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="use 38 or 40"):
        parallel.accumulation_per_rank(39, World(size=2))
