"""Quantised bases in both engines: the same weights, the same losses, and no more memory than they promise."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engines import ENGINES, make_batches, open_fresh
from patience import PATIENCE
from safetensors.numpy import load_file
from tiny_models import FAMILIES, write_family, write_llama

from common.base.weights import check_model_folder, tensor_names
from common.batches import BatchPlan
from common.config import LoraConfig, QuantizationConfig
from common.engine import Engine
from common.errors import UserError
from common.trainer import total_loss

NF4 = {"load_in_4bit": True}
DOUBLE = {"load_in_4bit": True, "use_double_quant": True}
FP4 = {"load_in_4bit": True, "quant_type": "fp4", "use_double_quant": True}
LOSS_TOLERANCE = 1e-4  # the contract between engines, float32 compute


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose rows are whole blocks of 64, as real models' are; that of `llama` are not."""
    return write_llama(tmp_path_factory.mktemp("wide"), tied=True, hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, Path]:
    """Checkpoints that transformers and bitsandbytes packed from bfloat16, by their kind."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kinds: dict[str, dict] = {
        "nf4, double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {"bnb_4bit_quant_type": "fp4"},
        "nf4 in bfloat16 words": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    }
    folders = {}
    for kind, settings in kinds.items():
        wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16", **settings)
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16, quantization_config=wanted)
        folders[kind] = tmp_path_factory.mktemp("stored")
        model.save_pretrained(folders[kind])
    return folders


def opened(name: str, model: Path, quantization: dict, **settings: object) -> Engine:
    return open_fresh(name, model, quantization=QuantizationConfig(**quantization), **settings)


def linear_paths(engine: Engine) -> list[str]:
    keys = engine.adapter_shapes()
    return sorted(key.removeprefix("base_model.model.").split(".lora_A")[0] for key in keys if ".lora_A." in key)


def assert_same_base(one: Engine, other: Engine, *others: str) -> None:
    assert linear_paths(one) == linear_paths(other)
    for path in [*linear_paths(one), *others]:
        # Where a CPU has no AVX512, FP4 has a negative zero in bitsandbytes, too: plus 0 it is 0.
        bits = [(engine.base_weight(path) + np.float32(0)).view(np.uint32) for engine in (one, other)]
        np.testing.assert_array_equal(*bits, err_msg=path)


def losses(engine: Engine, steps: int, first: int = 1) -> list[float]:
    plan = BatchPlan(make_batches(), batch_size=3, accumulation=2, seed=7, num_train_epochs=20)
    results = [engine.fetch(engine.train_step(plan.step_batch(step), 5e-3)) for step in range(first, first + steps)]
    return [result.loss_sum / result.num_loss_tokens for result in results]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", [NF4, DOUBLE, FP4], ids=["nf4", "double", "fp4-double"])
@pytest.mark.parametrize("model", ["llama", "wide"])
def test_four_bit_base_is_the_same_on_both_engines(model: str, quantization: dict, dtype: str, request):
    directory = request.getfixturevalue(model)
    engines = (opened(name, directory, quantization, dtype=dtype) for name in ENGINES)
    assert_same_base(*engines, "model.embed_tokens")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bit_base_is_what_bitsandbytes_makes_of_the_weights_in_the_runs_dtype(name: str, dtype: str, llama: Path):
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    engine = opened(name, llama, NF4, dtype=dtype)
    weights = load_file(llama / "model.safetensors")
    for path in linear_paths(engine):
        weight = torch.from_numpy(weights[f"{path}.weight"]).to(getattr(torch, dtype))
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
        state.shape = torch.Size((1, weight.numel()))
        expected = dequantize_4bit(packed, state).float().numpy().reshape(weight.shape)
        np.testing.assert_array_equal(engine.base_weight(path), expected, err_msg=path)
    for path in ("model.embed_tokens", "lm_head"):  # left in the run's dtype
        expected = torch.from_numpy(weights[f"{path}.weight"]).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(engine.base_weight(path), expected, err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_pack_the_same_modules_of_every_family(family: str, tmp_path: Path):
    write_family(tmp_path, family)
    assert_same_base(*(opened(name, tmp_path, NF4, max_seq_length=64) for name in ENGINES))


@pytest.mark.parametrize("quantization", [NF4, DOUBLE, FP4], ids=["nf4", "double", "fp4-double"])
@pytest.mark.parametrize("model", ["llama", "wide"])
def test_twenty_losses_over_a_four_bit_base_agree_between_the_engines(model: str, quantization: dict, request):
    directory = request.getfixturevalue(model)
    curves = [losses(opened(name, directory, quantization), 20) for name in ENGINES]
    np.testing.assert_allclose(*curves, rtol=LOSS_TOLERANCE)
    assert curves[0][-1] < 0.7 * curves[0][0]  # it did train


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4, double", "fp4", "nf4 in bfloat16 words"])
def test_a_checkpoint_that_bitsandbytes_packed_is_trained_as_it_is(kind: str, dtype: str, stored: dict[str, Path]):
    check_model_folder(stored[kind])
    assert "model.layers.0.mlp.up_proj.weight.absmax" in tensor_names(stored[kind])
    engines = [opened(name, stored[kind], {}, dtype=dtype) for name in ENGINES]
    assert_same_base(*engines, "model.embed_tokens")
    curves = [losses(engine, 20) for engine in engines]
    # bfloat16 keeps 8 bits of each activation; the weights are equal.
    np.testing.assert_allclose(*curves, rtol=LOSS_TOLERANCE if dtype == "float32" else 0.02)


@pytest.mark.parametrize("name", ENGINES)
def test_a_packed_checkpoint_may_be_asked_for_as_what_it_is_and_as_nothing_else(name: str, stored: dict[str, Path]):
    opened(name, stored["nf4, double"], DOUBLE)
    with pytest.raises(UserError, match=r"quantization.load_in_4bit: .* holds bitsandbytes' 4-bit weights already"):
        opened(name, stored["nf4, double"], FP4)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("quantization", [NF4, DOUBLE], ids=["nf4", "double"])
def test_training_goes_on_after_an_evaluation(name: str, quantization: dict, wide: Path):
    """On CPUs with AVX512-BF16 bitsandbytes repacks its weights at the first evaluation, and the gradient is lost."""
    alone, interrupted = (opened(name, wide, quantization, dtype="bfloat16") for _ in range(2))
    expected = losses(alone, 8)
    found = losses(interrupted, 4)
    total_loss(interrupted, make_batches(), 3)
    assert found + losses(interrupted, 4, first=5) == expected
    assert all(weight.dtype == np.float32 for weight in interrupted.read_state().weights.values())


@pytest.mark.parametrize("name", ENGINES)
def test_gradient_checkpointing_over_a_four_bit_base_changes_nothing(name: str, llama: Path):
    plain, recomputed = (losses(opened(name, llama, DOUBLE, gradient_checkpointing=on), 3) for on in (False, True))
    np.testing.assert_allclose(plain, recomputed, rtol=2e-5)  # sums in another order


def test_dora_over_a_four_bit_base_agrees_between_the_engines(wide: Path, llama: Path):
    lora = LoraConfig(use_dora=True)
    np.testing.assert_allclose(*(losses(opened(name, wide, DOUBLE, lora=lora), 10) for name in ENGINES), rtol=1e-4)
    assert np.isfinite(losses(opened("mlx", llama, DOUBLE, lora=lora), 2)).all()
    with pytest.raises(UserError, match=r"use_dora: .* rows of 48 weights, no multiple of 64"):
        opened("torch", llama, DOUBLE, lora=lora)


def test_eight_bits_of_bitsandbytes_train_on_torch(wide: Path):
    exact, rounded = opened("torch", wide, {}), opened("torch", wide, {"load_in_8bit": True})
    for path in linear_paths(exact):
        weight = exact.base_weight(path)
        # A row in 127 steps up to its largest magnitude: half a step off, and a little for float16 on the way.
        allowed = np.abs(weight).max(axis=1, keepdims=True) / 127 * 0.57
        assert (np.abs(rounded.base_weight(path) - weight) <= allowed).all()
    expected = losses(exact, 8)
    np.testing.assert_allclose(losses(rounded, 4), expected[:4], rtol=0.02)  # 1% of noise on each weight
    total_loss(rounded, make_batches(), 3)
    np.testing.assert_allclose(losses(rounded, 4, first=5), expected[4:], rtol=0.05)


def test_a_checkpoint_of_eight_bits_trains_on_torch_and_is_refused_by_mlx(wide: Path, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wanted = BitsAndBytesConfig(load_in_8bit=True)
    AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16, quantization_config=wanted).save_pretrained(
        tmp_path
    )
    stored, made = opened("torch", tmp_path, {}), opened("torch", wide, {"load_in_8bit": True})
    np.testing.assert_allclose(losses(stored, 8), losses(made, 8), rtol=0.02)  # the one was bfloat16 before
    with pytest.raises(UserError, match=r"LLM.int8 rounds activations .* quantization: {bits: 8}"):
        opened("mlx", tmp_path, {})


def test_packed_weights_that_mlx_lm_would_cut_up_are_refused():
    import mlx.core as mx

    from mlx_backend.nf4 import Format, quantize
    from mlx_backend.stored import _put_in

    codes, scales = quantize(mx.ones((4, 64)), "nf4")
    with pytest.raises(ValueError, match="cuts or stacks"):
        _put_in(None, {"a.weight": codes[:1]}, {id(codes): (codes, scales, Format("nf4", (4, 64)))}, mx.float32)


def test_what_an_engine_cannot_hold_is_refused_with_what_can(llama: Path):
    with pytest.raises(UserError, match=r"load_in_8bit: LLM.int8 rounds activations .* quantization: {bits: 8}"):
        opened("mlx", llama, {"load_in_8bit": True})
    for quantization in ({"bits": 4}, {"mode": "mxfp4"}):
        with pytest.raises(UserError, match=r"torch can't read; write quantization: {load_in_4bit: true}"):
            opened("torch", llama, quantization)


MEMORY = """
import sys
from mlx_backend.blas import use_fast_blas
use_fast_blas()
import mlx.core as mx
import mlx.nn as nn
mx.set_default_device(mx.cpu)
"""

UNPACKED_AT_ONCE = (
    MEMORY
    + """
