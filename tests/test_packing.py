"""Packed rows train what the same examples train one by one, on both engines and for every kind of attention."""

from pathlib import Path

import numpy as np
import pytest
from engines import ENGINES, make_batches, open_fresh
from tiny_models import FAMILIES, write_family

from common.batches import BatchPlan
from common.engine import Engine, StepBatch, TrainState
from common.errors import UserError
from common.layout import end_to_end, make_micro_batch
from common.sampling import Sampling

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
    data = make_batches(14)
    packed = BatchPlan(data, 2, 2, seed=0, num_train_epochs=1, capacity=min(120, longest)).step_batch(1)
    assert max(micro.segment_ids.max() for micro in packed.micro_batches) > 1
    alone = StepBatch(
        packed.step,
        packed.epoch,
        tuple(make_micro_batch(data, [[example]]) for example in packed.examples),
        packed.num_loss_tokens,
        packed.num_tokens,
        packed.examples,
    )
    (loss, gradient), (expected_loss, expected) = (gradient_of(engine, batch) for batch in (packed, alone))
    assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
    for key, tensor in expected.items():
        assert np.abs(tensor).max() > 1e-6
        np.testing.assert_allclose(gradient[key], tensor, atol=GRADIENT_TOLERANCE * np.abs(tensor).max(), rtol=0)


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
    from mlx_backend.attention import Masked, SideBySide, reach, separate_examples
    from mlx_backend.model import choose_device, load_base

    choose_device("cpu")
    model = load_base(checkpoints[family], "float32", QuantizationConfig())
    packing = separate_examples(model, checkpoints[family])
    (row,) = end_to_end(make_micro_batch(make_batches(5), [range(5)]))
    masked = Masked(mx.array(row.segment_ids), reach(row.segment_ids))

    def logits(arrangement: Masked | SideBySide) -> np.ndarray:
        with packing.follow(arrangement):
            return np.array(model(mx.array(row.token_ids)))

    plain, beside = logits(masked), logits(SideBySide(row))
    for module in ("long_rows", "amend"):
        monkeypatch.setattr(f"mlx_backend.{module}.LONG", 4)
    for name, size in (("BLOCK", 16), ("SMALLEST_BLOCK", 8)):
        monkeypatch.setattr(f"mlx_backend.blockwise.{name}", size)
    # Positions restart in one and not in the other: rotations by angles a hundred times as large.
    np.testing.assert_allclose(plain, beside, atol=2e-4 * np.abs(beside).max(), rtol=0)
    np.testing.assert_allclose(logits(masked), plain, atol=2e-5 * np.abs(beside).max(), rtol=0)  # as on a Mac


def test_the_way_of_a_card_trains_alike_on_mlx(checkpoints):
    plan = BatchPlan(make_batches(14), 2, 2, seed=0, num_train_epochs=1, capacity=120)
    results = []
    for on_gpu in (False, True):  # which decides how the examples of a row are kept apart, and that alone
        engine = open_fresh("mlx", checkpoints["llama"], packing=True, max_grad_norm=0)
        engine._on_gpu = on_gpu
        results.append(gradient_of(engine, plan.step_batch(1)))
    (expected_loss, expected), (loss, gradient) = results
    assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
    for key, tensor in expected.items():
        np.testing.assert_allclose(gradient[key], tensor, atol=1e-4 * np.abs(tensor).max(), rtol=0)


def test_masked_rows_can_be_compiled_on_mlx(checkpoints):
    # Only GPUs compile (mlx_backend/step.py); here it is tried without one.
    import mlx.core as mx

    from common.config import QuantizationConfig
    from mlx_backend.attention import Masked, separate_examples
    from mlx_backend.model import choose_device, load_base

    choose_device("cpu")
    model = load_base(checkpoints["llama"], "float32", QuantizationConfig())
    packing = separate_examples(model, checkpoints["llama"])

    def logits(token_ids: mx.array, segment_ids: mx.array) -> mx.array:
        with packing.follow(Masked(segment_ids, 64)):
            return model(token_ids)

    batch = make_micro_batch(make_batches(5), [range(2), range(2, 5)])
    arrays = mx.array(batch.token_ids), mx.array(batch.segment_ids)
    # Fused elementwise work rounds otherwise.
    np.testing.assert_allclose(np.array(mx.compile(logits)(*arrays)), np.array(logits(*arrays)), atol=1e-4)


def gradient_of(engine: Engine, batch: StepBatch) -> tuple[float, dict[str, np.ndarray]]:
    """Return the loss of a step and its gradient, read from the first moment of one update; A and B are random."""
    rng = np.random.default_rng(1)
    state = TrainState.fresh(
        {key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in engine.adapter_shapes().items()}
    )
    engine.load_state(state)
    result = engine.fetch(engine.train_step(batch, 1e-3))
    return result.loss_sum, engine.read_state().moment1
