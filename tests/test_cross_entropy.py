import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="triton is not installed")
from kernels import cross_entropy as ce
from kernels import launch, reference, torch_ops
from tests.numerics import DEVICE, assert_as_accurate, grads

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# of one element or two, whose error may be anything from 0; and the interpreter truncates bf16
LUCK = 8.0


def tensor(*shape, dtype=FP32, scale=1.0, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype).requires_grad_(grad)


def targets_for(M, V, ignored=()):
    targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(M + V))
    targets[list(ignored)] = -1
    return targets.to(DEVICE)


def using(suite, **options):
    """(cross_entropy, linear_cross_entropy) of a suite, with options."""
    return (lambda logits, targets: suite.cross_entropy(logits, targets, **options),
            lambda x, weight, targets: suite.linear_cross_entropy(x, weight, targets, **options))


@pytest.fixture
def chunks_of_four(monkeypatch):
    """Rows enough for one chunk of the shipped size would take the interpreter a minute."""
    monkeypatch.setattr(launch, "chunk_rows", lambda M, V, itemsize: 4)


# -- numbers -------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("M, V",
                         [(1, 1), (5, 2), (7, 65), (3, 5000), (3, 50257), (2, 50304), (1, 131072)])
def test_cross_entropy_errs_no_more_than_pytorch(M, V, dtype, reduction):
    logits, targets = tensor(M, V, dtype=dtype,
                             scale=3), targets_for(M, V, ignored=[1] if M > 2 else [])
    ours, definition, theirs = (using(suite, reduction=reduction)[0]
                                for suite in (ce, reference, torch_ops))
    assert_as_accurate(ours, definition, (logits, targets), theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("M, N, V", [(1, 1, 1), (5, 3, 2), (11, 16, 65), (6, 8, 5000)])
def test_linear_cross_entropy_errs_no_more_than_pytorch(M, N, V, dtype, reduction, chunks_of_four):
    x, weight, targets = tensor(M, N, dtype=dtype), tensor(V, N,
                                                           dtype=dtype), targets_for(M, V,
                                                                                     [1]
                                                                                     if M > 2
                                                                                     else [])
    ours, definition, theirs = (using(suite, reduction=reduction)[1]
                                for suite in (ce, reference, torch_ops))
    assert_as_accurate(ours, definition, (x, weight, targets), theirs)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(M=st.integers(1, 9), N=st.integers(1, 40), V=st.integers(1, 300), rows=st.integers(1, 9),
       data=st.data(),
       dtype=st.sampled_from([FP32, BF16, FP16]), reduction=st.sampled_from(["mean", "sum"]))
def test_any_shape_and_any_chunks(M, N, V, rows, data, dtype, reduction):
    targets = torch.tensor(data.draw(st.lists(st.sampled_from([-1, 0, V - 1]), min_size=M,
                                              max_size=M)), device=DEVICE)
    logits, x, weight = tensor(M, V, dtype=dtype,
                               scale=3), tensor(M, N, dtype=dtype), tensor(V, N, dtype=dtype)
    ours, definition, theirs = (using(suite, reduction=reduction)
                                for suite in (ce, reference, torch_ops))
    if reduction == "mean" and (targets == -1).all():
        assert ours[0](logits, targets).isnan() and ours[1](x, weight, targets).isnan()
        return
    assert_as_accurate(ours[0], definition[0], (logits, targets), theirs[0], slack=LUCK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "chunk_rows", lambda M, V, itemsize: rows)
        assert_as_accurate(ours[1], definition[1], (x, weight, targets), theirs[1], slack=LUCK)


def gradients_in_chunks(rows, monkeypatch, *args):
    monkeypatch.setattr(launch, "chunk_rows", lambda M, V, itemsize: rows)
    return grads(ce.linear_cross_entropy, args)


def test_the_gradient_of_the_weight_is_summed_in_fp32(monkeypatch):
    """Sums rounded to bf16 after each of 25 chunks would err by 2^-9 and more. The logits are
    exact, so that no rounding of theirs depends on the chunks."""
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
    logits, x, weight, targets = tensor(3, 65), tensor(3,
                                                       8), tensor(65,
                                                                  8), torch.full((3,), -1,
                                                                                 device=DEVICE)
    mean, total = ce.cross_entropy(logits, targets), ce.cross_entropy(logits, targets,
                                                                      reduction="sum")
    assert mean.isnan() and total == 0
    assert torch.autograd.grad(mean + total, logits)[0].eq(0).all()  # as in PyTorch
    assert ce.linear_cross_entropy(x, weight, targets).isnan()
    assert ce.linear_cross_entropy(x, weight, targets, reduction="sum") == 0


@pytest.mark.parametrize("ignore_index", [0, 64, 1, -100, 2**40])
def test_any_ignore_index(ignore_index, chunks_of_four):
    targets = targets_for(7, 65)
    targets[2] = targets[5] = ignore_index
    ours, definition, theirs = (using(suite, ignore_index=ignore_index)
                                for suite in (ce, reference, torch_ops))
    assert_as_accurate(ours[0], definition[0], (tensor(7, 65), targets), theirs[0])
    assert_as_accurate(ours[1], definition[1], (tensor(7, 8), tensor(65, 8), targets), theirs[1])


@pytest.mark.parametrize("row",
                         [[7.0] * 65, [1e4, 1e4 - 1, 0.0, -1e4],
                          [0.0, 1.0] + [float("-inf")] * 9000,
                          [float("-inf")] * 9000 + [0.0, 1.0]],
                         ids=["equal", "far apart", "-inf last", "-inf first"])
def test_extreme_logits(row):
    logits = torch.tensor([row] * 3, device=DEVICE, requires_grad=True)
    targets = logits.argmax(1)
    assert_as_accurate(ce.cross_entropy, reference.cross_entropy, (logits, targets),
                       torch_ops.cross_entropy)


def test_fp16_to_the_end_of_its_range(chunks_of_four):
    """Logits up to 60000, probabilities of 2e-5, and a loss scaled by 65536 as GradScaler does."""
    near_the_end = torch.tensor([[60000.0, 59968.0, -60000.0]] * 2, device=DEVICE,
                                dtype=FP16).requires_grad_()
    assert_as_accurate(ce.cross_entropy, reference.cross_entropy,
                       (near_the_end, targets_for(2, 3)), torch_ops.cross_entropy)

    def scaled(suite):
        return lambda *args: suite.linear_cross_entropy(*args) * 65536

    x, weight, targets = tensor(9, 8, dtype=FP16), tensor(50304, 8, dtype=FP16,
                                                          scale=0.1), targets_for(9, 50304)
    assert_as_accurate(scaled(ce), scaled(reference), (x, weight, targets), scaled(torch_ops))


def test_twenty_steps_end_where_pytorch_ends(chunks_of_four):
    def losses(suite):
        weight, features, inputs = tensor(65, 16, scale=0.1), tensor(16, 16, scale=0.3,
                                                                     seed=1), tensor(22,
                                                                                     16, grad=False)
        targets = targets_for(22, 65, ignored=range(8, 13))
        optimizer = torch.optim.SGD([weight, features], lr=2.0)
        for _ in range(20):
            optimizer.zero_grad()
            loss = suite.linear_cross_entropy(inputs @ features, weight, targets)
            loss.backward()
            optimizer.step()
            yield loss.detach()

    ours, theirs = torch.stack(list(losses(ce))), torch.stack(list(losses(torch_ops)))
    assert ours[-1] < 0.5 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# -- what is read, written and computed ----------------------------------------


def test_no_argument_is_changed(chunks_of_four):
    args = logits, x, weight, targets = tensor(7, 65), tensor(7,
                                                              8), tensor(65,
                                                                         8), targets_for(7, 65, [2])
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
        args = (logits.detach().requires_grad_(), targets)
        assert_as_accurate(ce.cross_entropy, reference.cross_entropy, args, torch_ops.cross_entropy)
    assert torch.equal(ce.cross_entropy(logits, targets.repeat_interleave(2)[::2]),
                       ce.cross_entropy(logits, targets))


def test_strided_features_and_weight(chunks_of_four):
    x, weight, targets = tensor(7, 24, grad=False)[:, ::3], tensor(8, 65,
                                                                   grad=False).T, targets_for(7, 65)
    args = (x.detach().requires_grad_(), weight.detach().requires_grad_(), targets)
    assert_as_accurate(ce.linear_cross_entropy, reference.linear_cross_entropy, args,
                       torch_ops.linear_cross_entropy)


def test_thirty_runs_are_bit_equal(chunks_of_four):
    args = tensor(6, 16, dtype=BF16), tensor(65, 16), targets_for(6, 65)
    logits, targets = tensor(3, 5000, dtype=BF16), targets_for(3, 5000)
    first, *rest = (grads(ce.linear_cross_entropy, args)
                    + grads(ce.cross_entropy, (logits, targets)) for _ in range(30))
    assert all(torch.equal(a, b) for again in rest for a, b in zip(first, again))
    loss = ce.linear_cross_entropy(*args)
    once, twice = (torch.autograd.grad(loss, args[:2], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, twice))


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_wanted_are_computed(need, chunks_of_four):
    x, weight, targets = tensor(7, 8, grad=need[0]), tensor(65, 8, grad=need[1]), targets_for(7, 65)
    with FlopCounterMode(display=False) as counter:
        loss = ce.linear_cross_entropy(x, weight, targets)
    assert counter.get_total_flops() == 2 * 7 * 8 * 65 * (1 + sum(need))
    if any(need):
        full = [t.detach().requires_grad_() for t in (x, weight)]
        true = torch.autograd.grad(ce.linear_cross_entropy(*full, targets),
                                   [f for f, n in zip(full, need) if n])
        assert all(map(torch.equal,
                       torch.autograd.grad(loss, [t for t, n in zip((x, weight), need) if n]),
                       true))


def test_evaluation_computes_no_gradient(chunks_of_four, monkeypatch):
    monkeypatch.setattr(ce, "_losses_and_gradient", None)
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
    assert all(map(torch.equal, (cast, dx, dweight),
                   (plain, *torch.autograd.grad(plain, (x, weight)))))


def test_never_all_logits_at_once(chunks_of_four, monkeypatch):
    sizes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: sizes.append(out.untyped_storage().nbytes())
                        or mm(a, b, out=out))
    with torch.no_grad():
        ce.linear_cross_entropy(tensor(14, 8), tensor(65, 8), targets_for(14, 65))
    assert sizes == [4 * 128 * 4] * 4  # four rows of 65 logits, padded to 128, in fp32


