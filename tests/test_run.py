"""One run in its folder: where it starts, what it refuses to mix with, what it leaves behind."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_tokenizer import write_tokenizer

from common.adapters.adapter import peft_config, read_adapter
from common.config import TrainConfig
from common.data.chat import ChatTokenizer
from common.engine import TrainState
from common.errors import UserError
from common.runs.checkpoint import AdapterFiles
from common.runs.run import Identity, RunFolder, alone_in, refuse_other_run
from common.trainer import Progress

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name}.weight" for name in "AB")
IDENTITY = Identity(data="d" * 64, base="b" * 64)


def state_of(value: float) -> TrainState:
    """Make a training state that differs in every tensor and from every other value's."""
    weights = {A: np.full((2, 3), value, np.float32), B: np.full((5, 2), value + 1, np.float32)}
    moments = ({key: array * factor for key, array in weights.items()} for factor in (2, 3))
    return TrainState(weights, *moments, update_count=int(value))


def config_of(output: Path, **changes: object) -> TrainConfig:
    return TrainConfig.from_dict({"model_name_or_path": "base", "output_dir": str(output), "lora": {"r": 2}, **changes})


def folder_of(output: Path, identity: Identity = IDENTITY, **changes: object) -> RunFolder:
    config = config_of(output, **changes)
    files = AdapterFiles(peft_config(config.lora, ["q_proj"], "base", None))
    return RunFolder(config, identity, files, total_steps=6)


def save(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        engine = SimpleNamespace(name="fake", versions={"fake": "1"}, read_state=lambda step=step: state_of(step))
        folder.save(engine, Progress(step, step / 2, step * 10, f"hash {step}", nonfinite_steps=1))


def refused(output: Path, resume: str | None = None, allow_changed: bool = False, **changes: object) -> str:
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        refuse_other_run(config_of(output, **changes), resume, allow_changed)
    assert sorted(output.parent.rglob("*")) == before
    return str(error.value)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_without_checkpoints_starts_at_nothing(output: Path, resume: str | None):
    notes: list[str] = []
    start = folder_of(output).find_start(resume, False, notes)
    assert (start.progress, start.state, start.checkpoint, notes) == (Progress(), None, None, [])


def test_a_resume_takes_up_everything_the_newest_checkpoint_holds(output: Path):
    folder = folder_of(output)
    save(folder, 2, 10, 4)
    start = folder.find_start("auto", False, [])
    assert start.checkpoint == output / "checkpoint-10"
    assert start.progress == Progress(10, 5.0, 100, "hash 10", nonfinite_steps=1)
    expected = state_of(10)
    assert start.state.update_count == 10
    for found, wanted in ((start.state.weights, expected.weights), (start.state.moment1, expected.moment1)):
        assert all(np.array_equal(found[key], wanted[key]) for key in (A, B))
    assert all(np.array_equal(start.state.moment2[key], expected.moment2[key]) for key in (A, B))


def test_a_damaged_checkpoint_is_passed_over_and_told(output: Path):
    folder = folder_of(output)
    save(folder, 2, 4, 6)
    (output / "checkpoint-6" / "optimizer.safetensors").write_bytes(b"")
    (output / "checkpoint-4" / "manifest.json").unlink()
    notes: list[str] = []
    assert folder.find_start("auto", False, notes).checkpoint == output / "checkpoint-2"
    assert [note.split(": passed over: ")[0] for note in notes] == [
        f"{output / 'checkpoint-6'}",
        f"{output / 'checkpoint-4'}",
    ]


def test_a_named_checkpoint_is_taken_and_a_damaged_one_refused(output: Path):
    folder = folder_of(output)
    save(folder, 2, 4)
    assert folder.find_start(str(output / "checkpoint-2"), False, []).progress.step == 2
    (output / "checkpoint-2" / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"checkpoint-2: damaged: trainer_state.json has changed"):
        folder.find_start(str(output / "checkpoint-2"), False, [])


def test_a_resume_lists_everything_that_changed_unless_allowed(output: Path):
    save(folder_of(output), 2)
    changed = folder_of(output, Identity("other", "another"), lora={"r": 8}, seed=7, max_steps=9, save_steps=1)
    with pytest.raises(UserError) as error:
        changed.find_start("auto", False, [])
    lines = str(error.value).splitlines()
    assert lines[0] == f"{output / 'checkpoint-2'}: can't be resumed, this run differs from it:"
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == [
        "seed",
        "lora.r",
        "data.train",
        "model_name_or_path",
    ]
    assert lines[1:3] == ["  seed: 42 -> 7", "  lora.r: 2 -> 8"]
    assert lines[-1].endswith("or go on regardless with --allow-changed")
    assert changed.find_start("auto", True, []).progress.step == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_changed_tokenizer_is_among_what_changed(output: Path, tmp_path: Path, name: str):
    base = tmp_path / "base"
    write_tokenizer(base)
    config, adapter = config_of(output), peft_config(config_of(output).lora, ["q_proj"], "base", None)

    def folder() -> RunFolder:
        return RunFolder(config, IDENTITY, AdapterFiles(adapter, ChatTokenizer(base).files), total_steps=6)

    save(folder(), 2)
    assert folder().find_start("auto", False, []).progress.step == 2
    path = base / name
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=rf"\n  tokenizer: {name} is not that of the checkpoint\nput back"):
        folder().find_start("auto", False, [])
    assert folder().find_start("auto", True, []).progress.step == 2


