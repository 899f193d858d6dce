"""Evaluate OpenAI's GPT-2 (124M) on OpenWebText: 500 batches of each split, nothing is written.

nanoGPT's README gives train loss 3.11 and validation loss 3.12: theirs, not ours. Needs the weights
(from the network, or a cached copy) and `python data/openwebtext/prepare.py`.
"""

from train.config import Config, DataConfig, RunConfig

config = Config(
    data=DataConfig(batch_size=8),
    run=RunConfig(init_from="gpt2", eval_only=True, eval_iters=500),
)
