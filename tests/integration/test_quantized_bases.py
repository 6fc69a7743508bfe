"""Bases in 8-bit rows, and bases that were stored quantised: trained, saved, loaded, merged; the loss stays near."""

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.config.quantization import QuantizationConfig
from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.model.base_model import (
    load_base_model,
    load_model_config,
    load_tokenizer,
    resolve_base_model,
)
from ludwig_peft_plugin.model.float8 import Float8Linear
from ludwig_peft_plugin.model.row_scaled import Int8Linear

BASE = "tiny-llama-python"
ROWS = {"float8": Float8Linear, "int8_weight_only": Int8Linear}
LORA = {"type": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}


def logits(model, dataset, row: int = 0) -> torch.Tensor:
    model.model.eval()
    ids = torch.from_numpy(np.array(dataset.input_ids[row])).long()[None]
    with torch.no_grad():
        return model.model.model(input_ids=ids).logits


def up_projection(model) -> torch.nn.Module:
    return model.model.model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()


@pytest.mark.parametrize(("adapter", "mode"), [("lora", "float8"), ("lora", "int8_weight_only"), ("dora", "float8")])
def test_trains_reloads_and_exports(make_config, new_model, rows, tmp_path, adapter, mode):
    from ludwig.api import LudwigModel

    config = make_config(
        adapter={**LORA, "type": adapter},
        quantization={"backend": "torchao", "mode": mode},
        export=["adapter", "merged"],  # each is loaded again and compared with the trained model
    )
    model = new_model(config)
    results = model.train(dataset=rows, output_directory=str(tmp_path))
    losses = results.train_stats.validation["output"]["loss"]
    assert losses[-1] < losses[0]
    assert type(up_projection(model)) is ROWS[mode]

    data = results.preprocessed_data.test_set
    trained = logits(model, data)
    loaded = LudwigModel.load(results.output_directory + "/model")
    assert type(up_projection(loaded)) is ROWS[mode]
    assert torch.equal(logits(loaded, data), trained)
    assert loaded.model.parameter_counts()[1] == sum(p.numel() for p in model.model.model.parameters())
    weights = list((Path(results.output_directory) / "model").rglob("*.safetensors"))
    assert [file.name for file in weights] == ["adapter_model.safetensors"]

    exported = Path(results.output_directory) / "exported"
    merged = AutoModelForCausalLM.from_pretrained(exported / "merged").eval()
    assert not hasattr(merged.config, "quantization_config")
    ids = torch.from_numpy(np.array(data.input_ids[0])).long()[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=0, atol=1e-4)

    card = (exported / "adapter" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert f'quantization_config=RowScaledConfig("{mode}")' in code
    scope: dict = {}
    code = code.replace('folder = "."', f"folder = {str(exported / 'adapter')!r}").split("tokenizer = ")[0]
    exec(compile(code, "README.md", "exec"), scope)
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(input_ids=ids).logits, trained)


