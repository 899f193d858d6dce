"""Pictures without a display: a figure to draw on, saved when it is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def picture(path: Path, width: float, height: float, dpi: int = 120) -> Iterator[Any]:
    """A matplotlib Figure of width x height inches, saved to `path` when the block ends."""
    # imported here: only those who draw wait for matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
