"""Write a model in another format: `python gpt/export.py --out_dir=out --to=hf --folder=DIR`.

--to=hf: config, safetensors and tokenizer for transformers' AutoModelForCausalLM, GPT-2 or nanochat
there as here, without the padding rows of the vocabulary. The folder is loaded again and its logits
are compared.
--to=nanogpt: a ckpt.pt that nanoGPT's train.py resumes and its sample.py reads, and a meta.pkl
unless the tokens are GPT-2's. Of GPT-2 alone.
--to=safetensors: the model alone, in one file even if FSDP saved it in shards. Our commands read
the folder with --init_from=FOLDER or --out_dir=FOLDER.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import cli
from common.bounds import NotEmpty

# What transformers' and nanoGPT's models are; a config without the field has no such thing.
PLAIN = {"direction": "forward", "window": 0, "seam": -1}


@dataclass(frozen=True)
class Export:
    """Write a trained model in another format."""

    out_dir: NotEmpty = "out"
    """a run's folder, or one checkpoint in it"""
    to: Literal["hf", "nanogpt", "safetensors"] = "hf"
    folder: str = ""
    """what to write; empty: OUT_DIR/hf, OUT_DIR/nanogpt or OUT_DIR/safetensors"""


def export(c: Export) -> Path:
    """Write the folder, and print its path and what the user should know.

    Raises ValueError or OSError, and then leaves nothing under the folder's name.
    """
    import shutil

    from gpt.run_folder import reading

    folder = Path(c.folder) if c.folder else Path(c.out_dir) / c.to
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it or give another --folder")
    write = {"hf": to_huggingface, "nanogpt": to_nanogpt, "safetensors": to_safetensors}[c.to]
    partial = folder.with_name(f".{folder.name}.unfinished")
    with reading(c.out_dir) as checkpoint:
        check_expressible(checkpoint, c.to)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            notes = write(checkpoint, partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"written to {folder}", *notes, sep="\n")
    return folder


def check_expressible(checkpoint: Path, to: str) -> None:
    """Raise ValueError if the format cannot express this model."""
    from gpt import huggingface, nanogpt
    from gpt.checkpoint_files import read_config

    if to == "safetensors":
        return
    config = read_config(checkpoint)
    translation = huggingface.TRANSLATIONS.get(config.architecture)
    known = {"architecture": " or ".join(huggingface.TRANSLATIONS)}
    needs = nanogpt.NEEDS if to == "nanogpt" else translation.NEEDS if translation else known
    for key, value in (needs | PLAIN).items():
        found = getattr(config, key, value)
        if found != value:
            raise ValueError(f"{checkpoint}: {key}={found}, which --to={to} cannot express; only "
                             f"a model with {key}={value} can be exported")


def to_huggingface(checkpoint: Path, folder: Path) -> list[str]:
    """Write a folder for AutoModelForCausalLM, with its tokenizer. Return notes for the user."""
    from data.tokenizer import load_tokenizer
    from gpt import huggingface
    from gpt.checkpoint_files import read_tokenizer
    from gpt.model import GPT

    meta = read_tokenizer(checkpoint)
    huggingface.write(GPT.from_checkpoint(checkpoint), folder, load_tokenizer(meta).vocab_size)
    if meta["kind"] == "gpt2":
        from transformers import GPT2TokenizerFast

        from data.gpt2 import vocabulary_files

        encoder, merges = vocabulary_files()
        GPT2TokenizerFast(str(encoder), str(merges)).save_pretrained(folder)
    else:
        (folder / huggingface.META).write_text((checkpoint / "tokenizer.json").read_text())
    return []


def to_nanogpt(checkpoint: Path, folder: Path) -> list[str]:
    """Write a ckpt.pt and the tokenizer's meta.pkl. Return notes for the user."""
    from data.tokenizer import write_meta
    from gpt import nanogpt
    from gpt.checkpoint_files import read_part, read_state, read_tokenizer
    from gpt.model import GPT

    model, state = GPT.from_checkpoint(checkpoint), read_state(checkpoint)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    settings, meta, notes = state["config"], read_tokenizer(checkpoint), []
    if data_dir := str(settings.get("data_dir", "")):  # nanoGPT names data by its folder
        settings["dataset"] = Path(data_dir).absolute().name
    optimizer = nanogpt.adamw_state(read_part(checkpoint, "optimizer"), weights, settings)
    nanogpt.write(folder / nanogpt.FILE, model.config, weights, optimizer,
                  state["step"], state["best_val_loss"], settings)
    if (kind := settings.get("optimizer")) in ("sgd", "muon"):
        notes.append(f"without {kind}'s momentum: nanoGPT's AdamW starts from zero moments there")
    if meta["kind"] != "gpt2":
        write_meta(folder, meta["kind"], meta["vocab_size"], meta.get("chars", ""))
    if meta["kind"] == "char":
        notes.append("for nanoGPT's sample.py, copy its meta.pkl to "
                     f"data/{settings['dataset']}/meta.pkl in a checkout of nanoGPT")
    return notes


def to_safetensors(checkpoint: Path, folder: Path) -> list[str]:
    """Write the model of a checkpoint, sharded or not, as one file. Return notes for the user."""
    import json
    import shutil

    from gpt.checkpoint_files import entry, read_part, save_tensors, verify

    verify(checkpoint)
    save_tensors(read_part(checkpoint, "model"), folder / "model.safetensors")
    for name in ("model.json", "tokenizer.json"):
        shutil.copy(checkpoint / name, folder)
    files = {f.name: entry(f) for f in sorted(folder.iterdir())}
    (folder / "DONE").write_text(json.dumps(files, indent=1))
    return []


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr for bad input."""
    return cli.run(export, Export, argv)


if __name__ == "__main__":
    sys.exit(main())
