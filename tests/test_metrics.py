"""metrics.jsonl: what is appended is read back, by us and by any other JSON reader."""

import json

from common.metrics import MetricsLog, read_metrics


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
