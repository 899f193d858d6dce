"""Write text with a trained model: `python gpt/sample.py --out_dir=out --start="def "`. --help
lists the settings.

A model trained with --direction=backward takes the prompt as the ending and writes what comes
before it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli
from common.bounds import NonNegative, NonNegativeFloat, NotEmpty, Positive, Share
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
    """the prompt, or FILE:path; of a backward model, the ending"""
    num_samples: Positive = 10
    max_new_tokens: Positive = 500
    temperature: NonNegativeFloat = 0.8
    """below 1: safer; 0: always the likeliest"""
    top_k: NonNegative = 200
    """choose among the likeliest top_k; 0: among all"""
    top_p: Share = 1.0
    """choose among the likeliest that together have this probability"""
    seed: NonNegative = 1337
    device: str = "auto"
    """cuda, mps, cpu; auto: the first that is there"""
    dtype: str = "auto"
    """of the weights: float32, bfloat16, float16; auto: see `weights_dtype`"""


def sample(c: Sample) -> None:
    """Print num_samples continuations of the prompt as they grow, one line of dashes after each, as
    nanoGPT does.

    What a backward model writes is printed once it is whole: a terminal cannot put text in front of
    what it shows.
    """
    import torch

    from common import hardware
    from gpt.generate import generate
    from gpt.model import load_with_tokenizer

    device = hardware.resolve_device(c.device)
    model, tokenizer = load_with_tokenizer(c.init_from, c.out_dir, device)
    prompt = read_text(Path(c.start[5:])) if c.start.startswith("FILE:") else c.start
    model.to(weights_dtype(c, model, len(tokenizer.encode(prompt))))
    idx = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long, device=device)
    torch.manual_seed(c.seed)
    for _ in range(c.num_samples):
        new = (int(token.item()) for token in generate(
            model, idx, c.max_new_tokens, c.temperature, c.top_k or None,
            None if c.top_p == 1 else c.top_p,
            n_tokens=tokenizer.vocab_size,
        ))
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
    """What the weights are kept in. Decoding reads all of them for each token, so half the bytes is
    half the time.

    auto: on a GPU what it has units for. On a CPU bfloat16 for a model that no cache holds, where
    reading is what takes the time: everywhere with bf16 units, and without them up to the end of
    the window, beyond which every step is a matrix multiplication. Tokens/s at 124M on a CPU with
    units (an EPYC's two cores): 75 for 36 in fp32, 34 for 19 for 32 tokens after 500, 6.7 for 3.0
    beyond a window of 256; on one with AVX2 alone: 45 for 28.
    """
    from common import hardware

    device = model.lm_head.weight.device
    if c.dtype != "auto" or device.type != "cpu":
        return hardware.resolve_dtype(c.dtype, device)
    if model.num_params() * 4 <= 128 * 2**20:
        return hardware.DTYPES["float32"]
    within = prompt_tokens + c.max_new_tokens <= model.config.block_size and prompt_tokens <= c.max_new_tokens
    return hardware.DTYPES["bfloat16"] if within else hardware.resolve_dtype("auto", device)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr for bad input."""
    return cli.run(sample, Sample, argv)


if __name__ == "__main__":
    sys.exit(main())
