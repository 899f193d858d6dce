"""GPT-2 (350M) on OpenWebText: train_gpt2 with another size.

12 sequences x 1024 tokens x 40 micro-batches over all GPUs = 491,520 tokens a step.
600,000 steps = 295 billion tokens. The learning rate is GPT-3's at this size (Brown et al. 2020,
table 2.1). No published loss. GPU-hours here: not measured.
"""

from dataclasses import replace

from configs.train_gpt2 import config as base

config = replace(
    base,
    model=replace(base.model, n_layer=24, n_head=16, n_embd=1024),
    optim=replace(base.optim, learning_rate=3e-4, min_lr=3e-5),
    run=replace(base.run, out_dir="out-train-gpt2-medium"),
)
