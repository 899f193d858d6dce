"""How one process spreads a model: what is compiled, recomputed and sharded.

Several ranks: tests/test_parallel.py.
"""

from functools import partial

import pytest
import torch

from gpt import GPT, GPTConfig
from tests.conftest import every_architecture
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
