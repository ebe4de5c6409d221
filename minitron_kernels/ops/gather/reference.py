"""gather_channels in plain torch: the definition, any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

# dtypes that torch's indexing does not support (float8, ...) are moved as integers of the same size
_INTEGER_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather_channels(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """weight[..., rows, :][..., cols], a new tensor; an axis without indices is kept whole."""
    dtype = weight.dtype
    integer = _INTEGER_OF.get(weight.element_size())  # None for complex128, which torch's indexing supports
    out = weight if integer is None else weight.view(integer)
    if rows is not None:
        out = out.index_select(-2, rows)
    if cols is not None:
        out = out.index_select(-1, cols)
    if rows is None and cols is None:
        out = out.clone(memory_format=torch.contiguous_format)
    return out.view(dtype)
