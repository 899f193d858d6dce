import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test imports triton

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every fresh tensor with NaN, so that a kernel which forgets an element fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