# -- operators, compile --------------------------------------------------------


def test_opcheck():
    logits, targets = tensor(5, 24, dtype=BF16), targets_for(5, 24, [1])
    torch.library.opcheck(ce._cross_entropy, (logits, targets, -1))
    torch.library.opcheck(ce._cross_entropy_backward,
                          (logits.detach(), targets, torch.ones(2, 5, device=DEVICE),
                           torch.ones((), device=DEVICE).expand(5), -1))
    torch.library.opcheck(ce._linear_cross_entropy,
                          (tensor(5, 8), tensor(24, 8), targets, -1, True, True))
    torch.library.opcheck(ce._linear_cross_entropy,
                          (tensor(5, 8, grad=False), tensor(24, 8), targets, -1, False, True))


def test_compiles_whole_and_does_not_recompile(chunks_of_four):
    def losses(x, weight, targets):
        return ce.linear_cross_entropy(x * 2, weight,
                                       targets) + ce.cross_entropy(x @ weight.T, targets,
                                                                   reduction="sum")

    compiled = torch.compile(losses, fullgraph=True, dynamic=True)
    for M in (7, 11):
        with torch.compiler.set_stance("default" if M == 7 else "fail_on_recompile"):
            args = tensor(M, 8), tensor(65, 8), targets_for(M, 65, [1])
            torch.testing.assert_close(grads(compiled, args), grads(losses, args))


