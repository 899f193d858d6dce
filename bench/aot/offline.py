"""Run the operators with no device, no data and no arithmetic: each kernel launch is handed to a
function instead.

    with offline((9, 0), launched):             # launched(kernel, grid, args, kwargs)
        for phase, tensors in cases.run(load("triton").layernorm, cases.arguments(case, "meta"), {}): ...

The tensors are on PyTorch's "meta" device: shapes, dtypes and strides without data, so logits of
16,384 x 50,304 and their matmuls cost nothing, and whatever would read a value on the host
(`.item()`) fails. The kernel files are not told.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import launch

NAMESPACE = "ridge"  # of the operators in kernels/
STORAGE_BITS = 40  # each storage gets an address range of its own, far larger than any of them
# Of the GPU that each capability stands for: A100, A40, L40, H100 and H200, B200.
MULTIPROCESSORS = {(8, 0): 108, (8, 6): 84, (8, 9): 142, (9, 0): 132, (10, 0): 148}
FREE = ("empty", "new_empty", "detach", "alias")  # move no bytes, though they make a tensor


@dataclass(frozen=True)
class Pointer:
    """What a kernel sees of a tensor without data: a dtype, and an address in the range of its
    storage."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


class Storages:
    """Hands out addresses; `nbytes[address >> STORAGE_BITS]` is the size of the storage an address
    belongs to."""

    def __init__(self) -> None:
        # the storage is kept, so that its key is not used again
        self._known: dict[int, tuple[int, object]] = {}
        self.nbytes: dict[int, int] = {}

    def pointer(self, tensor: Tensor) -> Pointer:
        storage = tensor.untyped_storage()
        index, _ = self._known.setdefault(storage._cdata, (len(self._known) + 1, storage))
        self.nbytes[index] = storage.nbytes()
        return Pointer(tensor.dtype,
                       (index << STORAGE_BITS)
                       + int(tensor.storage_offset()) * tensor.element_size())

    def pointers(self, arg: object) -> object:
        """A launch argument with its tensors replaced: plain ones, those in tuples, the base of a
        tensor descriptor."""
        if isinstance(arg, Tensor):
            return self.pointer(arg)
        if type(arg) is tuple:
            return tuple(map(self.pointers, arg))
        if isinstance(base := getattr(arg, "base", None), Tensor):
            return replace(arg, base=self.pointer(base))  # type: ignore[type-var]
        return arg


class _Bodies(TorchDispatchMode):
    """Enters the Python body of our operators, where PyTorch would stop at the output shapes they
    declare.

    `moved` hears of every other operator that touches memory: its name and the bytes of the tensors
    in and out.
    """

    def __init__(self, moved: Callable[[str, int], None]) -> None:
        super().__init__()
        self.moved = moved

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            return OPDEFS[func.name()]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view and not func.overloadpacket.__name__.startswith(FREE):
            touched = (t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            self.moved(func.name(), sum(map(_nbytes, touched)))
        return result


def name_of(kernel) -> str:
    """The file and name of a kernel: "attention._forward"."""
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"


def _nbytes(tensor: Tensor) -> int:
    """The distinct bytes of a tensor: an expanded axis (stride 0) counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


@contextmanager
def offline(capability: tuple[int, int], launched: Callable,
            moved: Callable[[str, int], None] = lambda name, nbytes: None) -> Iterator[Storages]:
    """Within it, kernels go to `launched(kernel, grid, args, kwargs)`, with settings for a device
    of this capability.

    For tensors on the meta device.
    """
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    storages = Storages()

    def run(kernel, *args, grid, warmup, **kwargs):
        named = {k: storages.pointers(a) for k, a in kwargs.items()}
        return launched(kernel, grid, [storages.pointers(a) for a in args], named)

    with ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(patch.object(kind, "run", run))
        stack.enter_context(patch.object(launch, "capability", lambda device: capability))
        stack.enter_context(patch.object(launch,
                                         "multiprocessors", lambda device: MULTIPROCESSORS[capability]))
        # meta has no autocast
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *device: False))
        stack.enter_context(_Bodies(moved))
        yield storages
