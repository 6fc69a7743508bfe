"""Tensors that are neighbouring columns of one matrix, so that whoever wants them all reads one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return the matrix (T, sum of columns) of parts (T, columns): as they lie, if they do so, or a copy."""
    width = sum(part.shape[1] for part in parts)
    first = parts[0]
    storage, place = first.untyped_storage()._cdata, first.storage_offset()
    for part in parts:
        if part.untyped_storage()._cdata != storage or part.storage_offset() != place or part.stride() != (width, 1):
            return torch.cat(list(parts), dim=1)
        place += part.shape[1]
    return first.as_strided((len(first), width), (width, 1))


def empty_columns(like: Sequence[Tensor]) -> list[Tensor]:
    """Return room for tensors (T, ...) of the shapes of those given, as neighbouring columns of a new matrix."""
    widths = [part[0].numel() for part in like]
    columns = like[0].new_empty((len(like[0]), sum(widths))).split(widths, dim=1)
    return [column.view(part.shape) for column, part in zip(columns, like, strict=True)]


def are_columns(heads: Sequence[Tensor]) -> bool:
    """Return whether tensors (T, heads, d) have the row strides of columns of one matrix that holds them all."""
    width = sum(part[0].numel() for part in heads)
    return all(part.stride() == (width, part.shape[2], 1) for part in heads)
