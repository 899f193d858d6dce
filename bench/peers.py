"""Models that train the same GPT: ours, and others' with the same weights, as something the bench can step.

Every peer starts from the same tensors, named as in gpt/model.py, and is asked for its loss on the same batch before
anything is timed: one that disagrees is refused.
"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import GPT, GPTConfig, hardware
from kernels import load
from train import optim
from train.config import OptimConfig

OPTIM = OptimConfig(learning_rate=1e-4)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of the loss, in nats


@dataclass
class Peer:
    """A model with its optimizer; `loss(idx, targets)` is the mean cross-entropy, before autocast."""

    name: str
    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype

    def step(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Forward, backward, clipping and the optimizer: one step of training; the loss, on the device."""
        with hardware.autocast(self.device, self.dtype):
            loss = self.loss(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), OPTIM.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, idx: Tensor, targets: Tensor) -> float:
        """The loss without dropout, which is what peers must agree in."""
        self.module.eval()
        with hardware.autocast(self.device, self.dtype):
            loss = self.loss(idx, targets).item()
        self.module.train()
        return loss


def ours(config: GPTConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype, *, name: str = "ours",
         kernels: str = "torch", compiled: bool = False, **families: str) -> Peer:
    """Our model on a kernel suite; `families` replace single ones, as in kernels.load."""
    model = GPT(config, load(kernels, **families))
    model.load_state_dict(weights)
    model.to(device)
    if compiled:
        model.compile()
    return Peer(name, model, model, optim.build(model, OPTIM), device, dtype)


def nanogpt(folder: str | Path, config: GPTConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype, *,
            name: str = "nanoGPT", compiled: bool = False) -> Peer:
    """A nanoGPT checkout's own model.py and optimizer. Raises ValueError if `folder` is none, or for a tanh GELU."""
    file = Path(folder) / "model.py"
    if not file.is_file():
        raise ValueError(f"--nanogpt={folder}: no model.py there; clone nanoGPT and give its folder")
    if config.activation != "gelu":
        raise ValueError(f"nanoGPT has no {config.activation}; measure it with activation=gelu")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    arguments = {k: getattr(config, k) for k in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")}
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**arguments))
        model.load_state_dict(weights)
        model.to(device)
        optimizer = model.configure_optimizers(OPTIM.weight_decay, OPTIM.learning_rate, (OPTIM.beta1, OPTIM.beta2), device.type)
    if compiled:
        model.compile()
    return Peer(name, model, lambda idx, targets: model(idx, targets)[1], optimizer, device, dtype)


def transformers_gpt2(config: GPTConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype, *,
                      name: str = "transformers", compiled: bool = False) -> Peer:
    """Hugging Face's GPT2LMHeadModel with PyTorch's fused attention, and PyTorch's fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, activation_function="gelu_new" if config.activation == "gelu_tanh" else "gelu",
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout, use_cache=False,
        attn_implementation="sdpa",
    ))
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored (in, out) there
    state = {k: v.T if k.endswith(turned) else v for k, v in weights.items()}
    theirs = {k: state.get(k, torch.zeros_like(v)) for k, v in model.state_dict().items()}  # biases that config has not: 0
    model.load_state_dict(theirs)
    model.to(device)
    if compiled:
        model.compile()

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(idx).logits.float().flatten(0, 1), targets.flatten())

    return Peer(name, model, loss, optim.build(model, OPTIM), device, dtype)


def agree(peers: list[Peer], idx: Tensor, targets: Tensor) -> dict[str, float]:
    """The losses of all peers on one batch. Raises ValueError, with both values, for one that is not the first one's."""
    losses = {peer.name: peer.evaluate(idx, targets) for peer in peers}
    first = peers[0]
    for peer in peers:
        allowed = max(TOLERANCE[peer.dtype], TOLERANCE[first.dtype])
        if not abs(losses[peer.name] - losses[first.name]) <= allowed:
            raise ValueError(f"{peer.name} has loss {losses[peer.name]:.5f} where {first.name} has {losses[first.name]:.5f}, "
                             f"on the same weights and batch (allowed: {allowed}); not timed")
    return losses
