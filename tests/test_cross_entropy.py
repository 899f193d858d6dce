from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="triton is not installed")
from kernels import cross_entropy as ce
from kernels import launch, reference, torch_ops
from tests.numerics import (
    BF16,
    DEVICE,
    FP16,
    FP32,
    LUCK,
    assert_as_accurate,
    assert_same_bits,
    grads,
    needs_gpu,
    tensor,
)


def targets_for(M, V, ignored=()):
    targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(M + V))
    targets[list(ignored)] = -1
    return targets.to(DEVICE)


def check(*args, slack=2.0, **options):
    """Of (logits, targets) or (x, weight, targets): ours errs no more than PyTorch's operator."""
    name = "cross_entropy" if len(args) == 2 else "linear_cross_entropy"
    ours, definition, theirs = (partial(getattr(backend, name), **options)
                                for backend in (ce, reference, torch_ops))
    assert_as_accurate(ours, definition, args, theirs, slack)


@pytest.fixture
def chunks_of_four(monkeypatch):
    """Four rows per chunk: one chunk of the shipped size would take the interpreter a minute."""
    monkeypatch.setattr(launch, "chunk_rows", lambda M, V, itemsize: 4)


# -- numbers -------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("M, V", [
    (1, 1), (5, 2), (7, 65), (3, 5000), (3, 50257), (2, 50304), (1, 131072),
])
def test_cross_entropy_errs_no_more_than_pytorch(M, V, dtype, reduction):
    targets = targets_for(M, V, ignored=[1] if M > 2 else [])
    check(tensor(M, V, dtype=dtype, scale=3), targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("M, N, V", [(1, 1, 1), (5, 3, 2), (11, 16, 65), (6, 8, 5000)])
def test_linear_cross_entropy_errs_no_more_than_pytorch(M, N, V, dtype, reduction, chunks_of_four):
    x, weight = tensor(M, N, dtype=dtype), tensor(V, N, dtype=dtype)
    targets = targets_for(M, V, ignored=[1] if M > 2 else [])
    check(x, weight, targets, reduction=reduction)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(M=st.integers(1, 9), N=st.integers(1, 40), V=st.integers(1, 300), rows=st.integers(1, 9),
       data=st.data(), dtype=st.sampled_from([FP32, BF16, FP16]),
       reduction=st.sampled_from(["mean", "sum"]))
def test_any_shape_and_any_chunks(M, N, V, rows, data, dtype, reduction):
    drawn = data.draw(st.lists(st.sampled_from([-1, 0, V - 1]), min_size=M, max_size=M))
    targets = torch.tensor(drawn, device=DEVICE)
    logits = tensor(M, V, dtype=dtype, scale=3)
    x, weight = tensor(M, N, dtype=dtype), tensor(V, N, dtype=dtype)
    if reduction == "mean" and (targets == -1).all():
        assert ce.cross_entropy(logits, targets).isnan()
        assert ce.linear_cross_entropy(x, weight, targets).isnan()
        return
    check(logits, targets, slack=LUCK, reduction=reduction)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "chunk_rows", lambda M, V, itemsize: rows)
        check(x, weight, targets, slack=LUCK, reduction=reduction)


def gradients_in_chunks(rows, monkeypatch, *args):
    monkeypatch.setattr(launch, "chunk_rows", lambda M, V, itemsize: rows)
    return grads(ce.linear_cross_entropy, args)


def test_the_gradient_of_the_weight_is_summed_in_fp32(monkeypatch):
    """Sums rounded to bf16 after each of 25 chunks would err by 2^-9 and more.

    The logits are exact, so their rounding does not depend on the chunks.
    """
    x = torch.randint(-2, 3, (100, 8), device=DEVICE).to(BF16)
    weight = (torch.randint(-4, 5, (17, 8), device=DEVICE) / 4).requires_grad_()
    _, chunked = gradients_in_chunks(4, monkeypatch, x, weight, targets_for(100, 17))
    _, whole = gradients_in_chunks(100, monkeypatch, x, weight, targets_for(100, 17))
    assert chunked.dtype == FP32
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-7)


