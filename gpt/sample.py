"""Write text with a trained model: `python gpt/sample.py --out_dir=out --start="def "`.

--help lists the settings. A model trained with --direction=backward takes the prompt as the ending
and writes the text before it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli
from common.bounds import AboveZeroToOne, NonNegative, NonNegativeFloat, NotEmpty, Positive
from common.files import read_text

if TYPE_CHECKING:
    import torch

    from gpt.model import GPT


@dataclass(frozen=True)
class Sample:
    """Sample from a model; nanoGPT's names and defaults."""

    out_dir: NotEmpty = "out"
    """a run's folder, or one checkpoint in it"""
    init_from: NotEmpty = "resume"
    """resume: out_dir; else gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with a model"""
    start: str = "\n"
    """the prompt, or FILE:path; for a backward model the ending"""
    num_samples: Positive = 10
    max_new_tokens: Positive = 500
    temperature: NonNegativeFloat = 0.8
    """below 1: safer; 0: always the likeliest"""
    top_k: NonNegative = 200
    """sample from the top_k likeliest tokens; 0: from all"""
    top_p: AboveZeroToOne = 1.0
    """sample from the likeliest tokens that have this probability together"""
    seed: NonNegative = 1337
    device: str = "auto"
    """cuda, mps or cpu; auto: the first that there is"""
    dtype: str = "auto"
    """of the weights: float32, bfloat16, float16; auto: see `weights_dtype`"""


def sample(c: Sample) -> None:
    """Print num_samples continuations of the prompt, each followed by nanoGPT's line of dashes.

    The text is printed as it grows; a backward model's, which grows to the left, at its end.
    Raises ValueError or OSError for bad input.
    """
    import torch

    from common import hardware
    from gpt.generate import generate
    from gpt.model import load_with_tokenizer

    device = hardware.resolve_device(c.device)
    model, tokenizer = load_with_tokenizer(c.init_from, c.out_dir, device)
    prompt = read_text(Path(c.start[5:])) if c.start.startswith("FILE:") else c.start
    ids = tokenizer.encode(prompt)
    model.to(weights_dtype(c, model, len(ids)))
    idx = torch.tensor([ids], dtype=torch.long, device=device)
    top_k, top_p = c.top_k or None, None if c.top_p == 1 else c.top_p
    torch.manual_seed(c.seed)
    for _ in range(c.num_samples):
        tokens = generate(model, idx, c.max_new_tokens, c.temperature, top_k, top_p,
                          n_tokens=tokenizer.vocab_size)
        new = (int(token.item()) for token in tokens)
        if model.config.direction == "backward":
            print(tokenizer.decode(list(new)[::-1]) + prompt)
        else:
            text = tokenizer.stream()
            print(prompt, end="", flush=True)
            for token in new:
                print(text(token), end="", flush=True)
            print(text())
        print("---------------", flush=True)


def weights_dtype(c: Sample, model: "GPT", prompt_tokens: int) -> "torch.dtype":
    """The dtype of the weights: decoding reads them all for each token, so bf16 halves the time.

    auto on a GPU: bfloat16 if it has units for it. auto on a CPU: float32 up to 128 MiB, which
    caches may hold. Above that bfloat16 with bf16 units; without them only if the text fits the
    window, beyond which each step is a matrix multiplication, and the prompt is its shorter part.

    Tokens/s of a 124M model in bf16 and in fp32, two cores of an EPYC with bf16 units: 75 and 36;
    32 tokens after 500: 34 and 19; beyond a window of 256: 6.7 and 3.0. With AVX2 alone: 45 and 28.
    """
    from common import hardware

    device = model.lm_head.weight.device
    if c.dtype != "auto" or device.type != "cpu":
        return hardware.resolve_dtype(c.dtype, device)
    if model.num_params() * 4 <= 128 * 2**20:
        return hardware.DTYPES["float32"]
    fits = prompt_tokens + c.max_new_tokens <= model.config.block_size
    if fits and prompt_tokens <= c.max_new_tokens:
        return hardware.DTYPES["bfloat16"]
    return hardware.resolve_dtype("auto", device)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr for bad input."""
    return cli.run(sample, Sample, argv)


if __name__ == "__main__":
    sys.exit(main())
