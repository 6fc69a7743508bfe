"""Every function of Ludwig's that is replaced is still there, is replaced everywhere, and can be put back."""

import importlib
import sys
import types

import pytest

from ludwig_peft_plugin import _ludwig_compat
from ludwig_peft_plugin._ludwig_compat import replacements
from ludwig_peft_plugin._replace import MARK, LudwigChangedError, Replacement, apply, undo

ENTRIES = replacements()


def current(entry: Replacement):
    value = importlib.import_module(entry.module)
    for part in entry.name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.module}.{entry.name}")
def test_is_replaced_wherever_ludwig_holds_it(entry, registered):
    ours = current(entry)
    original = getattr(ours, MARK)
    assert original.__module__.startswith("ludwig.")
    name = entry.name.split(".")[-1]
    left = [m for m, module in sys.modules.items() if m.startswith("ludwig.") and vars(module).get(name) is original]
    assert left == []
    assert entry.reason


def test_registering_twice_changes_nothing(registered):
    before = [current(entry) for entry in ENTRIES]
    apply(ENTRIES)
    assert [current(entry) for entry in ENTRIES] == before


def test_can_be_put_back_and_done_again(registered):
    undo(ENTRIES)
    try:
        assert not any(hasattr(current(entry), MARK) for entry in ENTRIES)
    finally:
        apply(ENTRIES)
    assert all(hasattr(current(entry), MARK) for entry in ENTRIES)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("load_yaml", ("no_such",), "no longer takes no_such"),
        ("no_such_function", (), "has no ludwig.utils.data_utils"),
    ],
)
def test_a_changed_ludwig_is_a_named_error_and_nothing_is_replaced(name, parameters, message, registered):
    fine = Replacement("ludwig.utils.data_utils", "load_json", (), "a test", lambda original: lambda *a: None)
    changed = Replacement("ludwig.utils.data_utils", name, parameters, "a test", lambda original: original)
    with pytest.raises(LudwigChangedError, match=message):
        apply([fine, changed])
    assert not hasattr(current(fine), MARK)


@pytest.mark.parametrize("failure", [None, ImportError, NameError])
def test_rays_executor_is_replaced_where_it_can_be_imported(failure, monkeypatch):
    """Ludwig's module fails with a NameError where Ray, or a part of it, is not installed."""

    def imported(name):
        if failure is not None:
            raise failure(name)

    monkeypatch.setattr(_ludwig_compat, "find_spec", lambda name: name)
    monkeypatch.setattr(_ludwig_compat.importlib, "import_module", imported)
    modules = [entry.module for entry in replacements()]
    assert ("ludwig.hyperopt.execution" in modules) is (failure is None)
    monkeypatch.setattr(_ludwig_compat, "find_spec", lambda name: None)
    assert "ludwig.hyperopt.execution" not in [entry.module for entry in replacements()]


def test_what_ray_keeps_of_a_trial_is_made_loadable(tmp_path, monkeypatch):
    (entry,) = _ludwig_compat._of_ray()
    seen = []
    monkeypatch.setattr("ludwig_peft_plugin.training.search_checkpoint.load_best_first", seen.append)
    checkpoint = types.SimpleNamespace(path=str(tmp_path))
    assert entry.build(lambda save_path: checkpoint)("model") is checkpoint
    assert seen == [str(tmp_path)]
