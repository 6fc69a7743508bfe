"""On a GPU: every adapter type on every kind of base, in the plugin's own model and trainer."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry
from ludwig.schema.model_types.base import ModelConfig
from torch import Tensor

import ludwig_peft_plugin.adapters  # noqa: F401 (registers the types)
from ludwig_peft_plugin.config.adapter_types import capabilities, trains_quantized
from ludwig_peft_plugin.data.batches import StepBatch, collate, padded
from ludwig_peft_plugin.model import base_model
from ludwig_peft_plugin.model.generation import Answer, generate_answers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("registered"),
    pytest.mark.filterwarnings(
        "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
    ),  # torch's, of FRoD
]

DEVICE = torch.device("cuda")
END = 0  # the token of the shipped tokenizer
SECTIONS: dict[str, dict[str, Any] | None] = {
    "bfloat16": None,
    "8-bit": {"bits": 8},
    "nf4": {"bits": 4},
    "float8": {"backend": "torchao", "mode": "float8"},
    "int8": {"backend": "torchao", "mode": "int8_weight_only"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_layers": 2},
    "multitask_prompt_tuning": {"task_column": "task", "num_tasks": 2},
}
OF_UNQUANTISED_WEIGHTS = {"layers": {"last": None, "pattern": ".*norm.*|.*bias"}}
CELLS_IN_ALL = 216
STEPS, TOTAL_STEPS = 3, 20
NEAR = 0.02
"""How far sums in bfloat16 may be from one another when they are grouped otherwise, relative to the largest."""


def cells() -> list[tuple[str, str]]:
    """Return every type with every base it trains on; one that brings a quantised base has no other."""
    found = []
    for kind in sorted(adapter_registry):
        cls = adapter_registry[kind]
        for name, section in SECTIONS.items():
            if section is None:
                trains = not capabilities(cls).default_quantization
            else:
                trains = trains_quantized(cls, section.get("backend"))
            found += [(kind, name)] * trains
    return found


class Cell:
    """A type on a base: trained for a few steps, and then given noise, so that it is far from where it started."""

    def __init__(self, kind: str, base: str, folders: dict[str, str], random_bases: ModuleType) -> None:
        self.kind, self.base, self.cls = kind, base, adapter_registry[kind]
        self.trains_base = bool(getattr(self.cls, "trains_base", False))
        options = {**OPTIONS.get(kind, {}), **(OF_UNQUANTISED_WEIGHTS.get(kind, {}) if SECTIONS[base] else {})}
        config = {
            "model_type": "llm",
            "base_model": folders["llama" if kind == "adaption_prompt" else "qwen2"],
            "input_features": [{"name": "prompt", "type": "text"}],
            "output_features": [{"name": "output", "type": "text"}],
            "adapter": {"type": kind, **options},
            "trainer": {"type": "finetune", "learning_rate": 1e-2, "optimizer": {"type": "adam"}},
            "generation": {"do_sample": False, "max_new_tokens": 20},
        }
        if SECTIONS[base]:
            config["quantization"] = SECTIONS[base]
        self.config = ModelConfig.from_dict(config)
        self.rows = random_bases.Rows((17, 40, 9, 26), "task_column" in self.cls.model_fields)
        self._train()

    def _train(self) -> None:
        from ludwig_peft_plugin.training.trainer import PeftTrainer

        self.llm = self.new_llm()
        self.base_logits = self.logits(self.llm)  # also the pass in which 8-bit layers settle their statistics
        self.held = tensors(self.llm.model)
        self.before = {name: tensor.detach().clone() for name, tensor in self.held.items()}
        torch.manual_seed(7)
        trainer = PeftTrainer(self.config.trainer, self.llm, device=DEVICE.type)
        trainer._attach_adapter_from_data(self.rows)  # some start from training rows
        self.autocast = trainer.autocast
        trainer._hooks = trainer._step_hooks(TOTAL_STEPS)
        start = {name: parameter.detach().clone() for name, parameter in self.trained(self.llm).items()}
        part, self.moved = collate(self.rows, self.rows.numbers), set()
        self.llm.train()
        for number in range(STEPS):
            trainer._progress = SimpleNamespace(steps=number)
            trainer.train_step(StepBatch.of([part]))  # where it can, a CUDA graph takes over the second time
            now = self.trained(self.llm)
            self.moved |= {name for name, parameter in now.items() if not torch.equal(parameter, start[name])}
        trainer._losses.flush()
        self.losses = [loss for _, loss in trainer.loss_curve]
        self.llm.eval()
        self.changed = [name for name, tensor in self.held.items() if not same(tensor, self.before[name])]
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.trained(self.llm).values():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.005 if self.trains_base else 0.05) * noise.to(DEVICE)

    def new_llm(self) -> Any:
        """Return the plugin's model with a new base and no adapter yet."""
        from ludwig_peft_plugin.model.llm import PeftLLM

        return PeftLLM(self.config, _device=str(DEVICE)).eval()

    @staticmethod
    def trained(llm: Any) -> dict[str, Any]:
        """Return the parameters that are trained, by name."""
        return {name: parameter for name, parameter in llm.model.named_parameters() if parameter.requires_grad}

    def precision(self) -> Any:
        """Return the context in which the trainer computes."""
        return torch.autocast(DEVICE.type, self.autocast) if self.autocast else nullcontext()

    def tasks(self, llm: Any) -> dict[str, Tensor]:
        """Return the argument that names each row's task, where an adapter has tasks."""
        known = self.rows.tasks is not None and hasattr(llm.model, "peft_config")
        return {"task_ids": torch.from_numpy(self.rows.tasks).long().to(DEVICE)} if known else {}

    @torch.no_grad()
    def logits(self, llm: Any) -> Tensor:
        """Return the logits of all rows, padded on the right, by transformers' and PEFT's own forward pass."""
        batch = padded(self.rows, self.rows.numbers, END)
        given = {name: batch[name].to(DEVICE) for name in ("input_ids", "attention_mask")}
        found: Tensor = llm.model(**given, **self.tasks(llm)).logits[:, -given["input_ids"].shape[1] :]
        return found.masked_fill(given["attention_mask"][..., None] == 0, 0)

    def answers(self, llm: Any, batch_size: int | None = None) -> list[Answer]:
        """Return the answers to the beginnings of all rows."""
        tasks = {} if self.rows.tasks is None else {"tasks": self.rows.tasks}
        return generate_answers(llm.model, self.prompts, llm.generation, device=DEVICE, batch_size=batch_size, **tasks)

    @property
    def prompts(self) -> list[np.ndarray]:
        """The beginnings of the rows."""
        return [self.rows.input_ids[row][:length] for row, length in enumerate((7, 3, 9, 12))]

    @torch.no_grad()
    def margin(self, row: int, answer: list[int]) -> float:
        """Return how narrowly the token that follows a part of an answer has won, relative to the largest logit."""
        tokens = torch.tensor([[*self.prompts[row].tolist(), *answer]], device=DEVICE)
        tasks = {name: numbers[row : row + 1] for name, numbers in self.tasks(self.llm).items()}
        logits = self.llm.model(input_ids=tokens, **tasks).logits[0, -1].float()
        first, second = logits.topk(2).values.tolist()
        return float((first - second) / logits.abs().max())


