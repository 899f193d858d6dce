"""Run operators without a device, data or arithmetic: kernel launches go to a function instead.

    def launched(kernel, grid, args, kwargs): ...

    with offline((9, 0), launched):
        for phase, tensors in calls.run(operator, calls.arguments(case, "meta"), {}):
            ...

The tensors are on PyTorch's "meta" device: shapes, dtypes and strides without data, so logits of
16,384 x 50,304 and their matrix products cost nothing, and whatever would read a value on the host
(`.item()`) fails. The kernel files need no change for this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """A tensor without data, as a kernel sees it: a dtype and an address within its storage."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


class Storages:
    """Gives each storage addresses; `nbytes[address >> STORAGE_BITS]` is that storage's size."""

    def __init__(self) -> None:
        # each storage is kept alive, so that its key is not used again
        self._known: dict[int, tuple[int, object]] = {}
        self.nbytes: dict[int, int] = {}

    def pointer(self, tensor: Tensor) -> Pointer:
        storage = tensor.untyped_storage()
        index, _ = self._known.setdefault(storage._cdata, (len(self._known) + 1, storage))
        self.nbytes[index] = storage.nbytes()
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return Pointer(tensor.dtype, (index << STORAGE_BITS) + offset)

    def pointers(self, arg: object) -> object:
        """A launch argument with Pointers for tensors: also in tuples and tensor descriptors."""
        if isinstance(arg, Tensor):
            return self.pointer(arg)
        if type(arg) is tuple:
            return tuple(map(self.pointers, arg))
        if isinstance(base := getattr(arg, "base", None), Tensor):
            return replace(arg, base=self.pointer(base))  # type: ignore[type-var]
        return arg


class _Bodies(TorchDispatchMode):
    """Runs the Python body of our operators; for meta tensors PyTorch would run their fake only.

    Calls `moved` with the name of every other operator that accesses memory, and the bytes of its
    inputs and outputs.
    """

    def __init__(self, moved: Callable[[str, int], None]) -> None:
        super().__init__()
        self.moved = moved

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            return OPDEFS[func.name()]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        free = func.is_view or func.overloadpacket.__name__.startswith(FREE)
        if func.namespace == "aten" and not free:
            touched = (t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            self.moved(func.name(), sum(map(_nbytes, touched)))
        return result


def _nbytes(tensor: Tensor) -> int:
    """The distinct bytes of a tensor: an expanded axis (stride 0) counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


@contextmanager
def offline(capability: tuple[int, int], launched: Callable,
            moved: Callable[[str, int], None] = lambda name, nbytes: None) -> Iterator[Storages]:
    """While the block runs, launches go to `launched(kernel, grid, args, kwargs)`.

    Launch settings are those for a device of this capability. Tensors must be on the meta device.
    """
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    storages = Storages()

    def run(kernel, *args, grid, warmup, **kwargs):
        named = {k: storages.pointers(a) for k, a in kwargs.items()}
        return launched(kernel, grid, [storages.pointers(a) for a in args], named)

    multiprocessors = MULTIPROCESSORS[capability]
    with (patch.object(JITFunction, "run", run), patch.object(InterpretedFunction, "run", run),
          patch.object(launch, "capability", lambda device: capability),
          patch.object(launch, "multiprocessors", lambda device: multiprocessors),
          # meta has no autocast
          patch.object(torch, "is_autocast_enabled", lambda *device: False), _Bodies(moved)):
        yield storages
