"""Launch settings: they fit the device and cover what they are for."""

import pytest

from kernels import launch
from tests.numerics import BF16, FP16, FP32


@pytest.mark.parametrize("capability", [*launch.SHARED_MEMORY_BYTES, (12, 0), (7, 5)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_attention_fits_the_shared_memory_of_the_device(dtype, capability):
    limit = launch.SHARED_MEMORY_BYTES.get(capability, 101_376)
    for D in range(16, 257, 8):
        row_bytes = (1 << (D - 1).bit_length()) * dtype.itemsize
        for settings_of, kept, streamed in ((launch.attention_forward, "M", "N"),
                                            (launch.attention_backward_q, "MM", "N"),
                                            (launch.attention_backward_kv, "NN", "M")):
            settings = settings_of(D, dtype, capability)
            rows = (len(kept) * settings[f"BLOCK_{kept[0]}"]
                    + 2 * settings["num_stages"] * settings[f"BLOCK_{streamed}"])
            assert rows * row_bytes <= limit, (settings_of.__name__, D, settings)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_of_layernorm_cover_every_width(itemsize):
    for N in range(1, launch.LAYERNORM_WIDEST + 1):
        tile = launch.layernorm_forward(N, itemsize)
        assert N <= tile["CHUNKS"] * tile["LANES"] < 2 * N + 1
        assert tile["num_warps"] <= 32
        back = launch.layernorm_backward(N)
        assert (back["CHUNKS"] - 1) * back["LANES"] < N <= back["CHUNKS"] * back["LANES"]
        assert back["CHUNKS"] <= 3 and back["num_warps"] <= 16


@pytest.mark.parametrize("M", [1, 127, 4096, 5000, 16 * 1024, 65536, 65537, 10**6])
@pytest.mark.parametrize("V", [65, 50257, 131072])
def test_chunks_of_logits_are_an_eighth_and_never_few_rows(M, V):
    rows = launch.chunk_rows(M, V, 2)
    assert rows % 128 == 0 and min(M, 2048) <= rows <= max(M / 8, 4096, 2**26 / (2 * V)) + 128


def test_settings_are_replaced_whole_for_a_call_and_in_part_for_a_function():
    call = launch.Call("layernorm_backward", (768,))
    launch.use({})
    table = launch.layernorm_backward(768)
    assert launch.given() == {call: table}
    try:
        launch.use({"layernorm_backward(768)": {"ROWS": 1}, "layernorm_forward": {"ROWS": 9},
                    "layernorm_programs": 7})
        assert launch.layernorm_backward(768) == {"ROWS": 1}
        backward = launch.layernorm_backward(1024)
        assert backward["CHUNKS"] * backward["LANES"] == 1024
        forward = launch.layernorm_forward(768, 2)
        assert forward["ROWS"] == 9 and forward["CHUNKS"] * forward["LANES"] == 1024
        assert launch.layernorm_programs(768, 2, 132) == 7
    finally:
        launch.use({})
    assert launch.layernorm_backward(768) == table
