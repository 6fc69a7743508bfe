"""The power meter: what it makes of the lines of nvidia-smi, and that it ends."""

import time
from pathlib import Path

import pytest

from benchmarks.gpu.power import PowerMeter


def test_medians_between_two_times():
    meter = PowerMeter()
    for now, line in enumerate(
        ["100.00, 345, 700.00", "690.5, 1500, 700.00", "700.5, 1600, 700.00", "80, 345, 700.00"]
    ):
        meter.add(line + "\n", float(now))
    assert meter.between(1.0, 2.0) == {"power_w": 695.5, "clock_mhz": 1550.0, "power_limit_w": 700.0}
    assert meter.between(10.0, 20.0) == {}


@pytest.mark.parametrize("line", ["", "[N/A], 345, 700.00", "No devices were found", "100, 345"])
def test_lines_without_numbers_are_left_out(line: str):
    meter = PowerMeter()
    meter.add(line, 0.0)
    assert meter.readings == []


def test_reads_until_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nwhile true; do echo 650.0, 1700, 700.0; sleep 0.02; done\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    meter = PowerMeter()
    begin = time.perf_counter()
    meter.start("0")
    while not meter.readings and time.perf_counter() - begin < 30:
        time.sleep(0.01)
    meter.stop()
    assert meter.between(begin, time.perf_counter())["power_w"] == 650.0
    count = len(meter.readings)
    time.sleep(0.1)
    assert len(meter.readings) <= count + 1


def test_without_nvidia_smi_there_are_no_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    meter = PowerMeter()
    meter.start("0")
    meter.stop()
    assert meter.between(0.0, time.perf_counter()) == {}