def test_a_tokenizer_with_a_file_more_is_another(output: Path, tmp_path: Path):
    base = tmp_path / "base"
    write_tokenizer(base)
    config = config_of(output)
    adapter = peft_config(config.lora, ["q_proj"], "base", None)
    files = ChatTokenizer(base).files
    save(RunFolder(config, IDENTITY, AdapterFiles(adapter, files[:-1]), total_steps=6), 2)
    with pytest.raises(UserError, match=rf"tokenizer: {files[-1].name} is not that of the checkpoint"):
        RunFolder(config, IDENTITY, AdapterFiles(adapter, files), total_steps=6).find_start("auto", False, [])
    save(RunFolder(config, IDENTITY, AdapterFiles(adapter, files), total_steps=6), 4)
    with pytest.raises(UserError, match=rf"tokenizer: {files[-1].name} is not that of the checkpoint"):
        RunFolder(config, IDENTITY, AdapterFiles(adapter, files[:-1]), total_steps=6).find_start("auto", False, [])


def test_other_weights_to_begin_from_are_among_what_changed(output: Path):
    save(folder_of(output, replace(IDENTITY, adapter="a" * 64), adapter_name_or_path="mine"), 2)
    for adapter in ("", "other"):
        with pytest.raises(UserError, match=r"adapter_name_or_path: its weights are not those .*, of mine"):
            folder_of(output, replace(IDENTITY, adapter=adapter)).find_start("auto", False, [])
    assert folder_of(output, replace(IDENTITY, adapter="a" * 64)).find_start("auto", False, []).progress.step == 2


def test_final_of_a_shorter_run_does_not_finish_a_longer_one(output: Path):
    folder = folder_of(output, max_steps=4)
    folder.write_final(state_of(4), "a card")
    longer = folder_of(output, max_steps=6)
    save(longer, 6)
    start = longer.find_start("auto", False, [])
    assert not longer.is_finished(start)
    longer.write_final(start.state, "a card")
    assert longer.is_finished(start)


def test_a_run_clears_its_folder_and_has_it_alone(output: Path):
    save(folder_of(output), 2)
    (output / ".checkpoint-4.tmp-1234567").mkdir()
    with alone_in(output, print):
        assert sorted(path.name for path in output.iterdir()) == [".lock", "checkpoint-2"]
        with pytest.raises(UserError, match="another run writes there"), alone_in(output, print):
            pytest.fail("two runs in one folder")
    assert [path.name for path in output.iterdir()] == ["checkpoint-2"]


def test_without_a_lock_nothing_is_cleared(output: Path, monkeypatch: pytest.MonkeyPatch):
    (output / ".checkpoint-4.tmp-1234567").mkdir(parents=True)
    monkeypatch.setattr("common.runs.lock._lock", lambda handle: False)
    with alone_in(output, print):
        assert (output / ".checkpoint-4.tmp-1234567").is_dir()  # it may be another run's, at work


def test_old_checkpoints_go_once_the_new_one_is_there(output: Path):
    folder = folder_of(output, save_total_limit=2)
    save(folder, 2, 4, 6, 10)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-10", "checkpoint-6"]


