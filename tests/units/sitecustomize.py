"""Make torch report the CPU's bf16 units as the variable BF16_UNITS says: "claimed" or "denied".

`pytest --bf16-units=...` puts this file first on PYTHONPATH, so every process of the tests runs it.
torch.cpu is patched once it is imported, not before, since tests check that a config error imports
no torch.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
HERE = os.path.dirname(os.path.abspath(__file__))


def claim(cpu) -> None:
    """Make torch.cpu.get_capabilities() report all bf16 units or none."""
    detected, has_units = cpu.get_capabilities, os.environ["BF16_UNITS"] == "claimed"
    cpu.get_capabilities = lambda: detected() | dict.fromkeys(FEATURES, has_units)


class WhenImported:
    """An import finder that runs `claim` on torch.cpu after its import."""

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
    others = [path for path in sys.path if os.path.abspath(path) != HERE]
    shadowed = PathFinder.find_spec("sitecustomize", others)
    if shadowed:  # run the one that would have run without this file
        shadowed.loader.exec_module(module_from_spec(shadowed))
