"""The backends inside the model: all train alike, eager and compiled."""

from dataclasses import asdict, replace

import pytest
import torch

from gpt import GPT, GPTConfig
from gpt.config import ARCHITECTURES, make_config
from kernels import BACKENDS, FAMILIES, load
from tests.conftest import every_architecture
from tests.numerics import DEVICE, needs_gpu
from train import optim, run
from train.config import OptimConfig

pytest.importorskip("triton", reason="triton is not installed")
CONFIG = GPTConfig(block_size=16, vocab_size=29, n_layer=2, n_head=2, n_embd=32, bias=True)
OTHERS = [name for name in ARCHITECTURES if name != "gpt2"]


@pytest.fixture
def config(architecture):
    """GPT-2 with biases, and the others without."""
    bias = architecture == "gpt2"
    return replace(CONFIG, architecture=architecture, bias=bias)


def losses(kernels, steps, *, config=CONFIG, compiler=None, **families):
    """The loss of each step, always from the same start: to count upwards, by one or two."""
    torch.manual_seed(0)
    model = GPT(config, load(kernels, **families)).to(DEVICE)
    model.requires_grad_(True)  # of a stitched model, too
    if compiler:
        model.compile(backend=compiler, fullgraph=True)
    optimizer = optim.build(model, OptimConfig(learning_rate=1e-2))
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        steps_up = torch.randint(1, 3, (2, config.block_size + 1), generator=generator)
        tokens = (steps_up.cumsum(1) % 29).to(DEVICE)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@every_architecture
def test_reference_and_torch_have_the_same_curve_over_200_steps(config):
    reference, fused = (losses(kernels, 200, config=config) for kernels in ("reference", "torch"))
    assert reference[-1] < reference[0] / 2
    torch.testing.assert_close(fused, reference, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("architecture", "steps"), [("gpt2", 12), *((a, 4) for a in OTHERS)])
def test_triton_has_the_same_curve(config, steps):
    """12 steps, since the interpreter is slow; then each family alone, to name the faulty one."""
    reference = losses("reference", steps, config=config)
    torch.testing.assert_close(losses("triton", steps, config=config), reference,
                               rtol=1e-4, atol=1e-4)
    for family in FAMILIES if steps == 12 else ():
        torch.testing.assert_close(losses("torch", 3, **{family: "triton"}), reference[:3],
                                   rtol=1e-4, atol=1e-4)


@every_architecture
@pytest.mark.parametrize("kernels", BACKENDS)
def test_no_graph_break_and_no_recompile(kernels, config):
    """fullgraph=True raises at a break; the second and third step must find the graph compiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = losses(kernels, 3, config=config, compiler="aot_eager")
    torch.testing.assert_close(compiled, losses(kernels, 3, config=config), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(("kernels", "architecture"),
                         [("triton", "gpt2"), *(("torch", name) for name in OTHERS)])
def test_backends_inside_inductor(kernels, config):
    config = replace(config, n_layer=1)
    torch._dynamo.reset()
    compiled = losses(kernels, 2, config=config, compiler="inductor")
    torch.testing.assert_close(compiled, losses("reference", 2, config=config),
                               rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(("kernels", "architecture"),
                         [*(("torch", name) for name in ARCHITECTURES), ("triton", "gpt2")])
def test_a_seam_and_a_head_of_its_own_train_alike(kernels, config):
    config = make_config(1, **asdict(replace(config, tie_weights=False)))
    torch._dynamo.reset()
    stitched = losses(kernels, 3, config=config, compiler="aot_eager")
    torch.testing.assert_close(stitched, losses("reference", 3, config=config),
                               rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_dropout_in_attention_is_the_same_for_reference_and_triton():
    """The mask depends on position and seed alone, and the seed comes from torch's generator."""
    config = GPTConfig(block_size=16, vocab_size=29, n_layer=1, n_head=2, n_embd=32, dropout=0.2)
    torch.testing.assert_close(losses("triton", 4, config=config),
                               losses("reference", 4, config=config), rtol=1e-4, atol=1e-4)


def test_kernels_triton_trains_from_the_command_line(tiny_flags, capsys):
    flags = [*tiny_flags, "--kernels=triton", "--max_iters=2", "--eval_interval=2",
             "--eval_iters=1", "--n_embd=32", "--batch_size=1"]
    assert run.main(flags) == 0
    said = capsys.readouterr().out
    chosen = "attention=triton, layernorm=triton, cross_entropy=triton (--kernels=triton)"
    assert f"kernels: {chosen}" in said


@needs_gpu
def test_compiled_124m_step_has_no_graph_break_no_recompile_and_no_host_sync():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset leaves them
    config = GPTConfig(vocab_size=50304)
    model = GPT(config, load("triton")).cuda()
    model.compile(fullgraph=True)
    optimizer = optim.build(model, OptimConfig())
    idx = torch.randint(50304, (4, 1024), device="cuda")
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert loss.item() < 11
