"""The loss of a frozen head on MLX, chunk by chunk: MLX's own gradient of the plain formula, in less memory."""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conversions import run_convert
from engines import make_batches, open_fresh
from tiny_models import write_family, write_llama

import mlx_backend.loss
from common.batches import BatchPlan
from common.config import LoraConfig
from common.engine import TrainState
from common.initial import initial_weights
from common.logits import TILE, AfterHead, chunk_rows
from common.trainer import total_loss
from mlx_backend.frozen import FourBitLinear
from mlx_backend.head import Head, find_head, output_head
from mlx_backend.loss import cross_entropy, frozen_head_loss, loss_alone, softmax_error

VOCABULARY, WIDTH, ROWS = 301, 32, 17


@pytest.fixture
def arrays() -> dict[str, mx.array]:
    rng = np.random.default_rng(0)
    return {
        "hidden": mx.array(rng.normal(size=(ROWS, WIDTH)).astype(np.float32)),
        "targets": mx.array(rng.integers(0, VOCABULARY, ROWS)),
        "counted": mx.array((np.arange(ROWS) % 3 > 0).astype(np.float32)),
        "weight": mx.array(rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)),
        "bias": mx.array(rng.normal(size=VOCABULARY).astype(np.float32)),
    }


def make_head(kind: str, arrays: dict[str, mx.array], after: AfterHead) -> Head:
    """Make a frozen head of random weights: linear, with a bias, a tied embedding, or packed in 4 bits."""
    if "embedding" in kind:
        module, method = nn.Embedding(VOCABULARY, WIDTH), "as_linear"
    else:
        module, method = nn.Linear(WIDTH, VOCABULARY, bias="bias" in kind), "__call__"
    module.update({name: arrays[name] for name in module.parameters()})
    module = module.to_quantized(group_size=32, bits=4) if "4 bits" in kind else module
    module = FourBitLinear.from_linear(module, "nf4", True) if "nf4" in kind else module
    return Head(module, getattr(type(module), method), VOCABULARY, after)


