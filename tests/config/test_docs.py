"""What docs say about options and adapter types is what the schema classes say, and every type has a page."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
PAGES = ROOT / "docs" / "methods"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docs_are_up_to_date(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["generate_docs.py", "--check"])
    assert generator.main() == 0, capsys.readouterr().err


@pytest.fixture
def checked_copy(generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of docs/ that `--check` looks at."""
    shutil.copytree(generator.DOCS, tmp_path / "docs")
    monkeypatch.setattr(generator, "DOCS", tmp_path / "docs")
    monkeypatch.setattr("sys.argv", ["generate_docs.py", "--check"])
    return tmp_path / "docs"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("configuration.md", "`precision`", "`precison`"),
        ("methods/README.md", "Hu et al. 2021", "Hu et al. 2020"),
        ("methods/lora.md", "| `r` | a whole number >= 1 | `8` |", "| `r` | a whole number >= 1 | `16` |"),
    ],
)
def test_check_notices_a_change(
    name: str, old: str, new: str, generator: ModuleType, checked_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (checked_copy / name).read_text(encoding="utf-8")
    assert old in text
    (checked_copy / name).write_text(text.replace(old, new), encoding="utf-8")
    assert generator.main() == 1
    assert capsys.readouterr().err == f"docs/{name} is out of date: run python scripts/generate_docs.py\n"


def test_a_type_without_a_page_is_an_error(
    generator: ModuleType, checked_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checked_copy / "methods" / "vera.md").unlink()
    assert generator.main() == 1
    assert capsys.readouterr().err.startswith("docs/methods/vera.md must be written")
    monkeypatch.setattr("sys.argv", ["generate_docs.py"])
    assert generator.main() == 1, "a page that nobody wrote is not made up"
    assert not (checked_copy / "methods" / "vera.md").exists()


def test_what_is_written_by_hand_stays(
    generator: ModuleType, checked_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = checked_copy / "methods" / "vera.md"
    text = page.read_text(encoding="utf-8")
    before, _, after = text.partition(generator.BEGIN)[0], "", text.partition(generator.END)[2]
    page.write_text(f"{before}{generator.BEGIN}\nold\n{generator.END}{after}by hand\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["generate_docs.py"])
    assert generator.main() == 0
    assert page.read_text(encoding="utf-8") == f"{text}by hand\n"


def test_there_is_a_page_for_every_type_and_no_other(generator: ModuleType) -> None:
    types = generator.adapter_types()
    assert len(types) >= 45
    assert {path.stem for path in PAGES.glob("*.md")} == {*types, "README"}


def test_pages_say_what_every_page_says(generator: ModuleType) -> None:
    """Title, equation, the paper of the class, when to choose it, a config, the options."""
    missing = []
    for name, cls in generator.adapter_types().items():
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        parts = {
            "title": text.startswith(f"# {name}\n"),
            "equation": "```\n" in text.partition("## When")[0],
            "paper": cls.paper.rpartition(", ")[2] in text.split(generator.BEGIN)[0],
            "when": "\n## When\n- " in text,
            "config": f"adapter: {{type: {name}" in text,
            "options": "\n## Options\n" in text,
        }
        missing += [f"{name}: {part}" for part, there in parts.items() if not there]
    assert missing == []


def test_the_index_has_every_type_once(generator: ModuleType) -> None:
    found = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.md\)", (PAGES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(found) == [(name, name) for name in generator.adapter_types()]


def configs_on(page: str) -> list[dict[str, Any]]:
    """Return the adapter sections in the YAML of a page, where each begins with `adapter:`."""
    text = "\n".join(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    return [
        yaml.safe_load(f"adapter:{part}")["adapter"] for part in re.split(r"^adapter:", text, flags=re.MULTILINE)[1:]
    ]


def test_configs_on_pages_are_valid(generator: ModuleType) -> None:
    from ludwig_peft_plugin.config.adapter_types import AdapterSelection

    for name in generator.adapter_types():
        configs = configs_on((PAGES / f"{name}.md").read_text(encoding="utf-8"))
        assert configs, name
        for config in configs:
            assert config["type"] == name
            unknown = set(config) - set(type(AdapterSelection().resolve(config)).model_fields)
            assert not unknown, f"{name}: {unknown}"


def test_links_of_the_docs_lead_somewhere() -> None:
    broken = []
    for page in [*(ROOT / "docs").glob("*.md"), *PAGES.glob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            address, _, anchor = target.partition("#")
            if "://" in target:
                continue
            other = page.parent / address if address else page
            if not other.exists() or (anchor and anchor not in anchors(other)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Return what GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_option_of_the_plugin_is_described() -> None:
    from ludwig.schema.llms.peft import adapter_registry

    from ludwig_peft_plugin.config.export import ExportConfig
    from ludwig_peft_plugin.config.llm_config import LLMConfig
    from ludwig_peft_plugin.config.sections import PACKAGE, options

    classes = [LLMConfig, ExportConfig, *adapter_registry.values()]
    missing = [
        f"{cls.__name__}.{option.name}"
        for cls in classes
        for option in options(cls).values()
        if option.declared_in.__module__.startswith(f"{PACKAGE}.") and not option.description
    ]
    assert missing == []
