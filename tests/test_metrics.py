"""metrics.jsonl: what is appended is read back, by us and by any other JSON reader."""

import json

import numpy as np
import pytest

import common.view.metrics
from common.errors import DiskError
from common.files import append_text
from common.view.metrics import FEWEST, RECENT, MetricsLog, is_spike, read_metrics
from common.view.progress import evaluated, figures


def row(step: int) -> dict:
    return {"step": step, "loss": 2.0 / step}


def test_rows_are_read_back_in_order(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path, after_step=0)
    for step in (1, 2, 3):
        log.append(row(step))
    assert read_metrics(path) == [row(1), row(2), row(3)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(1), row(2), row(3)]


def test_a_row_is_in_the_file_as_soon_as_it_is_appended(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", after_step=0)
    log.append(row(1))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_floats_come_back_bit_for_bit(tmp_path):
    values = {"step": 1, "loss": 1 / 3, "learning_rate": 5e-324, "tokens_per_second": 123456789.123456789}
    MetricsLog(tmp_path / "metrics.jsonl", 0).append(values)
    assert read_metrics(tmp_path / "metrics.jsonl") == [values]


def test_a_log_that_is_not_there_is_empty(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_run_that_goes_on_drops_what_was_logged_beyond_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, 0)
    for step in range(1, 8):
        first.append(row(step))
    second = MetricsLog(path, after_step=5)
    assert read_metrics(path) == [row(step) for step in range(1, 6)]
    second.append(row(6))
    assert read_metrics(path) == [row(step) for step in range(1, 7)]


def test_a_run_that_starts_afresh_drops_every_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, 0).append(row(1))
    MetricsLog(path, 0)
    assert read_metrics(path) == []


def test_a_last_line_cut_off_by_a_crash_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, 0).append(row(1))
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(path) == [row(1)]
    MetricsLog(path, after_step=1).append(row(2))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(1), row(2)]


def test_a_resume_replaces_the_log_in_one_move(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, 0).append(row(1))
    inode = path.stat().st_ino
    MetricsLog(path, after_step=1)
    assert path.stat().st_ino != inode and [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_wait_while_the_disk_is_full_and_come_in_order_when_it_is_not(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    assert log.append(row(1)) is None

    def full(path, text):
        raise DiskError(f"{path}: the disk is full")

    monkeypatch.setattr(common.view.metrics, "append_text", full)
    assert log.append(row(2)) == f"{path}: the disk is full. The rows of metrics wait in memory until then"
    assert log.append(row(3)) is None  # told once
    assert read_metrics(path) == [row(1)]
    monkeypatch.setattr(common.view.metrics, "append_text", append_text)
    assert log.append(row(4)) is None
    assert read_metrics(path) == [row(step) for step in (1, 2, 3, 4)]
    assert log.append(row(5)) is None
    assert read_metrics(path) == [row(step) for step in (1, 2, 3, 4, 5)]


# ---- spikes

AROUND_2 = [1.9, 2.1] * 5  # mean 2.0, standard deviation 0.1


@pytest.mark.parametrize(
    ("loss", "earlier", "expected"),
    [
        (2.59, AROUND_2, False),
        (2.61, AROUND_2, True),  # 6 deviations above
        (0.01, AROUND_2, False),  # far below is no spike
        (99.0, AROUND_2[: FEWEST - 1], False),  # too few to tell
        (None, AROUND_2, False),  # a row of an evaluation alone
        (2.19, [2.0] * 10, False),
        (2.21, [2.0] * 10, True),  # a tenth above losses that don't move at all
        (1e-9, [0.0] * 10, True),
        (0.0, [0.0] * 10, False),
    ],
)
def test_a_spike_is_far_above_the_losses_before_it(loss, earlier, expected):
    assert is_spike(loss, earlier) is expected


def test_healthy_noise_raises_no_alarm():
    noise = np.random.default_rng(0).lognormal(0.0, 0.2, 20_000)  # as of small batches, skewed to the high side
    losses = (noise * np.geomspace(4, 0.5, 20_000)).tolist()
    flagged = [at for at in range(len(losses)) if is_spike(losses[at], losses[max(0, at - RECENT) : at])]
    assert len(flagged) <= 2  # 1 in 10,000, as such noise has it 4 of its own deviations out


def test_a_jump_that_lasts_becomes_the_new_normal():
    losses, flagged = AROUND_2 * 5, []
    for _ in range(20):
        flagged.append(is_spike(8.0, losses[-RECENT:]))
        losses.append(8.0)
    assert flagged[0] and not any(flagged[5:])


def test_only_the_recent_losses_are_remembered(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, RECENT + 11):
        log.append({"step": step, "loss": float(step)})
    log.append({"step": RECENT + 11, "loss": None})
    expected = [float(step) for step in range(11, RECENT + 11)]
    assert list(log.losses) == list(MetricsLog(path, RECENT + 11).losses) == expected


# ---- what a person sees of a row


def test_a_row_is_shown_with_its_spike_and_without_what_it_lacks():
    assert figures({"loss": 8.0, "loss_spike": True, "learning_rate": 1e-3}) == "loss 8.0000  (a spike)  lr 1.00e-03"
    assert figures({"loss": None, "learning_rate": 1e-3}) == "lr 1.00e-03"
    assert evaluated({"loss": 8.0}) == ""
    assert evaluated({"eval_loss": 0.25}) == "  validation loss 0.2500"
    assert evaluated({"eval_loss": None}) == "  validation loss not finite"
