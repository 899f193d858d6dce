"""Make a Python process say of its CPU's bf16 units what BF16_UNITS says: first on PYTHONPATH under
`pytest --bf16-units=...`.

torch.cpu is patched when it is imported, and not before: that a config error imports no torch is
tested, too.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
HERE = os.path.dirname(os.path.abspath(__file__))


def claim(cpu) -> None:
    """Let torch.cpu.get_capabilities() have all units or none."""
    detected, there = cpu.get_capabilities, os.environ["BF16_UNITS"] == "claimed"
    cpu.get_capabilities = lambda: detected() | dict.fromkeys(FEATURES, there)


class WhenImported:
    """A finder that finds torch.cpu as ever, and lets `claim` follow its code."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), claim(module))
        return spec


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, WhenImported())
    elsewhere = PathFinder.find_spec("sitecustomize",
                                     [p for p in sys.path if os.path.abspath(p) != HERE])
    if elsewhere:  # the one that would have run
        elsewhere.loader.exec_module(module_from_spec(elsewhere))