@pytest.mark.parametrize("after", [AfterHead(), AfterHead(factor=0.125), AfterHead(soft_cap=5.0)], ids=str)
def test_a_gpus_way_to_the_loss_is_a_cpus(
    after: AfterHead, arrays: dict[str, mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, counted = arrays["targets"], arrays["counted"]
    output = 9 * mx.random.normal((ROWS, VOCABULARY), key=mx.random.key(1))
    found = []
    for kind in (mx.cpu, mx.gpu):
        monkeypatch.setattr(mx, "default_device", lambda kind=kind: SimpleNamespace(type=kind))
        found.append(softmax_error(output, targets, counted, after))
    (loss, error), (loss_of_gpu, error_of_gpu) = found
    assert loss_of_gpu.item() == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(np.array(error_of_gpu), np.array(error), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("after", [AfterHead(), AfterHead(factor=0.125), AfterHead(soft_cap=5.0)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "bias", "embedding", "linear in 4 bits", "embedding in 4 bits", "nf4"])
def test_loss_and_gradient_are_those_of_the_plain_formula(
    rows: int, after: AfterHead, kind: str, arrays: dict[str, mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_backend.loss, "CHUNK_BYTES", 4 * VOCABULARY * rows)
    hidden, targets, counted, *_ = arrays.values()
    head = make_head(kind, arrays, after)

    def plain(hidden: mx.array) -> mx.array:
        return 2 * (cross_entropy(head(hidden), targets) * counted).sum()

    def chunked(hidden: mx.array) -> mx.array:
        return 2 * frozen_head_loss(head)(hidden, targets, counted, head.arrays)[0]

    (expected, gradient), (found, ours) = (mx.value_and_grad(function)(hidden) for function in (plain, chunked))
    np.testing.assert_allclose(found.item(), expected.item(), rtol=1e-6)
    np.testing.assert_allclose(2 * loss_alone(hidden, targets, counted, head).item(), expected.item(), rtol=1e-6)
    # Float32 sums of 301 terms in another order.
    np.testing.assert_allclose(np.array(ours), np.array(gradient), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_mlx_lm_quantised_goes_in_chunks(tied: bool, tmp_path: Path) -> None:
    write_llama(tmp_path / "base", tied=tied, hidden_size=64, intermediate_size=128)
    run_convert(tmp_path / "base", tmp_path / "packed", to="mlx", bits=4)
    engine = open_fresh("mlx", tmp_path / "packed")
    assert isinstance(output_head(engine._model)[1], nn.QuantizedEmbedding if tied else nn.QuantizedLinear)
    assert engine._loss._head is not None
    plan = BatchPlan(make_batches(), 4, 1, 42, 2)
    found = engine.fetch(engine.train_step(plan.step_batch(1), 5e-3))
    engine._loss._head = None  # the plain way
    engine.load_state(TrainState.fresh(initial_weights(engine.adapter_shapes(), 42)))
    expected = engine.fetch(engine.train_step(plan.step_batch(1), 5e-3))
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {}, AfterHead()),
        ("gemma2", {"final_logit_softcapping": 3.0}, AfterHead(soft_cap=3.0)),
        ("granite", {"logits_scaling": 4.0}, AfterHead(factor=0.25)),
    ],
)
def test_what_follows_the_head_is_found_by_measuring(
    family: str, settings: dict, expected: AfterHead, tmp_path: Path
) -> None:
    engine = open_fresh("mlx", write_family(tmp_path, family, **settings))
    config = {"model_type": family, **settings}
    head = find_head(engine._model, engine._selection, config, "float32")
    assert head is not None and head.after == expected
    assert (
        find_head(engine._model, engine._selection, {"final_logit_softcapping": 0.7}, "float32") is None or not settings
    )


def test_a_head_that_is_trained_takes_the_plain_way(llama: Path) -> None:
    for lora in (LoraConfig(target_modules=["q_proj", "lm_head"]), LoraConfig(modules_to_save=["lm_head"])):
        engine = open_fresh("mlx", llama, lora)
        assert find_head(engine._model, engine._selection, {}, "float32") is None


def test_small_chunks_train_and_evaluate_as_one_large_one(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = BatchPlan(make_batches(), 4, 1, 42, 2)
    curves = []
    for size in (2**28, 4 * 416 * 5):
        monkeypatch.setattr(mlx_backend.loss, "CHUNK_BYTES", size)
        engine = open_fresh("mlx", llama)
        results = [engine.fetch(engine.train_step(plan.step_batch(step), 5e-3)) for step in range(1, 6)]
        curves.append([result.loss_sum for result in results] + [total_loss(engine, make_batches(), 4)[0]])
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-5)


def test_memory_holds_one_chunk_and_not_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 2048, 8192  # 67 MB of float32 logits, four times over in MLX's own gradient
    monkeypatch.setattr(mlx_backend.loss, "CHUNK_BYTES", 4 * vocabulary * 64)
    hidden, weight = mx.random.normal((rows, 32)), mx.random.normal((vocabulary, 32))
    targets, counted = mx.zeros(rows, mx.int32), mx.ones(rows)
    mx.eval(hidden, weight, targets, counted)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    linear = nn.Linear(32, vocabulary, bias=False)
    linear.weight = weight
    function = frozen_head_loss(Head(linear, nn.Linear.__call__, vocabulary, AfterHead()))
    mx.eval(mx.value_and_grad(lambda each: function(each, targets, counted, {"weight": weight})[0])(hidden))
    # A chunk's logits, exponentials and errors are 2 MB each; all logits would be 67.
    assert mx.get_peak_memory() - before < 30e6


@pytest.mark.parametrize(
    ("rows_that_fit", "expected"), [(0.5, 1), (1, 1), (TILE, TILE), (TILE + 5, TILE), (5 * TILE - 1, 4 * TILE)]
)
def test_a_chunk_has_whole_tiles_of_rows_where_it_holds_any(rows_that_fit: float, expected: int) -> None:
    assert chunk_rows(VOCABULARY, int(rows_that_fit * 4 * VOCABULARY)) == expected
