"""What a compiled step does on a GPU, read from the code that Inductor generates for an H200.

Two layers of GPT-2's width in bf16; nothing runs. Attention is our operator, which Inductor leaves
alone, as it does PyTorch's on a GPU; what operators do inside is tested with them. nanochat is left
out: without a GPU Inductor cannot ask its attention for the shapes of its outputs.
"""

import math

import pytest

from gpt import GPTConfig
from tests import gpu_code, ranks

SHAPE, C = (4, 1024), 768  # the stream has as many elements as no weight has
GPT2 = GPTConfig(n_layer=2, n_head=12, n_embd=C, vocab_size=50304)
BACKENDS = {"torch": {"kernels": "torch", "attention": "triton"}, "triton": {"kernels": "triton"}}


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The code of forward and backward of a step, by the backend of all but attention."""
    folder = tmp_path_factory.mktemp("code")
    steps = [(name, GPT2, backends) for name, backends in BACKENDS.items()]
    assert ranks.run(gpu_code.write_steps, (folder, steps, SHAPE), 1, folder / "logs") == [0], (
        folder / "logs" / "0.log").read_text()[-3000:]
    return {name: [path.read_text() for path in sorted(folder.glob(f"{name}-*"))]
            for name in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_one_graph_each_way(code, backend):
    forward, backward = code[backend]
    assert "tangents" not in forward and "tangents" in backward
    for one in (forward, backward):
        assert "tl.store" in one and "async_compile.triton" in one and "cpp_fused" not in one


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_residual_stream_is_bf16(code, backend):
    """No other tensor of its size is fp32 but the gradient of the embedding, which is summed."""
    fp32 = [[shape for shape, dtype in gpu_code.buffers(one)
             if dtype == "float32" and math.prod(shape) == math.prod(SHAPE) * C]
            for one in code[backend]]
    assert fp32 == [[], [(*SHAPE, C)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_added_atomically(code, backend):
    """The embedding's gradient is PyTorch's operator, which sorts."""
    assert not [one for one in code[backend] if "tl.atomic" in one]
    assert "torch.ops.ridge.embedding_backward" in code[backend][1]
