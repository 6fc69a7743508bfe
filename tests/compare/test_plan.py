"""What a comparison trains: each type with its own defaults, the config's options for its own, overrides over both."""

import pytest
from ludwig.schema.llms.peft import adapter_registry

from ludwig_peft_plugin.compare.plan import BASE, chosen_methods, jobs, split_config
from ludwig_peft_plugin.errors import ModelError

CONFIG = {
    "model_type": "llm",
    "base_model": "tiny-llama-python",
    "adapter": {"type": "lora", "r": 16},
    "trainer": {"type": "finetune", "epochs": 1, "batch_size": 8, "learning_rate": 3e-3},
    "export": ["merged"],
}


@pytest.fixture(autouse=True)
def _registered(registered):
    """Adapter types are looked up in Ludwig's registry."""


def by_method(methods, overrides=None, config=CONFIG):
    return {job.method: job.config for job in jobs(config, methods, overrides)}


def test_all_is_every_registered_type_and_the_base_comes_first():
    assert chosen_methods(["all"]) == [BASE, *adapter_registry]
    assert chosen_methods([" LoRA ", "dora", "lora"]) == [BASE, "lora", "dora"]


def test_other_names_of_a_type_are_that_type():
    name, cls = next((name, cls) for name, cls in adapter_registry.items() if getattr(cls, "aliases", ()))
    assert chosen_methods([cls.aliases[0]]) == [BASE, name]


def test_an_unknown_type_is_an_error_with_a_hint():
    with pytest.raises(ModelError, match="'loraa' is no adapter type; did you mean `lora`"):
        chosen_methods(["loraa"])


def test_the_config_speaks_for_its_own_type_alone(monkeypatch):
    monkeypatch.setattr(adapter_registry["dora"], "learning_rate", 7e-4, raising=False)
    configs = by_method([BASE, "lora", "dora"])
    assert configs["lora"]["adapter"] == {"type": "lora", "r": 16}
    assert configs["lora"]["trainer"]["learning_rate"] == 3e-3
    assert configs["dora"]["adapter"] == {"type": "dora"}
    assert configs["dora"]["trainer"] == {"type": "finetune", "epochs": 1, "batch_size": 8, "learning_rate": 7e-4}
    assert configs[BASE]["trainer"] == {"type": "none", "batch_size": 8}
    assert "adapter" not in configs[BASE]
    assert not any("export" in config for config in configs.values())


def test_overrides_are_options_of_the_adapter_or_whole_sections():
    override = {"r": 2, "trainer": {"learning_rate": 1e-4}, "quantization": {"bits": 4}}
    config = by_method([BASE, "lora"], {"lora": override})["lora"]
    assert config["adapter"] == {"type": "lora", "r": 2}
    assert config["trainer"] == {**CONFIG["trainer"], "learning_rate": 1e-4}
    assert config["quantization"] == {"bits": 4}


def test_overrides_of_what_is_not_compared_are_errors():
    with pytest.raises(ModelError, match=r"compare.dora: this method is not compared"):
        jobs(CONFIG, [BASE, "lora"], {"dora": {"r": 2}})
    with pytest.raises(ModelError, match=r"compare.lora: must be a mapping"):
        jobs(CONFIG, [BASE, "lora"], {"lora": 3})
    with pytest.raises(ModelError, match="compare: must be a mapping"):
        split_config({"compare": [1]})


def test_a_jobs_key_changes_with_its_settings_and_seed_alone():
    first, again, other, seeded = (
        jobs(CONFIG, ["lora"], *arguments, **seed)[0].key
        for arguments, seed in (((), {}), ((), {}), (({"lora": {"r": 2}},), {}), ((), {"seed": 1}))
    )
    assert first == again
    assert len({first, other, seeded}) == 3
