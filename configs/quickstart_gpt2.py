"""configs/quickstart.py with nanoGPT's recipe: GPT-2, AdamW, a cosine.

16 sequences x 64 bytes = 1,024 tokens a step; 1,000 steps read 1 MB. Prepare:
`python data/python_stdlib/prepare.py`.
"""

from gpt.config import GPTConfig
from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    model=GPTConfig(block_size=64, vocab_size=0, n_layer=3, n_head=4, n_embd=128),
    data=DataConfig(dataset="python_stdlib", batch_size=16),
    optim=OptimConfig(
        learning_rate=4e-3, min_lr=4e-4, max_iters=1000, lr_decay_iters=1000, warmup_iters=50,
        gradient_accumulation_steps=1, beta2=0.99,
    ),
    run=RunConfig(out_dir="out-quickstart-gpt2", eval_interval=100, eval_iters=20, log_interval=20),
)
