"""configs/shakespeare_char.py with the modern recipe, in an eighth of its steps. Not run whole yet.

64 sequences x 256 characters = 16,384 tokens a step; 625 steps read the million characters ten
times, for the 82 times of nanoGPT's recipe. docs/modern-recipe.md says what each part is. Prepare:
`python data/shakespeare_char/prepare.py`.
"""

from gpt.config import GPTConfig
from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    model=GPTConfig(architecture="nanochat", block_size=256, vocab_size=0, n_layer=6, n_head=6,
                    n_embd=384, dropout=0.2, rope_theta=1000.0),
    data=DataConfig(dataset="shakespeare_char", batch_size=64),
    optim=OptimConfig(
        optimizer="muon", muon_lr=0.02, muon_momentum=0.95,
        # for width 768 0.004 and 0.3; both times (768 / 384)^0.5
        learning_rate=0.0057, embedding_lr=0.42,
        schedule="trapezoid", decay_fraction=0.6, min_lr=0.0, warmup_iters=0, max_iters=625,
        lr_decay_iters=625, beta1=0.8, beta2=0.95, weight_decay=0.0, grad_clip=0.0,
        gradient_accumulation_steps=1,
    ),
    run=RunConfig(
        out_dir="out-shakespeare-char-fast", eval_interval=125, eval_iters=100, log_interval=10,
        always_save_checkpoint=False,
    ),
)
