"""nanoGPT's run for a laptop's CPU, with the modern recipe: its loss in a tenth of its steps.

12 sequences x 64 characters = 768 tokens a step; 200 steps read 153,600 characters, nanoGPT's 2,000
steps 1,536,000. Data, context, batch and width are nanoGPT's; 803,072 parameters for its 804,096.
docs/modern-recipe.md says what each part of the recipe is. Prepare:
`python data/shakespeare_char/prepare.py`.
"""

from gpt.config import GPTConfig
from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    model=GPTConfig(architecture="nanochat", block_size=64, vocab_size=0, n_layer=4, n_head=4,
                    # for so short a context: its slowest angle is 0.85 at the end
                    n_embd=128, rope_theta=100.0),
    data=DataConfig(dataset="shakespeare_char", batch_size=12),
    optim=OptimConfig(
        optimizer="muon", muon_lr=0.04, muon_momentum=0.9,
        # for width 768 0.004 and 0.3; both times (768 / 128)^0.5
        learning_rate=0.0098, embedding_lr=0.735,
        schedule="trapezoid", decay_fraction=0.5, min_lr=0.0, warmup_iters=0, max_iters=200,
        lr_decay_iters=200, beta1=0.8, beta2=0.95, weight_decay=0.0, grad_clip=0.0,
        gradient_accumulation_steps=1,
    ),
    run=RunConfig(out_dir="out-macbook", eval_interval=40, eval_iters=20, log_interval=10),
)
