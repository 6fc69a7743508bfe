"""What Ludwig asks of a dataset."""

import numpy as np
import pandas as pd
import pytest
from ludwig.utils.dataset_utils import generate_dataset_statistics

from ludwig_peft_plugin.data.ragged import Ragged
from ludwig_peft_plugin.data.token_dataset import TokenDataset


def dataset(rows=5):
    return TokenDataset(
        Ragged.from_lists([[1] * (row + 1) + [2, 3] for row in range(rows)]),
        np.arange(1, rows + 1, dtype=np.int32),
        pd.DataFrame({"prompt": ["p"] * rows, "output": [f"o{row}" for row in range(rows)]}),
        has_targets=True,
        pad_id=9,
        proc_columns={"prompt": "prompt_x1", "output": "output_x2"},
    )


def test_sizes():
    data = dataset()
    assert len(data) == data.size == 5
    assert data.in_memory_size_bytes > data.input_ids.nbytes
    statistics = generate_dataset_statistics(data, None, data)
    assert [row[1] for row in statistics[1:]] == [5, 5]
    with pytest.raises(ValueError, match="2 rows, 1 prompt lengths"):
        TokenDataset(
            Ragged.from_lists([[1], [2]]), np.ones(1, np.int32), pd.DataFrame({"a": "x"}, [0]), has_targets=False
        )


def test_text_under_ludwigs_column_names():
    class Feature:
        proc_column = "output_x2"

    data = dataset()
    assert list(data.to_df()) == ["prompt_x1", "output_x2"]
    assert data.to_df([Feature()]).to_dict("list") == {"output_x2": [f"o{row}" for row in range(5)]}
    assert data.to_scalar_df().equals(data.to_df())
    assert list(data.frame) == ["prompt", "output"]


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_every_row_once(shuffle):
    data = dataset()
    with data.initialize_batcher(batch_size=2, should_shuffle=shuffle, random_seed=1, ignore_last=True) as batcher:
        assert batcher.steps_per_epoch == 3
        seen = []
        while not batcher.last_batch():
            for part in batcher.next_batch().micro_batches:
                seen += part.rows.tolist()
                ends = part.cu_seqlens.tolist()
                for row, start, end in zip(part.rows, ends, ends[1:], strict=False):
                    assert part.input_ids[start:end].tolist() == data.input_ids[int(row)][:-1].tolist()
    assert sorted(seen) == list(range(5))
