"""The model: config, architecture, generation, and the reading of models and checkpoints."""

from gpt.config import SIZES, GPTConfig

__all__ = ["GPT", "SIZES", "GPTConfig"]


def __getattr__(name: str):
    if name == "GPT":  # imported only when used, so that reading a config does not wait for torch
        from gpt.model import GPT

        return GPT
    raise AttributeError(f"module 'gpt' has no attribute {name!r}")
