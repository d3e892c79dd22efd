"""The totals of a preview: what was lost, how long examples are, how much of a step is padding."""

import numpy as np
import pytest

from common.batches import BatchPlan
from common.config import TrainConfig
from common.data.tokenise import DataReport
from common.data.tokens import TokenDataset, build_dataset
from common.view.preview import sharing_advice, sum_up


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


def prompted(count: int, prompt: int) -> TokenDataset:
    """Make examples that a prompt of so many tokens opens, each with 5 to 30 of its own, of which half are trained."""
    random = np.random.default_rng(0)
    own = [random.integers(500, 999, random.integers(5, 31)).tolist() for _ in range(count)]
    masks = [[False] * (prompt + len(each) // 2) + [True] * (len(each) - len(each) // 2) for each in own]
    return build_dataset(
        [([*range(1, prompt + 1), *each], mask, "made") for each, mask in zip(own, masks, strict=True)]
    )


PACKED = {"packing": True, "max_seq_length": 128}


@pytest.mark.parametrize("settings", [{}, PACKED, {**PACKED, "prefix_sharing": True}, {"group_by_length": True}])
def test_the_share_of_padding_is_that_of_the_steps_of_an_epoch(settings):
    data = prompted(60, 40)
    config = TrainConfig(per_device_train_batch_size=4, **settings)
    plan = BatchPlan.of(data, config)
    micros = [micro for step in range(1, plan.steps_per_epoch + 1) for micro in plan.step_batch(step).micro_batches]
    computed = sum(micro.token_ids.size for micro in micros)
    real = sum(int((micro.segment_ids > 0).sum()) for micro in micros)
    assert sum_up(plan, DataReport()).padding_share == pytest.approx(1 - real / computed, abs=1e-12)
    assert sum_up(plan, DataReport()).shared_tokens == data.input_lengths().sum() - real


def test_what_sharing_would_leave_out_is_said_where_packing_is_on_and_it_is_off():
    data = prompted(60, 40)
    shared = BatchPlan.of(data, TrainConfig(**PACKED, prefix_sharing=True))
    left_out = sum_up(shared, DataReport()).shared_tokens
    advice = sharing_advice(BatchPlan.of(data, TrainConfig(**PACKED)))
    assert left_out == 40 * (60 - len(shared.rows)) and f"true would leave out {left_out:,} tokens" in advice
    assert sharing_advice(shared) == sharing_advice(BatchPlan.of(data, TrainConfig())) == ""


def test_what_is_not_worth_it_is_not_advised():
    assert sharing_advice(BatchPlan.of(prompted(60, 7), TrainConfig(**PACKED))) == ""
