"""A small character-level model of Shakespeare, with nanoGPT's settings.

64 sequences x 256 characters = 16,384 tokens a step; 5,000 steps read the million characters 82
times, so it overfits, hence the dropout. Prepare: `python data/shakespeare_char/prepare.py`.
"""

from gpt.config import GPTConfig
from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    model=GPTConfig(block_size=256, vocab_size=0, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
    data=DataConfig(dataset="shakespeare_char", batch_size=64),
    optim=OptimConfig(
        learning_rate=1e-3, min_lr=1e-4, max_iters=5000, lr_decay_iters=5000, warmup_iters=100,
        gradient_accumulation_steps=1, beta2=0.99,
    ),
    run=RunConfig(
        out_dir="out-shakespeare-char", eval_interval=250, eval_iters=200, log_interval=10,
        always_save_checkpoint=False,
    ),
)
