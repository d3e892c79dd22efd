"""Adapters that are broken, dangerous or of another kind: each ends in a message that says why, no traceback."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import ENGINES, open_fresh
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_adapters import edit, peft_model, save_mlx
from safetensors.numpy import load_file, save_file

from common.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, fitted_weights, lora_of, read_adapter
from common.adapters.files import MLX_WEIGHTS_NAME
from common.config import TrainConfig
from common.engine import Array, TrainState
from common.errors import UserError
from common.lora import lora_a_key, lora_b_key
from common.runs.start import read_start
from common.talk import speaker as talk

MODULE = "model.layers.0.self_attn.q_proj"
A, B = lora_a_key(MODULE), lora_b_key(MODULE)
HEADER_OF_10_GB = 10 * 2**30


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an adapter that PEFT wrote."""
    directory = tmp_path_factory.mktemp("whole")
    peft_model(tiny_model).save_pretrained(directory)
    return {name: (directory / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}


@pytest.fixture
def adapter(whole: dict[str, bytes], tmp_path: Path) -> Path:
    """A copy of that adapter to break."""
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def message(adapter: Path) -> str:
    """Return why an adapter is refused, before any model is loaded."""
    with pytest.raises(UserError) as error:
        lora_of(read_adapter(adapter)[1], adapter)
    assert str(error.value).startswith(str(adapter))
    return str(error.value)


def change(adapter: Path, alter: Callable[[dict[str, Array]], object]) -> None:
    weights = load_file(adapter / WEIGHTS_NAME)
    alter(weights)
    save_file(weights, adapter / WEIGHTS_NAME)


def test_the_adapter_that_is_broken_below_is_whole(adapter, tiny_model):
    weights, config = read_adapter(adapter)
    engine = open_fresh("torch", tiny_model, lora_of(config, adapter))
    engine.load_state(TrainState.fresh(fitted_weights(weights, engine, adapter)))


CONFIGS = {
    "no target_modules": (
        lambda c: c.pop("target_modules"),
        'names no target_modules; .* some of ["down_proj", "q_proj"]',
    ),
    "null for them": (lambda c: c.update(target_modules=None), "names no target_modules"),
    "none of them": (lambda c: c.update(target_modules=[]), "names no target_modules"),
    "no alpha": (lambda c: c.pop("lora_alpha"), "names no lora_alpha; the scale can't be told from the weights"),
    "another rank": (lambda c: c.update(r=8), "lora_A.weight has rank 4, but the config says 8"),
    "a rank in words": (lambda c: c.update(r="4"), "has rank 4, but the config says '4'"),
    "no kind": (lambda c: c.pop("peft_type"), "names no peft_type, so it is no LoRA adapter; expected peft_type LORA"),
    "another kind": (lambda c: c.update(peft_type="ADALORA"), "has peft_type 'ADALORA', which is no LoRA adapter"),
    "a classifier": (lambda c: c.update(task_type="SEQ_CLS"), "has task_type 'SEQ_CLS'; expected CAUSAL_LM"),
    "of a changed base": (lambda c: c.update(init_lora_weights="pissa"), "it was saved against a changed base"),
    "in and out exchanged": (lambda c: c.update(fan_in_fan_out=True), "uses fan_in_fan_out"),
    "layers doubled": (lambda c: c.update(layer_replication=[[0, 2], [1, 2]]), "uses layer_replication"),
    "blocks": (lambda c: c.update(use_bdlora={"nblocks": 2}), "uses use_bdlora"),
}


@pytest.mark.parametrize(("alter", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_does_not_say_what_the_weights_mean_is_refused(alter, expected, adapter):
    edit(adapter, alter)
    for part in expected.split(" .* "):
        assert part in message(adapter)


WEIGHTS = {
    "a B missing": (lambda w: w.pop(B), f"lacks {B}; the file is incomplete"),
    "an A missing": (lambda w: w.pop(A), f"lacks {A}; the file is incomplete"),
    "no weights at all": (lambda w: w.clear(), "holds no LoRA weights"),
    "a base's weight": (
        lambda w: w.update({"base_model.model.model.embed_tokens.weight": w[B]}),
        "holds base_model.model.model.embed_tokens.weight, which is no LoRA weight, nor one that modules_to_save names",
    ),
    "a trained bias": (lambda w: w.update({f"base_model.model.{MODULE}.bias": w[B][:, 0]}), "or biases were trained"),
    "an adapted embedding": (
        lambda w: w.update({"base_model.model.model.embed_tokens.lora_embedding_A": w[A]}),
        "lora_embedding_A is LoRA on an embedding, which is not supported; merge it into its base",
    ),
    "a bias of B": (
        lambda w: w.update({f"base_model.model.{MODULE}.lora_B.bias": w[B][:, 0]}),
        "lora_B.bias is a bias of its own (lora_bias)",
    ),
    "one rank of its own": (lambda w: w.update({A: w[A][:3]}), "and its B (64, 4): ranks 3 and 4; expected the same"),
    "transposed": (lambda w: w.update({A: w[A].T.copy(), B: w[B].T.copy()}), "ranks 48 and 64"),
    "a shard": (
        lambda w: w.update({A: w[A][:0]}),
        f"{A} has shape (0, 48); expected (r, in); was it saved from a sharded",
    ),
    "a shard's remains": (lambda w: w.update({B: np.zeros(0, np.float32)}), f"{B} has shape (0,); expected (out, r)"),
    "nan": (lambda w: w[B].__setitem__((0, 0), np.nan), f"{B} holds NaN or infinity"),
    "infinity": (lambda w: w[A].__setitem__((1, 2), -np.inf), f"{A} holds NaN or infinity"),
    "too large for float32": (lambda w: w.update({A: np.full((4, 48), 1e300)}), f"{A} holds NaN or infinity"),
    "whole numbers": (
        lambda w: w.update({A: w[A].astype(np.int32)}),
        "is of dtype 'I32'; expected F32, BF16, F16 or F64",
    ),
}


@pytest.mark.parametrize(("alter", "expected"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_not_whole_are_refused_before_a_model_is_loaded(alter, expected, adapter):
    change(adapter, alter)
    assert expected in message(adapter)


ODD_NAMES = ["../../etc/passwd", "/etc/passwd", "a\\..\\b", "model..q_proj", ".hidden", "", "a\nb", "a\x00b", "модель"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_tensor_is_named_after_a_module_and_nothing_else(name, adapter):
    change(adapter, lambda weights: weights.update({name: weights[A]}))
    assert f"holds a tensor named {name!a}; expected names of modules" in message(adapter)


# --- Against the model


def of_layer(keys: dict[str, Array], layer: int) -> list[str]:
    return [key for key in keys if f".layers.{layer}." in key]


MISFITS = {
    "a module missing": (lambda w: [w.pop(key) for key in (A, B)], "lacks .*layers.0.self_attn.q_proj.lora_A.weight"),
    "a layer missing": (lambda w: [w.pop(key) for key in of_layer(w, 1)], r"lacks .*layers.1.*\(3 more\)"),
    "a module too many": (
        lambda w: w.update({lora_a_key("model.layers.0.x"): w[A], lora_b_key("model.layers.0.x"): w[B]}),
        r"holds .*layers\.0\.x\.lora_A\.weight, which the model has no place for",
    ),
    "a copy of what the model lacks": (
        lambda w: w.update(
            {f"base_model.model.x.{end}.weight": w[A] for end in ("lora_A", "base_layer")} | {lora_b_key("x"): w[B]}
        ),
        r"holds .*x\.lora_A\.weight, which the model has no place for",
    ),
    "another width": (lambda w: w.update({A: w[A][:, :-1].copy()}), r"has shape \(4, 47\); expected \(4, 48\)"),
    "every B zero": (
        lambda w: [w[key].fill(0) for key in w if ".lora_B." in key],
        "every B is zero: the adapter changes",
    ),
    "a copy of the base alone": (
        lambda w: w.update({"base_model.model.lm_head.base_layer.weight": w[B]}),
        "holds a copy of the base's lm_head but no adapter of it",
    ),
}


@pytest.mark.parametrize(("alter", "expected"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_do_not_fit_the_model_are_refused(engine, alter, expected, adapter, tiny_model):
    change(adapter, alter)
    with pytest.raises(UserError, match=f"^{adapter}: .*{expected}"):
        talk.open_model(str(tiny_model), adapter, engine, "cpu")


def test_a_run_does_not_begin_from_an_adapter_that_changes_nothing(adapter, tiny_model):
    change(adapter, lambda weights: [value.fill(0) for key, value in weights.items() if ".lora_B." in key])
    lora = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    config = TrainConfig.from_dict({"adapter_name_or_path": str(adapter), "lora": lora})
    start = read_start(config)
    assert start is not None
    with pytest.raises(UserError, match="every B is zero"):
        start.fitted_to(open_fresh("torch", tiny_model, config.lora), config.lora)


# --- Files


class Danger:
    """Leave a mark where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "pytorch_model.pth", "last.ckpt", "weights.pkl"])
def test_a_pickle_is_named_and_never_opened(name, adapter, monkeypatch):
    monkeypatch.chdir(adapter)
    (adapter / WEIGHTS_NAME).unlink()
    (adapter / name).write_bytes(pickle.dumps(Danger()))
    assert f"has no {WEIGHTS_NAME}; found {name}, a pickle; pickles can run code when opened" in message(adapter)
    assert not (adapter / "unpickled").exists()


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_under_the_name_of_safetensors_is_told(save, adapter, monkeypatch):
    monkeypatch.chdir(adapter)
    save({"danger": Danger()}, adapter / WEIGHTS_NAME)
    assert f"{WEIGHTS_NAME}: is a pickle under another name; pickles can run code" in message(adapter)
    assert not (adapter / "unpickled").exists()


@pytest.mark.parametrize("bytes_of_header", [0x280, 0x380, 0x480])
def test_a_long_header_is_no_pickle(bytes_of_header, adapter):
    """Its length, little-endian, begins as a pickle does."""
    header = {
        key: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * at, 4 * at + 4]} for at, key in enumerate((A, B))
    }
    padded = json.dumps(header).encode().ljust(bytes_of_header)
    data = struct.pack("<Q", bytes_of_header) + padded + np.ones(2, np.float32).tobytes()
    (adapter / WEIGHTS_NAME).write_bytes(data)
    edit(adapter, lambda config: config.update(r=1))
    assert data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04"))
    assert read_adapter(adapter)[0][B] == 1


def test_a_header_of_10_gb_is_refused_unread(adapter):
    with (adapter / WEIGHTS_NAME).open("wb") as file:  # sparse: it takes no room
        file.write(struct.pack("<Q", HEADER_OF_10_GB) + b"{")
        file.truncate(HEADER_OF_10_GB + 8)
    assert "its header claims 10,737,418,240 bytes; expected at most 100,000,000" in message(adapter)


def test_a_header_longer_than_its_file_is_refused(adapter):
    (adapter / WEIGHTS_NAME).write_bytes(struct.pack("<Q", HEADER_OF_10_GB) + b"{}")
    assert "no safetensors file, or cut off inside its header (10 bytes)" in message(adapter)


def test_a_config_of_a_gigabyte_is_refused_unread(adapter):
    with (adapter / CONFIG_NAME).open("wb") as file:
        file.truncate(2**30)
    assert "has 1,073,741,824 bytes; expected a config of at most 10,000,000" in message(adapter)


def test_a_pointer_of_git_lfs_is_told(adapter):
    (adapter / WEIGHTS_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "is a pointer of Git LFS, not the weights; fetch them with: git lfs pull" in message(adapter)


def test_a_deep_nest_of_brackets_is_refused(adapter):
    deep = b"[" * 100_000
    (adapter / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(deep)) + deep)
    assert "its safetensors header can't be read" in message(adapter)
    (adapter / CONFIG_NAME).write_bytes(deep)
    assert f"{CONFIG_NAME}: no JSON" in message(adapter)


def test_two_tensors_in_one_place_are_refused(adapter):
    header = {key: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]} for key in (A, B)}
    text = json.dumps(header).encode()
    (adapter / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert f"{WEIGHTS_NAME}: can't be read (" in message(adapter)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapters.npz", "found adapters.npz, of an early mlx-lm; turn it into one"),
        ("0000100_adapters.safetensors", "found 0000100_adapters.safetensors, of one moment of the training; copy it"),
        (WEIGHTS_NAME, f"found {WEIGHTS_NAME}, but {CONFIG_NAME} is that of an mlx-lm adapter"),
        ("README.md", "expected an mlx-lm adapter"),
    ],
)
def test_what_an_mlx_folder_has_instead_of_weights_is_told(name, expected, tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path)
    (tmp_path / MLX_WEIGHTS_NAME).rename(tmp_path / name)
    assert f"has no {MLX_WEIGHTS_NAME}; {expected}" in message(tmp_path)


def test_early_weights_of_mlx_lm_become_readable_as_the_message_says(tiny_model, tmp_path, monkeypatch):
    import mlx.core as mx

    save_mlx(tiny_model, tmp_path)
    expected, _ = read_adapter(tmp_path)
    mx.savez(str(tmp_path / "adapters.npz"), **mx.load(str(tmp_path / MLX_WEIGHTS_NAME)))
    (tmp_path / MLX_WEIGHTS_NAME).unlink()
    program = message(tmp_path).split('python -c "')[1].removesuffix('"')
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "message", "exec"), {})
    assert all((read_adapter(tmp_path)[0][key] == value).all() for key, value in expected.items())


MLX_WEIGHTS = {
    "an a alone": (lambda w, m: w.pop(f"{m}.lora_b"), "lacks base_model.model.*lora_B.weight; the file is incomplete"),
    "whole weights": (lambda w, m: w.update({f"{m}.weight": w[f"{m}.lora_a"]}), "holds .*; expected lora_a, lora_b"),
    "experts": (lambda w, m: w.update({f"{m}.lora_a": np.ones((3, 4, 48), np.float32)}), "LoRA on stacked experts"),
    "a vector": (
        lambda w, m: w.update({f"{m}.lora_b": np.ones(4, np.float32)}),
        r"has shape \(4,\); expected \(r, out\)",
    ),
    "magnitudes": (lambda w, m: w.update({f"{m}.m": np.ones(64, np.float32)}), "has magnitudes m, but .* is lora"),
    "in PEFT's orientation": (
        lambda w, m: w.update({f"{m}.{kind}": w[f"{m}.{kind}"].T.copy() for kind in ("lora_a", "lora_b")}),
        "ranks 48 and 64; expected the same",
    ),
    "nan": (lambda w, m: w[f"{m}.lora_b"].__setitem__((0, 0), np.nan), "lora_B.weight holds NaN"),
}


@pytest.mark.parametrize(("alter", "expected"), MLX_WEIGHTS.values(), ids=MLX_WEIGHTS)
def test_weights_of_mlx_lm_that_are_not_whole_are_refused(alter, expected, tiny_model, tmp_path):
    save_mlx(tiny_model, tmp_path)
    weights = load_file(tmp_path / MLX_WEIGHTS_NAME)
    alter(weights, MODULE)
    save_file(weights, tmp_path / MLX_WEIGHTS_NAME)
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{expected}"):
        read_adapter(tmp_path)


# --- Anything at all


def read_or_refuse(directory: Path) -> None:
    """Read an adapter, or be told why not; any other exception is a bug."""
    try:
        lora_of(read_adapter(directory)[1], directory)
    except UserError as error:
        assert str(error).startswith(str(directory))


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = (
    SCALAR | st.lists(SCALAR | st.lists(SCALAR), max_size=3) | st.dictionaries(st.text(max_size=8), SCALAR, max_size=3)
)


@pytest.fixture(scope="module")
def fuzzed(whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzzed")
    for name, content in whole.items():
        (directory / name).write_bytes(content)
    return directory


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_a_headers_bytes_ends_in_a_traceback(whole, fuzzed, data):
    raw = bytearray(whole[WEIGHTS_NAME])
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (fuzzed / CONFIG_NAME).write_bytes(whole[CONFIG_NAME])
    (fuzzed / WEIGHTS_NAME).write_bytes(raw[: data.draw(st.sampled_from([len(raw), header, header // 2]))])
    read_or_refuse(fuzzed)


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "F8_E4M3", "?"]) | JSON,
        "shape": st.lists(st.integers(-1, 5) | st.just(2**62), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 9), st.integers(0, 40)) | JSON,
    }
)


@settings(max_examples=300, deadline=None)
@example(header={A: {"dtype": [], "shape": None, "data_offsets": (0, 0)}}, size=0)
@given(
    header=st.dictionaries(st.sampled_from([A, B, "__metadata__"]) | st.text(max_size=9), ENTRY | JSON),
    size=st.integers(0, 64),
)
def test_no_header_ends_in_a_traceback(whole, fuzzed, header, size):
    text = json.dumps(header).encode()
    (fuzzed / CONFIG_NAME).write_bytes(whole[CONFIG_NAME])
    (fuzzed / WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    read_or_refuse(fuzzed)


PEFT_KEYS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "new_key"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "use_dora", "bias", "peft_type", "task_type"),
    *("init_lora_weights", "ensure_weight_tying", "target_parameters", "layers_pattern"),
)


@pytest.mark.parametrize("key", PEFT_KEYS)
@settings(max_examples=40, deadline=None)
@given(value=JSON)
def test_no_config_of_peft_ends_in_a_traceback(key, whole, fuzzed, value):
    (fuzzed / WEIGHTS_NAME).write_bytes(whole[WEIGHTS_NAME])
    (fuzzed / CONFIG_NAME).write_text(json.dumps({**json.loads(whole[CONFIG_NAME]), key: value}))
    read_or_refuse(fuzzed)


@pytest.fixture(scope="module")
def fuzzed_mlx(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzzed-mlx")
    save_mlx(tiny_model, directory)
    return directory


MLX_KEYS = ("fine_tune_type", "num_layers", "lora_layers", "lora_parameters", "model", "use_dora")
PARAMETERS = ("rank", "scale", "dropout", "keys", "alpha")


@pytest.mark.parametrize("key", (*MLX_KEYS, *PARAMETERS))
@settings(max_examples=40, deadline=None)
@given(value=JSON)
def test_no_config_of_mlx_lm_ends_in_a_traceback(key, fuzzed_mlx, value):
    parameters = {"rank": 4, "scale": 2.0} | ({key: value} if key in PARAMETERS else {})
    config = {"num_layers": -1, "lora_parameters": parameters} | ({key: value} if key in MLX_KEYS else {})
    (fuzzed_mlx / CONFIG_NAME).write_text(json.dumps(config))
    read_or_refuse(fuzzed_mlx)
