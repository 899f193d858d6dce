"""--compile=auto on a CPU: a block is measured, the gain over the whole run decides.

In fp32 and bf16, with times by a clock of the test.
"""

from functools import partial

import pytest
import torch

from gpt import GPTConfig
from kernels import load
from tests.conftest import every_architecture
from train import compiling, run
from train.config import Config, DataConfig, OptimConfig, RunConfig

CPU = torch.device("cpu")


def config(max_iters, architecture="gpt2"):
    model = GPTConfig(block_size=16, vocab_size=29, n_layer=10, n_head=2, n_embd=16, dropout=0.1,
                      architecture=architecture)
    return Config(model=model, data=DataConfig(batch_size=2),
                  optim=OptimConfig(max_iters=max_iters, lr_decay_iters=10**6,
                                    gradient_accumulation_steps=1), run=RunConfig())


def clocked(monkeypatch, *measured):
    """Each call of `timed` takes the next of `measured`, (seconds of a step, of the first one)."""
    times = iter(measured)
    monkeypatch.setattr(compiling, "timed", lambda step: next(times))
    monkeypatch.setattr(compiling, "probe", lambda device: 1.0)


@pytest.mark.parametrize(("iters", "compiled", "wanted"), [
    (10_000, (0.015, 20.0), True),  # saves 5 ms in each of 10 layers, 500 s; takes 20 s a layer
    (3_000, (0.015, 20.0), False),  # saves 150 s
    (10_000, (0.021, 20.0), False),  # is slower
])
def test_it_compiles_where_the_run_gains_more_than_compiling_takes(
        iters, compiled, wanted, monkeypatch):
    clocked(monkeypatch, (0.02, 0.02), compiled)
    yes, why = compiling.should_compile(config(iters), load("torch"), CPU, torch.float32)
    assert yes == wanted
    assert why.startswith("yes (" if wanted else "no (")
    assert f"a block takes 20 ms, compiled {1e3 * compiled[0]:.3g} ms" in why


def test_a_short_run_is_not_kept_waiting(monkeypatch):
    clocked(monkeypatch, (0.02, 0.02))
    yes, why = compiling.should_compile(config(100), load("torch"), CPU, torch.float32)
    assert not yes and why == "no (auto: a block takes 20 ms, so the run is too short to try)"


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_timed_is_a_block_forward_and_backward(dtype, architecture, monkeypatch):
    """In the dtype of the run, and compiled by what torch.compile is."""
    seen = []

    def compile_(forward):
        def counted(*args):
            seen.append((args[0].shape, torch.is_autocast_enabled("cpu")))
            return forward(*args)
        return counted

    monkeypatch.setattr(torch, "compile", compile_)
    step = compiling.step_of_a_block(config(1, architecture), load("torch"), dtype)
    seconds, first = compiling.timed(step(torch.compile))
    assert seen == [((2, 16, 16), dtype == torch.bfloat16)] * 6
    assert seconds > 0 and first > 0


def test_a_resumed_run_does_as_before(tiny_flags, monkeypatch, capsys):
    """A new measurement could decide otherwise, and the resume would then not be bit-equal.

    Compiled code rounds otherwise.
    """
    flags = [f for f in tiny_flags if "--compile" not in f] + ["--max_iters=4", "--compile=auto"]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compiling, "WORTH_TRYING_S", 0.0)
    clocked(monkeypatch, (60.0, 60.0), (30.0, 0.0))
    assert run.main(flags) == 0
    assert "compile: yes (auto: a block takes 6e+04 ms" in capsys.readouterr().out
    clocked(monkeypatch)  # another measurement would be an error
    assert run.main([*flags, "--max_iters=8", "--init_from=resume"]) == 0
    assert "compile: yes (auto: as before; tried in 1.0 s)" in capsys.readouterr().out.splitlines()


def test_a_gpu_is_compiled_for_without_a_measurement(monkeypatch):
    clocked(monkeypatch)
    cuda, mps, kernels = torch.device("cuda"), torch.device("mps"), load("torch")
    assert compiling.should_compile(config(1), kernels, cuda, torch.bfloat16)[0]
    assert not compiling.should_compile(config(1), kernels, mps, torch.float32)[0]
