"""Base models in every precision of the matrix, tiny random ones and the shipped one, and the rows to train on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ludwig_peft_plugin.data.batches import IGNORED
from ludwig_peft_plugin.model.base_model import resolve_base_model
from ludwig_peft_plugin.model.row_scaled_loading import RowScaledConfig

VOCABULARY, END = 96, 2
PROMPT = 5  # tokens of a random row that are not learned
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
} | {f"shipped-{precision}": precision for precision in ("fp32", "8-bit", "4-bit")}  # a Llama that was trained
SHIPPED = "tiny-llama-python"
DATASET = Path(__file__).parents[2] / "datasets" / "stdlib_instructions.csv"
TEMPLATE = "{instruction}\n"


class Rows:
    """What micro-batches and padded batches are made from: rows of tokens, the first few of which are the prompt."""

    has_targets = True

    def __init__(self, sequences: list[np.ndarray], prompt_lengths: list[int]) -> None:
        self.sequences = [sequence.astype(np.int32) for sequence in sequences]
        self.prompt_lengths = np.array(prompt_lengths, dtype=np.int32)
        self.input_ids = self
        self.lengths = np.array([len(sequence) for sequence in sequences])
        self.tasks: np.ndarray | None = None

    @classmethod
    def random(cls, lengths: tuple[int, ...], seed: int) -> Rows:
        """Return rows of random tokens."""
        generator = np.random.default_rng(seed)
        return cls([generator.integers(3, VOCABULARY, length) for length in lengths], [PROMPT] * len(lengths))

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
            prompt = self.prompt_lengths[row]
            labels[row, prompt : len(sequence)] = sequence[prompt:]
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels, **self._tasks_of(self.numbers)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _tasks_of(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {} if self.tasks is None else {"task_ids": self.tasks[rows]}

    def alone(self, row: int) -> tuple[dict[str, torch.Tensor], int]:
        """Return a row by itself as transformers takes it, and how many of its tokens are learned."""
        ids = torch.from_numpy(self.sequences[row]).long()[None]
        labels, prompt = ids.clone(), int(self.prompt_lengths[row])
        labels[:, :prompt] = IGNORED
        tasks = {name: torch.from_numpy(array) for name, array in self._tasks_of(self.numbers[row : row + 1]).items()}
        return {"input_ids": ids, "labels": labels, **tasks}, ids.shape[1] - prompt


@dataclass(frozen=True)
class Texts:
    """What a base reads.

    Attributes:
        rows: two sets of rows to train on.
        prompts: what is to be answered, one prompt for each row of the first set.
        end: the token that ends an answer.
    """

    rows: tuple[Rows, Rows]
    prompts: list[np.ndarray]
    end: int

    @classmethod
    def random(cls) -> Texts:
        """Return random tokens for the bases made here."""
        rows = Rows.random((17, 24, 11), seed=1)
        prompts = [sequence[:length] for sequence, length in zip(rows.sequences, (7, 3, 11), strict=True)]
        return cls((rows, Rows.random((9, 21), seed=2)), prompts, END)

    @classmethod
    def shipped(cls) -> Texts:
        """Return some of the shortest rows of the shipped dataset, as the shipped tokenizer reads them."""
        tokenizer = AutoTokenizer.from_pretrained(resolve_base_model(SHIPPED))
        frame = pd.read_csv(DATASET, keep_default_na=False)
        frame = frame.iloc[(frame["instruction"].str.len() + frame["output"].str.len()).argsort(kind="stable")]

        def rows(*places: int) -> Rows:
            chosen = frame.iloc[list(places)].to_dict("records")
            prompts = [tokenizer(TEMPLATE.format(**row))["input_ids"] for row in chosen]
            answers = [[*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id] for row in chosen]
            sequences = [np.array([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
            return Rows(sequences, [len(prompt) for prompt in prompts])

        first = rows(0, 7)
        prompts = [sequence[:length] for sequence, length in zip(first.sequences, first.prompt_lengths, strict=True)]
        return cls((first, rows(3)), prompts, tokenizer.eos_token_id)


class Bases:
    """Makes the bases of the matrix: of each one file with weights, each precision loaded once and then copied."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[str, PreTrainedModel] = {}

    def new(self, name: str) -> PreTrainedModel:
        """Return a frozen base in evaluation mode that nothing was done to."""
        if name not in self._loaded:
            self._loaded[name] = self.load(name)
        return copy.deepcopy(self._loaded[name])

    def texts(self, name: str) -> Texts:
        """Return what a base reads."""
        return self._real if name.startswith("shipped") else self._random

    @cached_property
    def _random(self) -> Texts:
        return Texts.random()

    @cached_property
    def _real(self) -> Texts:
        return Texts.shipped()

    def load(self, name: str) -> PreTrainedModel:
        """Load a base from its file."""
        family = name.partition("-")[0]
        cls = Qwen2ForCausalLM if family == "qwen2" else LlamaForCausalLM
        folder = resolve_base_model(SHIPPED) if family == "shipped" else getattr(self, f"_{family}")
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