def test_chunks_with_unequal_counts_and_one_with_none(monkeypatch):
    """The mean is over all valid rows, not a mean of the means of chunks."""
    args = tensor(14, 16), tensor(65, 16), targets_for(14, 65, ignored=[1, 4, 5, 6, 7, 12])
    chunked, whole = (gradients_in_chunks(rows, monkeypatch, *args) for rows in (4, 14))
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(chunked, grads(reference.linear_cross_entropy, args))


def test_without_a_valid_row():
    logits, x, weight = tensor(3, 65), tensor(3, 8), tensor(65, 8)
    targets = torch.full((3,), -1, device=DEVICE)
    mean = ce.cross_entropy(logits, targets)
    total = ce.cross_entropy(logits, targets, reduction="sum")
    assert mean.isnan() and total == 0
    assert torch.autograd.grad(mean + total, logits)[0].eq(0).all()  # as in PyTorch
    assert ce.linear_cross_entropy(x, weight, targets).isnan()
    assert ce.linear_cross_entropy(x, weight, targets, reduction="sum") == 0


@pytest.mark.parametrize("ignore_index", [0, 64, 1, -100, 2**40])
def test_any_ignore_index(ignore_index, chunks_of_four):
    targets = targets_for(7, 65)
    targets[2] = targets[5] = ignore_index
    check(tensor(7, 65), targets, ignore_index=ignore_index)
    check(tensor(7, 8), tensor(65, 8), targets, ignore_index=ignore_index)


@pytest.mark.parametrize("row", [
    [7.0] * 65,
    [1e4, 1e4 - 1, 0.0, -1e4],
    [0.0, 1.0] + [float("-inf")] * 9000,
    [float("-inf")] * 9000 + [0.0, 1.0],
], ids=["equal", "far apart", "-inf last", "-inf first"])
def test_extreme_logits(row):
    logits = torch.tensor([row] * 3, device=DEVICE, requires_grad=True)
    check(logits, logits.argmax(1))


def test_fp16_to_the_end_of_its_range(chunks_of_four):
    """Logits up to 60000, probabilities of 2e-5, and a loss scaled by 65536 as GradScaler does."""
    near_the_end = torch.tensor([[60000.0, 59968.0, -60000.0]] * 2, device=DEVICE, dtype=FP16)
    check(near_the_end.requires_grad_(), targets_for(2, 3))

    def scaled(backend):
        return lambda *args: backend.linear_cross_entropy(*args) * 65536

    x, weight = tensor(9, 8, dtype=FP16), tensor(50304, 8, dtype=FP16, scale=0.1)
    args = x, weight, targets_for(9, 50304)
    assert_as_accurate(scaled(ce), scaled(reference), args, scaled(torch_ops))


def test_twenty_steps_end_where_pytorch_ends(chunks_of_four):
    def losses(backend):
        weight, features = tensor(65, 16, scale=0.1), tensor(16, 16, scale=0.3, seed=1)
        inputs = tensor(22, 16, grad=False)
        targets = targets_for(22, 65, ignored=range(8, 13))
        optimizer = torch.optim.SGD([weight, features], lr=2.0)
        for _ in range(20):
            optimizer.zero_grad()
            loss = backend.linear_cross_entropy(inputs @ features, weight, targets)
            loss.backward()
            optimizer.step()
            yield loss.detach()

    ours, theirs = torch.stack(list(losses(ce))), torch.stack(list(losses(torch_ops)))
    assert ours[-1] < 0.5 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# -- what is read, written and computed ----------------------------------------


def test_no_argument_is_changed(chunks_of_four):
    logits, x, weight, targets = tensor(7, 65), tensor(7, 8), tensor(65, 8), targets_for(7, 65, [2])
    args = logits, x, weight, targets
    before = [(a.detach().clone(), a._version) for a in args]
    (ce.cross_entropy(logits, targets) + ce.linear_cross_entropy(x, weight, targets)).backward()
    assert all(torch.equal(a.detach(), copy) and a._version == version
               for a, (copy, version) in zip(args, before))


