"""A byte-level GPT on Python's own source, in about half a minute on two CPU cores.

16 sequences x 64 bytes = 1,024 tokens a step; 550 steps read 0.56 MB. docs/modern-recipe.md
explains the recipe; configs/quickstart_gpt2.py is the same with GPT-2 and AdamW. Prepare:
`python data/python_stdlib/prepare.py`.
"""

from gpt.config import GPTConfig
from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    model=GPTConfig(architecture="nanochat", block_size=64, vocab_size=0, n_layer=3, n_head=4,
                    n_embd=128, rope_theta=100.0),
    data=DataConfig(dataset="python_stdlib", batch_size=16),
    optim=OptimConfig(
        optimizer="muon", muon_lr=0.02, muon_momentum=0.9,
        # for width 768 0.004 and 0.3; both times (768 / 128)^0.5
        learning_rate=0.0098, embedding_lr=0.735,
        schedule="trapezoid", decay_fraction=0.6, min_lr=0.0, warmup_iters=0, max_iters=550,
        lr_decay_iters=550, beta1=0.8, beta2=0.95, weight_decay=0.0, grad_clip=0.0,
        gradient_accumulation_steps=1,
    ),
    run=RunConfig(out_dir="out-quickstart", eval_interval=50, eval_iters=20, log_interval=20),
)