from mlx_backend.frozen import FourBitLinear
layers = []
for _ in range(12):
    layers.append(FourBitLinear.from_linear(nn.Linear(256, 256, bias=False), "nf4", True))
    mx.eval(layers[-1].parameters())

def loss(x):
    for layer in layers:
        x = mx.tanh(layer(x))
    return x.sum()

x = mx.ones((2, 256))
function = mx.value_and_grad(loss)
function = mx.compile(function) if sys.argv[1] == "compiled" else function
mx.clear_cache()
mx.reset_peak_memory()
before = mx.get_active_memory()
mx.eval(function(x))
print((mx.get_peak_memory() - before) / (256 * 256 * 4))
"""
)


@pytest.mark.parametrize("how", ["plain", "compiled"])
def test_no_unpacked_weight_lives_from_the_forward_to_the_backward_pass(how: str):
    """Of twelve layers, MLX's own gradient would hold twelve unpacked ones."""
    assert measured(UNPACKED_AT_ONCE, how) < 7  # the few steps of one or two unpackings


LOADED = (
    MEMORY
    + """
from pathlib import Path
from common.config import LoraConfig, QuantizationConfig
from mlx_backend.model import load_base
from mlx.utils import tree_flatten
mx.reset_peak_memory()
model = load_base(Path(sys.argv[1]), "bfloat16", QuantizationConfig(**eval(sys.argv[2])))
mx.eval(model.parameters())
print((mx.get_peak_memory() - sum(array.nbytes for _, array in tree_flatten(model.parameters()))) / 2**20)
"""
)


@pytest.fixture(scope="module")
def hundred_megabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 112 MB in bfloat16, its largest layer of 2 MB."""
    import torch

    torch.set_default_dtype(torch.bfloat16)
    try:
        return write_llama(
            tmp_path_factory.mktemp("large"), hidden_size=512, intermediate_size=2048, num_hidden_layers=18
        )
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("quantization", [DOUBLE, {"bits": 4}], ids=["nf4-double", "affine"])
def test_loading_needs_the_packed_model_and_one_layer(quantization: dict, hundred_megabytes: Path):
    """Beyond the packed model: one weight of 2 MB, and while half a million numbers are packed 8 arrays of 2 MB."""
    size = sum(path.stat().st_size for path in hundred_megabytes.glob("*.safetensors")) / 2**20
    assert size > 100
    assert measured(LOADED, str(hundred_megabytes), repr(quantization)) < 24


def measured(script: str, *arguments: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    return float(done.stdout)