def test_rows_of_logits_may_lie_apart_and_columns_too():
    targets = targets_for(7, 65)
    wide = tensor(7, 96, dtype=BF16, grad=False)
    wide[:, :7] = wide[:, 72:] = float("nan")  # what lies between must not count
    for logits in (wide[:, 7:72], tensor(65, 7, dtype=BF16, grad=False).T,
                   tensor(1, 65, dtype=BF16, grad=False).expand(7, 65)):
        check(logits.detach().requires_grad_(), targets)
    assert torch.equal(ce.cross_entropy(logits, targets.repeat_interleave(2)[::2]),
                       ce.cross_entropy(logits, targets))


def test_strided_features_and_weight(chunks_of_four):
    x, weight = tensor(7, 24, grad=False)[:, ::3], tensor(8, 65, grad=False).T
    check(x.requires_grad_(), weight.requires_grad_(), targets_for(7, 65))


def test_thirty_runs_are_bit_equal(chunks_of_four):
    args = tensor(6, 16, dtype=BF16), tensor(65, 16), targets_for(6, 65)
    logits, targets = tensor(3, 5000, dtype=BF16), targets_for(3, 5000)
    first, *rest = (grads(ce.linear_cross_entropy, args)
                    + grads(ce.cross_entropy, (logits, targets)) for _ in range(30))
    for again in rest:
        assert_same_bits(again, first)
    loss = ce.linear_cross_entropy(*args)
    once, twice = (torch.autograd.grad(loss, args[:2], retain_graph=True) for _ in range(2))
    assert_same_bits(once, twice)


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_wanted_are_computed(need, chunks_of_four):
    x, weight, targets = tensor(7, 8, grad=need[0]), tensor(65, 8, grad=need[1]), targets_for(7, 65)
    with FlopCounterMode(display=False) as counter:
        loss = ce.linear_cross_entropy(x, weight, targets)
    assert counter.get_total_flops() == 2 * 7 * 8 * 65 * (1 + sum(need))
    if any(need):
        full = [t.detach().requires_grad_() for t in (x, weight)]
        both = torch.autograd.grad(ce.linear_cross_entropy(*full, targets), full)
        found = torch.autograd.grad(loss, [t for t, n in zip((x, weight), need) if n])
        assert_same_bits(found, [d for d, n in zip(both, need) if n])


def test_evaluation_computes_no_gradient(chunks_of_four, monkeypatch):
    monkeypatch.setattr(ce, "cross_entropy_in_place", None)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ce.linear_cross_entropy(tensor(7, 8), tensor(65, 8), targets_for(7, 65))
    assert counter.get_total_flops() == 2 * 7 * 8 * 65


def test_autocast_decides_the_dtype_of_the_matmuls(chunks_of_four):
    x, weight, targets = tensor(7, 8), tensor(65, 8), targets_for(7, 65)
    with torch.autocast(DEVICE, BF16):
        cast = ce.linear_cross_entropy(x, weight, targets)
    dx, dweight = torch.autograd.grad(cast, (x, weight))
    plain = ce.linear_cross_entropy(x.bfloat16(), weight, targets)
    assert dx.dtype == dweight.dtype == FP32
    assert_same_bits((cast, dx, dweight), (plain, *torch.autograd.grad(plain, (x, weight))))


def test_never_all_logits_at_once(chunks_of_four, monkeypatch):
    sizes, mm = [], torch.mm

    def measured(a, b, out):
        sizes.append(out.untyped_storage().nbytes())
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", measured)
    with torch.no_grad():
        ce.linear_cross_entropy(tensor(14, 8), tensor(65, 8), targets_for(14, 65))
    assert sizes == [4 * 128 * 4] * 4  # four rows of 65 logits, padded to 128, in fp32


# -- operators, compile --------------------------------------------------------


