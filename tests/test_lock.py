"""The lock of an output folder: one holder at a time, named to the others, gone with its process."""

import errno
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.errors import UserError
from common.runs.lock import LOCK_NAME, locked

ROOT = Path(__file__).parent.parent
HOLD = """
import sys; from pathlib import Path; from common.runs.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    """Start a process that holds a folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error, locked(folder, print):
        pytest.fail("two processes hold one folder")
    return str(error.value)


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path):
    with hold(tmp_path) as first:
        message = refusal(tmp_path)
        assert message.startswith(
            f"output_dir: {tmp_path}: another run writes there: process {first.pid} on {platform.node()}, since 20"
        )
        assert message.endswith(f"stop it (kill {first.pid}), or use another output_dir (--set output_dir=...)")
        assert refusal(tmp_path) == message  # a refusal leaves the lock as it is
        first.stdin.close()
        assert first.wait() == 0
    with locked(tmp_path, print) as held:
        assert held


def test_a_killed_process_leaves_no_lock(tmp_path):
    with hold(tmp_path) as first:
        first.kill()
        first.wait()
    assert (tmp_path / LOCK_NAME).is_file()  # with its text, which holds nobody up
    with locked(tmp_path, print) as held:
        assert held and f'"pid": {os.getpid()},' in (tmp_path / LOCK_NAME).read_text()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_takes_what_it_made_with_it_and_nothing_else(tmp_path):
    with locked(tmp_path / "a" / "b", print):
        assert (tmp_path / "a" / "b" / LOCK_NAME).is_file()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b", print):
        (tmp_path / "a" / "b" / "kept.txt").write_text("")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept.txt"]


def test_the_lock_goes_when_the_run_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path, print):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_has_not_written_its_name_yet_is_refused_too(tmp_path):
    with locked(tmp_path, print):
        (tmp_path / LOCK_NAME).write_text("")
        assert "another run writes there: another process; wait for it, stop it, or use" in refusal(tmp_path)


def test_no_two_hold_a_folder_however_often_its_lock_comes_and_goes(tmp_path):
    holders, worst, taken = [], [], []

    def contend() -> None:
        while len(taken) < 300:
            try:
                with locked(tmp_path, print):
                    holders.append(1)
                    worst.append(len(holders))
                    taken.append(1)
                    holders.pop()
            except UserError:
                pass

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) == 1 and list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch):
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    told: list[str] = []
    with locked(tmp_path, told.append) as held:
        assert not held
    assert told == [f"{tmp_path}: its file system has no locks; don't start a second run there"]


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/out: can't be written \(Not a directory\)"),
        locked(tmp_path / "file" / "out", print),
    ):
        pytest.fail("a file holds no folder")
