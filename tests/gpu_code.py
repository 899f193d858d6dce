"""The code that Inductor generates for an H200, on a machine without a GPU.

Tensors are fake and the GPU's properties are constants; autograd and Inductor run as for a GPU, up
to the code. No kernel is compiled or run. Left out are the passes of Inductor that first run
something on the GPU: padded products, and patterns of attention and softmax. Call it in a process
of its own: Inductor remembers what it is told of the GPU.
"""

import contextlib
import re
import types
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._functorch import config as functorch_config
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, utils
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import post_grad
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _triton
from torch.utils._pytree import tree_map

from gpt import GPT, GPTConfig
from kernels import load

GPU = torch.device("cuda:0")
H200 = types.SimpleNamespace(
    name="NVIDIA H200", type="cuda", index=0, major=9, minor=0, multi_processor_count=132,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, warp_size=32,
    max_threads_per_block=1024, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
    total_memory=141 << 30)


class Interface(device_interface.CudaInterface):
    """What Inductor asks of a GPU."""

    get_device_properties = staticmethod(lambda device=None: H200)
    get_compute_capability = staticmethod(lambda device=None: 90)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    is_bf16_supported = staticmethod(lambda including_emulation=True: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


@contextlib.contextmanager
def pretended():
    """Make Inductor believe in an H200."""
    answers = {"is_available": True, "current_device": 0, "device_count": 1,
               "get_device_properties": H200, "get_device_capability": (9, 0),
               "mem_get_info": (H200.total_memory,) * 2,
               "get_rng_state": torch.zeros(1), "set_rng_state": None}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name,
                                                  lambda *_, answer=answer, **__: answer))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(_triton, "triton_hash_with_backend", lambda: ""))
        stack.enter_context(mock.patch.object(post_grad, "lazy_init", lambda *_: None))
        stack.enter_context(mock.patch.object(compile_fx, "get_cuda_device_context",
                                              lambda graph: contextlib.nullcontext()))
        # Each node knows its shape and dtype; to find them again, some operators need a GPU.
        stack.enter_context(mock.patch.object(compile_fx, "fake_tensor_prop",
                                              lambda graph, inputs, *_: detect_fake_mode(inputs)))
        device_interface.get_registered_device_interfaces()  # registers its own first
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces,
                                            {"cuda": Interface, "cuda:0": Interface}))
        yield


def for_the_gpu(graph: torch.fx.GraphModule, inputs: list, **options):
    """Relabel a graph's devices, and lower it as Inductor does."""
    def moved(value):
        if isinstance(value, FakeTensor):
            value.fake_device = GPU
        return GPU if isinstance(value, torch.device) else value

    tree_map(moved, inputs)
    for node in graph.graph.nodes:
        node.args, node.kwargs = tree_map(moved, node.args), tree_map(moved, node.kwargs)
        tree_map(moved, node.meta.get("val"))
    graph.recompile()
    with pretended():
        return compile_fx.compile_fx_inner(graph, inputs, **options)


class Loss(nn.Module):
    """The loss of a model under autocast, as the training loop calls it."""

    def __init__(self, model: GPT, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor]:
        with torch.autocast("cpu", dtype=self.dtype):
            return (self.model(idx, targets, reduction="sum"),)


def write_step(folder: Path, name: str, config: GPTConfig, backends: dict[str, str],
               shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the code of forward and backward for ids of `shape`, as name-0.py and name-1.py."""
    with FakeTensorMode():
        model = GPT(config, load(**backends))
        ids = [torch.empty(shape, dtype=torch.int64) for _ in range(2)]
    with (functorch_config.patch(force_non_lazy_backward_lowering=True),
          inductor_config.patch(compile_threads=1, force_disable_caches=True)):
        codes = utils.get_code(compile_fx.compile_fx, Loss(model, dtype), ids, for_the_gpu)
    for i, code in enumerate(filter(None, codes)):
        (folder / f"{name}-{i}.py").write_text(code)


def write_steps(folder: Path, steps: list[tuple], shape: tuple[int, int]) -> None:
    """Write several, each given by its name, configuration and backends."""
    for step in steps:
        write_step(folder, *step, shape)


def buffers(code: str) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of every buffer that generated code allocates."""
    found = re.findall(r"empty_strided_cuda\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)", code)
    return [(tuple(int(n) for n in shape.split(",") if n.strip()), dtype)
            for shape, dtype in found]
