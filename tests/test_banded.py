"""Attention of all blocks of a row at once on MLX: the plain formula's numbers, where queries look back a short way."""

import mlx.core as mx
import numpy as np
import pytest
from plain_attention import HEADS, ROWS, VALUE_WIDTH, arrays, plain, sight_and_mask, values_of

import mlx_backend.band
import mlx_backend.banded
import mlx_backend.long_rows
from mlx_backend.band import Band, band_of
from mlx_backend.banded import banded_attention
from mlx_backend.blockwise import Sight
from mlx_backend.long_rows import attend

KINDS = ["window", "segments of known reach", "segments and window", "continued", "continued and window"]


def band(sight: Sight, length: int, number: int, size: int) -> Band:
    """Make a band with blocks of so many queries, be it narrow or not."""
    return Band(length, number, size, -(-(sight.furthest(length) - 1) // size), min(sight.shared, length))


@pytest.mark.parametrize(("length", "size"), [(1, 4), (5, 1), (8, 4), (37, 1), (37, 4), (37, 16), (37, 64)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("with_sinks", "soft_cap"), [(False, None), (True, 1.5)])
@pytest.mark.parametrize("passing", [2**27, 200])  # all at once, and some of 200 scores or a block at a time
def test_output_and_gradients_are_those_of_the_plain_formula(
    kind, length, size, with_sinks, soft_cap, passing, monkeypatch
):
    monkeypatch.setattr(mlx_backend.banded, "PASSING", passing)
    compare(kind, length, length, size, with_sinks, soft_cap)


@pytest.mark.parametrize("number", [1, 9, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_queries_alone_give_what_they_give_among_all(kind, number):
    compare(kind, 37, number, 4, True, None)


def compare(kind: str, length: int, number: int, size: int, with_sinks: bool, soft_cap: float | None) -> None:
    rng = np.random.default_rng(length)
    sight, mask = sight_and_mask(kind, length, rng)
    queries, *others = arrays(length, rng)
    towards = mx.array(rng.normal(size=(ROWS, HEADS, number, VALUE_WIDTH)).astype(np.float32))
    within = band(sight, length, number, size)

    def ours(q, k, v, sinks):
        found = banded_attention(q, k, v, 0.3, sight, within, sinks if with_sinks else None, soft_cap)
        return (found * towards).sum()

    def expected(q, k, v, sinks):
        whole = mx.concatenate([queries[:, :, : length - number], q], axis=2)
        found = plain(whole, k, v, sinks if with_sinks else None, 0.3, mx.array(mask), soft_cap)
        return (found[:, :, length - number :] * towards).sum()

    inputs = [queries[:, :, length - number :], *others]
    for found, right in zip(*(values_of(each, inputs) for each in (ours, expected)), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=2e-5)  # sums of a hundred float32 terms


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_near_and_stays_half(dtype: mx.Dtype) -> None:
    sight, _ = sight_and_mask("continued", 37, np.random.default_rng(0))
    inputs = arrays(37, np.random.default_rng(0))[:3]
    within = band(sight, 37, 37, 4)

    def gradients(inputs: list[mx.array]) -> tuple[mx.array, ...]:
        return mx.grad(lambda *each: mx.square(banded_attention(*each, 0.3, sight, within)).sum(), [0, 1, 2])(*inputs)

    for found, exact in zip(gradients([each.astype(dtype) for each in inputs]), gradients(inputs), strict=True):
        assert found.dtype == dtype
        bound = 0.02 * mx.abs(exact).max().item()  # a handful of roundings to 8 bits
        np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(exact), atol=bound)


@pytest.mark.parametrize(
    ("sight", "length", "shape"),
    [
        (Sight(window=128), 2048, (128, 1, 0)),
        (Sight(window=130), 2048, (128, 2, 0)),
        (Sight(segment_ids=mx.zeros((1, 2048)), reach=1024, window=2048), 2048, (256, 4, 0)),
        (Sight(window=4096), 16384, (512, 8, 0)),
        (Sight(segment_ids=mx.zeros((1, 2048)), reach=128, shared=64), 2048, (128, 1, 64)),
        (Sight(segment_ids=mx.zeros((1, 2048)), reach=2048), 2048, None),
        (Sight(window=128, allowed=mx.ones((1, 1, 2048, 2048), mx.bool_)), 2048, None),
        (Sight(window=128, causal=False), 2048, None),
        (Sight(), 2048, None),
    ],
)
def test_a_band_is_made_where_it_is_narrower_than_the_row(sight, length, shape):
    found = band_of(sight, length, length)
    assert (found and (found.size, found.before, found.shared)) == shape


def test_it_compiles_with_its_gradient_inside_a_checkpoint() -> None:
    q, k, v, sinks = arrays(6, np.random.default_rng(0))  # few blocks: every other fused kernel is a second of g++
    ids = mx.array([[1, 1, 2, 2, 2, 3]] * ROWS)
    told = mx.array([[-1, -1, 1, 1, 1, 1]] * ROWS), mx.array([[0, 1, 2, 3, 4, 2]] * ROWS)

    def loss(q: mx.array, k: mx.array, sinks: mx.array, ids: mx.array, *told: mx.array) -> mx.array:
        sight = Sight(segment_ids=ids, reach=3, shared=2, continued=told[0], positions=told[1])
        within = band(sight, 6, 6, 2)
        attention = mx.checkpoint(lambda q, k, sinks: banded_attention(q, k, v, 0.3, sight, within, sinks))
        return mx.square(attention(q, k, sinks)).sum()

    gradient = mx.value_and_grad(loss, [0, 1, 2])
    (found, of_found), (right, of_right) = (each(q, k, sinks, ids, *told) for each in (mx.compile(gradient), gradient))
    for one, other in zip((found, *of_found), (right, *of_right), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5)  # fused work rounds otherwise


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_keep_no_scores_and_no_copies(compiled: bool) -> None:
    q, k = (mx.random.normal((1, heads, 1024, 4)) for heads in (4, 2))
    scores = 4 * 4 * 1024 * 256  # bytes of a layer's

    def peak(layers: int) -> int:
        def loss(q: mx.array, k: mx.array) -> mx.array:
            for _ in range(layers):
                q = mx.sin(q + banded_attention(q, k, k, 0.3, Sight(window=128), Band(1024, 1024, 128, 1, 0)))
            return mx.square(q).sum()

        gradient = mx.value_and_grad(loss, [0, 1])
        gradient = mx.compile(gradient) if compiled else gradient
        mx.eval(gradient(q, k))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(gradient(q, k))
        return mx.get_peak_memory() - before

    few, many = peak(2), peak(10)
    print(f"{few / scores:.2f} arrays of scores with two layers, {many / scores:.2f} with ten")
    assert (many - few) / 8 < 0.25 * scores


def test_a_cpu_goes_block_by_block_and_a_gpu_all_at_once_where_rows_are_long(monkeypatch):
    called: list[str] = []
    for name in ("banded_attention", "blockwise_attention"):
        monkeypatch.setattr(mlx_backend.long_rows, name, lambda *_, name=name: called.append(name))
    long, short = (mx.zeros((1, 1, length, 4)) for length in (1024, 512))
    plain, narrow, wide = Sight(), Sight(window=128), Sight(window=1000)
    for on_gpu, kernel in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(mlx_backend.long_rows, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(mlx_backend.long_rows, "_has_backward_kernel", lambda *_, kernel=kernel: kernel)
        for sight in (plain, narrow, wide):
            attend(long, long, long, None, 1.0, sight)
            attend(short, short, short, None, 1.0, sight)  # MLX's own
    blockwise, banded = "blockwise_attention", "banded_attention"
    assert called == [*3 * [blockwise], *(blockwise, banded, blockwise), *(banded, blockwise)]


def test_a_mask_makes_no_empty_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX 0.32 crashes on CUDA where it computes one; a row that shares no beginning has no first keys to show."""
    made: list[int] = []
    plain = mx.arange

    def arange(*limits: int) -> mx.array:
        array = plain(*limits)
        made.append(array.size)
        return array

    monkeypatch.setattr(mx, "arange", arange)
    found = band_of(Sight(window=7), 1024, 1024)
    assert found is not None and found.mask(Sight(window=7), 2).shape == (2 * found.count, 1, found.size, found.width)
    assert made and min(made) > 0
