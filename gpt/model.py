"""GPT: an architecture with the methods of its users, which load weights and write text."""

from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer, load_tokenizer
from gpt.checkpoint_files import read_config, read_part, read_tokenizer, verify
from gpt.decoder import Decoder
from gpt.generate import generate
from gpt.pretrained import Trained, fill, read_source, tokenizer_of
from gpt.run_folder import reading
from kernels import Kernels


class GPT(Decoder):
    """A GPT, with what a user does with a model."""

    def predict(self, idx: Tensor, targets: bool = True) -> Tensor:
        """The same as `logits`, under the name that scripts use; False: the last position alone."""
        return self.logits(idx, last_only=not targets)

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None) -> Tensor:
        """idx (B, T) and max_new_tokens sampled ids after it, or before it for a backward model.

        gpt/generate.py describes the settings.
        """
        new = list(generate(self, idx, max_new_tokens, temperature, top_k, top_p))
        backward = self.config.direction == "backward"
        return torch.cat([*reversed(new), idx] if backward else [idx, *new], dim=1)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device | str = "cpu",
                        kernels: Kernels | None = None) -> "GPT":
        """The model of a checkpoint folder, or of the newest one in a run's folder, in eval mode.

        Raises ValueError if a file does not have its checksum.
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
        """A published size (gpt2, ..., gpt2-xl), or the model in a folder, in eval mode on the CPU.

        The folder is Hugging Face's, a nanoGPT checkpoint's, or one of ours.
        """
        return cls.from_trained(read_source(source), kernels)

    @classmethod
    def from_trained(cls, trained: Trained, kernels: Kernels | None = None) -> "GPT":
        """A model with these weights, on the CPU, in eval mode."""
        model = cls(trained.config, kernels)
        fill(model, trained.weights)
        return model.eval()


def load_with_tokenizer(init_from: str, out_dir: str,
                        device: torch.device) -> tuple[GPT, Tokenizer]:
    """The model and tokenizer that --init_from names; "resume" takes those of `out_dir`."""
    if init_from != "resume":
        trained = read_source(init_from)
        return GPT.from_trained(trained).to(device), tokenizer_of(trained)
    with reading(out_dir) as folder:
        return GPT.from_checkpoint(folder, device), load_tokenizer(read_tokenizer(folder))
