"""Folders and files appear whole or not at all, whatever happens while they are written."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import DiskError, UserError
from common.files import LEFT, append_text, new_folder, remove_folder, sweep, write_text

CRASH = RuntimeError("the power failed")


def names(directory: Path) -> list[str]:
    """List a folder, hidden leftovers included."""
    return sorted(path.name for path in directory.iterdir())


def write_folder(output: Path, text: str, **settings) -> None:
    with new_folder(output, **settings) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text(text)


def read_folder(output: Path) -> str:
    return (output / "inner" / "a.txt").read_text()


@pytest.fixture
def full_disk(tmp_path):
    """Mount a disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "twintune-test", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_appears_with_its_files_and_nothing_beside_it(tmp_path):
    write_folder(tmp_path / "deep" / "out", "new")
    assert read_folder(tmp_path / "deep" / "out") == "new"
    assert names(tmp_path / "deep") == ["out"]


def test_a_folder_is_not_there_before_it_is_whole(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("half")
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path  # on the same disk, or a rename would be a copy
    assert (tmp_path / "out" / "a.txt").is_file()


@pytest.mark.parametrize("error", [CRASH, KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_folder_half_written_is_removed_and_the_old_one_stays(tmp_path, error):
    write_folder(tmp_path / "out", "old")
    with pytest.raises(type(error)), new_folder(tmp_path / "out", replace=True) as folder:
        (folder / "a.txt").write_text("half")
        raise error
    assert names(tmp_path) == ["out"]
    assert read_folder(tmp_path / "out") == "old"


def test_replace_exchanges_the_whole_folder(tmp_path):
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out" / "old.txt").write_text("only in the old one")
    write_folder(tmp_path / "out", "new", replace=True)
    assert read_folder(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["inner"]


def test_an_older_folder_stays_unless_it_is_to_be_replaced(tmp_path):
    write_folder(tmp_path / "out", "old")
    with pytest.raises(UserError, match=r"out: can't be written \(Directory not empty\)"):
        write_folder(tmp_path / "out", "new")
    assert read_folder(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    # In a container every run may have the same process number.
    left = tmp_path / f".out.tmp-{os.getpid()}"
    left.mkdir()
    (left / "half.bin").write_text("half")
    write_folder(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["inner"]


def test_a_killed_process_leaves_the_old_folder_as_it_was(tmp_path):
    write_folder(tmp_path / "out", "old")
    program = (
        "import os, signal, sys; from pathlib import Path; from common.files import new_folder\n"
        "with new_folder(Path(sys.argv[1]), replace=True) as folder:\n"
        "    (folder / 'a.txt').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], cwd=root)
    assert killed.returncode == -9
    assert read_folder(tmp_path / "out") == "old"


def test_room_is_checked_before_anything_is_written(tmp_path):
    with pytest.raises(UserError) as caught, new_folder(tmp_path / "out", num_bytes=10**18):
        pytest.fail("nothing may be written to a disk that is too small")
    assert "out: the disk is full: " in str(caught.value)
    assert "expected room for 1,000,000,000,000,000,000; free some, or name a folder on another disk" in str(
        caught.value
    )
    assert names(tmp_path) == []


def test_bytes_missing_are_told(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=400)
    monkeypatch.setattr("common.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="the disk is full: 600 bytes are missing; expected room for 1,000"):
        write_folder(tmp_path / "out", "new", num_bytes=1000)


def test_a_disk_that_fills_up_leaves_the_old_folder_and_nothing_half_written(full_disk):
    write_folder(full_disk / "out", "old")
    with pytest.raises(UserError, match=r"out: the disk is full: [1-9][\d,]* bytes are missing"):
        write_folder(full_disk / "out", "x" * 2_000_000, replace=True)
    assert names(full_disk) == ["out"] and read_folder(full_disk / "out") == "old"


def test_a_file_on_a_disk_that_fills_up_stays_as_it_was(full_disk):
    write_text(full_disk / "a.txt", "old")
    with pytest.raises(UserError, match=r"a\.txt: the disk is full; free some room"):
        write_text(full_disk / "a.txt", "x" * 2_000_000)
    assert (full_disk / "a.txt").read_text() == "old" and names(full_disk) == ["a.txt"]


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "old")
    write_text(tmp_path / "deep" / "a.txt", "Grüße\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "Grüße\n".encode()
    assert names(tmp_path / "deep") == ["a.txt"]


def test_a_file_that_can_not_be_written_stays_as_it_was(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "new \ud800")
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("write", [write_text, write_folder])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/out: can't be written \((File exists|Not a directory)\); check the path"
    ):
        write(tmp_path / "file" / "out", "text")
    assert names(tmp_path) == ["file"]


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(
        "common.files.os.fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")) or real(handle)
    )
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which files are synced")
    write_folder(tmp_path / "out", "new")
    temporary = str(tmp_path / f".out.tmp-{os.getpid()}")
    assert sorted(synced[:-2]) == [f"{temporary}/inner", f"{temporary}/inner/a.txt"]
    assert synced[-2:] == [temporary, str(tmp_path)]  # the folder itself, and the rename last


# ---- what killed processes leave


def test_half_written_folders_and_files_of_killed_processes_are_swept_and_others_kept(tmp_path):
    write_folder(tmp_path / "out", "good")
    (tmp_path / ".out.tmp-1234567").mkdir()
    (tmp_path / ".out.tmp-1234567" / "half.bin").write_text("half")
    (tmp_path / ".metrics.jsonl.tmp-1234567").write_text("half")
    for kept in (".lock", ".tmp-12", ".notes.tmp-12.txt", "out.tmp-12"):
        (tmp_path / kept).write_text("")
    sweep(tmp_path)
    assert names(tmp_path) == [".lock", ".notes.tmp-12.txt", ".tmp-12", "out", "out.tmp-12"]
    assert read_folder(tmp_path / "out") == "good"


def test_a_folder_whose_replacement_never_came_is_put_back(tmp_path):
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.old-1234567")
    write_folder(tmp_path / ".out.tmp-1234567", "new, and perhaps not whole")
    sweep(tmp_path)
    assert names(tmp_path) == ["out"] and read_folder(tmp_path / "out") == "old"


def test_a_folder_whose_replacement_came_is_not_put_back(tmp_path):
    write_folder(tmp_path / "out", "new")
    write_folder(tmp_path / ".out.old-1234567", "old")
    sweep(tmp_path)
    assert names(tmp_path) == ["out"] and read_folder(tmp_path / "out") == "new"


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_process_killed_at_either_rename_of_an_exchange_loses_nothing(tmp_path, killed_at):
    write_folder(tmp_path / "out", "old")
    program = (
        "import os, signal, sys; from pathlib import Path; from common.files import new_folder\n"
        f"left = [{killed_at}]; rename = os.rename\n"
        "def counted(*names):\n"
        "    left[0] -= 1\n"
        "    rename(*names)\n"
        "    left[0] or os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.rename = counted\n"
        "with new_folder(Path(sys.argv[1]), replace=True) as folder:\n"
        "    (folder / 'inner').mkdir(); (folder / 'inner' / 'a.txt').write_text('new')\n"
    )
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], cwd=root)
    assert killed.returncode == -9 and names(tmp_path) != ["out"]
    sweep(tmp_path)
    assert names(tmp_path) == ["out"] and read_folder(tmp_path / "out") == ("old" if killed_at == 1 else "new")


@pytest.mark.parametrize("error", [OSError(errno.EXDEV, "Invalid cross-device link"), KeyboardInterrupt()])
def test_an_exchange_that_fails_in_the_middle_puts_the_old_folder_back(tmp_path, monkeypatch, error):
    write_folder(tmp_path / "out", "old")
    rename, count = os.rename, [0]

    def fails_second(*arguments: object) -> None:
        count[0] += 1
        if count[0] == 2:
            raise error
        rename(*arguments)

    monkeypatch.setattr("os.rename", fails_second)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        write_folder(tmp_path / "out", "new", replace=True)
    assert names(tmp_path) == ["out"] and read_folder(tmp_path / "out") == "old"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
@pytest.mark.parametrize("write", [write_text, write_folder])
def test_a_disk_on_which_nothing_can_be_renamed_is_one_message(tmp_path, monkeypatch, write, number):
    def no_rename(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.rename", no_rename)
    with pytest.raises(UserError) as error:
        write(tmp_path / "out", "text")
    assert str(error.value) == (
        f"{tmp_path / 'out'}: can't be written ({os.strerror(number)}); check the path and its permissions"
    )
    assert names(tmp_path) == []


def test_a_folder_is_deleted_whole_and_one_that_cannot_be_stays(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "old")

    def killed(path: Path, **settings: object) -> None:
        assert not (tmp_path / "out").exists() and LEFT.fullmatch(path.name)  # what a kill leaves now will be swept
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("common.files.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "out")
    sweep(tmp_path)
    assert names(tmp_path) == []
    write_folder(tmp_path / "out", "old")
    monkeypatch.setattr("os.rename", lambda *arguments: (_ for _ in ()).throw(PermissionError()))
    remove_folder(tmp_path / "out")
    assert read_folder(tmp_path / "out") == "old"


def test_text_is_appended(tmp_path):
    append_text(tmp_path / "a.txt", "one\n")
    append_text(tmp_path / "a.txt", "two\n")
    assert (tmp_path / "a.txt").read_text() == "one\ntwo\n"


def test_a_file_to_append_to_on_a_full_disk_stays_as_it_was_without_half_a_line(full_disk):
    append_text(full_disk / "a.txt", "old\n")
    with pytest.raises(DiskError, match=r"a\.txt: the disk is full; free some room"):
        append_text(full_disk / "a.txt", "x" * 2_000_000)
    assert (full_disk / "a.txt").read_text() == "old\n"
