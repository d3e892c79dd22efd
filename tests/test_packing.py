"""Packed rows train what the same examples train one by one, on both engines and for every kind of attention."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import ENGINES, Step, gradient_of, make_batches, open_fresh
from tiny_models import FAMILIES, write_family

from common.batches import BatchPlan
from common.data.tokens import TokenDataset
from common.engine import StepBatch
from common.errors import UserError
from common.layout import make_micro_batch
from common.sampling import Sampling
from common.segments import end_to_end

# The sum of some hundred float32 terms, in another order.
LOSS_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 2e-5  # of the largest entry of a tensor


PACKED = [(engine, name) for engine in ENGINES for name, family in FAMILIES.items() if engine in family.packs_on]
UNPACKED = [(engine, name) for engine in ENGINES for name, family in FAMILIES.items() if engine not in family.packs_on]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: write_family(folder / name, name) for name in FAMILIES}


@pytest.mark.parametrize(
    ("name", "family", "checkpointing"),
    [
        *((engine, family, False) for engine, family in PACKED),
        *((engine, family, True) for engine in ENGINES for family in ("llama", "gemma2")),
    ],
)
def test_loss_and_gradient_are_those_of_the_examples_one_by_one(name, family, checkpointing, checkpoints):
    longest = FAMILIES[family].max_seq_length
    settings = {"packing": True, "gradient_checkpointing": checkpointing, "max_grad_norm": 0, "max_seq_length": longest}
    engine = open_fresh(name, checkpoints[family], **settings)
    for beginning in (0, 12):
        data = make_batches(14, beginning=beginning)
        plan = BatchPlan(data, 2, 2, 0, 1, capacity=min(120, longest), prefix_sharing=True)
        assert plan.prefixes.lengths.tolist() == [beginning] * 14
        packed = plan.step_batch(1)
        assert max(micro.segment_ids.max() for micro in packed.micro_batches) > 1 + (beginning > 0)
        compare(*(gradient_of(engine, batch) for batch in (packed, one_by_one(data, packed))))


def one_by_one(data: TokenDataset, batch: StepBatch) -> StepBatch:
    """Give each example of a step a row and a micro-batch of its own."""
    return replace(batch, micro_batches=tuple(make_micro_batch(data, [[example]]) for example in batch.examples))


def compare(found: Step, expected: Step, tolerance: float = GRADIENT_TOLERANCE) -> None:
    """Hold loss and gradients of two steps to be the same sums."""
    assert found[0] == pytest.approx(expected[0], rel=LOSS_TOLERANCE)
    for key, tensor in expected[1].items():
        largest = np.abs(tensor).max()
        assert largest > 1e-6
        np.testing.assert_allclose(found[1][key], tensor, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize(("name", "family"), UNPACKED)
def test_packing_is_refused_where_examples_can_not_be_kept_apart(name, family, checkpoints):
    with pytest.raises(UserError, match="packing: false"):
        open_fresh(name, checkpoints[family], packing=True)


@pytest.mark.parametrize("name", ENGINES)
def test_no_example_sees_the_one_before_it(name, checkpoints):
    engine = open_fresh(name, checkpoints["llama"], packing=True)
    data = make_batches(3)

    def second_example_loss(first: int) -> float:
        batch = make_micro_batch(data, [[first, 2]])
        batch.loss_mask[batch.segment_ids != 2] = False
        return engine.fetch(engine.eval_step(batch)).loss_sum

    assert second_example_loss(0) == pytest.approx(second_example_loss(1), rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3_moe"])
def test_torch_does_not_ask_the_device_whether_rows_are_packed(family, checkpoints, monkeypatch):
    engine = open_fresh("torch", checkpoints[family])
    expected = list(engine.generate([[5, 9, 11], [6]], Sampling(4)))

    def ask(*_: object) -> None:
        raise AssertionError("the host would wait for the device")

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", ask)
    batch = BatchPlan(make_batches(4), 2, 2, 0, 1).step_batch(1)
    assert np.isfinite(engine.fetch(engine.train_step(batch, 0.0)).loss_sum)
    engine.fetch(engine.eval_step(batch.micro_batches[0]))
    assert list(engine.generate([[5, 9, 11], [6]], Sampling(4))) == expected  # by transformers' own masks


def test_a_window_that_torch_models_write_into_their_mask_alone_is_kept(tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    model, data = write_family(tmp_path, "qwen2_moe", **window), make_batches(12)
    for packing in (False, True):
        engine = open_fresh("torch", model, packing=packing, max_grad_norm=0)
        ids, mask = data.tokens(3), data.mask(3)
        logits = torch.from_numpy(engine.logits(ids[None, :-1])[0])  # by transformers' own masks
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:].astype(np.int64)), reduction="none")
        assert len(ids) > 2 * window["sliding_window"]
        found = engine.fetch(engine.eval_step(make_micro_batch(data, [[3]]))).loss_sum
        assert found == pytest.approx(losses.numpy()[mask[1:]].sum(), rel=LOSS_TOLERANCE)
    packed = BatchPlan(data, 2, 2, 0, 1, capacity=120).step_batch(1)
    compare(*(gradient_of(engine, batch) for batch in (packed, one_by_one(data, packed))))


@pytest.mark.parametrize("name", ENGINES)
def test_generation_is_as_without_packing(name, checkpoints):
    prompts = [[5, 9, 11, 40, 3, 7, 20, 21, 22, 23], [6, 7]]
    packing, plain = (open_fresh(name, checkpoints["gemma3_text"], packing=packing) for packing in (True, False))
    list(packing.generate(prompts, Sampling(3)))
    packing.fetch(packing.eval_step(make_micro_batch(make_batches(3), [[0, 1, 2]])))
    assert list(packing.generate(prompts, Sampling(8))) == list(plain.generate(prompts, Sampling(8)))


@pytest.mark.parametrize("family", [family for engine, family in PACKED if engine == "mlx"])
def test_mask_and_side_by_side_attend_alike_on_mlx(family, checkpoints, monkeypatch):
    import mlx.core as mx

    from common.config import QuantizationConfig
    from mlx_backend.arrangement import Masked, SideBySide, masking
    from mlx_backend.attention import separate_examples
    from mlx_backend.model import choose_device, load_base

    choose_device("cpu")
    model = load_base(checkpoints[family], "float32", QuantizationConfig())
    packing = separate_examples(model, checkpoints[family])
    (row,) = end_to_end(make_micro_batch(make_batches(5), [range(5)]))
    masked = Masked(masking(row))

    def logits(arrangement: Masked | SideBySide) -> np.ndarray:
        with packing.follow(arrangement):
            return np.array(model(mx.array(row.token_ids)))

    plain, beside = logits(masked), logits(SideBySide(row))
    monkeypatch.setattr("mlx_backend.long_rows.LONG", 4)
    for name, size in (("BLOCK", 16), ("SMALLEST_BLOCK", 8)):
        monkeypatch.setattr(f"mlx_backend.blockwise.{name}", size)
    # Positions restart in one and not in the other: rotations by angles a hundred times as large.
    np.testing.assert_allclose(plain, beside, atol=2e-4 * np.abs(beside).max(), rtol=0)
    np.testing.assert_allclose(logits(masked), plain, atol=2e-5 * np.abs(beside).max(), rtol=0)  # as on a Mac


@pytest.mark.parametrize("beginning", [0, 12])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "olmo3", "gpt_oss"])
def test_the_way_of_a_card_trains_alike_on_mlx(family, beginning, checkpoints, monkeypatch):
    from mlx_backend.banded import banded_attention

    data = make_batches(14, beginning=beginning)
    plan = BatchPlan(data, 2, 2, 0, 1, capacity=120, prefix_sharing=True)
    results, called = [], []
    monkeypatch.setattr("mlx_backend.band.SMALLEST_BLOCK", 8)
    for name, size in (("BLOCK", 16), ("SMALLEST_BLOCK", 8)):
        monkeypatch.setattr(f"mlx_backend.blockwise.{name}", size)
    monkeypatch.setattr("mlx_backend.long_rows.banded_attention", lambda *a: called.append(1) or banded_attention(*a))
    ways = [(False, 512, False), (False, 4, False), (True, 512, False), (True, 4, False), (True, 4, True)]
    for on_gpu, long, at_once in ways:
        engine = open_fresh("mlx", checkpoints[family], packing=True, max_grad_norm=0)
        engine._on_gpu = on_gpu  # which decides how the examples of a row are kept apart, and that alone
        monkeypatch.setattr("mlx_backend.long_rows.LONG", long)
        monkeypatch.setattr("mlx_backend.long_rows.on_gpu", lambda at_once=at_once: at_once)
        called.clear()
        results.append(gradient_of(engine, plan.step_batch(1)))
        assert bool(called) == at_once
    for found in results[1:]:
        compare(found, results[0], tolerance=1e-4)  # positions that run on turn by larger angles


@pytest.mark.parametrize("beginning", [0, 12])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_way_of_a_card_trains_alike_on_torch(family, beginning, checkpoints, monkeypatch):
    import torch_backend.attention

    def kernel(query, key, value, bounds_q, bounds_k, longest_q, longest_k, scale, window):
        """Attend as FlashAttention says of its own: masks are aligned to the last query and the last key."""
        parts = []
        for (first, last), (start, stop) in zip(
            itertools.pairwise(bounds_q.tolist()), itertools.pairwise(bounds_k.tolist()), strict=True
        ):
            assert last - first <= longest_q and stop - start <= longest_k
            heads = (each[None].transpose(1, 2) for each in (query[first:last], key[start:stop], value[start:stop]))
            parts.append(torch_backend.attention._attend(*heads, scale, window)[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(torch_backend.attention, "_varlen", kernel)
    plan = BatchPlan(make_batches(14, beginning=beginning), 2, 2, 0, 1, capacity=120, prefix_sharing=True)
    results = []
    for on_card in (False, True):
        engine = open_fresh("torch", checkpoints[family], packing=True, max_grad_norm=0)
        engine._attention._varlen = on_card
        results.append(gradient_of(engine, plan.step_batch(1)))
    compare(*results)


@pytest.mark.parametrize("beginning", [0, 12])
def test_masked_rows_can_be_compiled_on_mlx(beginning, checkpoints):
    # Only GPUs compile (mlx_backend/step.py); here it is tried without one.
    import mlx.core as mx

    from common.config import QuantizationConfig
    from mlx_backend.arrangement import Masked, masking
    from mlx_backend.attention import separate_examples
    from mlx_backend.model import choose_device, load_base

    choose_device("cpu")
    model = load_base(checkpoints["llama"], "float32", QuantizationConfig())
    packing = separate_examples(model, checkpoints["llama"])

    def logits(token_ids: mx.array, told: dict) -> mx.array:
        with packing.follow(Masked(told)):
            return model(token_ids)

    prefixes = np.full(5, beginning)
    batch = make_micro_batch(make_batches(5, beginning=beginning), [range(2), range(2, 5)], prefixes)
    given = mx.array(batch.token_ids), masking(batch)
    assert ("continued" in given[1]) == (beginning > 0)
    # Fused elementwise work rounds otherwise.
    np.testing.assert_allclose(np.array(mx.compile(logits)(*given)), np.array(logits(*given)), atol=1e-4)
