"""MLX's own quantised formats: each mode against mx.quantize, overrides, stored checkpoints, and the two products."""

import json
from pathlib import Path

import numpy as np
import pytest
from engines import make_batches, open_fresh
from safetensors.numpy import load_file
from tiny_models import write_llama

from common.batches import BatchPlan
from common.config import QuantizationConfig
from common.engine import Engine
from common.errors import UserError
from common.trainer import total_loss

MODES = [
    *({"bits": bits, "group_size": group} for bits, group in ((2, 64), (3, 32), (4, 64), (5, 128), (6, 32), (8, 128))),
    *({"mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")),
]
PATH = "model.layers.0.mlp.down_proj"
OVERRIDES = {"lm_head": {"bits": 8}, "embed_tokens": {"mode": "mxfp8"}, "layers.0": {"bits": 6}, "k_proj": False}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose rows are whole groups of 128."""
    return write_llama(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINTUNE_CACHE", str(tmp_path / "cache"))


def opened(model: Path, quantization: dict, **settings: object) -> Engine:
    return open_fresh("mlx", model, quantization=QuantizationConfig(**quantization), **settings)


def losses(engine: Engine, steps: int) -> list[float]:
    plan = BatchPlan(make_batches(), batch_size=3, accumulation=2, seed=7, num_train_epochs=20)
    results = [engine.fetch(engine.train_step(plan.step_batch(step), 5e-3)) for step in range(1, steps + 1)]
    return [result.loss_sum / result.num_loss_tokens for result in results]


def rounded(weight: np.ndarray, dtype: str, **settings: object) -> np.ndarray:
    """Return what mx.quantize leaves of a weight."""
    import mlx.core as mx

    packed = mx.quantize(mx.array(weight).astype(getattr(mx, dtype)), **settings)
    return np.array(mx.dequantize(*packed, **settings).astype(mx.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_each_mode_holds_what_mx_quantize_makes_and_trains(quantization: dict, dtype: str, wide: Path):
    engine = opened(wide, quantization, dtype=dtype)
    weights = load_file(wide / "model.safetensors")
    np.testing.assert_array_equal(engine.base_weight(PATH), rounded(weights[f"{PATH}.weight"], dtype, **quantization))
    for path in ("lm_head", "model.embed_tokens"):
        expected = weights[f"{path}.weight"]
        np.testing.assert_allclose(engine.base_weight(path), expected, rtol=0 if dtype == "float32" else 2**-8)
    curve = losses(engine, 8)
    assert np.mean(curve[-2:]) < 0.9 * curve[0]


def test_overrides_name_modules_by_a_part_of_their_path(wide: Path):
    engine = opened(wide, {"bits": 2, "group_size": 128, "overrides": OVERRIDES})
    weights = load_file(wide / "model.safetensors")
    formats: dict[str, dict | None] = {
        "lm_head": {"bits": 8, "group_size": 128},
        "model.embed_tokens": {"mode": "mxfp8"},
        "model.layers.0.mlp.up_proj": {"bits": 6, "group_size": 128},
        "model.layers.0.self_attn.k_proj": {"bits": 6, "group_size": 128},  # the first that names it
        "model.layers.1.self_attn.k_proj": None,
        "model.layers.1.mlp.up_proj": {"bits": 2, "group_size": 128},
    }
    for path, form in formats.items():
        weight = weights[f"{path}.weight"]
        expected = rounded(weight, "float32", **form) if form else weight
        np.testing.assert_array_equal(engine.base_weight(path), expected, err_msg=path)
    curve = losses(engine, 8)
    assert np.mean(curve[-2:]) < 0.9 * curve[0]


def test_an_override_that_names_nothing_is_refused_with_what_there_is(wide: Path):
    with pytest.raises(UserError, match=r"overrides: lm_hed: no module of this model; its modules are .*lm_head"):
        opened(wide, {"bits": 4, "overrides": {"lm_hed": {"bits": 8}, "lm_head": {"bits": 8}}})


def test_rows_of_no_whole_groups_are_refused_with_the_way_out(llama: Path):
    with pytest.raises(UserError, match=r"rows of \d+ weights, no multiple of 64; write overrides: {.*: false}"):
        opened(llama, {"bits": 4})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_keep_the_runs_dtype_over_small_float_embeddings(dtype: str, wide: Path):
    """MLX looks up rows of mxfp8 in bfloat16; a float32 run would go on in it."""
    import mlx.core as mx

    engine = opened(wide, {"mode": "mxfp8", "overrides": {"embed_tokens": {"mode": "mxfp8"}}}, dtype=dtype)
    assert engine._model.model.embed_tokens(mx.array([1, 2])).dtype == getattr(mx, dtype)


@pytest.fixture(scope="module")
def stored(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that mlx-lm quantised, embeddings and head too, two modules with more bits."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    folder = tmp_path_factory.mktemp("stored")
    model, config = load_model(wide, model_config=json.loads((wide / "config.json").read_text()) | {"rope_theta": 5e4})

    def form(path: str, _: object) -> bool | dict:
        return {"bits": 8, "group_size": 32, "mode": "affine"} if path.endswith("v_proj") else True

    model, config = quantize_model(model, config, group_size=64, bits=4, quant_predicate=form)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def test_a_checkpoint_that_mlx_lm_quantised_is_trained_as_it_is(stored: Path, wide: Path):
    engine = open_fresh("mlx", stored)
    weights = load_file(wide / "model.safetensors")
    for path, form in {
        PATH: {"bits": 4, "group_size": 64},
        "lm_head": {"bits": 4, "group_size": 64},
        "model.embed_tokens": {"bits": 4, "group_size": 64},
        "model.layers.1.self_attn.v_proj": {"bits": 8, "group_size": 32},
    }.items():
        expected = rounded(weights[f"{path}.weight"], "float32", **form)
        np.testing.assert_array_equal(engine.base_weight(path), expected, err_msg=path)
    curve = losses(engine, 8)
    assert np.mean(curve[-2:]) < 0.9 * curve[0]


def test_a_checkpoint_that_mlx_lm_quantised_is_refused_by_torch_and_not_rounded_again(stored: Path):
    with pytest.raises(UserError, match=r"holds MLX's quantised weights, which torch can't read; use --engine mlx"):
        open_fresh("torch", stored)
    with pytest.raises(UserError, match=r"quantization.bits: .* holds MLX's quantised weights already"):
        opened(stored, {"bits": 4})


@pytest.mark.parametrize("quantization", [{"bits": 4}, {"bits": 5, "group_size": 32}, {"mode": "mxfp4"}], ids=str)
def test_both_ways_of_a_product_give_the_same_losses(quantization: dict, wide: Path, monkeypatch: pytest.MonkeyPatch):
    from mlx_backend import products

    curves, sums = [], []
    for min_rows in (0, products.NEVER):
        monkeypatch.setattr(products, "measure", lambda layer, dtype, min_rows=min_rows: min_rows)
        monkeypatch.setenv("TWINTUNE_CACHE", f"/nonexistent/{min_rows}")  # can't be written: it is measured anew
        engine = opened(wide, quantization)
        sums.append(total_loss(engine, make_batches(), 3)[0])
        curves.append(losses(engine, 10))
    assert sums[0] == pytest.approx(sums[1], rel=2e-6)  # float32 sums in another order
    np.testing.assert_allclose(*curves, rtol=1e-4)


def test_the_faster_product_is_measured_once_a_machine(wide: Path, monkeypatch: pytest.MonkeyPatch):
    from mlx_backend import products

    measured = []

    def measure(layer: products.ChosenLinear, dtype: object) -> int:
        measured.append((layer.bits, layer.weight.size))
        return 77

    monkeypatch.setattr(products, "measure", measure)
    for _ in range(2):
        engine = opened(wide, {"bits": 4, "overrides": {"lm_head": {"bits": 8}}})
        assert engine._model.layers[0].mlp.up_proj.linear._min_rows == 77
    assert sorted(measured) == [(4, 256 * 16), (8, 416 * 32)]  # one layer of each format, the largest


def test_a_slow_product_is_not_measured_with_more_rows(monkeypatch: pytest.MonkeyPatch):
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_backend import products

    layer = nn.Linear(64, 64).to_quantized()
    layer.__class__ = products.ChosenLinear
    times = iter([0.1, 0.2, 0.4, 0.5])  # the kernel's and the other's, for 16 rows and for 64
    monkeypatch.setattr(products, "_seconds", lambda function, x: next(times))
    assert products.measure(layer, mx.float32) == products.NEVER
    times = iter([0.1, 0.2, 0.2, 0.1])
    assert products.measure(layer, mx.float32) == products.ROWS[1]
