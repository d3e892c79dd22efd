"""Checkpoints: all that resuming needs comes back bit for bit, and a damaged one is never trusted."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizer import write_tokenizer

from common.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, peft_config
from common.config import LoraConfig, TrainConfig
from common.data.chat import ChatTokenizer
from common.engine import TrainState
from common.errors import UserError
from common.lora import lora_a_key, lora_b_key
from common.runs.checkpoint import (
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    AdapterFiles,
    TrainerState,
    checkpoints,
    damage,
    load_checkpoint,
    newest_intact,
    remove_old,
    save_checkpoint,
)

SHAPES = {lora_a_key("layers.0.q_proj"): (4, 16), lora_b_key("layers.0.q_proj"): (8, 4)}
FILES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def train_state(seed: int = 0, shapes: dict = SHAPES) -> TrainState:
    random = np.random.default_rng(seed)
    first, second, third = (
        {key: random.standard_normal(shape, np.float32) for key, shape in shapes.items()} for _ in range(3)
    )
    return TrainState(first, second, third, update_count=10 + seed)


def trainer_state(step: int = 5) -> TrainerState:
    return TrainerState(
        step=step,
        epoch=step / 7,
        seed=42,
        supervised_tokens=1234,
        batch_hash="abc",
        update_count=10,
        total_steps=70,
        config=TrainConfig(model_name_or_path="some/base").to_dict(),
        data_fingerprint="d",
        base_fingerprint="b",
        engine="fake",
        versions={"numpy": "2"},
        best_metric=1 / 3,
        nonfinite_steps=2,
    )


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> AdapterFiles:
    base = tmp_path_factory.mktemp("base")
    write_tokenizer(base)
    config = peft_config(LoraConfig(r=4), ["q_proj"], "some/base", None)
    return AdapterFiles(config, ChatTokenizer(base).files)


def save(output: Path, files: AdapterFiles, *steps: int) -> Path:
    for step in steps:
        path = save_checkpoint(output, train_state(step), trainer_state(step), files)
    return path


def same(one: TrainState, other: TrainState) -> bool:
    def equal(name: str) -> bool:
        ours, theirs = getattr(one, name), getattr(other, name)
        return list(ours) == list(theirs) and all(
            ours[key].dtype == theirs[key].dtype and ours[key].tobytes() == theirs[key].tobytes() for key in ours
        )

    return all(map(equal, ("weights", "moment1", "moment2")))


def test_everything_comes_back_bit_for_bit(tmp_path, files):
    state = train_state()
    state.weights[next(iter(SHAPES))][0, :3] = [-0.0, 1e-45, 3.4e38]  # signed zero, denormal, nearly infinite
    path = save_checkpoint(tmp_path / "run", state, trainer_state(), files)
    found, trainer = load_checkpoint(path)
    assert same(found, state) and found.update_count == 10
    assert trainer == trainer_state()
    assert TrainConfig.from_dict(trainer.config) == TrainConfig(model_name_or_path="some/base")


def test_folder_holds_the_files_of_the_contract_and_nothing_else(tmp_path, files):
    path = save(tmp_path, files, 5)
    assert path.name == "checkpoint-5"
    assert sorted(each.name for each in path.iterdir()) == sorted(FILES)
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-5"]


def test_manifest_names_every_other_file_with_what_sha256sum_says(tmp_path, files):
    path = save(tmp_path, files, 5)
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    assert sorted(manifest) == sorted(set(FILES) - {MANIFEST_NAME})
    if shutil.which("sha256sum"):
        lines = "".join(f"{digest}  {name}\n" for name, digest in manifest.items())
        subprocess.run(["sha256sum", "--check", "--quiet"], input=lines, text=True, cwd=path, check=True)


def test_moments_are_named_as_the_contract_has_it(tmp_path, files):
    from safetensors.numpy import load_file

    tensors = load_file(save(tmp_path, files, 5) / OPTIMIZER_NAME)
    assert set(tensors) == {f"{moment}.{key}" for moment in ("moment1", "moment2") for key in SHAPES}


def test_peft_loads_a_checkpoint_as_an_adapter(tmp_path, llama):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(llama)
    width = base.config.hidden_size
    shapes = {}
    for layer in range(base.config.num_hidden_layers):
        module = f"model.layers.{layer}.self_attn.q_proj"
        shapes |= {lora_a_key(module): (4, width), lora_b_key(module): (base.get_submodule(module).out_features, 4)}
    config = peft_config(LoraConfig(r=4), ["q_proj"], str(llama), None)
    state = train_state(shapes=shapes)
    path = save_checkpoint(tmp_path, state, trainer_state(), AdapterFiles(config, ChatTokenizer(llama).files))

    model = peft.PeftModel.from_pretrained(base, path)
    loaded = peft.get_peft_model_state_dict(model)
    assert loaded.keys() == state.weights.keys()
    assert all((loaded[key].numpy() == value).all() for key, value in state.weights.items())
    assert AutoTokenizer.from_pretrained(path).eos_token == "<|im_end|>"


def truncate(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # a final line end alone is no loss


def flip_a_bit(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path, _: Path) -> None:
    path.unlink()


def take_another(path: Path, other: Path) -> None:
    shutil.copyfile(other / path.name, path)


OF_EVERY_CHECKPOINT = (CONFIG_NAME, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HARM = [(name, harm) for name in FILES for harm in (truncate, flip_a_bit, empty, delete)]
HARM += [(name, take_another) for name in FILES if name not in OF_EVERY_CHECKPOINT]


@pytest.mark.parametrize(("name", "harm"), HARM)
def test_damage_of_any_file_is_named_and_passed_over(tmp_path, files, name, harm):
    newest = save(tmp_path, files, 5, 10)
    harm(newest / name, tmp_path / "checkpoint-5")
    with pytest.raises(UserError) as caught:
        load_checkpoint(newest)
    message = str(caught.value)
    assert message.startswith(f"{newest}: damaged: ") and message.endswith("resume from an earlier checkpoint")
    # Where the manifest is wrong but whole, it is the other files that seem wrong.
    assert name in message or name == MANIFEST_NAME

    damaged: list[str] = []
    assert newest_intact(tmp_path, damaged) == tmp_path / "checkpoint-5"
    assert len(damaged) == 1 and damaged[0].startswith(f"{newest}: passed over: ")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_run_is_named_and_passed_over(tmp_path, files, name):
    newest = save(tmp_path, files, 5, 10)
    for path in files.tokenizer:
        (tmp_path / path.name).write_text(path.read_text() + "\n")
    theirs = AdapterFiles(
        peft_config(LoraConfig(r=4), ["q_proj"], "other/base", None), [tmp_path / path.name for path in files.tokenizer]
    )
    state = dataclasses.replace(trainer_state(10), seed=7)
    other = save_checkpoint(tmp_path / "other", train_state(77), state, theirs)
    take_another(newest / name, other)
    damaged: list[str] = []
    assert newest_intact(tmp_path, damaged) == tmp_path / "checkpoint-5"
    assert len(damaged) == 1 and (name in damaged[0] or name == MANIFEST_NAME)
    with pytest.raises(UserError, match="checkpoint-10: damaged: "):
        load_checkpoint(newest)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("[]", "does not name"),
        ("{}", "does not name adapter_model.safetensors"),
        ("12", "can't be read"),
        ("null", "can't be read"),
        ('{"adapter_model.safetensors": 1, "optimizer.safetensors": 2, "trainer_state.json": 3}', "has changed"),
    ],
)
def test_a_manifest_that_says_nothing_is_no_proof(tmp_path, files, manifest, message):
    path = save(tmp_path, files, 5)
    (path / MANIFEST_NAME).write_text(manifest)
    assert message in damage(path)


def test_a_file_added_later_does_no_harm(tmp_path, files):
    path = save(tmp_path, files, 5)
    (path / "notes.txt").write_text("my best one")
    assert damage(path) is None
    load_checkpoint(path)


def test_no_checkpoint_is_left_where_all_are_damaged(tmp_path, files):
    save(tmp_path, files, 5, 10)
    for path in checkpoints(tmp_path):
        (path / WEIGHTS_NAME).unlink()
    damaged: list[str] = []
    assert newest_intact(tmp_path, damaged) is None
    assert [line.split(":")[0] for line in damaged] == [str(tmp_path / f"checkpoint-{step}") for step in (10, 5)]


def test_checkpoints_are_ordered_by_number_and_strangers_are_left_alone(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-x", "checkpoint-5-old", "final"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    remove_old(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-100",
        "checkpoint-5-old",
        "checkpoint-x",
        "final",
    ]


@pytest.mark.parametrize(("keep", "left"), [(None, [4, 3, 2, 1]), (1, [4]), (2, [4, 3]), (9, [4, 3, 2, 1])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old(tmp_path, keep)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, 1, [4, 1]),
        (1, 4, [4]),
        (2, 2, [4, 3, 2]),
        (2, 7, [4, 3]),  # there is no such checkpoint
        (None, 1, [4, 3, 2, 1]),
    ],
)
def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, keep, best, left):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old(tmp_path, keep, newest=4, best=best)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


@pytest.mark.parametrize(("keep", "left"), [(1, [2]), (2, [2, 1]), (3, [4, 2, 1]), (None, [4, 3, 2, 1])])
def test_checkpoints_beyond_where_a_run_stands_go_first(tmp_path, keep, left):
    for step in (1, 2, 3, 4):  # the run went on from 1 and stands at 2
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_old(tmp_path, keep, newest=2)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoints(tmp_path / "nowhere") == []
    assert newest_intact(tmp_path / "nowhere", []) is None


def test_saving_a_step_again_replaces_it_whole(tmp_path, files):
    save(tmp_path, files, 5)
    again = train_state(seed=77)
    path = save_checkpoint(tmp_path, again, dataclasses.replace(trainer_state(5), supervised_tokens=9), files)
    found, trainer = load_checkpoint(path)
    assert same(found, again) and trainer.supervised_tokens == 9
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("fails_at", [WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME, MANIFEST_NAME])
def test_writing_that_fails_midway_leaves_nothing_half_written(tmp_path, files, monkeypatch, fails_at):
    save(tmp_path, files, 5)

    def failing(write):
        def wrapper(path: Path, *arguments, **settings):
            if path.name == fails_at:
                raise OSError(5, "Input/output error")
            return write(path, *arguments, **settings)

        return wrapper

    monkeypatch.setattr(Path, "write_bytes", failing(Path.write_bytes))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    for step in (5, 10):
        with pytest.raises(UserError, match=rf"checkpoint-{step}: can't be written \(Input/output error\)"):
            save_checkpoint(tmp_path, train_state(99), trainer_state(step), files)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert same(load_checkpoint(tmp_path / "checkpoint-5")[0], train_state(5))


def test_a_full_disk_leaves_the_checkpoints_there_are(tmp_path, files):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "twintune-test", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        save(disk, files, 5)
        shapes = {key: (4000, 16) for key in SHAPES}
        with pytest.raises(UserError, match=r"checkpoint-10: the disk is full: [\d,]+ bytes are missing"):
            save_checkpoint(disk, train_state(10, shapes), trainer_state(10), files)
        assert [path.name for path in disk.iterdir()] == ["checkpoint-5"]
        assert newest_intact(disk, []) == disk / "checkpoint-5"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_adapter_is_never_saved(tmp_path, files, value):
    state = train_state()
    state.weights[next(iter(SHAPES))][0, 0] = value
    with pytest.raises(UserError, match="holds NaN or infinity"):
        save_checkpoint(tmp_path, state, trainer_state(), files)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_to_ship_that_changes_nothing_is_refused(tmp_path, files):
    state = train_state()
    state.weights[lora_b_key("layers.0.q_proj")][:] = 0
    files.write(tmp_path, state)  # right for a checkpoint of the first steps
    with pytest.raises(UserError, match="every B is zero"):
        files.write(tmp_path, state, trained=True)


def test_nothing_is_pickled(tmp_path, files):
    for path in save(tmp_path, files, 5).iterdir():
        # JSON, templates and safetensors are text or begin with a length below 2^32; a pickle begins with 0x80.
        assert path.suffix in (".json", ".jinja", ".safetensors")
        assert path.read_bytes()[:1] != b"\x80" or path.suffix == ".safetensors"
