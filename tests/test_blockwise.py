"""Attention without L x L scores on MLX: the plain formula's numbers, in memory that grows with L."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from engines import make_batches, open_fresh
from plain_attention import HEADS, ROWS, VALUE_WIDTH, arrays, plain, sight_and_mask, values_of
from tiny_models import FAMILIES, write_family

import mlx_backend.blockwise
import mlx_backend.long_rows
from common.batches import BatchPlan
from common.engine import TrainState
from mlx_backend.blockwise import Sight, blockwise_attention
from mlx_backend.long_rows import attend, calls_attend
from mlx_backend.tree import decoder_layers

KINDS = [
    *("causal", "all", "window", "segments", "segments of known reach", "segments and window"),
    *("continued", "continued and window", "any", "any by head"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("BLOCK", 8), ("SMALLEST_BLOCK", 4), ("LARGEST_BLOCK", 8)):
        monkeypatch.setattr(mlx_backend.blockwise, name, size)


@pytest.mark.parametrize("length", [1, 5, 8, 37])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("with_sinks", "soft_cap"), [(False, None), (True, 1.5)])
def test_output_and_gradients_are_those_of_the_plain_formula(kind, length, with_sinks, soft_cap):
    rng = np.random.default_rng(length)
    sight, mask = sight_and_mask(kind, length, rng)
    inputs = arrays(length, rng)
    towards = mx.array(rng.normal(size=(ROWS, HEADS, length, VALUE_WIDTH)).astype(np.float32))

    def ours(q, k, v, sinks):
        return (blockwise_attention(q, k, v, 0.3, sight, sinks if with_sinks else None, soft_cap) * towards).sum()

    def expected(q, k, v, sinks):
        return (plain(q, k, v, sinks if with_sinks else None, 0.3, mx.array(mask), soft_cap) * towards).sum()

    for found, right in zip(*(values_of(each, inputs) for each in (ours, expected)), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=2e-5)  # sums of a hundred float32 terms
    np.testing.assert_array_equal(  # the same, written out for attention that takes an array
        np.broadcast_to(np.array(sight.dense(length, length)), mask.shape), mask
    )


@pytest.mark.parametrize("number", [1, 9, 20])
@pytest.mark.parametrize("kind", ["causal", "window", "any by head"])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_the_last_queries_alone_give_what_they_give_among_all(kind, number, soft_cap):
    rng = np.random.default_rng(number)
    sight, mask = sight_and_mask(kind, 37, rng)
    queries, *others = arrays(37, rng)
    of_last = sight if sight.allowed is None else replace(sight, allowed=sight.allowed[..., -number:, :])
    towards = mx.array(rng.normal(size=(ROWS, HEADS, number, VALUE_WIDTH)).astype(np.float32))

    def ours(q, k, v, sinks):
        return (blockwise_attention(q, k, v, 0.3, of_last, sinks, soft_cap) * towards).sum()

    def expected(q, k, v, sinks):
        whole = mx.concatenate([queries[:, :, :-number], q], axis=2)
        return (plain(whole, k, v, sinks, 0.3, mx.array(mask), soft_cap)[:, :, -number:] * towards).sum()

    inputs = [queries[:, :, -number:], *others]
    for found, right in zip(*(values_of(each, inputs) for each in (ours, expected)), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("long", [4, 512])
def test_a_mask_for_all_positions_is_cut_to_the_last_queries(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_backend.long_rows, "LONG", long)
    rng = np.random.default_rng(0)
    sight, mask = sight_and_mask("any by head", 37, rng)
    q, k, v, _ = arrays(37, rng)
    # A query that sees nothing is MLX's own to define.
    sees = mask[:, :, -9:].any(axis=-1, keepdims=True)
    for given in (sight, mx.array(mask)):
        found = np.where(sees, np.array(attend(q[:, :, -9:], k, v, None, 0.3, given)), 0)
        expected = plain(q, k, v, None, 0.3, mx.array(mask), None)[:, :, -9:]
        np.testing.assert_allclose(found, np.array(expected), atol=2e-5)  # sums of some float32 terms


def test_queries_that_see_nothing_give_zero_and_take_no_gradient() -> None:
    q, k, v, _ = arrays(11, np.random.default_rng(0))
    hidden = Sight(allowed=mx.zeros((1, 1, 11, 11), mx.bool_))
    out, gradients = mx.value_and_grad(lambda *each: blockwise_attention(*each, 1.0, hidden).sum(), [0, 1, 2])(q, k, v)
    assert out.item() == 0 and not any(np.array(each).any() for each in gradients)


def test_scores_far_from_zero_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    q, k, v, _ = arrays(37, rng)
    ours = blockwise_attention(100 * q, k, v, 1.0)  # exp of such scores is inf
    expected = mx.fast.scaled_dot_product_attention(100 * q, k, v, scale=1.0, mask="causal")
    np.testing.assert_allclose(np.array(ours), np.array(expected), atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_near_and_stays_half(dtype: mx.Dtype) -> None:
    q, k, v, _ = arrays(37, np.random.default_rng(0))
    exact = mx.grad(lambda q: mx.square(blockwise_attention(q, k, v, 0.3)).sum())(q)
    half = [each.astype(dtype) for each in (q, k, v)]
    found = mx.grad(lambda q: mx.square(blockwise_attention(q, *half[1:], 0.3)).sum())(half[0])
    assert found.dtype == dtype
    bound = 0.02 * mx.abs(exact).max().item()  # a handful of roundings to 8 bits
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(exact), atol=bound)


@pytest.mark.parametrize(
    ("sight", "pairs"),
    [
        (Sight(causal=False), 25),
        (Sight(), 15),
        (Sight(window=8), 9),  # one back, and its own
        (Sight(window=9), 9),
        (Sight(window=10), 12),  # whose oldest key may be two back
        (Sight(segment_ids=mx.zeros((1, 40)), reach=8), 9),
        (Sight(window=4, segment_ids=mx.zeros((1, 40)), reach=8), 19),  # of half the size, ten a side
    ],
)
def test_blocks_that_nobody_sees_are_left_out(sight: Sight, pairs: int) -> None:
    assert sum(len(seen) for _, seen in sight.blocks(40, 40)) == pairs


def test_it_compiles_with_packed_rows_inside_a_checkpoint() -> None:
    q, k, v, _ = arrays(6, np.random.default_rng(0))  # one block: every other fused kernel is a second of g++
    ids = mx.array([[1, 1, 2, 2, 2, 3]] * ROWS)

    def loss(q: mx.array, ids: mx.array) -> mx.array:
        attention = mx.checkpoint(lambda q: blockwise_attention(q, k, v, 0.3, Sight(segment_ids=ids, reach=3)))
        return mx.square(attention(q)).sum()

    gradient = mx.grad(loss)
    np.testing.assert_allclose(np.array(mx.compile(gradient)(q, ids)), np.array(gradient(q, ids)), atol=1e-5)


def test_gradients_are_computed_on_the_stream_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    device = mx.Device(mx.cpu)
    stream, seen = mx.new_stream(device), []
    backward = mlx_backend.blockwise.backward
    monkeypatch.setattr(
        mlx_backend.blockwise, "backward", lambda *each: seen.append(mx.default_stream(device)) or backward(*each)
    )

    def loss(q: mx.array) -> mx.array:
        with mx.stream(stream):
            return blockwise_attention(q, q, q, 1.0).sum()

    mx.eval(mx.grad(loss)(mx.ones((1, 1, 4, 4))))
    assert seen == [stream]


@pytest.mark.parametrize(
    ("family", "packing"),
    [(name, False) for name in FAMILIES] + [(name, True) for name in ("llama", "mistral", "gemma2", "gpt_oss")],
)
def test_every_architecture_trains_alike_with_long_and_with_short_rows(family, packing, tmp_path, monkeypatch):
    base = write_family(tmp_path, family)
    longest = FAMILIES[family].max_seq_length
    plan = BatchPlan(make_batches(14), 3, 1, 0, 1, capacity=min(120, longest) if packing else None)
    calls: list[int] = []
    original = mlx_backend.long_rows.blockwise_attention
    monkeypatch.setattr(
        mlx_backend.long_rows,
        "blockwise_attention",
        lambda *each, **named: calls.append(each[0].shape[2]) or original(*each, **named),
    )
    found = []
    for long in (10**6, 4):
        monkeypatch.setattr(mlx_backend.long_rows, "LONG", long)
        settings = {"packing": packing, "gradient_checkpointing": packing and long == 4, "max_seq_length": longest}
        engine = open_fresh("mlx", base, max_grad_norm=0, **settings)
        rng = np.random.default_rng(1)
        shapes = engine.adapter_shapes().items()
        engine.load_state(TrainState.fresh({key: rng.normal(0, 0.1, of).astype(np.float32) for key, of in shapes}))
        calls.clear()
        result = engine.fetch(engine.train_step(plan.step_batch(1), 1e-3))
        assert bool(calls) == (long == 4 or family == "gemma2")  # no kernel has its soft cap
        found.append((result.loss_sum, engine.read_state().moment1))
        # Packing puts a function of its own where `attend` is called.
        attentions = [layer.self_attn for layer in decoder_layers(engine._model) if "self_attn" in layer]
    assert packing or all(map(calls_attend, attentions))
    assert found[1][0] == pytest.approx(found[0][0], rel=2e-6)
    for key, expected in found[0][1].items():
        np.testing.assert_allclose(found[1][1][key], expected, atol=3e-5 * np.abs(expected).max(), rtol=0)


def test_numbers_added_to_scores_keep_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_backend.long_rows, "LONG", 4)
    q, k, v, _ = arrays(11, np.random.default_rng(0))
    bias = mx.random.normal((1, HEADS, 11, 11))
    found = mx.grad(lambda bias: attend(q, k, v, None, 1.0, bias).sum())(bias)
    assert mx.abs(found).max().item() > 1e-3


@pytest.mark.parametrize(
    ("mask", "lengths"), [("causal", [1, 2, 4, 8]), (Sight(window=128), [1, 2, 4, 8, 16])], ids=str
)
def test_memory_grows_with_the_length_and_not_with_its_square(mask, lengths, monkeypatch):
    monkeypatch.undo()  # the blocks of real runs
    peaks = []
    for length in [1024 * each for each in lengths]:
        q, k, v = (mx.random.normal((1, 1, length, 8)) for _ in range(3))
        mx.eval(q, k, v)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(lambda *each: attend(*each, None, 1.0, mask).sum(), argnums=[0, 1, 2])(q, k, v))
        peaks.append((mx.get_peak_memory() - before) / 1e6)
    print(mask, [f"{1024 * each}: {peak:.2f} MB" for each, peak in zip(lengths, peaks, strict=True)])
    # How far the host runs ahead of a busy CPU moves a peak by some blocks; L x L would make the power 2.
    power, _ = np.polyfit(np.log(lengths), np.log(peaks), 1)
    assert power < 1.1
    assert peaks[-1] < 0.05 * 4e-6 * (1024 * lengths[-1]) ** 2  # one L x L in float32
