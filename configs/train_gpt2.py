"""GPT-2 (124M) on OpenWebText, with nanoGPT's settings, on 8 GPUs:

    torchrun --standalone --nproc_per_node=8 train/run.py configs/train_gpt2.py

12 sequences x 1024 tokens x 40 micro-batches (5 on each of 8 GPUs) = 491,520 tokens a step.
600,000 steps x 491,520 = 295 billion tokens. nanoGPT reports a validation loss of about 2.85:
theirs, not ours. GPU-hours here: not measured.
Prepare: `python data/openwebtext/prepare.py`.
"""

from gpt.config import GPTConfig
from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    model=GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=0),
    data=DataConfig(dataset="openwebtext", batch_size=12),
    optim=OptimConfig(
        gradient_accumulation_steps=5 * 8, max_iters=600_000, lr_decay_iters=600_000,
        warmup_iters=2000, learning_rate=6e-4, min_lr=6e-5, weight_decay=0.1, beta1=0.9, beta2=0.95,
    ),
    run=RunConfig(out_dir="out-train-gpt2", eval_interval=1000, eval_iters=200, log_interval=10),
)
