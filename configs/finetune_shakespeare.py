"""Fine-tune GPT-2 XL on Shakespeare with nanoGPT's settings: 20 steps, a constant learning rate.

1 sequence x 1024 tokens x 32 micro-batches = 32,768 tokens a step; the text has 301,966 tokens, so
20 steps read it twice. Prepare: `python data/shakespeare/prepare.py`. `--init_from=gpt2` takes the
smallest model instead.
"""

from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    data=DataConfig(dataset="shakespeare", batch_size=1),
    optim=OptimConfig(gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5,
                      decay_lr=False),
    run=RunConfig(
        out_dir="out-shakespeare", init_from="gpt2-xl", eval_interval=5, eval_iters=40,
        always_save_checkpoint=False,
    ),
)
