"""Models that train the same GPT, ours and others', each as something the bench can step.

Every variant starts from the same tensors, named as in gpt/model.py. Before anything is timed all
compute the loss of one batch, and a variant whose loss differs is refused.
"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import hardware
from gpt import GPT, GPTConfig
from kernels import Kernels, load
from train import optim
from train.config import OptimConfig

OPTIM = OptimConfig(learning_rate=1e-4)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of the loss, in nats


@dataclass
class Variant:
    """A model with its optimizer; `step` calls `loss`, the mean cross-entropy, under autocast."""

    name: str
    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    compiled: bool = False
    backend: str = ""

    def rehearse(self, idx: Tensor, targets: Tensor) -> Tensor:
        """A step that leaves the weights as they are, with a learning rate and decay of 0."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        try:
            return self.step(idx, targets)
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def bytes_held(self) -> int:
        """Bytes of weights and optimizer state; another variant may share them."""
        states = (t for state in self.optimizer.state.values()
                  for t in state.values() if isinstance(t, Tensor))
        return sum(t.nbytes for t in [*self.module.parameters(), *states])

    def step(self, idx: Tensor, targets: Tensor, micro_steps: int = 1) -> Tensor:
        """One training step: forward, backward, clipping, optimizer. The loss, on the device.

        Forward and backward run `micro_steps` times, on the same batch.
        """
        for _ in range(micro_steps):
            with hardware.autocast(self.device, self.dtype):
                loss = self.loss(idx, targets)
            (loss / micro_steps).backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), OPTIM.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, idx: Tensor, targets: Tensor) -> float:
        """The loss without dropout, in which variants must agree."""
        self.module.eval()
        with hardware.autocast(self.device, self.dtype):
            loss = self.loss(idx, targets).item()
        self.module.train()
        return loss


def ours(config: GPTConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype,
         *, name: str = "ours", kernels: str | Kernels = "torch", compiled: bool = False,
         like: Variant | None = None, **families: str) -> Variant:
    """Our model on a backend, or on any Kernels; `families` replace single ones (kernels.load).

    It shares the parameters and the optimizer of the variant `like`, so that many variants of a
    large model fit a GPU.
    """
    operators = load(kernels, **families) if isinstance(kernels, str) else kernels
    model = shared(GPT, like, config, operators)
    if like is None:
        model.load_state_dict(weights)
        model.to(device)
    if compiled:
        model.compile()
    optimizer = like.optimizer if like else optim.build(model, OPTIM)
    return Variant(name, model, model, optimizer, device, dtype)


def shared(make: Callable[..., nn.Module], like: Variant | None, *arguments: Any) -> Any:
    """make(*arguments), which shares the parameters of `like` where there is one."""
    if like is None:
        return make(*arguments)
    with torch.device("meta"):
        module = make(*arguments)
    module.load_state_dict(like.module.state_dict(keep_vars=True), assign=True)
    return module


def liger_kernels() -> Kernels:
    """Liger's layer norm and losses among PyTorch's operators; written for liger-kernel 0.8.

    It has no residual add beside a layer norm (only beside RMSNorm) and no attention. Its norm
    needs a bias, which is zero here where ours has none; its RMS norm needs a weight, which
    nanochat's has not, so that RMS norms are PyTorch's.
    """
    from liger_kernel.transformers.functional import (
        liger_cross_entropy,
        liger_fused_linear_cross_entropy,
        liger_layer_norm,
    )

    def layernorm(x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        return liger_layer_norm(x, w, torch.zeros_like(w) if b is None else b, eps)

    def add_layernorm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None = None,
                      eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        total = (residual + x).to(residual.dtype)
        return total, layernorm(total, w, b, eps).to(x.dtype)

    def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean",
                      ignore_index: int = -1) -> Tensor:
        return liger_cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)

    def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, cap: float = 0.0,
                             reduction: str = "mean", ignore_index: int = -1) -> Tensor:
        return liger_fused_linear_cross_entropy(x, weight, targets, reduction=reduction,
                                                ignore_index=ignore_index, softcap=cap or None)

    return load("torch")._replace(layernorm=layernorm, add_layernorm=add_layernorm,
                                  cross_entropy=cross_entropy,
                                  linear_cross_entropy=linear_cross_entropy)


