"""shakespeare_char in reverse: a model that predicts the previous character.

    python train/run.py configs/shakespeare_char_backward.py
    python gpt/sample.py --out_dir=out-shakespeare-char-backward --start=" the end."

16,384 tokens a step and 5,000 steps, as in shakespeare_char; the losses of the two directions
should be close.
"""

from dataclasses import replace

from configs.shakespeare_char import config as forward

config = replace(
    forward,
    model=replace(forward.model, direction="backward"),
    run=replace(forward.run, out_dir="out-shakespeare-char-backward"),
)
