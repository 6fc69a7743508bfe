"""An embedding in host memory gives the same results, and is refused where it would save nothing."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ludwig_peft_plugin.engine.embeddings import DeviceAddress, host_view, offload_embedding
from ludwig_peft_plugin.errors import ModelError

SHAPE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def build(*, tied: bool = False, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).requires_grad_(False)
    settings = {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))


def moved(weight: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(weight.numpy().tobytes()), dtype=weight.dtype).view(weight.shape)


def test_loss_gradients_and_answers_are_the_same():
    model = build()
    other = copy.deepcopy(model)
    old = weakref.ref(other.get_base_model().model.embed_tokens.weight)
    assert offload_embedding(other, moved) == 53 * 32 * 4
    gc.collect()
    assert old() is None  # nothing holds the memory it was in
    ids = torch.randint(0, 53, (2, 9))
    for either in (model, other):
        either(input_ids=ids, labels=ids).loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (model, other)]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answers = [
        m.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings) for m in (model, other)
    ]
    assert torch.equal(*answers)
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in other.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_address_describes_the_memory(dtype):
    """numpy's protocol has the same fields, so numpy can read what a GPU would."""
    host = torch.randn(5, 3).to(dtype)
    address = DeviceAddress(host)

    class Array:
        __array_interface__ = address.__cuda_array_interface__

    array = np.asarray(Array())
    assert array.shape == (5, 3)
    assert array.tobytes() == host.view(torch.uint8).numpy().tobytes()
    assert array.__array_interface__["data"][0] == host.data_ptr()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tied": True}, "output matrix"),
        ({"modules_to_save": ["embed_tokens"]}, "is trained"),
        ({"trainable_token_indices": [1, 2]}, "is trained"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is trained"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_where_it_cannot_be_offloaded(options, reason):
    model = build(**options)
    before = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(ModelError, match=f"embedding_offload: .*{reason}"):
        offload_embedding(model, moved)
    assert {name: id(value) for name, value in model.named_parameters()} == before


def test_an_adapter_around_the_embedding_is_refused_even_when_frozen():
    model = build(target_modules=["embed_tokens"]).requires_grad_(False)
    with pytest.raises(ModelError, match="not just a matrix"):
        offload_embedding(model, moved)


def test_it_needs_a_gpu():
    with pytest.raises(ModelError, match=r"embedding_offload.*'cpu'"):
        offload_embedding(build())
    with pytest.raises(ModelError, match="'cpu'"):
        host_view(torch.zeros(2, 2))
