"""The 4-bit codec on MLX, bit for bit bitsandbytes': against its own functions, and against files it wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden.four_bit import CASES, PATH, digest, made_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from common.base.four_bit import CODE_BOOKS, NESTED_BLOCK, WeightDescription, dynamic_code, nest_scales

DTYPES = ("float32", "bfloat16", "float16")


def packed_by_mlx(weight: np.ndarray, quant_type: str, double: bool, dtype: str = "bfloat16"):
    import mlx.core as mx

    from mlx_backend.nf4 import quantize

    return quantize(mx.array(weight).astype(getattr(mx, dtype)), quant_type, double)


def unpacked_by_mlx(packed, scales, quant_type: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    import mlx.core as mx

    from mlx_backend.nf4 import Format, dequantize

    dense = dequantize(packed, scales, Format(quant_type, shape), getattr(mx, dtype))
    assert dense.dtype == getattr(mx, dtype)
    return np.array(dense.astype(mx.float32))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", CASES)
def test_codes_scales_and_weights_are_those_that_bitsandbytes_wrote_down(name: str, quant_type: str, double: bool):
    golden = json.loads(PATH.read_text())[f"{name}, {quant_type}{', double' * double}"]
    weight = made_weight(*CASES[name])
    packed, scales = packed_by_mlx(weight, quant_type, double)
    found = {"packed": packed, "absmax": scales.absmax}
    if double:
        found |= {"nested_absmax": scales.nested_absmax, "nested_offset": scales.nested_offset}
    digests = {key: digest(np.array(array)) for key, array in found.items()}
    for dtype in DTYPES:
        digests[dtype] = digest(unpacked_by_mlx(packed, scales, quant_type, weight.shape, dtype).reshape(-1))
    assert digests == golden


def test_a_weight_of_several_parts_is_packed_as_one(monkeypatch: pytest.MonkeyPatch):
    from mlx_backend import nf4

    weight = made_weight(*CASES["short last block"])
    packed, scales = packed_by_mlx(weight, "nf4", False)
    monkeypatch.setattr(nf4, "PART", nf4.BLOCK)
    parts, other_scales = packed_by_mlx(weight, "nf4", False)
    np.testing.assert_array_equal(np.array(parts), np.array(packed))
    np.testing.assert_array_equal(np.array(other_scales.absmax), np.array(scales.absmax))


# Up to four rows of up to 150 numbers, each row of its own magnitude: shapes with odd blocks come by themselves.
MAGNITUDES = st.sampled_from([0.0, 1e-30, 1e-6, 0.02, 1.0, 3e3])  # below float16's infinity


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 150),
    st.lists(MAGNITUDES, min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.sampled_from(DTYPES),
    st.sampled_from(["nf4", "fp4"]),
)
def test_any_weight_is_packed_and_unpacked_as_bitsandbytes_does(columns, magnitudes, seed, dtype, quant_type):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    rows = np.random.default_rng(seed).normal(0, 1, (len(magnitudes), columns)) * np.array(magnitudes)[:, None]
    weight = torch.from_numpy(rows.astype(np.float32)).to(getattr(torch, dtype))
    codes, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=False)
    packed, scales = packed_by_mlx(weight.float().numpy(), quant_type, False, dtype)
    np.testing.assert_array_equal(np.array(packed), codes.reshape(-1).numpy())
    np.testing.assert_array_equal(np.array(scales.absmax), state.absmax.numpy())
    state.shape = torch.Size((1, 2 * codes.numel()))  # an odd one makes bitsandbytes compile, for seconds
    for other in DTYPES:
        state.dtype = getattr(torch, other)
        dense = functional.dequantize_4bit(codes, state).float().numpy().reshape(-1)
        expected = dense[: weight.numel()].reshape(weight.shape)
        found = unpacked_by_mlx(packed, scales, quant_type, tuple(weight.shape), other)
        np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 700), st.floats(1e-6, 1e4), st.integers(0, 2**32 - 1))
def test_scales_are_rounded_to_8_bits_as_bitsandbytes_rounds_them(count, magnitude, seed):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    absmax = (np.abs(np.random.default_rng(seed).normal(1, 0.5, count)) * magnitude).astype(np.float32)
    nested = nest_scales(absmax)
    codes, state = functional.quantize_blockwise(torch.from_numpy(absmax - nested.offset), blocksize=NESTED_BLOCK)
    np.testing.assert_array_equal(nested.codes, codes.numpy())
    np.testing.assert_array_equal(nested.scales, state.absmax.numpy())
    assert nested.offset == pytest.approx(absmax.mean(), rel=1e-6)  # its mean differs in the last bit, by the machine


def test_scales_of_one_value_have_nothing_left_beside_their_mean():
    nested = nest_scales(np.full(300, 0.125, np.float32))
    assert nested.offset == 0.125
    assert not nested.codes.any()
    assert not nested.scales.any()


def test_code_books_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for quant_type, book in CODE_BOOKS.items():
        np.testing.assert_array_equal(book, functional.get_4bit_type(quant_type, "cpu").numpy())
    np.testing.assert_array_equal(dynamic_code(), functional.create_dynamic_map().numpy())


def test_a_description_of_another_format_is_refused():
    fields = {"quant_type": "int4", "shape": [4, 4], "blocksize": 64}
    with pytest.raises(ValueError, match="int4"):
        WeightDescription.parse(np.frombuffer(json.dumps(fields).encode(), np.uint8))


def test_golden_weights_hold_zero_and_constant_blocks():
    weight = made_weight(*CASES["many"]).reshape(-1)
    blocks = weight.reshape(-1, 64)
    assert (blocks == blocks[:, :1]).all(axis=1).any()
    assert (weight == 0).any()
    assert Path(PATH).stat().st_size < 100_000
