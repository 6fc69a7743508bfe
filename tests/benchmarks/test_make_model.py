"""Checkpoints with random weights are what transformers loads."""

import pytest
import torch

from benchmarks.gpu.make_model import make_model, write_shard
from benchmarks.gpu.shapes import SHAPES


def test_a_shard_is_a_safetensors_file(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "bf16": torch.randn(3, 5).bfloat16(),
        "float": torch.randn(4),
    }
    names, size = write_shard(tmp_path / "x.safetensors", [lambda: tensors])
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(names) == set(loaded) == set(tensors)
    assert size == 7 + 30 + 16
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["tiny", "tiny-nf4"])
def test_transformers_loads_a_checkpoint(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = SHAPES[name]
    assert make_model(shape, tmp_path, "cpu") > 0
    assert make_model(shape, tmp_path, "cpu") == 0  # it is there
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    weight = model.model.layers[1].mlp.up_proj.weight
    if shape.nf4:
        assert type(weight).__name__ == "Params4bit"
        assert weight.quant_state.nested
        values = weight.quant_state.dtype
        assert values == torch.bfloat16
    else:
        assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
        assert weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    assert len(tokenizer) <= shape.vocabulary
    with torch.no_grad():
        logits = model(**tokenizer("def f():", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_a_checkpoint_is_the_same_every_time(tmp_path):
    for folder in ("one", "two"):
        make_model(SHAPES["tiny"], tmp_path / folder, "cpu")
    names = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert names
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
