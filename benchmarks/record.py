"""Where a result comes from: the machine, the versions, the commit and the day, as every result file says."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ludwig", "torch", "transformers", "peft", "bitsandbytes")


def provenance(packages: tuple[str, ...] = PACKAGES, device: str | None = None) -> dict[str, Any]:
    """Return device, versions, commit and date of a measurement that is made now.

    Args:
        packages: whose versions are given, of those that are installed.
        device: `cuda` or `cpu`; None is the GPU where there is one.

    The commit is null outside of a git checkout; such a result is completed by hand before it is kept.
    """
    import torch

    cuda = torch.cuda.is_available() if device is None else device == "cuda"
    cpu = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    installed = {name: list(metadata.distributions(name=name)) for name in packages}
    versions = {name: copies[0].version for name, copies in installed.items() if copies}
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": f"{torch.cuda.get_device_name()}, {cpu}" if cuda else cpu,
        "versions": versions | {"torch": torch.__version__},
        "commit": found.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }
