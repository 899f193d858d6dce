"""GPT-2 (350M) on 31 billion tokens of FineWeb: llm.c's run_gpt2_350M.sh, on 8 GPUs.

32 sequences x 1024 tokens x 16 micro-batches (2 on each of 8 GPUs) = 524,288 tokens a step.
60,000 steps = 31.5 billion tokens. llm.c's script gives no loss; GPT-2 of this size has 37.5 % on
HellaSwag (llm.c's figure). GPU-hours here: not measured.
Prepare: `python data/fineweb/prepare.py --sample=sample-100BT --out=data/fineweb_100BT`.
"""

from dataclasses import replace

from configs.fineweb_gpt2_124m import config as base

config = replace(
    base,
    model=replace(base.model, n_layer=24, n_head=16, n_embd=1024),
    data=replace(base.data, dataset="fineweb_100BT", batch_size=32),
    optim=replace(
        base.optim, gradient_accumulation_steps=16, max_iters=60_000, lr_decay_iters=60_000,
        learning_rate=3e-4, min_lr=0.0,
    ),
    run=replace(base.run, out_dir="out-fineweb-350m"),
)
