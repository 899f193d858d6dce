"""Hugging Face's GPT-2, in and out: `GPT2LMHeadModel` checkpoints from the Hub or a folder, and folders that it loads."""

from pathlib import Path

import torch
from torch import Tensor

from gpt.config import SIZES, GPTConfig
from gpt.model import GPT

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored (in, out) there
EXPECTED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "tie_word_embeddings": True, "model_type": "gpt2"}


def read(source: str) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The shape and the weights, under our names, of a published size (SIZES) or a folder.

    Raises ValueError, in one line, where they cannot be had or are of another kind of model.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        theirs = GPT2Config.from_pretrained(source)
        for key, value in EXPECTED.items():
            if getattr(theirs, key, value) != value:
                raise ValueError(f"{source}: {key}={getattr(theirs, key)}, this trainer's GPT-2 has {value}")
        if theirs.activation_function not in ACTIVATIONS or theirs.n_inner not in (None, 4 * theirs.n_embd):
            raise ValueError(f"{source}: activation {theirs.activation_function}, inner width {theirs.n_inner}; "
                             f"this trainer's GPT-2 has {', '.join(ACTIVATIONS)} and 4 * n_embd")
        model = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32)
    except OSError as error:
        where = "there is no network and no cached copy" if source in SIZES else str(error).splitlines()[0]
        raise ValueError(f"--init_from={source}: its weights cannot be loaded ({where}); "
                         "give a folder that `save_pretrained` wrote") from error
    config = GPTConfig(
        block_size=theirs.n_positions, vocab_size=theirs.vocab_size, n_layer=theirs.n_layer, n_head=theirs.n_head,
        n_embd=theirs.n_embd, bias=True, activation=ACTIVATIONS[theirs.activation_function],  # type: ignore[arg-type]
    )
    state = {k: v for k, v in model.state_dict().items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    state.pop("lm_head.weight")
    return config, {k: (v.T if k.endswith(TURNED) else v).contiguous() for k, v in state.items()}


@torch.no_grad()
def write(model: GPT, folder: Path, vocab_size: int) -> None:
    """Save config and weights as a folder for AutoModelForCausalLM, with the first vocab_size rows of the vocabulary.

    GPT-2 has biases; a model without gets zeros, which is the same function. The folder is loaded again and its logits
    compared before this returns; ValueError if they differ.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function="gelu_new" if c.activation == "gelu_tanh" else "gelu", resid_pdrop=c.dropout,
        embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=min(50256, vocab_size - 1),
        eos_token_id=min(50256, vocab_size - 1),
    ))
    ours = {k: v.T if k.endswith(TURNED) else v for k, v in model.state_dict().items()}
    ours |= {k: ours[k][:vocab_size] for k in ("transformer.wte.weight", "lm_head.weight")}
    theirs.load_state_dict({k: ours.get(k, torch.zeros_like(v)) for k, v in theirs.state_dict().items()})
    theirs.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    idx = torch.randint(vocab_size, (1, min(c.block_size, 32)), generator=torch.Generator().manual_seed(0))
    difference = (again(idx).logits - model.cpu().eval().predict(idx)[..., :vocab_size]).abs().max().item()
    if not difference < 1e-3:
        raise ValueError(f"{folder}: reloaded, its logits differ from the model's by {difference:.2g}; not a usable export")
