"""run.json: what it says at each moment of a run, and that a run can do without it."""

import json

import pytest

from common.errors import Interrupted, UserError
from common.runs.record import RECORD_NAME, RunRecord, read_record


def test_a_finished_run_says_so_and_how_long_it_took(tmp_path):
    record = RunRecord(tmp_path)
    with record.until_the_end():
        record.begin({"total_steps": 7})
        assert read_record(tmp_path)["ended"] is None
    written = read_record(tmp_path)
    assert written["ended"]["how"] == "finished" and written["total_steps"] == 7 and written["seconds"] >= 0


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (Interrupted("by SIGINT"), "interrupted"),
        (UserError("step 3 is not finite"), "failed"),
        (ValueError("x"), "failed"),
    ],
)
def test_a_run_that_ends_badly_says_how_and_the_error_goes_on(tmp_path, error, how):
    record = RunRecord(tmp_path)
    with pytest.raises(type(error)), record.until_the_end():
        record.begin({})
        raise error
    ended = read_record(tmp_path)["ended"]
    assert (ended["how"], ended["message"]) == (how, str(error))


def test_a_second_start_keeps_name_and_time_and_clears_the_end(tmp_path):
    first = RunRecord(tmp_path)
    with pytest.raises(Interrupted), first.until_the_end():
        first.begin({"first_step": 1})
        raise Interrupted("stopped")
    first.add({"seconds": 100.0, "began": "yesterday"})
    second = RunRecord(tmp_path)
    second.begin({"first_step": 5})
    now = read_record(tmp_path)
    assert second.id == first.id == now["id"] and now["began"] == "yesterday"
    assert now["ended"] is None and now["first_step"] == 5
    with second.until_the_end():
        pass
    assert 100.0 <= read_record(tmp_path)["seconds"] < 110.0


def test_a_start_without_a_step_to_do_leaves_the_end_as_it_was(tmp_path):
    first = RunRecord(tmp_path)
    with first.until_the_end():
        first.begin({})
    before = read_record(tmp_path)
    with RunRecord(tmp_path).until_the_end():
        pass
    assert read_record(tmp_path) == before


def test_a_record_that_cannot_be_written_or_read_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with RunRecord(tmp_path / "file" / "out").until_the_end():  # no folder can be there
        pass
    record = RunRecord(tmp_path / "file" / "out")
    record.begin({})
    (tmp_path / RECORD_NAME).write_text('{"cut o')
    assert read_record(tmp_path) == {}
    (tmp_path / RECORD_NAME).write_text(json.dumps([1]))
    assert read_record(tmp_path) == {}
