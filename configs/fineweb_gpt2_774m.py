"""GPT-2 (774M) on 150 billion tokens of FineWeb: llm.c's run_gpt2_774M.sh, on 8 GPUs.

32 sequences x 1024 tokens x 16 micro-batches (2 on each of 8 GPUs) = 524,288 tokens a step.
286,102 steps = 150 billion tokens. GPT-2 of this size has 43.2 % on HellaSwag (llm.c's figure).
GPU-hours here: not measured.
Prepare: `python data/fineweb/prepare.py --sample=sample-350BT --out=data/fineweb_350BT`.
"""

from dataclasses import replace

from configs.fineweb_gpt2_124m import config as base

config = replace(
    base,
    model=replace(base.model, n_layer=36, n_head=20, n_embd=1280),
    data=replace(base.data, dataset="fineweb_350BT", batch_size=32),
    optim=replace(
        base.optim, gradient_accumulation_steps=16, max_iters=286_102, lr_decay_iters=286_102,
        learning_rate=2.5e-4, min_lr=0.0,
    ),
    run=replace(base.run, out_dir="out-fineweb-774m"),
)
