"""Micro-batches that fit the memory, the message if none does, and a trial of torch.compile."""

import pytest
import torch

from common import hardware
from tests.conftest import every_architecture
from train import build, compiling, loop, memory, run
from train.command_line import parse
from train.parallel import World


@every_architecture
def test_batch_size_auto_keeps_the_tokens_of_a_step(monkeypatch, tiny_flags):
    """A simulated GPU of 1,000 bytes: 100 for the model, 60 a sequence, and AdamW's moments.

    A step has 8 sequences.
    """
    config = parse([f.replace("--batch_size=4", "--batch_size=auto") for f in tiny_flags]
                   + ["--gradient_accumulation_steps=8"])
    assert config.data.fit_batch and config.data.batch_size == 12
    config = parse([*tiny_flags, "--fit_batch=True"])
    seen = []
    model = build.build(parse(tiny_flags)).model
    forward = model.forward
    spy = lambda x, y, doc_start: (seen.append(len(x)), forward(x, y))[1]  # noqa: E731
    monkeypatch.setattr(model, "forward", spy)
    monkeypatch.setattr(hardware, "peak_memory_bytes", lambda _: 100 + 60 * seen[-1])
    moments = 2 * sum(p.nbytes for p in model.parameters())
    for free, batch in ((500, 4), (800, 8), (300, 2), (200, 1)):
        total = int((free + moments) / memory.USABLE) + 1
        monkeypatch.setattr(hardware, "free_memory_bytes", lambda _, total=total: total)
        fitted = memory.fit(config, model, World(), torch.device("cpu"), torch.float32)
        assert (fitted.data.batch_size,
                fitted.optim.gradient_accumulation_steps) == (batch, 8 // batch)
        assert fitted.tokens_per_iter == config.tokens_per_iter
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda _: moments)
    with pytest.raises(ValueError, match="not even a micro-batch of 1 fits"):
        memory.fit(config, model, World(), torch.device("cpu"), torch.float32)


def test_micro_batches_divide_among_ranks(tiny_flags):
    config = parse([*tiny_flags, "--batch_size=6", "--gradient_accumulation_steps=2"])
    assert memory.micro_batches(config, World(size=1)) == [1, 2, 3, 4, 6, 12]
    assert memory.micro_batches(config, World(size=4)) == [1, 3]
    with pytest.raises(ValueError, match="12 sequences a step .* do not divide among 5 ranks"):
        memory.micro_batches(config, World(size=5))


def test_batch_size_auto_needs_a_gpu(tiny_flags, tmp_path, capsys):
    assert run.main([*tiny_flags, "--batch_size=auto"]) == 2
    said = capsys.readouterr().err
    assert "--batch_size=auto measures a GPU's memory, and the device is cpu" in said
    assert not (tmp_path / "out").exists()


def test_out_of_memory_says_which_flags_take_less(tiny_flags, monkeypatch, capsys):
    def full(_run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr(loop, "accumulate", full)
    assert run.main(tiny_flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Tried to allocate 2.00 GiB." in said
    assert "--batch_size=2 --gradient_accumulation_steps=4 (the same tokens per step)" in said
    assert "--activation_checkpointing=True" in said and "--parallel=fsdp" not in said


@pytest.mark.parametrize("value", ["True", "auto"])
def test_torch_compile_that_cannot_work_is_said_at_the_start(
        value, tiny_flags, monkeypatch, capsys):
    """--compile=True is refused; auto trains without, and the line says why."""
    def broken(*_):
        raise RuntimeError("no C++ compiler found\nin eleven places")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiling, "WORTH_TRYING_S", 0.0)
    code = run.main([*(f for f in tiny_flags if not f.startswith("--compile")),
                     f"--compile={value}", "--dropout=0.0", "--max_iters=1"])
    out, err = capsys.readouterr()
    if value == "True":
        assert code == 2 and err.count("\n") == 1
        assert "no C++ compiler found" in err and "--compile=False" in err
    else:
        assert code == 0
        why = "torch.compile cannot work here: RuntimeError: no C++ compiler found"
        assert f"compile: no ({why})" in out.splitlines()


def test_a_compiler_that_computes_wrongly_is_found(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: 2 * function(x))
    with pytest.raises(RuntimeError, match="wrong"):
        compiling.probe(torch.device("cpu"))
