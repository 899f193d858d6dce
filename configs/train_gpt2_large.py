"""GPT-2 (774M) on OpenWebText: train_gpt2 with another size.

6 sequences x 1024 tokens x 80 micro-batches over all GPUs = 491,520 tokens a step.
600,000 steps = 295 billion tokens. The learning rate is GPT-3's at this size (Brown et al. 2020,
table 2.1). No published loss. GPU-hours here: not measured.
"""

from dataclasses import replace

from configs.train_gpt2 import config as base

config = replace(
    base,
    model=replace(base.model, n_layer=36, n_head=20, n_embd=1280),
    data=replace(base.data, batch_size=6),
    optim=replace(base.optim, gradient_accumulation_steps=80, learning_rate=2.5e-4, min_lr=2.5e-5),
    run=replace(base.run, out_dir="out-train-gpt2-large"),
)
