"""--window: what a token sees in training and generation, and who must know of it."""

import json
from dataclasses import replace

import pytest
import torch

from gpt import GPT, GPTConfig, sample
from gpt.checkpoint_files import read_config
from gpt.generate import generate
from gpt.run_folder import find_checkpoint
from kernels import Kernels, load
from tests.conftest import every_architecture
from tests.numerics import DEVICE, stirred
from train import build, run
from train.command_line import parse

TINY = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)
STARTS = torch.tensor([[0] * 4 + [4] * 12, [0] * 9 + [9, 10] + [11] * 5], dtype=torch.int32)


def made(kernels: Kernels | None = None, **changes) -> GPT:
    """A model whose attention has its say: with weights far from their initialisation."""
    torch.manual_seed(0)
    model = GPT(replace(TINY, **changes), kernels)
    for p in model.parameters():
        p.data *= 4
    return stirred(model)


@every_architecture
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_no_token_sees_beyond_the_window(layers, window, architecture):
    """Each layer lets it look window - 1 tokens further back."""
    model = made(window=window, n_layer=layers, architecture=architecture)
    x = torch.randn(1, 10, 32, requires_grad=True)
    model.transformer.wte.forward = lambda idx: x
    for t in range(10):
        out = model.features(torch.zeros(1, 10, dtype=torch.long))[0, t]
        (grad,) = torch.autograd.grad(out @ torch.arange(32.0), x)
        seen = (grad[0] != 0).any(-1).nonzero().flatten().tolist()
        assert seen == list(range(max(0, t - layers * (window - 1)), t + 1))


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "length"), [(16, 16), (2**62, 16), (9, 9), (20, 5)])
def test_a_window_that_hides_nothing_is_none_bit_for_bit(window, length, dtype, architecture):
    """And costs nothing: no backend makes a mask for it."""
    idx, found, asked, torch_ops = torch.randint(65, (2, 2, length)), [], [], load("torch")
    spying = torch_ops._replace(attention_qkv=lambda qkv, **options: (
        asked.append(options), torch_ops.attention_qkv(qkv, **options))[1])
    for size in (0, window):
        model = made(spying, window=size, architecture=architecture)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(*idx)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert [options.keys() - {"rotation"} for options in asked] == [{"doc_start"}] * 4
    assert all(options["doc_start"] is None for options in asked)


@every_architecture
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("options", [{"window": 3}, {"documents": True},
                                     {"window": 3, "documents": True, "dropout": 0.2}], ids=str)
def test_backends_agree_with_the_definition(kernels, options, architecture):
    """The loss and every gradient, through the model. With dropout PyTorch's masks are others."""
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    documents = {"doc_start": STARTS.to(DEVICE)} if "documents" in options else {}
    changes = {k: v for k, v in options.items() if k != "documents"}
    changes["architecture"] = architecture
    if kernels == "torch":
        changes["dropout"] = 0.0
    torch.manual_seed(2)
    (idx, targets), found = torch.randint(65, (2, 2, 16)), {}
    for name in ("reference", kernels):
        model = GPT(replace(TINY, **changes), load(name))
        model.load_state_dict(made(architecture=architecture).state_dict())
        torch.manual_seed(1)
        loss = model.to(DEVICE)(idx.to(DEVICE), targets.to(DEVICE), **documents)
        loss.backward()
        found[name] = {"loss": loss} | {k: p.grad for k, p in model.named_parameters()}
    torch.testing.assert_close(found[kernels], found["reference"], rtol=1e-3, atol=1e-5)


@every_architecture
@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_no_graph_break_and_no_recompile(kernels, architecture):
    """fullgraph=True raises at a break; other documents must find the graph compiled."""
    torch._dynamo.reset()
    plain, model = (made(load(kernels), window=3, architecture=architecture) for _ in range(2))
    model.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for starts in (STARTS, STARTS.flip(0), STARTS * 0):
            idx, targets = torch.randint(65, (2, 2, 16))
            loss = model(idx, targets, doc_start=starts)
            loss.backward()
            torch.testing.assert_close(loss, plain(idx, targets, doc_start=starts))
    torch._dynamo.reset()