def test_a_run_is_finished_with_all_its_steps_and_final(output: Path):
    folder = folder_of(output)
    save(folder, 6)
    start = folder.find_start("auto", False, [])
    assert not folder.is_finished(start)
    folder.write_final(start.state, "a card")
    assert folder.is_finished(start)
    save(folder_of(output), 4)
    assert not folder.is_finished(folder.find_start(str(output / "checkpoint-4"), False, []))


def test_final_holds_adapter_config_and_card_and_replaces_an_older_one(output: Path):
    folder = folder_of(output)
    folder.write_final(state_of(1), "old")
    folder.write_final(state_of(2), "new")
    assert sorted(path.name for path in output.iterdir()) == ["final"]
    assert sorted(path.name for path in folder.final.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_config.json",
    ]
    assert (folder.final / "README.md").read_text() == "new"
    assert json.loads((folder.final / "training_config.json").read_text()) == config_of(output).to_dict()
    assert np.array_equal(read_adapter(folder.final)[0][A], state_of(2).weights[A])


@pytest.mark.parametrize("broken", ["zero", "nan"])
def test_a_broken_adapter_never_becomes_final(output: Path, broken: str):
    folder = folder_of(output)
    folder.write_final(state_of(1), "good")
    state = state_of(2)
    state.weights[B] = state.weights[B] * (0 if broken == "zero" else np.nan)
    with pytest.raises(UserError, match="every B is zero" if broken == "zero" else "holds NaN or infinity"):
        folder.write_final(state, "bad")
    assert [path.name for path in output.iterdir()] == ["final"]
    assert (folder.final / "README.md").read_text() == "good"


def test_a_claimed_folder_without_checkpoints_may_be_trained_again(output: Path):
    folder_of(output).claim()
    for resume in (None, "auto"):
        refuse_other_run(config_of(output), resume, False)


def test_a_folder_of_another_config_is_refused_with_the_differences(output: Path):
    folder_of(output).claim()
    for resume in (None, "auto"):
        message = refused(output, resume, lora={"r": 8}, adam_beta2=0.95)
        assert "already holds a run of another config:\n  adam_beta2: 0.999 -> 0.95\n  lora.r: 2 -> 8\n" in message
        assert "use another output_dir (--set output_dir=...), or delete that folder" in message
    refuse_other_run(config_of(output, lora={"r": 8}), "auto", True)


def test_what_only_says_where_and_how_long_is_no_other_config(output: Path):
    folder_of(output).claim()
    refuse_other_run(config_of(output, engine="mlx", device="cpu", max_steps=3, save_steps=7), None, False)


def test_a_run_with_checkpoints_is_continued_only_on_request(output: Path):
    folder = folder_of(output)
    folder.claim()
    save(folder, 2)
    assert "already holds this run; continue it with --resume" in refused(output)
    refuse_other_run(config_of(output), "auto", False)


def test_a_finished_run_without_checkpoints_is_not_trained_over(output: Path):
    folder = folder_of(output)
    folder.claim()
    folder.write_final(state_of(1), "card")
    assert "already holds this run; continue it with --resume" in refused(output)
    assert "already holds this run, finished and without a checkpoint to go on from" in refused(output, "auto")


def test_an_unreadable_training_config_is_named(output: Path):
    output.mkdir()
    for content in ("{", "1"):
        (output / "training_config.json").write_text(content)
        assert refused(output).startswith(f"{output / 'training_config.json'}: can't be read (")


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_in_the_way_is_refused(output: Path, below: str):
    output.write_text("")
    assert f"{output} is a file; expected a folder to write the run into" in refused(output / below)


@pytest.mark.parametrize("resume", ["nosuch", ""])
def test_resume_wants_a_checkpoint(output: Path, resume: str):
    save(folder_of(output), 2)
    message = refused(output, str(output / resume))
    assert "no checkpoint; expected a folder such as" in message and "or --resume alone" in message


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder nobody can write into: for root, who may write anywhere, a read-only mount."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"root may write anywhere and can't mount here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_folder_that_cannot_be_written_is_refused(read_only: Path, below: str):
    message = refused(read_only / below)
    assert f"{read_only} can't be written; check its permissions and whether its disk is read-only" in message
