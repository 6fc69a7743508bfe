"""The model shapes that are measured: architecture, number of parameters, and the arithmetic of one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Llama 3's vocabulary; the rows use the first 4,099 tokens of it, the cost of the loss is that of the whole.
LLAMA_3_VOCABULARY = 128_256


@dataclass(frozen=True)
class Shape:
    """A Llama architecture, filled with random weights.

    Attributes:
        nf4: the checkpoint holds the linear layers as bitsandbytes NF4 with double quantisation, as a checkpoint
            does whose bfloat16 form is too large for the disk; otherwise everything is bfloat16.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = LLAMA_3_VOCABULARY
    tied: bool = False
    nf4: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of one decoder layer: name and (out, in) features."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def parameters(self) -> int:
        """Number of frozen parameters."""
        layer = sum(out * features for out, features in self.linears().values()) + 2 * self.hidden
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * layer + embeddings + self.hidden

    def limit(self, flops: float) -> float:
        """Return the tokens a second at which `flops` FLOP/s of matrix products are used up by LoRA training.

        A frozen parameter costs 2 FLOP a token forward and 2 for the gradient of its input; its own gradient is not
        made. Attention and the adapter itself are left out, so no implementation reaches this.
        """
        return flops / (4 * self.parameters)

    def config(self) -> dict[str, Any]:
        """Return the config.json of the checkpoint."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }
        if self.nf4:
            config["quantization_config"] = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
            }
        return config


SHAPES = {
    shape.name: shape
    for shape in (
        # For trying the harness out on a CPU.
        Shape("tiny", 64, 192, 2, 4, 2, 16, vocabulary=4352),
        Shape("tiny-nf4", 64, 192, 2, 4, 2, 16, vocabulary=4352, nf4=True),
        # Llama 3.2 1B, Llama 3.1 8B, Llama 3.1 70B.
        Shape("1b", 2048, 8192, 16, 32, 8, 64, tied=True),
        Shape("8b", 4096, 14336, 32, 32, 8, 128),
        Shape("70b", 8192, 28672, 80, 64, 8, 128, nf4=True),
    )
}