# -- launch settings, errors ---------------------------------------------------


@pytest.mark.parametrize("M", [1, 127, 4096, 5000, 16 * 1024, 65536, 65537, 10**6])
@pytest.mark.parametrize("V", [65, 50257, 131072])
def test_chunks_are_an_eighth_and_never_starve(M, V):
    rows = launch.chunk_rows(M, V, 2)
    assert rows % 128 == 0 and min(M, 2048) <= rows <= max(M / 8, 4096, 2**26 / (2 * V)) + 128


def test_targets_out_of_range_are_named_on_a_cpu():
    for wrong in (-2, 65, 2**33):
        targets = targets_for(7, 65, [1]).cpu()
        targets[3] = wrong
        with pytest.raises(ValueError, match=f"target {wrong} is outside of the vocabulary of 65"):
            ce.cross_entropy(tensor(7, 65).cpu(), targets)
        with pytest.raises(ValueError, match=f"target {wrong}"):
            ce.linear_cross_entropy(tensor(7, 8).cpu(), tensor(65, 8).cpu(), targets)


@pytest.mark.parametrize("wrong", [-2, 65, 70, 2**33])
def test_targets_out_of_range_give_nan_where_nobody_looks(wrong, chunks_of_four, monkeypatch):
    """As on a GPU. 70 is within the padding of the private logits."""
    monkeypatch.setattr(ce, "_check_targets", lambda *args: None)
    logits, x, weight, targets = tensor(7, 65), tensor(7, 8), tensor(65, 8), targets_for(7, 65)
    targets[3] = wrong
    for fn, args in zip(using(ce, reduction="sum"), [(logits,), (x, weight)]):
        loss = fn(*args, targets)
        assert loss.isnan()
        assert all(g.isnan().any() for g in torch.autograd.grad(loss, args))
    assert ce.linear_cross_entropy(x.detach(), weight.detach(), targets).isnan()