def test_merges_into_the_saved_model(make_config, new_model, rows, tmp_path):
    from ludwig.api import LudwigModel

    adapter = {**LORA, "postprocessor": {"merge_adapter_into_base_model": True}}
    quantization = {"backend": "torchao", "mode": "float8"}
    model = new_model(make_config(adapter=adapter, quantization=quantization))
    results = model.train(dataset=rows, output_directory=str(tmp_path))
    data = results.preprocessed_data.test_set
    loaded = LudwigModel.load(results.output_directory + "/model")
    assert type(loaded.model.model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(loaded, data), logits(model, data), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """The shipped base as bitsandbytes stores it in NF4 with double quantisation."""
    folder = tmp_path_factory.mktemp("stored") / "tiny-nf4"
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = resolve_base_model(BASE)
    model = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"}, quantization_config=settings)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_trains_on_weights_stored_in_4_bits(make_config, new_model, rows, tmp_path, stored, adapter):
    from ludwig.api import LudwigModel

    config = make_config(base_model=str(stored), adapter={**LORA, "type": adapter}, export=["adapter", "merged"])
    model = new_model(config)
    results = model.train(dataset=rows, output_directory=str(tmp_path))
    losses = results.train_stats.validation["output"]["loss"]
    assert losses[-1] < losses[0]
    layer = up_projection(model)
    assert type(layer).__name__ == "Linear4bit"
    assert layer.compute_dtype == torch.float32
    trainable, total = model.model.parameter_counts()
    assert total - trainable == AutoModelForCausalLM.from_pretrained(resolve_base_model(BASE)).num_parameters()
    data = results.preprocessed_data.test_set
    assert torch.equal(logits(LudwigModel.load(results.output_directory + "/model"), data), logits(model, data))
    merged = AutoModelForCausalLM.from_pretrained(Path(results.output_directory) / "exported" / "merged")
    assert not hasattr(merged.config, "quantization_config")


def test_weights_stored_in_4_bits_are_not_trained_themselves(make_config, new_model, rows, tmp_path, stored):
    with pytest.raises(ModelError, match=r"Add `adapter: qlora`"):
        new_model(make_config(base_model=str(stored), adapter=None)).train(dataset=rows, output_directory=str(tmp_path))


STEPS, BATCHES, ROWS_A_STEP, WINDOW = 24, 8, 6, 8


@pytest.fixture(scope="module")
def loss_curve():
    """Return a function that trains LoRA on the shipped model and returns the loss of each step."""
    frame = pd.read_csv(Path(__file__).parents[2] / "datasets" / "stdlib_instructions.csv", keep_default_na=False)
    frame = frame[frame["output"].str.len() + frame["instruction"].str.len() < 160].head(BATCHES * ROWS_A_STEP)
    tokenizer = load_tokenizer(BASE)
    prompts = tokenizer([f"### Instruction: {text}\n### Response:\n" for text in frame["instruction"]])["input_ids"]
    answers = tokenizer(frame["output"].tolist(), add_special_tokens=False)["input_ids"]
    pairs = [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers, strict=True)]

    def batch(step: int) -> dict[str, torch.Tensor]:
        chosen = pairs[step * ROWS_A_STEP : (step + 1) * ROWS_A_STEP]
        length = max(len(prompt) + len(answer) for prompt, answer in chosen)
        ids = torch.zeros(ROWS_A_STEP, length, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(chosen):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            mask[row, :end] = 1
            labels[row, len(prompt) : end] = torch.tensor(answer)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @functools.cache
    def train(mode: str | None, float8_products: bool = False) -> torch.Tensor:
        from ludwig_peft_plugin.adapters.methods.lora import LoraConfig

        config = SimpleNamespace(
            base_model=BASE,
            precision="float32",
            trust_remote_code=False,
            model_parameters=None,
            trainer=SimpleNamespace(type="finetune"),
            adapter=SimpleNamespace(type="lora"),
            adapters=None,
            quantization=QuantizationConfig(backend="torchao", mode=mode) if mode else None,
        )
        base = load_base_model(config, load_model_config(config), torch.device("cpu"))
        for module in base.modules():
            if isinstance(module, Float8Linear):
                module.multiplies_in_float8 = float8_products
        torch.manual_seed(0)
        model = attach_adapter(base, LoraConfig(r=8, dropout=0.0, target_modules="all-linear")).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for step in range(STEPS):
            loss = model(**batch(step % BATCHES)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses)

    return train


@pytest.mark.parametrize(
    ("mode", "float8_products", "bound"),
    [("float8", False, 0.005), ("float8", True, 0.005), ("int8_weight_only", False, 0.0025)],
)
def test_loss_curve_is_that_of_the_full_base(loss_curve, mode, float8_products, bound):
    full = loss_curve(None).view(-1, WINDOW).mean(1)
    assert full[-1] < 0.9 * full[0]
    curve = loss_curve(mode, float8_products).view(-1, WINDOW).mean(1)
    assert not torch.equal(curve, full)
    assert ((curve - full) / full).abs().max() < bound
