"""The embedding's gradient (gpt/embedding.py): PyTorch's own, compiled or not, on a CPU."""

import pytest
import torch
from torch._inductor.utils import run_fw_bw_and_get_code

from gpt.embedding import Embedding, embedding_backward
from tests.numerics import BF16, FP32, tensor

V, C = 29, 16


def ids(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 40), (0,)])
def test_it_is_pytorchs_embedding(shape, dtype):
    table, theirs = Embedding(V, C, dtype=dtype), torch.nn.Embedding(V, C, dtype=dtype)
    theirs.load_state_dict(table.state_dict())
    idx, dy = ids(*shape), tensor(*shape, C, dtype=dtype, grad=False)
    for y in (ours := table(idx)), (theirs_y := theirs(idx)):
        y.backward(dy)
    assert torch.equal(ours, theirs_y) and torch.equal(table.weight.grad, theirs.weight.grad)


def test_the_gradient_of_a_sum():
    """It arrives expanded."""
    table, idx = Embedding(V, C), ids(5, 7)
    table(idx).sum().backward()
    counts = torch.bincount(idx.flatten(), minlength=V).float()
    assert torch.equal(table.weight.grad, counts[:, None].expand(V, C))


def test_a_frozen_table_has_no_gradient():
    table = Embedding(V, C).requires_grad_(False)
    assert not table(ids(4)).requires_grad


def test_opcheck():
    torch.library.opcheck(embedding_backward, (tensor(3, 5, C, grad=False), ids(3, 5), V))


@pytest.fixture
def two_threads():
    """As a run on a CPU: with threads, and without PyTorch's deterministic algorithms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "atomic"), [(torch.nn.Embedding, True), (Embedding, False)])
def test_inductor_makes_atomic_additions_of_pytorchs_embedding_alone(kind, atomic, two_threads):
    """On a CPU, fp32; for a GPU: tests/test_gpu_step.py."""
    table, idx = kind(V, C), ids(8, 64)
    _, codes = run_fw_bw_and_get_code(lambda: torch.compile(table, fullgraph=True)(idx))
    assert ("atomic_add" in "".join(codes)) == atomic


def test_thirty_compiled_backwards_are_bit_equal(two_threads):
    """On a CPU, fp32; each id comes a thousand times."""
    table, idx, dy = Embedding(V, C), ids(8, 4096), tensor(8, 4096, C, grad=False)
    compiled = torch.compile(table, fullgraph=True)
    gradients = [torch.autograd.grad(compiled(idx), table.weight, dy)[0] for _ in range(30)]
    assert all(torch.equal(g, gradients[0]) for g in gradients)
