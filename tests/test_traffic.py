"""The bytes that memory-bound operators move, counted in Triton's interpreter (bench/aot)."""

import pytest
import torch
import triton
import triton.language as tl

from bench.aot.offline import offline
from bench.aot.traffic import Window, cache_share, floor_bytes, traffic
from kernels import launch
from kernels.calls import Case


@triton.jit
def _copy(x, y, N, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    offsets = tl.program_id(0) * N + cols
    tl.store(y + offsets, tl.load(x + offsets, mask=cols < N, other=0.0), mask=cols < N)


@triton.jit
def _copy_after_two_looks(x, y, N, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    offsets = tl.program_id(0) * N + cols
    top = tl.max(tl.load(x + offsets, mask=cols < N, other=0.0).to(tl.float32))
    tl.store(y + offsets, tl.load(x + offsets, mask=cols < N, other=0.0) - top, mask=cols < N)


@triton.jit
def _copy_columns(x, y, M, N, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    offsets = rows * N + tl.program_id(0)
    tl.store(y + offsets, tl.load(x + offsets, mask=rows < M, other=0.0), mask=rows < M)


CASE = Case("layernorm", (2**16, 768), variant="nobias")  # 100 MB: more than any cache
needs_interpreter = pytest.mark.skipif(not triton.knobs.runtime.interpret,
                                       reason="counted in the interpreter")


def ratios(forward):
    """The bytes that `forward(x)` requests and moves in CASE's forward phase, over its floor."""
    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            return forward(x)

        @staticmethod
        def backward(ctx, dy):
            return dy, dy.new_zeros(CASE.shape[1], dtype=torch.float32)

    row = traffic(CASE, [(9, 0)], Operator.apply)[0]
    return round(row["requested_over_floor"], 2), round(row["moved_over_floor"], 2)


def launched(kernel, width=4096, block=None):
    """The operator that copies x by `kernel`, in rows of `width` elements, one program a row."""
    def forward(x):
        y = torch.empty_like(x)
        kernel[(x.numel() // width,)](x, y, width, BLOCK=block or width)
        return y
    return forward


def test_offline_hands_over_launches_and_counts_pytorchs_own_bytes():
    launches, bytes_by_torch = [], {}
    with offline((9, 0), lambda *launch: launches.append(launch), bytes_by_torch.__setitem__):
        assert launch.capability(torch.device("cpu")) == (9, 0)
        x = torch.empty(2**20, 2**20, dtype=torch.bfloat16, device="meta")  # 2 TB, were it real
        bytes_by_torch.clear()
        x[1:].t()
        assert not bytes_by_torch, "a view moves nothing"
        x[:1].contiguous(), x[:, :1].contiguous()
        told = "read and write of 2 MB; a single row is contiguous already"
        assert bytes_by_torch == {"aten::clone": 2**22}, told
        bytes_by_torch.clear()
        x[:1, :1].expand(2**20, 1).contiguous()
        assert bytes_by_torch == {"aten::clone": 2**21 + 2}, "one element read, 2 MB written"
        _copy[(7,)](x[0, 3:], x[0], 5, BLOCK=8)
    (kernel, grid, args, kwargs), = launches
    assert kernel is _copy and grid == (7,) and args[2] == 5 and kwargs == {"BLOCK": 8}
    assert args[0].dtype == torch.bfloat16 and args[0].data_ptr() - args[1].data_ptr() == 6


@needs_interpreter
def test_one_read_and_one_write_is_the_floor():
    assert ratios(launched(_copy)) == (1.0, 1.0)


@needs_interpreter
def test_a_second_look_at_what_a_program_just_read_is_requested_but_not_moved():
    assert ratios(launched(_copy_after_two_looks)) == (1.5, 1.0)


@needs_interpreter
def test_a_second_look_beyond_a_programs_share_of_the_cache_is_moved():
    assert ratios(launched(_copy_after_two_looks, width=2**19)) == (1.5, 1.5)


@needs_interpreter
def test_a_second_kernel_moves_everything_again():
    assert ratios(lambda x: launched(_copy)(launched(_copy)(x))) == (2.0, 2.0)


@needs_interpreter
def test_a_copy_by_pytorch_counts():
    assert ratios(lambda x: launched(_copy)(x.clone())) == (2.0, 2.0)


@needs_interpreter
def test_columns_move_whole_sectors():
    def forward(x):
        y = torch.empty_like(x)
        _copy_columns[(x.shape[1],)](x, y, *x.shape, BLOCK=x.shape[0])
        return y
    assert ratios(forward) == (1.0, 16.0), "a sector of 32 bytes for each element of 2"


@needs_interpreter
def test_masked_elements_do_not_count():
    assert ratios(launched(_copy, width=768, block=1024)) == (1.0, 1.0)


def test_the_window_forgets():
    window = Window(96)  # three sectors of 32 bytes
    first, second = torch.tensor([7, 8]).numpy(), torch.tensor([8, 9]).numpy()
    assert window.misses(first).tolist() == [7, 8] and window.misses(first).tolist() == []
    assert window.misses(second).tolist() == [9]
    assert window.misses(first).tolist() == [7], "8 is still there, 7 is not"


def test_floors():
    assert floor_bytes(Case("layernorm", (100, 10)))["forward"] == 2 * 100 * 10 * 2 + 2 * 10 * 4
    added = floor_bytes(Case("add_layernorm", (100, 10)))
    assert added["backward"] == 4 * 100 * 10 * 2 + 3 * 10 * 4
    wide = floor_bytes(Case("add_layernorm", (100, 10), torch.bfloat16, "fp32 residual"))
    assert wide["forward"] == 100 * 10 * (2 + 4 + 4 + 2) + 80
    assert floor_bytes(Case("rmsnorm", (100, 10))) == {"forward": 4000, "backward": 6000}
    assert floor_bytes(Case("add_rmsnorm", (100, 10))) == {"forward": 8000, "backward": 8000}
    turned = floor_bytes(Case("attention_qkv", (2, 8, 3, 16), variant="rotary"))
    qk, rest = 2 * 8 * 2 * 3 * 16 * 2, 4 * (2 * 8 * 2 * 3 + 8 * 16)
    assert turned == {"forward": 2 * qk + rest, "backward": 3 * qk + rest}
    assert floor_bytes(Case("cross_entropy", (100, 50))) == {"forward": 10_800, "backward": 20_800}
    assert floor_bytes(Case("linear_cross_entropy", (100, 10, 50))) == {"forward": 20_800}


def test_a_programs_share_of_the_cache_is_that_of_the_programs_resident_at_once():
    assert cache_share((9, 0), 10**6, num_warps=4) == 50e6 // (132 * 16)
    assert cache_share((9, 0), 10**6, num_warps=32) == 50e6 // (132 * 2)
    assert cache_share((9, 0), 100, num_warps=4) == 50e6 // 100
