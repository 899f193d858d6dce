"""train_gpt2 in reverse: GPT-2 (124M) predicts the previous token, on OpenWebText.

    torchrun --standalone --nproc_per_node=8 train/run.py configs/train_gpt2_backward.py
    python gpt/sample.py --out_dir=out-gpt2-backward --start=" the end."

491,520 tokens a step and 600,000 steps, as in train_gpt2. Papadopoulos, Wenger and Hongler (2024)
report backward losses slightly above forward ones on natural language: theirs, not ours. GPU-hours
here: not measured.
"""

from dataclasses import replace

from configs.train_gpt2 import config as forward

config = replace(
    forward,
    model=replace(forward.model, direction="backward"),
    run=replace(forward.run, out_dir="out-gpt2-backward"),
)