def nanogpt(folder: str | Path, config: GPTConfig, weights: dict[str, Tensor],
            device: torch.device, dtype: torch.dtype, *, name: str = "nanoGPT",
            compiled: bool = False, like: Variant | None = None) -> Variant:
    """The model.py and optimizer of a nanoGPT checkout; `like` as in `ours`.

    Raises ValueError if `folder` has no model.py, or for what nanoGPT does not have.
    """
    file = Path(folder) / "model.py"
    if not file.is_file():
        raise ValueError(f"--nanogpt={folder}: no model.py there; clone nanoGPT and "
                         "give its folder")
    only_gpt2(config, "nanoGPT")
    if config.activation != "gelu":
        raise ValueError(f"nanoGPT has no {config.activation}; measure it with activation=gelu")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    arguments = {k: getattr(config, k) for k in names}
    with contextlib.redirect_stdout(io.StringIO()):
        model = shared(module.GPT, like, module.GPTConfig(**arguments))
        if like is None:
            model.load_state_dict(weights)
            model.to(device)
            betas = OPTIM.beta1, OPTIM.beta2
            optimizer = model.configure_optimizers(OPTIM.weight_decay, OPTIM.learning_rate, betas,
                                                   device.type)
        else:
            optimizer = like.optimizer
    if compiled:
        model.compile()

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        return model(idx, targets)[1]

    return Variant(name, model, loss, optimizer, device, dtype)


def transformers_gpt2(config: GPTConfig, weights: dict[str, Tensor], device: torch.device,
                      dtype: torch.dtype, *, name: str = "transformers", compiled: bool = False,
                      like: Variant | None = None) -> Variant:
    """transformers' GPT2LMHeadModel, PyTorch's fused attention and AdamW; `like` as in `ours`."""
    only_gpt2(config, "transformers' GPT2LMHeadModel")
    from transformers import GPT2Config, GPT2LMHeadModel

    activation = "gelu_new" if config.activation == "gelu_tanh" else "gelu"
    model = shared(GPT2LMHeadModel, like, GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, activation_function=activation,
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        use_cache=False, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None))
    if like is None:
        # stored (in, out) there
        turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight",
                  "mlp.c_proj.weight")
        state = {k: v.T if k.endswith(turned) else v for k, v in weights.items()}
        # biases that config has not are zero
        theirs = {k: state.get(k, torch.zeros_like(v)) for k, v in model.state_dict().items()}
        model.load_state_dict(theirs)
        model.to(device)
    if compiled:
        model.compile()

    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(idx).logits.float().flatten(0, 1), targets.flatten())

    optimizer = like.optimizer if like else optim.build(model, OPTIM)
    return Variant(name, model, loss, optimizer, device, dtype)


def only_gpt2(config: GPTConfig, peer: str) -> None:
    """Raise ValueError for a model that `peer` does not have."""
    if config.architecture != "gpt2" or not config.tied:
        raise ValueError(f"{peer} is GPT-2 with a tied head, this is "
                         f"{config.architecture} with tie_weights={config.tied}; leave it out")


def agree(variants: list[Variant], idx: Tensor, targets: Tensor) -> None:
    """Raise ValueError if the loss of a variant on one batch is not like that of the first."""
    losses = {variant.name: variant.evaluate(idx, targets) for variant in variants}
    for name, why in unlike(variants, losses).items():
        raise ValueError(f"{name} {why}")


def unlike(variants: list[Variant], losses: dict[str, float]) -> dict[str, str]:
    """The variants whose losses, by name, are not like that of the first, and in what."""
    first, found = variants[0], {}
    expected = losses[first.name]
    for variant in variants:
        loss = losses[variant.name]
        allowed = max(TOLERANCE[variant.dtype], TOLERANCE[first.dtype])
        if not abs(loss - expected) <= allowed:
            found[variant.name] = (f"has loss {loss:.5f} where {first.name} has {expected:.5f}, on "
                                   f"the same weights and batch (allowed: {allowed}); not timed")
    return found
