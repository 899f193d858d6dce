"""GPT-2 (124M) on 10 billion tokens of FineWeb: llm.c's run_gpt2_124M.sh, on 8 GPUs.

64 sequences x 1024 tokens x 8 micro-batches (1 on each of 8 GPUs) = 524,288 tokens a step.
18,865 steps x 524,288 = 9.9 billion tokens, the whole sample once. The goal is llm.c's validation
loss, 3.28; OpenAI's GPT-2 has 3.29 on the same split. Both are theirs, not ours. GPU-hours here:
not measured. Prepare: `python data/fineweb/prepare.py`.
"""

from gpt.config import GPTConfig
from train.config import Config, DataConfig, OptimConfig, RunConfig

config = Config(
    model=GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304,
                    bias=True, activation="gelu_tanh"),
    data=DataConfig(dataset="fineweb", batch_size=64),
    optim=OptimConfig(
        gradient_accumulation_steps=8, max_iters=18_865, lr_decay_iters=18_865, warmup_iters=700,
        learning_rate=6e-4, min_lr=0.0, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    ),
    run=RunConfig(out_dir="out-fineweb-124m", eval_interval=250, eval_iters=160, log_interval=10),
)
