"""The totals of a preview: what was lost, how long examples are, how much of a step is padding."""

import numpy as np
import pytest

from common.batches import BatchPlan
from common.config import TrainConfig
from common.data.tokenise import DataReport
from common.data.tokens import TokenDataset, build_dataset
from common.view.preview import sum_up


def data_of(lengths: list[int]) -> TokenDataset:
    return build_dataset([([1] * n, [False] + [True] * (n - 1), f"made:{i}") for i, n in enumerate(lengths)])


def test_totals_count_what_is_there_and_what_was_lost():
    report = DataReport(num_records=9, num_errors=2, truncated=3, lost_loss_tokens=40, dropped=1)
    totals = sum_up(BatchPlan.of(data_of([3, 5, 9, 17]), TrainConfig(per_device_train_batch_size=3)), report)
    assert (totals.num_examples, totals.num_tokens, totals.num_loss_tokens) == (4, 34, 30)
    assert (totals.shortest, totals.longest) == (3, 17)
    assert (totals.truncated, totals.lost_loss_tokens, totals.dropped, totals.skipped) == (3, 40, 1, 2)
    assert (totals.steps_per_epoch, totals.rows_per_epoch) == (2, 4)


def test_the_histogram_doubles_and_counts_every_example_once():
    totals = sum_up(BatchPlan.of(data_of([2, 3, 4, 5, 8, 9, 33]), TrainConfig()), DataReport())
    assert totals.length_histogram == {"2": 1, "4": 2, "8": 2, "16": 1, "32": 0, "64": 1}


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_seq_length": 128}, {"group_by_length": True}])
def test_the_share_of_padding_is_that_of_the_steps_of_an_epoch(settings):
    data = data_of(np.random.default_rng(0).integers(5, 120, 60).tolist())
    config = TrainConfig(per_device_train_batch_size=4, **settings)
    plan = BatchPlan.of(data, config)
    micros = [micro for step in range(1, plan.steps_per_epoch + 1) for micro in plan.step_batch(step).micro_batches]
    computed = sum(micro.token_ids.size for micro in micros)
    real = sum(int((micro.segment_ids > 0).sum()) for micro in micros)
    assert sum_up(plan, DataReport()).padding_share == pytest.approx(1 - real / computed, abs=1e-12)
