"""How one process spreads a model: what is compiled, recomputed and sharded; and graphs of two.

Several ranks: tests/test_parallel.py.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from gpt import GPT, GPTConfig
from tests import ranks
from tests.conftest import every_architecture, write_tiny_data
from tests.numerics import stirred
from train import build, loop, parallel
from train.command_line import parse
from train.config import ParallelConfig
from train.parallel import World


def tiny(architecture, dropout=0.0):
    torch.manual_seed(0)
    return stirred(GPT(GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=2, n_embd=16,
                                 dropout=dropout, architecture=architecture)))


@every_architecture
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient_and_no_name(dropout, architecture):
    idx = torch.randint(29, (2, 16))
    gradients = []
    for on in (False, True):
        model = tiny(architecture, dropout)
        parallel.place(model, ParallelConfig(activation_checkpointing=on), World(),
                       torch.device("cpu"), torch.float32, False)
        torch.manual_seed(1)
        model(idx, idx).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@every_architecture
def test_attention_is_not_computed_again(architecture):
    """Counted in backward: the MLPs run again, attention does not."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    model = tiny(architecture)
    parallel.place(model, ParallelConfig(activation_checkpointing=True), World(),
                   torch.device("cpu"), torch.float32, False)
    idx = torch.randint(29, (2, 16))
    loss, again = model(idx, idx), []
    for block in model.transformer.h:
        block.mlp.c_fc.register_forward_hook(lambda *_: again.append(1))
    with Count() as count:
        loss.backward()
    assert len(again) == 2 and "aten::mm" in count.seen
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


@every_architecture
@pytest.mark.parametrize("how", ["auto", "fsdp"])
def test_evaluation_and_generation_do_not_compile_the_step_again(how, tiny_flags, monkeypatch):
    """One process compiles the model; DDP and FSDP2 compile its blocks.

    FSDP2 over one rank stands for more.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    flags = [flag for flag in tiny_flags if not flag.startswith("--compile=")]
    built = build.build(parse([*flags, "--compile=True", f"--parallel={how}"]))
    try:
        for _ in range(2):
            loop.train_step(built, lr=1e-3)
            loop.evaluate(built)
        with torch.compiler.set_stance("fail_on_recompile"):
            loop.train_step(built, lr=1e-3)
            loop.evaluate(built)
            if how == "auto":
                built.model.eval().generate(torch.zeros(1, 1, dtype=torch.int64), 4)
                built.model.train()
            loop.train_step(built, lr=1e-3)
    finally:
        parallel.stop()


def count_graphs(flags, folder):
    """A rank that compiles a forward and backward, and writes how many graphs a backend gets."""
    graphs = []
    torch.compile = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph)
    built = build.build(parse(flags))
    graphs.clear()  # that of the trial
    loop.accumulate(built)
    (folder / f"{built.world.rank}.graphs").write_text(f"{len(graphs)} {built.compiled}")
    del built  # freed without its process group, DDP may wait forever
    parallel.stop()


@every_architecture
def test_a_block_is_one_graph_under_ddp(tmp_path, architecture):
    """Two gloo ranks on a CPU, fp32: two blocks and the loss; DDP's own optimizer made it five.

    A block has 1.8 MB of weights, more than the first bucket's 1 MiB.
    """
    flags = [f"--data_dir={write_tiny_data(tmp_path / 'tiny')}", "--init_from=scratch",
             f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--dtype=float32", "--compile=True",
             "--parallel=ddp", "--n_layer=2", "--n_head=2", "--n_embd=192", "--block_size=16",
             "--batch_size=1", "--gradient_accumulation_steps=2", f"--architecture={architecture}"]
    assert ranks.run(count_graphs, (flags, tmp_path), 2, tmp_path / "logs") == [0, 0]
    assert [(tmp_path / f"{rank}.graphs").read_text() for rank in range(2)] == ["3 True"] * 2


@pytest.mark.parametrize(("device", "backend", "bound"), [
    ("cuda:1", "auto", True), ("cuda:1", "nccl", True), ("cuda:1", "gloo", False),
    ("cpu", "auto", False)])
def test_nccl_is_told_its_gpu(monkeypatch, device, backend, bound):
    """No GPU is asked; gloo has none to be told of."""
    told = {}
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **kwargs: told.update(kwargs))
    parallel.start(World(), torch.device(device), ParallelConfig(parallel="ddp", backend=backend))
    assert told["device_id"] == (torch.device(device) if bound else None)
