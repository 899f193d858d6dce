"""Evaluate OpenAI's GPT-2 (1558M) on OpenWebText: one evaluation of 500 batches, and nothing
written.

nanoGPT's README gives train loss 2.56, validation loss 2.54 for it: theirs, not ours. Needs the
weights (network, or a cached copy) and `python data/openwebtext/prepare.py`.
"""

from train.config import Config, DataConfig, RunConfig

config = Config(
    data=DataConfig(batch_size=8),
    run=RunConfig(init_from="gpt2-xl", eval_only=True, eval_iters=500),
)
