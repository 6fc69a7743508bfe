"""Write a checkpoint of a shape with random weights, quickly: made on the GPU, streamed into a few large files.

usage: python -m benchmarks.gpu.make_model SHAPE FOLDER [DEVICE]
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.shapes import SHAPES, Shape

TOKENIZER = Path(__file__).resolve().parents[2] / "ludwig_peft_plugin" / "assets" / "tiny-llama-python"
STANDARD_DEVIATION = 0.02  # transformers' initializer_range of Llama
SHARD_BYTES = 4 * 2**30
WRITERS = 4
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}

Maker = Callable[[], dict[str, torch.Tensor]]  # one weight and, where it is quantised, what belongs to it


def make_model(shape: Shape, folder: Path, device: str = "cuda") -> int:
    """Write config, tokenizer and weights of `shape` to `folder`, unless they are there.

    Returns:
        The bytes of the weights written.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # written last
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    shards = list(_shards(shape, device))
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    with ThreadPoolExecutor(WRITERS) as pool:
        written = list(pool.map(write_shard, [folder / name for name in names], shards))
    weight_map = {tensor: name for name, (tensors, _) in zip(names, written, strict=True) for tensor in tensors}
    size = sum(size for _, size in written)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}), encoding="utf-8")
    return size


def make_70b(folder: Path, device: str = "cuda") -> int:
    """Write the 70B shape: 38 GB, because its linear layers are stored in NF4 and loaded as they are."""
    return make_model(SHAPES["70b"], folder, device)


def save_tokenizer(folder: Path) -> None:
    """Write the shipped tokenizer with special tokens of their own for beginning, end and unknown.

    Stock Ludwig trains and predicts only with a tokenizer that has all of them, and with pad = 0 not equal to eos; so
    every tool gets this one, and the same tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)


def _shards(shape: Shape, device: str) -> Iterator[list[Maker]]:
    """Yield groups of weights of at most `SHARD_BYTES`."""
    group: list[Maker] = []
    size = 0
    for name, dimensions, quantised in _weights(shape):
        count = dimensions[0] * (dimensions[1] if len(dimensions) == 2 else 1)
        weight_bytes = count // 2 if quantised else 2 * count
        if group and size + weight_bytes > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(_maker(name, dimensions, quantised, device))
        size += weight_bytes
    yield group


def _weights(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield the name, the dimensions and whether it is quantised, of each weight."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden), False
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (shape.hidden,), False
        for name, dimensions in shape.linears().items():
            yield f"{prefix}{name}.weight", dimensions, shape.nf4
    yield "model.norm.weight", (shape.hidden,), False
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden), False


def _maker(name: str, dimensions: tuple[int, ...], quantised: bool, device: str) -> Maker:
    def make() -> dict[str, torch.Tensor]:
        if len(dimensions) == 1:
            return {name: torch.ones(dimensions, dtype=torch.bfloat16)}
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        weight = torch.empty(dimensions, dtype=torch.bfloat16, device=device)
        weight.normal_(std=STANDARD_DEVIATION, generator=generator)
        if not quantised:
            return {name: weight}
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    return make


def write_shard(path: Path, makers: list[Maker]) -> tuple[list[str], int]:
    """Write one safetensors file (8 bytes of header length, JSON header, data) and return its names and bytes.

    The library's own writer takes a copy of every tensor first; at 16 GB and more this one is several times as fast.
    """
    tensors: dict[str, torch.Tensor] = {}
    for make in makers:
        tensors |= make()
    # As the library orders them: what has large elements first, so that each tensor starts aligned.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            data = memoryview(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
            while data:  # a raw write takes at most 2 GiB
                data = data[file.write(data) :]
    return list(tensors), end


if __name__ == "__main__":
    started = time.monotonic()
    total = make_model(SHAPES[sys.argv[1]], Path(sys.argv[2]), *sys.argv[3:4])
    print(f"{total / 1e9:.1f} GB in {time.monotonic() - started:.1f} s")
