"""The dataset `ludwig://python_codes_25k`: flytech/python-codes-25k of the Hugging Face hub, in Ludwig's list.

The hub repository holds the same 24,813 rows twice, as `python-codes-25k.json` and as `python-codes-25k.jsonl`, and the
hub's own loader returns them one after the other. A random split of that would have most test rows in the training
set, so one file is loaded here, and `hf://flytech/python-codes-25k` is cut to one copy (`sources.py`).
"""

from __future__ import annotations

import os
import shutil
import sys

import pandas as pd
from ludwig.datasets.dataset_config import DatasetConfig
from ludwig.datasets.loaders.dataset_loader import DatasetLoader, DatasetState

from ludwig_peft_plugin.data.reading import JSON_AS_WRITTEN
from ludwig_peft_plugin.errors import DataError

NAME = "python_codes_25k"
REPOSITORY = "flytech/python-codes-25k"
FILES = ("python-codes-25k.json", "python-codes-25k.jsonl")
COLUMNS = ("instruction", "input", "output")


class PythonCodes25kLoader(DatasetLoader):
    """Downloads the file through the hub's client (its cache, endpoint, token and offline switch apply), once."""

    def _download_and_process(self, kaggle_username: str | None = None, kaggle_key: str | None = None) -> None:
        if self.state == DatasetState.NOT_LOADED:
            self.download()
        if self.state != DatasetState.TRANSFORMED:
            self.transform()

    def download(self, kaggle_username: str | None = None, kaggle_key: str | None = None) -> list[str]:
        """Put one of the repository's files into Ludwig's cache, and return its path.

        Raises:
            DataError: neither can be had; the message says why and what works without a network.
        """
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        for name in FILES:
            try:
                path = hf_hub_download(REPOSITORY, name, repo_type="dataset")
            except LocalEntryNotFoundError as error:
                raise DataError(_unavailable("the hub cannot be reached", constants.ENDPOINT)) from error
            except EntryNotFoundError:
                continue
            except (OSError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise DataError(_unavailable(reason, constants.ENDPOINT)) from error
            os.makedirs(self.raw_dataset_dir, exist_ok=True)
            target = os.path.join(self.raw_dataset_dir, FILES[0])
            shutil.copyfile(path, f"{target}.part")
            os.replace(f"{target}.part", target)
            return [target]
        raise DataError(_unavailable(f"{REPOSITORY} holds neither {' nor '.join(FILES)}", constants.ENDPOINT))

    def load_file_to_dataframe(self, file_path: str) -> pd.DataFrame:
        """Return the rows of a JSON array, or of JSON lines, with every value as it is written."""
        with open(file_path, encoding="utf-8") as stream:
            lines = stream.read(1) != "["
        return pd.read_json(file_path, lines=lines, **JSON_AS_WRITTEN)


def dataset_config() -> DatasetConfig:
    """Return the entry for Ludwig's list of datasets."""
    return DatasetConfig(
        version="1.0",
        name=NAME,
        description=f"24,813 Python instructions with their answers (instruction, input, output): {REPOSITORY}, MIT.\n",
        download_urls=[f"https://huggingface.co/datasets/{REPOSITORY}/resolve/main/{FILES[0]}"],
        dataset_filenames=[FILES[0]],
        columns=[{"name": column, "type": "text"} for column in COLUMNS],
        output_features=[{"name": "output", "type": "text"}],
        huggingface_dataset_id=REPOSITORY,
        loader=f"{NAME}.{PythonCodes25kLoader.__name__}",
    )


def added_to(configs: dict[str, DatasetConfig]) -> dict[str, DatasetConfig]:
    """Return Ludwig's list of datasets, by name, with this one in it; twice is once.

    Ludwig imports a dataset's loader from `ludwig.datasets.loaders`, so this module is also known by a name there.
    """
    configs.setdefault(NAME, dataset_config())
    sys.modules.setdefault(f"ludwig.datasets.loaders.{NAME}", sys.modules[__name__])
    return configs


def _unavailable(reason: str, endpoint: str) -> str:
    return (
        f"ludwig://{NAME} cannot be downloaded from {endpoint}: {reason}.\n"
        f"Without a network: fetch {FILES[0]} of {REPOSITORY} elsewhere and give its path as `dataset`, or use the "
        "project's own datasets/stdlib_instructions.csv."
    )
