"""What one process holds of a run."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data.loader import Loader
from data.tokens import Tokens
from gpt import GPT
from kernels import Choice
from train.config import Config
from train.documents import Documents
from train.parallel import World
from train.signals import StopRequest
from train.watchdog import Progress


@dataclass
class Run:
    """Everything that train/loop.py works on; made by train/build.py."""

    config: Config
    world: World
    device: torch.device
    dtype: torch.dtype
    """of the matrix multiplications"""
    autocast: AbstractContextManager
    """around every forward"""
    choice: Choice
    """the backend of each family of operators"""
    model: GPT
    wrapped: nn.Module
    """the model as it is called in training: under DDP the wrapper, else the model itself"""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokens: dict[str, Tokens]
    """train and val, in the order in which the model reads them"""
    batches: Loader
    documents: Documents
    """where documents begin, for attention (train/documents.py)"""
    tokenizer: dict[str, Any]
    """its meta, as data.tokenizer.load_tokenizer takes it"""
    compiled: bool
    why_compiled: str
    store: dist.Store | None
    """shared by all ranks, for the watchdog; None for a single process"""
    starts_from: str
    """what the weights are from, for the first lines of the run"""
    resumed_from: str = ""
    """what the run was resumed from, and what has changed since; "" for a new run"""
    step: int = 0
    """optimizer steps done, those that were skipped included"""
    best_val_loss: float = float("inf")
    evaluated: bool = False
    """whether the evaluation at `step` is done"""
    stop_request: StopRequest = field(default_factory=StopRequest)
    progress: Progress = field(default_factory=Progress)
