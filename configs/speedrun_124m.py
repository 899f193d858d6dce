"""The modern recipe at GPT-2's 124M size on FineWeb: to llm.c's validation loss, 3.28. Not run yet.

64 sequences x 1024 tokens x 8 micro-batches (1 on each of 8 GPUs, or 8 on one):
524,288 tokens a step; 4,578 steps read 2.4 billion, configs/fineweb_gpt2_124m.py 10 billion.
162,201,600 parameters: 38,633,472 in the embedding, which is only looked up, and as many in the
head.

Others' steps of this size to 3.28, from the history of modded-nanogpt's records, not ours: AdamW
with a tuned rate and rotary positions 9,536; Muon 6,200; ReLU squared, zero starts, normalised
queries and keys 5,100; untied head and normalised embedding 4,578. The recipe here has these parts
and no more. Prepare: `python data/fineweb/prepare.py`.
"""

from gpt.config import GPTConfig
from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    model=GPTConfig(architecture="nanochat", n_layer=12, n_head=6, n_embd=768, block_size=1024,
                    vocab_size=50304),
    data=DataConfig(dataset="fineweb", batch_size=64),
    optim=OptimConfig(
        optimizer="muon", muon_lr=0.02, learning_rate=0.004, embedding_lr=0.3,
        schedule="trapezoid", decay_fraction=0.4, min_lr=0.0, warmup_iters=0,
        max_iters=4578, lr_decay_iters=4578, beta1=0.8, beta2=0.95, weight_decay=0.0,
        grad_clip=0.0, gradient_accumulation_steps=8,
    ),
    run=RunConfig(out_dir="out-speedrun-124m", eval_interval=125, eval_iters=160, log_interval=10),
)
