"""Environment and fixtures of all tests: no network, no graphics, caches of their own."""

import logging
import os
import random
import shutil
import sys
import tempfile

_caches = tempfile.mkdtemp(prefix="ludwig-peft-plugin-tests-")

# Read by the libraries when they are imported, so set before any of them is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=os.path.join(_caches, "huggingface"),
    LUDWIG_CACHE=os.path.join(_caches, "ludwig"),
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",  # the models are tiny: threads only get in each other's way
)

import pytest  # noqa: E402


def pytest_unconfigure() -> None:
    shutil.rmtree(_caches, ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_log_levels() -> None:
    """Undo the level that a LudwigModel of an earlier test has set: it is one for the whole process."""
    for name in ("ludwig", "ludwig_peft_plugin"):
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Begin every test with the same random numbers, whichever tests ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def registered() -> None:
    """Ludwig with the plugin registered, the explicit way."""
    from ludwig_peft_plugin.register import register

    register()
