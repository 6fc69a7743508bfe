"""Tiny random base models in every precision of the matrix, and the rows they are trained on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ludwig_peft_plugin.data.batches import IGNORED
from ludwig_peft_plugin.model.row_scaled_loading import RowScaledConfig

VOCABULARY, END = 96, 2
PROMPT = 5  # tokens of a row that are not learned
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # wide enough that adapters show and answers differ
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
FOUR_BIT = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}


@dataclass(frozen=True)
class Precision:
    """How a base is stored, as a config says it, as transformers is told, and how exact its products are.

    Attributes:
        section: the `quantization` section of a config, None without.
        tolerance: the error, relative to the largest number, by which the same sum differs when its terms are grouped
            otherwise. LLM.int8() rounds activations to 8 bits, where a last bit can tip a rounding.
    """

    section: dict[str, Any] | None
    tolerance: float

    @property
    def backend(self) -> str | None:
        """The `quantization.backend`, as the plugin's checks name it."""
        return (self.section or {}).get("backend")

    def loading(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`."""
        if self.section is None:
            return {}
        if self.backend == "torchao":
            return {"quantization_config": RowScaledConfig(self.section["mode"])}
        settings = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, **FOUR_BIT}}[self.section["bits"]]
        return {"quantization_config": BitsAndBytesConfig(**settings)}


PRECISIONS = {
    "fp32": Precision(None, 2e-5),
    "8-bit": Precision({"bits": 8}, 5e-2),
    "4-bit": Precision({"bits": 4}, 2e-5),
    "int8": Precision({"backend": "torchao", "mode": "int8_weight_only"}, 2e-5),
}
BASES = {  # Llama has no biases; Qwen2 has them at q, k and v, and here its output layer is its embedding
    f"{family}-{precision}": precision for family in ("llama", "qwen2") for precision in PRECISIONS
}


class Rows:
    """What micro-batches and padded batches are made from: rows of tokens, the first few of which are the prompt."""

    has_targets = True

    def __init__(self, lengths: tuple[int, ...], seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.sequences = [generator.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]
        self.prompt_lengths = np.full(len(lengths), PROMPT, dtype=np.int32)
        self.input_ids = self
        self.lengths = np.array(lengths)
        self.tasks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.sequences[row]

    @property
    def numbers(self) -> np.ndarray:
        """The numbers of all rows."""
        return np.arange(len(self))

    def padded(self) -> dict[str, torch.Tensor]:
        """Return all rows padded on the right, with labels at the targets."""
        shape = (len(self), int(self.lengths.max()))
        ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
        for row, sequence in enumerate(self.sequences):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
            labels[row, PROMPT : len(sequence)] = sequence[PROMPT:]
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels, **self._tasks_of(self.numbers)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _tasks_of(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {} if self.tasks is None else {"task_ids": self.tasks[rows]}

    def alone(self, row: int) -> tuple[dict[str, torch.Tensor], int]:
        """Return a row by itself as transformers takes it, and how many of its tokens are learned."""
        ids = torch.from_numpy(self.sequences[row]).long()[None]
        labels = ids.clone()
        labels[:, :PROMPT] = IGNORED
        tasks = {name: torch.from_numpy(array) for name, array in self._tasks_of(self.numbers[row : row + 1]).items()}
        return {"input_ids": ids, "labels": labels, **tasks}, ids.shape[1] - PROMPT


class Bases:
    """Makes the bases of the matrix: of each one file with weights, each precision loaded once and then copied."""

    end = END
    rows = Rows((17, 24, 11), seed=1)
    more_rows = Rows((9, 21), seed=2)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[str, PreTrainedModel] = {}

    def new(self, name: str) -> PreTrainedModel:
        """Return a frozen base in evaluation mode that nothing was done to."""
        if name not in self._loaded:
            self._loaded[name] = self.load(name)
        return copy.deepcopy(self._loaded[name])

    def load(self, name: str) -> PreTrainedModel:
        """Load a base from its file."""
        cls, folder = (Qwen2ForCausalLM, self._qwen2) if name.startswith("qwen2") else (LlamaForCausalLM, self._llama)
        model = cls.from_pretrained(folder, dtype=torch.float32, **PRECISIONS[BASES[name]].loading())
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # as the plugin's own loading does
                module.support_avx512bf16_for_cpu = False
        frozen: PreTrainedModel = model.requires_grad_(False).eval()
        return frozen

    @cached_property
    def _llama(self) -> str:
        return self._write("llama", LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=False))

    @cached_property
    def _qwen2(self) -> str:
        return self._write("qwen2", Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True))

    def _write(self, name: str, cls: Any, config: Any) -> str:
        torch.manual_seed(0)
        model = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms start as ones and biases as zeros, where a mistake would not show
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(self._folder / name)
        return str(self._folder / name)
