"""Sizes of GPU memory, as people write and read them."""

from __future__ import annotations

import re

from ludwig_peft_plugin.errors import ModelError

GIB = 2**30
UNITS = {"": GIB, "G": GIB, "GIB": GIB, "GB": 10**9, "M": 2**20, "MIB": 2**20, "MB": 10**6}


def parse_size(text: str) -> int:
    """Return the bytes of `24GiB`, `24` (GiB), `24GB` (10^9 bytes) or `500MiB`.

    Raises:
        ModelError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or not float(match[1]):
        raise ModelError(f"--gpu: {text!r} is no amount of memory; write 24GiB, 80GB or a number of GiB.")
    return round(float(match[1]) * UNITS[match[2].upper()])


def gib(size: float) -> str:
    """Return bytes as GiB, with two digits below 100."""
    value = size / GIB
    return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.1f}"


def local_gpu() -> int | None:
    """Return the memory of this machine's first GPU in bytes, None without one."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