def zeros(*shape):
    return torch.zeros(shape, device=DEVICE)


@pytest.mark.parametrize("call, message", [
    (lambda t: ce.cross_entropy(zeros(3, 5), t, reduction="none"),
     "'none'; choose 'mean' or 'sum'"),
    (lambda t: ce.cross_entropy(zeros(3, 1, 5), t), "must have two axes"),
    (lambda t: ce.cross_entropy(zeros(3, 0), t), "must have two axes"),
    (lambda t: ce.cross_entropy(zeros(3, 5).double(), t), "float64"),
    (lambda t: ce.cross_entropy(zeros(4, 5), t), r"must be \(4,\) int64"),
    (lambda t: ce.cross_entropy(zeros(3, 5), t.int()), "int32"),
    (lambda t: ce.cross_entropy(zeros(3, 5), t.to("meta")), "on meta"),
    (lambda t: ce.linear_cross_entropy(zeros(3, 5), zeros(7, 4), t), r"weight must be \(V, 5\)"),
    (lambda t: ce.linear_cross_entropy(zeros(3, 5), zeros(7, 5).double(), t), "float64"),
    (lambda t: ce.linear_cross_entropy(zeros(3, 5), zeros(7, 5).to("meta"), t), "on meta"),
    (lambda t: ce.linear_cross_entropy(zeros(3, 5), zeros(7, 5), t[:2]), r"must be \(3,\) int64"),
    (lambda t: ce.linear_cross_entropy(zeros(3, 5), zeros(7, 5), t, reduction="max"), "'max'"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, dtype=torch.int64, device=DEVICE))


# -- on a GPU ------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
class TestAtRealSize:
    def test_errs_no_more_than_pytorch(self):
        for N in (768, 1600):
            args = tensor(8192 + 1, N, dtype=BF16), tensor(50304, N, dtype=BF16,
                                                           scale=0.02), targets_for(8193, 50304,
                                                                                    [5])
            assert_as_accurate(ce.linear_cross_entropy, reference.linear_cross_entropy, args,
                               torch_ops.linear_cross_entropy)
        for V in (50257, 50304, 131072):
            args = tensor(1025, V, dtype=BF16), targets_for(1025, V, [5])
            assert_as_accurate(ce.cross_entropy, reference.cross_entropy, args,
                               torch_ops.cross_entropy)

    def test_offsets_beyond_int32(self):
        """65536 x 50304 is 1.5 times 2**31."""
        M, V = 65536, 50304
        logits = torch.randn(M, V, device=DEVICE, dtype=BF16).requires_grad_()
        targets = targets_for(M, V)
        (gradient,) = torch.autograd.grad(ce.cross_entropy(logits, targets, reduction="sum"),
                                          logits)
        tail = logits.detach()[-3:].clone().requires_grad_()
        expected = reference.cross_entropy(tail, targets[-3:], reduction="sum")
        torch.testing.assert_close(ce.cross_entropy(tail, targets[-3:], reduction="sum"), expected)
        torch.testing.assert_close(gradient[-3:], torch.autograd.grad(expected, tail)[0])

    def test_memory_is_an_eighth_and_the_host_never_waits(self):
        M, N, V = 65536, 768, 50304
        x, weight, targets = tensor(M, N, dtype=BF16), tensor(V, N,
                                                              scale=0.02), targets_for(M, V, [5])
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
        args = tensor(10000, 768, dtype=BF16), tensor(50304, 768,
                                                      scale=0.02), targets_for(10000, 50304)
        first, *rest = (grads(ce.linear_cross_entropy, args) for _ in range(30))
        assert all(torch.equal(a, b) for again in rest for a, b in zip(first, again))
