"""Where documents begin in windows of token ids.

data/encode.py writes an end-of-text token after every document, and that token is all that is
needed: it is the last token of the document it ends.
"""

import torch
from torch import Tensor


def doc_start(idx: Tensor, end_of_text: int, backward: bool = False) -> Tensor:
    """The first position of the document that each position of idx (B, T) is in: (B, T) int32.

    `idx` is in the order the model reads it. A `backward` model reads an end-of-text token before
    the document it ends. A window may begin inside a document: its first one begins at position 0.
    The host does not wait for the device.
    """
    ends = idx == end_of_text
    begins = ends if backward else ends.roll(1, dims=1)
    positions = torch.arange(idx.shape[1], dtype=torch.int32, device=idx.device)
    # What roll brings to position 0 is multiplied with 0 there.
    return (positions * begins).cummax(1).values