def tensors(base: Any) -> dict[str, Tensor]:
    """Return the tensors a base is made of, those that quantised layers keep beside their weights included."""
    found = dict(base.named_parameters()) | dict(base.named_buffers())
    for name, parameter in base.named_parameters():
        state = getattr(parameter, "quant_state", None)
        beside = {"absmax": getattr(state, "absmax", None)} | {of: getattr(parameter, of, None) for of in ("CB", "SCB")}
        found |= {f"{name}.{of}": tensor for of, tensor in beside.items() if isinstance(tensor, Tensor)}
    return found


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether tensors are equal bit for bit; float8 numbers cannot be compared themselves."""
    if one.dtype.itemsize == 1:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)


@pytest.fixture(scope="module", autouse=True)
def _each_base_is_loaded_once() -> Iterator[None]:
    """Load what a config asks for as users do, the first time, and hand out copies: there are hundreds of cells."""
    real, kept = base_model.load_base_model, {}

    def load(config: Any, model_config: Any, device: torch.device) -> Any:
        quantization = json.dumps(config.quantization.to_dict() if config.quantization else None)
        key = (config.base_model, quantization, base_model.precision_dtype(config, device))
        if key not in kept:
            kept[key] = real(config, model_config, device)
        return copy.deepcopy(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "load_base_model", load)
        yield


@pytest.fixture(scope="module", params=cells(), ids="-".join)
def cell(request: pytest.FixtureRequest, base_folders: dict[str, str], random_bases: ModuleType) -> Cell:
    return Cell(*request.param, base_folders, random_bases)


def test_every_type_is_here() -> None:
    assert {kind for kind, _ in cells()} == set(adapter_registry)
    assert len(cells()) == CELLS_IN_ALL


def test_steps_train_the_whole_adapter_and_nothing_else(cell: Cell) -> None:
    assert len(cell.losses) == STEPS
    assert np.isfinite(cell.losses).all()
    trained = cell.trained(cell.llm)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {parameter.device.type for parameter in trained.values()} == {DEVICE.type}
    assert cell.moved == trained.keys(), f"never changed: {sorted(trained.keys() - cell.moved)}"
    assert cell.trains_base or not cell.changed


def test_disabled_it_is_the_base(cell: Cell) -> None:
    found = cell.logits(cell.llm)
    assert torch.isfinite(found).all()
    assert (found - cell.base_logits).abs().max() > 5e-3 * cell.base_logits.abs().max()
    if cell.trains_base:
        return
    with cell.llm.model.disable_adapter():
        assert torch.equal(cell.logits(cell.llm), cell.base_logits)
    assert torch.equal(cell.logits(cell.llm), found)


def test_loads_as_it_was_saved(cell: Cell, tmp_path: Any) -> None:
    cell.llm.save(str(tmp_path))
    loaded = cell.new_llm()
    loaded.load(str(tmp_path))
    loaded.eval()
    assert torch.equal(cell.logits(loaded), cell.logits(cell.llm))


@torch.no_grad()
def test_rows_without_padding_have_the_loss_of_padded_ones(cell: Cell) -> None:
    part = collate(cell.rows, cell.rows.numbers).to(DEVICE)
    labels = padded(cell.rows, cell.rows.numbers, END)["labels"][:, 1:].to(DEVICE)
    with cell.precision():
        flat = cell.llm(part)
        logits = cell.logits(cell.llm)[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
    torch.testing.assert_close(-flat.row_log_likelihood, losses, rtol=NEAR, atol=0)


def test_answers_of_a_batch_are_those_of_one_at_a_time(cell: Cell) -> None:
    batched = [answer.tokens.tolist() for answer in cell.answers(cell.llm)]
    assert len({tuple(answer) for answer in batched}) > 1
    if cell.base != "bfloat16":
        return
    for row, alone in enumerate(cell.answers(cell.llm, batch_size=1)):
        one, other = [*batched[row], END], [*alone.tokens.tolist(), END]
        if one != other:
            first = next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            assert cell.margin(row, one[:first]) < NEAR, "another token, which was no draw"
