"""GPT, the model as its users hold it: an architecture that loads its weights and writes text."""

from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from gpt.checkpoint_files import read_config, read_part, read_tokenizer, verify
from gpt.generate import generate
from gpt.gpt2 import GPT2
from gpt.pretrained import Trained, fill, read_source, tokenizer_of
from gpt.run_folder import reading
from kernels import Kernels


class GPT(GPT2):
    """GPT-2, with what a user does with a model."""

    def predict(self, idx: Tensor, targets: bool = True) -> Tensor:
        """`logits` by the name that scripts call: of all positions, or with False of the last."""
        return self.logits(idx, last_only=not targets)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None) -> Tensor:
        """idx (B, T) with max_new_tokens sampled ones after it, or before it in a backward model.

        gpt/generate.py describes the settings.
        """
        new = list(generate(self, idx, max_new_tokens, temperature, top_k, top_p))
        backward = self.config.direction == "backward"
        return torch.cat([*reversed(new), idx] if backward else [idx, *new], dim=1)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device | str = "cpu",
                        kernels: Kernels | None = None) -> "GPT":
        """The model of a checkpoint folder, or of the newest one in a run's folder, in eval mode.

        Its files are compared with their checksums: raises ValueError for damaged ones.
        """
        with reading(path) as folder:
            verify(folder)
            with torch.device("meta"):
                model = cls(read_config(folder), kernels)
            model.to_empty(device=device)
            model.tie()
            fill(model, read_part(folder, "model", device))
        return model.eval()

    @classmethod
    def from_pretrained(cls, source: str, kernels: Kernels | None = None) -> "GPT":
        """The model of anything that `read_source` reads, on the CPU, in eval mode.

        That is gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face folder, a nanoGPT
        checkpoint's folder, or one of ours.
        """
        return cls.from_trained(read_source(source), kernels)

    @classmethod
    def from_trained(cls, trained: Trained, kernels: Kernels | None = None) -> "GPT":
        """The model of weights that were read, on the CPU, in eval mode."""
        model = cls(trained.config, kernels)
        fill(model, trained.weights)
        return model.eval()


def load_with_tokenizer(init_from: str, out_dir: str,
                        device: torch.device) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer that --init_from names: out_dir's for "resume"."""
    if init_from != "resume":
        trained = read_source(init_from)
        return GPT.from_trained(trained).to(device), tokenizer_of(trained)
    with reading(out_dir) as folder:
        return GPT.from_checkpoint(folder, device), load_tokenizer(read_tokenizer(folder))
