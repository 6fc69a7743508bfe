"""On a GPU: every adapter type on every kind of base, in the plugin's own model and trainer, and their switching."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry
from ludwig.schema.model_types.base import ModelConfig
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import ludwig_peft_plugin.adapters  # noqa: F401 (registers the types)
from ludwig_peft_plugin.adapters.several.active import set_adapter, use_adapter
from ludwig_peft_plugin.adapters.several.attach import attach_adapters
from ludwig_peft_plugin.config.adapter_types import capabilities, trains_quantized
from ludwig_peft_plugin.config.adapters_section import AdaptersConfig
from ludwig_peft_plugin.data.batches import StepBatch, collate, padded
from ludwig_peft_plugin.data.ragged import Ragged
from ludwig_peft_plugin.data.token_dataset import TokenDataset
from ludwig_peft_plugin.decoding import step
from ludwig_peft_plugin.model import base_model
from ludwig_peft_plugin.model.generation import Answer, generate_answers
from ludwig_peft_plugin.training.loss import target_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("registered"),
    pytest.mark.filterwarnings(
        "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
    ),  # torch's, of FRoD
]

DEVICE = torch.device("cuda")
VOCABULARY, END = 512, 0  # the end is that of the shipped tokenizer
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": END,
}
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


class Rows(TokenDataset):
    """Rows of random tokens, the first four of which are the prompt, each of one of two tasks."""

    def __init__(self, lengths: tuple[int, ...], tasks: bool) -> None:
        generator = np.random.default_rng(len(lengths))
        rows = [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]
        frame = pd.DataFrame({"prompt": [""] * len(rows), "output": [""] * len(rows)})
        prompts = np.full(len(rows), 4, dtype=np.int32)
        of_rows = np.arange(len(rows), dtype=np.int32) % 2 if tasks else None
        super().__init__(Ragged.from_lists(rows), prompts, frame, has_targets=True, pad_id=END, tasks=of_rows)
        self.numbers = np.arange(len(rows))


class Cell:
    """A type on a base: trained for a few steps, and then given noise, so that it is far from where it started."""

    def __init__(self, kind: str, base: str, folders: dict[str, str]) -> None:
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
        self.rows = Rows((17, 40, 9, 26), "task_column" in self.cls.model_fields)
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random bases with the shipped tokenizer: a Qwen2, which has biases, and a Llama for what needs one."""
    found = {}
    for name, cls, config in (("qwen2", Qwen2ForCausalLM, Qwen2Config), ("llama", LlamaForCausalLM, LlamaConfig)):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = cls(config(**SHAPE))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms start as ones and biases as zeros, where a mistake would not show
                    parameter += 0.1 * torch.randn_like(parameter)
        model.to(torch.bfloat16).save_pretrained(folder)
        for tokenizer in (base_model.ASSETS / "tiny-llama-python").glob("tokenizer*"):
            shutil.copy(tokenizer, folder)
        found[name] = str(folder)
    return found


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
def cell(request: pytest.FixtureRequest, registered: None, folders: dict[str, str]) -> Cell:
    return Cell(*request.param, folders)


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


# ---- switching between adapters --------------------------------------------------------------------------------

EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear"}
LAST_LAYER: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
ORDER = ("one", "two", "one")


def pair(folder: str, options: dict[str, Any]) -> Any:
    """Return a base with two LoRA adapters far from zero, always the same."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": DEVICE})
    lora = {"type": "lora", "dropout": 0.0, **options}
    section = {"adapters": {"one": {**lora, "r": 4}, "two": {**lora, "r": 8}}}
    model = attach_adapters(base.requires_grad_(False), AdaptersConfig.model_validate(section))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_recorded_answers_follow_the_adapter(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    record = step.Steps._record

    def spy(self: Any) -> None:
        record(self)
        recorded.append(int(self._graph is not None))

    monkeypatch.setattr(step.Steps, "_record", spy)
    rows = Rows((7, 3, 9, 12), tasks=False)
    prompts = [rows.input_ids[row] for row in rows.numbers]
    config = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=[END], pad_token_id=END)

    def answers(model: Any) -> list[tuple[list[int], list[float]]]:
        made = generate_answers(model, prompts, config, device=DEVICE)
        return [(answer.tokens.tolist(), answer.probabilities.tolist()) for answer in made]

    switched = pair(folders["qwen2"], EVERYWHERE).eval()
    found = []
    for name in ORDER:
        with use_adapter(switched, name):
            found.append(answers(switched))
    for name, made in zip(ORDER, found, strict=True):
        fresh = pair(folders["qwen2"], EVERYWHERE).eval()
        set_adapter(fresh, name)
        assert answers(fresh) == made
    assert found[0] != found[1]
    assert recorded == [1] * 2 * len(ORDER)


@pytest.mark.parametrize("options", [EVERYWHERE, LAST_LAYER], ids=["all layers", "the last layer"])
def test_recorded_training_follows_the_adapter(folders: dict[str, str], options: dict[str, Any]) -> None:
    """With adapters in the last layer alone, nothing in the first one tells which of them is active."""
    rows = Rows((17, 40, 9, 26), tasks=False)
    part = collate(rows, rows.numbers).to(DEVICE)

    def passes(model: Any, name: str) -> tuple[list[float], dict[str, Tensor]]:
        """Return the losses and the sum of the gradients of some passes, the last of which are replayed."""
        set_adapter(model, name, trained=[name])
        model.train()
        model.zero_grad(set_to_none=True)
        losses = []
        for _ in range(4):
            loss = target_loss(model, part).loss_sum
            loss.backward()
            losses.append(loss.item())
        assert model.get_base_model().__dict__["_ludwig_peft_graphs"].graphs
        named = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
        assert named
        assert all(name in path.split(".") for path in named)
        return losses, named

    switched = pair(folders["qwen2"], options)
    for name in ORDER:
        losses, gradients = passes(switched, name)
        expected_losses, expected = passes(pair(folders["qwen2"], options), name)
        assert losses == pytest.approx(expected_losses, rel=1e-3)
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3), "replayed as it was run"
        assert gradients.keys() == expected.keys()
        for path, gradient in gradients.items():
            assert (gradient - expected[path]).norm() < 1e-2 * expected[path].norm(), path
    losses, gradients = passes(switched, "one")
    switched.eval()
    with torch.no_grad(), use_adapter(switched, None):
        alone = float(target_loss(switched, part).loss_sum)
    filler = [torch.full((256,), float("nan"), device=DEVICE) for _ in range(4096)]  # also where memory was freed
    again, repeated = passes(switched, "one")
    assert all(torch.isnan(tensor).all() for tensor in filler), "a graph has written where it no longer may"
    assert again == pytest.approx(losses, rel=1e-3)
    assert alone != losses[0]
    for path, gradient in repeated.items():
        assert (gradient - gradients[path]).norm() < 1e-2 * gradients[path].norm(), path