@every_architecture
@pytest.mark.parametrize("window", [1, 4, 16])
@pytest.mark.parametrize("prompt", [1, 4, 10, 20])
def test_text_is_the_same_with_and_without_cache(window, prompt, architecture):
    """Also where the prompt is longer than the window, and past the end of the positions."""
    model = made(window=window, architecture=architecture).double()
    idx = torch.randint(65, (2, prompt))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(65, 32, dtype=torch.double))
    cached, defined = (torch.cat([*generate(model, idx, 30, temperature=0, cached=c)], 1)
                       for c in (True, False))
    assert torch.equal(cached, defined) and len(cached.unique()) > 2
    for block in model.transformer.h:
        block.attn.config = replace(TINY, window=0)
    unlimited = torch.cat([*generate(model, idx, 30, temperature=0, cached=False)], 1)
    assert torch.equal(cached, unlimited) == (window == 16)


# -- from the command line -----------------------------------------------------------


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(e["iter"], e.get("loss"), e.get("val/loss")) for e in lines]


@every_architecture
def test_a_run_keeps_its_window_without_the_flag(tiny_flags, tmp_path, capsys):
    """Stopped and resumed it is bit-equal, with dropout and accumulation.

    And it is not the run without a window.
    """
    parts, plain = tmp_path / "parts", tmp_path / "plain"
    assert run.main([*tiny_flags, "--window=3"]) == 0
    assert run.main([*tiny_flags, "--window=3", f"--out_dir={parts}", "--max_iters=4"]) == 0
    assert run.main([*tiny_flags, f"--out_dir={parts}", "--init_from=resume"]) == 0
    assert run.main([*tiny_flags, f"--out_dir={plain}"]) == 0
    assert losses(parts) == losses(tmp_path / "out") != losses(plain)
    assert GPT.from_checkpoint(str(parts)).config.window == 3
    assert json.loads((parts / "config.json").read_text())["window"] == 3
    assert sample.main([f"--out_dir={parts}", "--start=abc", "--num_samples=1", "--device=cpu",
                        "--max_new_tokens=20", "--dtype=float32"]) == 0
    capsys.readouterr()
    for there, here, source in ((3, 5, f"--resume_dir={parts}"), (0, 5, f"--init_from={plain}")):
        flags = [*tiny_flags, f"--out_dir={tmp_path / 'other'}", f"--window={here}"]
        flags += [source] + ["--init_from=resume"] * source.startswith("--resume")
        assert run.main(flags) == 2
        err = capsys.readouterr().err
        assert f"window is {there} there and {here} here" in err and err.count("\n") == 1


def test_a_checkpoint_from_before_there_were_windows_has_none(tiny_flags, tmp_path):
    assert run.main([*tiny_flags, "--max_iters=2", "--eval_interval=2"]) == 0
    folder = find_checkpoint(tmp_path / "out")
    shape = json.loads((folder / "model.json").read_text())
    assert shape.pop("window") == 0
    (folder / "model.json").write_text(json.dumps(shape))
    assert read_config(folder).window == 0


def test_two_models_with_a_window_are_stitched_with_it(tiny_flags, tmp_path, capsys):
    short = [*tiny_flags, "--max_iters=2", "--eval_interval=2"]
    for name, window in (("a", 3), ("b", 3), ("c", 0)):
        assert run.main([*short, f"--out_dir={tmp_path / name}", f"--window={window}"]) == 0
    joined = [*short, f"--resume_dir={tmp_path / 'a'}", "--stitch_layer_index=1"]
    for kind in ("merge", "stitch"):
        made = [*joined, f"--out_dir={tmp_path / kind}", f"--init_from={kind}"]
        assert build.build(parse([*made, f"--merge_dir={tmp_path / 'b'}"])).config.model.window == 3
        assert run.main([*made, f"--merge_dir={tmp_path / 'b'}"]) == 0
        capsys.readouterr()
        elsewhere = [f"--out_dir={tmp_path / 'd'}", f"--merge_dir={tmp_path / 'c'}"]
        assert run.main([*made, *elsewhere]) == 2
        err = capsys.readouterr().err
        assert "window is 3 in " in err and " and 0 in " in err and err.count("\n") == 1
    assert find_checkpoint(tmp_path / "stitch").is_dir()
