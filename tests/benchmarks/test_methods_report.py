"""The page that compares all methods says what was measured, beside today's defaults."""

import copy
import json

from benchmarks import methods_report


def test_the_page_is_up_to_date():
    document = json.loads(methods_report.SOURCE.read_text(encoding="utf-8"))
    assert methods_report.PAGE.read_text(encoding="utf-8") == methods_report.page(document, methods_report.defaults())


def test_every_measured_default_beats_the_base():
    document = json.loads(methods_report.SOURCE.read_text(encoding="utf-8"))
    labels, rates = methods_report.measured(document), methods_report.defaults()
    base = labels["base"][0]["test_loss"]
    seen = 0
    for kind, rate in rates.items():
        at_default = [run for run in labels.get(kind, []) if abs(run["rate"] / rate - 1) < 1e-6]
        for run in at_default:
            seen += 1
            assert run["test_loss"] < 0.95 * base, kind
    assert seen >= 42


def test_the_best_rate_is_chosen_by_validation_and_failures_do_not_count():
    document = json.loads(methods_report.SOURCE.read_text(encoding="utf-8"))
    changed = copy.deepcopy(document)
    for run in changed["labels"]["lora"]:
        run["validation_loss"], run["test_loss"] = 2.0 + run["rate"], 1.0 / (1.0 + run["rate"])
    changed["labels"]["lora"].append({**changed["labels"]["lora"][0], "rate": 1e-9, "error": "it failed"})
    runs = methods_report.measured(changed)["lora"]
    assert all(run["error"] is None for run in runs)
    assert methods_report.best(runs)["rate"] == min(run["rate"] for run in runs)
