"""A GPT on Python's own source in GPT-2's tokens, in a few minutes on two CPU cores.

8 sequences x 128 = 1,024 tokens a step; 250 steps read 256,000. docs/modern-recipe.md explains the
recipe. Nine tenths of the parameters are the embedding and the head. Prepare:
`python data/python_stdlib_bpe/prepare.py`.
"""

from gpt.config import GPTConfig
from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    model=GPTConfig(architecture="nanochat", block_size=128, vocab_size=50304, n_layer=6, n_head=6,
                    n_embd=192, rope_theta=1000.0),
    data=DataConfig(dataset="python_stdlib_bpe", batch_size=8),
    optim=OptimConfig(
        optimizer="muon", muon_lr=0.03, muon_momentum=0.9,
        # for width 768 0.004 and 0.3; both times (768 / 192)^0.5
        learning_rate=0.008, embedding_lr=0.6,
        schedule="trapezoid", decay_fraction=0.6, min_lr=0.0, warmup_iters=0, max_iters=250,
        lr_decay_iters=250, beta1=0.8, beta2=0.95, weight_decay=0.0, grad_clip=0.0,
        gradient_accumulation_steps=1,
    ),
    run=RunConfig(out_dir="out-python-bpe", eval_interval=50, eval_iters=20, log_interval=10),
)
