"""Score a text: `python gpt/predict.py --out_dir=out --text="To be or not to"`.

Prints the mean loss and the perplexity of the text, and the likeliest next tokens with their
probabilities. A model trained with --direction=backward predicts the token before the text.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.bounds import NotEmpty, Positive
from common.files import read_text


@dataclass(frozen=True)
class Predict:
    """Score a text and predict its next token."""

    out_dir: NotEmpty = "out"
    """a run's folder, or one checkpoint in it"""
    text: str = ""
    file: str = ""
    """read the text from here instead"""
    top: Positive = 10
    """how many next tokens to show"""
    device: str = "auto"
    """cuda, mps or cpu; auto: the first that there is"""


def predict(c: Predict) -> None:
    """Print the scores and the table. Raises ValueError or OSError for bad input."""
    import torch

    from common import hardware
    from gpt.model import load_with_tokenizer
    from gpt.scoring import perplexity, token_losses

    if bool(c.text) == bool(c.file):
        raise ValueError("give one of --text=TEXT and --file=FILE")
    device = hardware.resolve_device(c.device)
    model, tokenizer = load_with_tokenizer("resume", c.out_dir, device)
    text = read_text(Path(c.file)) if c.file else c.text
    ids = torch.tensor(tokenizer.encode(text), device=device)
    if len(ids) == 0:
        raise ValueError(f"{c.file}: the text is empty")
    backward = model.config.direction == "backward"
    ids = ids.flip(0) if backward else ids  # in the order the model reads
    losses = token_losses(model, ids)
    if len(losses):
        mean = losses.double().mean().item()
        print(f"{len(ids):,} tokens, mean loss {mean:.4f}, perplexity {perplexity(mean):.4f}")
    with torch.no_grad():
        window = ids[None, -model.config.block_size :]
        logits = model.logits(window, last_only=True)[0, 0, : tokenizer.vocab_size]
    likeliest = logits.float().softmax(-1).topk(min(c.top, tokenizer.vocab_size))
    print("token before:" if backward else "next token:")
    for p, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
        print(f"{100 * p:7.2f} %  {token:6d}  {tokenizer.decode([token])!r}")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr for bad input."""
    return cli.run(predict, Predict, argv)


if __name__ == "__main__":
    sys.exit(main())