def test_opcheck():
    logits, targets = tensor(5, 24, dtype=BF16), targets_for(5, 24, [1])
    torch.library.opcheck(ce._cross_entropy_op, (logits, targets, -1))
    stats, dlosses = torch.ones(2, 5, device=DEVICE), torch.ones((), device=DEVICE).expand(5)
    torch.library.opcheck(ce._cross_entropy_backward_op,
                          (logits.detach(), targets, stats, dlosses, -1))
    torch.library.opcheck(ce._linear_cross_entropy_op,
                          (tensor(5, 8), tensor(24, 8), targets, -1, True, True))
    torch.library.opcheck(ce._linear_cross_entropy_op,
                          (tensor(5, 8, grad=False), tensor(24, 8), targets, -1, False, True))


def test_compiles_whole_and_does_not_recompile(chunks_of_four):
    def losses(x, weight, targets):
        plain = ce.cross_entropy(x @ weight.T, targets, reduction="sum")
        return ce.linear_cross_entropy(x * 2, weight, targets) + plain

    compiled = torch.compile(losses, fullgraph=True, dynamic=True)
    for M in (7, 11):
        with torch.compiler.set_stance("default" if M == 7 else "fail_on_recompile"):
            args = tensor(M, 8), tensor(65, 8), targets_for(M, 65, [1])
            torch.testing.assert_close(grads(compiled, args), grads(losses, args))


@pytest.mark.parametrize("wrong", [-2, 65, 70, 2**33])
def test_targets_out_of_range_give_nan_where_unchecked(wrong, chunks_of_four, monkeypatch):
    """As on a GPU. Target 70 is within the padding of the private logits."""
    monkeypatch.setattr(ce, "_check_targets", lambda *args: None)
    logits, x, weight, targets = tensor(7, 65), tensor(7, 8), tensor(65, 8), targets_for(7, 65)
    targets[3] = wrong
    for fn, args in ((ce.cross_entropy, (logits,)), (ce.linear_cross_entropy, (x, weight))):
        loss = fn(*args, targets, reduction="sum")
        assert loss.isnan()
        assert all(g.isnan().any() for g in torch.autograd.grad(loss, args))
    assert ce.linear_cross_entropy(x.detach(), weight.detach(), targets).isnan()


# -- on a GPU ------------------------------------------------------------------


@needs_gpu
class TestAtRealSize:
    def test_errs_no_more_than_pytorch(self):
        for N in (768, 1600):
            x, weight = tensor(8193, N, dtype=BF16), tensor(50304, N, dtype=BF16, scale=0.02)
            check(x, weight, targets_for(8193, 50304, [5]))
        for V in (50257, 50304, 131072):
            check(tensor(1025, V, dtype=BF16), targets_for(1025, V, [5]))

    def test_offsets_beyond_int32(self):
        """65536 x 50304 is 1.5 times 2**31."""
        M, V = 65536, 50304
        logits = torch.randn(M, V, device=DEVICE, dtype=BF16).requires_grad_()
        targets = targets_for(M, V)
        loss = ce.cross_entropy(logits, targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        tail = logits.detach()[-3:].clone().requires_grad_()
        expected = reference.cross_entropy(tail, targets[-3:], reduction="sum")
        torch.testing.assert_close(ce.cross_entropy(tail, targets[-3:], reduction="sum"), expected)
        torch.testing.assert_close(gradient[-3:], torch.autograd.grad(expected, tail)[0])

    def test_memory_is_an_eighth_and_the_host_never_waits(self):
        M, N, V = 65536, 768, 50304
        x, weight = tensor(M, N, dtype=BF16), tensor(V, N, scale=0.02)
        targets = targets_for(M, V, [5])
        ce.linear_cross_entropy(x, weight, targets).backward()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ce.linear_cross_entropy(x, weight, targets).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        unfused = 2 * M * V * 2  # logits and their gradient, bf16
        assert torch.cuda.max_memory_allocated() - before <= unfused / 8

    def test_thirty_runs_are_bit_equal(self):
        x, weight = tensor(10000, 768, dtype=BF16), tensor(50304, 768, scale=0.02)
        args = x, weight, targets_for(10000, 50304)
        first, *rest = (grads(ce.linear_cross_entropy, args) for _ in range(30))
        for again in rest:
            assert_same_bits(again, first)
