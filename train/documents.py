"""--document_mask=True: attention does not look beyond the document that a token is in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from data.documents import doc_start
from data.manifest import recorded_max_id
from data.tokenizer import load_tokenizer
from data.tokens import Tokens
from gpt.checkpoint_files import read_state
from kernels import Choice
from train.config import Config

# From ids (B, T), in the model's reading order, to its doc_start (B, T) int32; None: one document.
Documents = Callable[[Tensor], Tensor | None]
WITHOUT_DOC_START = ("flash_attn",)  # backends whose attention takes no doc_start


def one_document(idx: Tensor) -> None:
    """Return None: each sequence is one document."""
    return None


def documents_at(end_of_text: int | None, direction: str, name: str) -> Documents:
    """A function that finds the documents, which end in the token `end_of_text`.

    Raises ValueError, with `name` as the data's, where there is no such token.
    """
    if end_of_text is None:
        raise ValueError(f"--document_mask=True: {name} is of characters or bytes, which have no "
                         "end-of-text token to tell documents apart; prepare the text with "
                         "data/text/prepare.py")
    return lambda idx: doc_start(idx, end_of_text, direction == "backward")


def documents_of(config: Config, choice: Choice, meta: dict[str, Any] | None,
                 tokens: Tokens) -> Documents:
    """What the config asks for, on data with this meta.json and these training tokens.

    Raises ValueError where the data has no boundaries, or the backend of attention cannot see them.
    """
    if not config.data.document_mask:
        return one_document
    backend, end_of_text = choice.backends["attention"], load_tokenizer(meta).end_of_text
    if backend in WITHOUT_DOC_START:
        raise ValueError(f"--document_mask=True: --attention={backend} cannot tell documents "
                         "apart; choose --attention=triton or torch")
    largest = recorded_max_id(tokens.paths)
    if end_of_text is not None and largest is not None and largest < end_of_text:
        raise ValueError(f"--document_mask=True: {tokens.name} holds no end-of-text token "
                         f"({end_of_text}), so it is one document; prepare documents with "
                         "data/text/prepare.py")
    return documents_at(end_of_text, config.model.direction, str(config.data_dir))


def trained_with_mask(checkpoint: Path) -> bool:
    """Whether a run of ours, with --document_mask=True, saved it. An export does not say: False."""
    if not (checkpoint / "state.json").exists():
        return False
    return bool(read_state(checkpoint)["config"].get("document_mask"))
