"""Power and clock of the GPU while a run is timed: they tell whether the chip is held back by its power limit."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time

FIELDS = ("power.draw.instant", "clocks.sm", "enforced.power.limit")
MILLISECONDS = 100  # between two readings


class PowerMeter:
    """Reads `nvidia-smi` in the background; without it, or where it knows no such fields, there are no readings."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, tuple[float, ...]]] = []  # host time, values of FIELDS: W, MHz, W
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)

    def start(self, gpu: str) -> None:
        """Begin to read.

        Args:
            gpu: the device's number or UUID, as `nvidia-smi` takes it.
        """
        command = shutil.which("nvidia-smi")
        if command is None:
            return
        options = [
            f"--query-gpu={','.join(FIELDS)}",
            "--format=csv,noheader,nounits",
            f"--loop-ms={MILLISECONDS}",
            "-i",
            gpu,
        ]
        self._process = subprocess.Popen([command, *options], stdout=subprocess.PIPE, text=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process is not None
        for line in self._process.stdout or []:
            self.add(line, time.perf_counter())

    def add(self, line: str, now: float) -> None:
        """Take over one line of `nvidia-smi`, read at host time `now`; one without numbers is left out."""
        cells = line.split(",")
        if len(cells) == len(FIELDS) and all(cell.strip().replace(".", "", 1).isdigit() for cell in cells):
            self.readings.append((now, tuple(float(cell) for cell in cells)))

    def stop(self) -> None:
        """End reading."""
        if self._process is None:
            return
        self._process.terminate()
        self._thread.join()
        self._process.communicate()  # closes the pipe
        self._process = None

    def between(self, begin: float, end: float) -> dict[str, float]:
        """Return the medians over host times `begin` to `end`: `power_w`, `clock_mhz` and `power_limit_w`."""
        found = [values for now, values in self.readings if begin <= now <= end]
        if not found:
            return {}
        names = ("power_w", "clock_mhz", "power_limit_w")
        return {
            name: round(statistics.median(column), 1)
            for name, column in zip(names, zip(*found, strict=True), strict=True)
        }
