"""GPT-2 (1558M) on 34 billion tokens of FineWeb-Edu: llm.c's run_gpt2_1558M.sh, on 8 GPUs.

16 sequences x 1024 tokens x 64 micro-batches (8 on each of 8 GPUs) = 1,048,576 tokens a step.
32,000 steps = 33.6 billion tokens. GPT-2 of this size has 48.9 % on HellaSwag (llm.c's figure);
llm.c needed 24 hours on 8 H100 (its script). GPU-hours here: not measured.
Prepare: `python data/fineweb/prepare.py --edu=True --sample=sample-100BT`.
"""

from dataclasses import replace

from configs.fineweb_gpt2_124m import config as base

config = replace(
    base,
    model=replace(base.model, n_layer=48, n_head=25, n_embd=1600),
    data=replace(base.data, dataset="fineweb_edu", batch_size=16),
    optim=replace(
        base.optim, gradient_accumulation_steps=64, max_iters=32_000, lr_decay_iters=32_000,
        learning_rate=6e-4, min_lr=6e-5,
    ),
    run=replace(base.run, out_dir="out-fineweb-1558m"),
)
