"""The contract between the engines: same config, same batches, same start, same losses, same adapter."""

from pathlib import Path

import numpy as np
import pytest
from engines import make_batches, open_fresh

from common.batches import BatchPlan, chain_hash
from common.config import DataConfig, LoraConfig
from common.data.chat import ChatTokenizer
from common.data.records import read_examples
from common.data.tokens import build_dataset
from common.engine import Engine
from common.initial import initial_weights
from common.schedule import learning_rate_at
from common.trainer import total_loss

# DESIGN.md section 3: float32 on the CPU. Measured: 2e-6 and 4e-5.
LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-3
STEPS = 20
QUICKSTART = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"


def train(engine: Engine, plan: BatchPlan, steps: int, peak: float = 5e-3) -> tuple[list[float], str]:
    """Train some steps with a cosine schedule; returns the losses a token and the hash of all batches."""
    losses, digest = [], ""
    for step in range(1, steps + 1):
        batch = plan.step_batch(step)
        digest = chain_hash(digest, batch)
        result = engine.fetch(engine.train_step(batch, learning_rate_at(step - 1, steps, peak, "cosine", 3)))
        losses.append(result.loss_sum / result.num_loss_tokens)
    return losses, digest


@pytest.mark.parametrize(
    "lora", [LoraConfig(), LoraConfig(r=4, lora_alpha=12, use_rslora=True)], ids=["lora", "rslora"]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("capacity", "beginning"), [(None, 0), (64, 0), (80, 16)], ids=["padded", "packed", "shared"])
def test_twenty_steps_agree_between_the_engines(
    capacity: int | None, beginning: int, tied: bool, lora: LoraConfig, llama: Path, tied_llama: Path
) -> None:
    directory, data = tied_llama if tied else llama, make_batches(beginning=beginning)
    runs = {}
    for name in ("mlx", "torch"):
        engine = open_fresh(name, directory, lora=lora, weight_decay=0.01, packing=capacity is not None)
        start = engine.read_state().weights
        plan = BatchPlan(data, 3, 2, seed=7, num_train_epochs=20, capacity=capacity, prefix_sharing=beginning > 0)
        losses, digest = train(engine, plan, STEPS)
        runs[name] = start, losses, digest, engine.read_state().weights, engine.target_modules()
    (start_a, losses_a, digest_a, final_a, targets_a), (start_b, losses_b, digest_b, final_b, targets_b) = runs.values()
    assert digest_a == digest_b
    assert targets_a == targets_b
    assert start_a.keys() == start_b.keys()
    for key in start_a:
        np.testing.assert_array_equal(start_a[key].view(np.uint32), start_b[key].view(np.uint32), err_msg=key)
        np.testing.assert_allclose(final_a[key], final_b[key], atol=WEIGHT_TOLERANCE, err_msg=key)
    np.testing.assert_allclose(losses_a, losses_b, rtol=LOSS_TOLERANCE)
    assert losses_a[-1] < losses_a[0]  # it did train


@pytest.mark.parametrize("order", [("mlx", "torch"), ("torch", "mlx")], ids=["mlx-torch", "torch-mlx"])
def test_a_run_goes_on_with_the_other_engine(order: tuple[str, str], llama: Path) -> None:
    plan = BatchPlan(make_batches(), batch_size=3, accumulation=2, seed=7, num_train_epochs=6)
    first, second, alone = (open_fresh(name, llama) for name in (*order, order[1]))
    moved = steps(first, plan, 1, 10)
    second.load_state(first.read_state())
    moved += steps(second, plan, 11, 20)
    np.testing.assert_allclose(moved, steps(alone, plan, 1, 20), rtol=LOSS_TOLERANCE)
    found, expected = second.read_state(), alone.read_state()
    assert found.update_count == expected.update_count == 20
    for key in expected.weights:
        np.testing.assert_allclose(found.weights[key], expected.weights[key], atol=WEIGHT_TOLERANCE, err_msg=key)


def test_a_relay_of_both_engines_follows_the_curve_of_one(llama: Path) -> None:
    plan = BatchPlan(make_batches(), batch_size=3, accumulation=2, seed=7, num_train_epochs=6)
    alone = steps(open_fresh("torch", llama), plan, 1, STEPS)
    relay: list[float] = []
    state = None
    for leg, name in enumerate(("mlx", "torch", "mlx", "torch")):
        engine = open_fresh(name, llama)
        if state:
            engine.load_state(state)
        relay += steps(engine, plan, 5 * leg + 1, 5 * leg + 5)
        state = engine.read_state()
        engine.close()
    print("\nstep  engine  relay     torch     relative difference")
    for step, (ours, expected) in enumerate(zip(relay, alone, strict=True), start=1):
        name = ("mlx", "torch")[(step - 1) // 5 % 2]
        print(f"{step:4}  {name:6}  {ours:.6f}  {expected:.6f}  {abs(ours / expected - 1):.1e}")
    np.testing.assert_allclose(relay, alone, rtol=LOSS_TOLERANCE)


def steps(engine: Engine, plan: BatchPlan, first: int, last: int) -> list[float]:
    """Run some steps of a plan with a linear schedule over 20; returns the losses a token."""
    results = [
        engine.fetch(engine.train_step(plan.step_batch(step), learning_rate_at(step - 1, STEPS, 5e-3, "linear", 0)))
        for step in range(first, last + 1)
    ]
    return [result.loss_sum / result.num_loss_tokens for result in results]


def test_initial_adapter_is_uniform_within_the_inverse_root_of_in_features(llama: Path) -> None:
    shapes = open_fresh("mlx", llama).adapter_shapes()
    weights = initial_weights(shapes, 42)
    for key, value in weights.items():
        if ".lora_B." in key:
            assert not value.any()
        else:
            bound = 1 / np.sqrt(value.shape[1])
            assert np.abs(value).max() <= bound
            assert np.abs(value).max() > 0.9 * bound  # 16 * 48 draws or more
    assert not np.array_equal(*(initial_weights(shapes, seed)[next(iter(shapes))] for seed in (1, 2)))


@pytest.mark.skipif(not QUICKSTART.is_dir(), reason="the quickstart's model is not here; fetch it with: make model")
def test_smollm2_agrees_on_three_real_examples() -> None:
    data = DataConfig(train="configs/quickstart/train.jsonl")
    tokenizer = ChatTokenizer(QUICKSTART)
    source = Path(__file__).parent.parent / "configs/quickstart/train.jsonl"
    examples = read_examples(str(source), data, [])[:3]
    encoded = [(tokenizer.encode(example, "assistant"), example.source) for example in examples]
    dataset = build_dataset([(each.token_ids, each.loss_mask, source) for each, source in encoded])
    plan = BatchPlan(dataset, batch_size=3, accumulation=1, seed=0, num_train_epochs=2)
    runs = {}
    for name in ("mlx", "torch"):
        engine = open_fresh(name, QUICKSTART)
        forward = total_loss(engine, dataset, 1)
        losses, _ = train(engine, plan, 2, peak=1e-3)
        runs[name] = forward, losses, engine.read_state()
        engine.close()
    (forward_a, losses_a, state_a), (forward_b, losses_b, state_b) = runs.values()
    assert forward_a[1] == forward_b[1] == int(dataset.loss_mask.sum())
    assert forward_a[0] == pytest.approx(forward_b[0], rel=LOSS_TOLERANCE)
    np.testing.assert_allclose(losses_a, losses_b, rtol=LOSS_TOLERANCE)
    for key in state_a.weights:
        scale = np.abs(state_b.moment1[key]).max()
        # One gradient through 30 layers, relative to the tensor's largest entry; measured 3e-4.
        np.testing.assert_allclose(state_a.moment1[key], state_b.moment1[key], atol=2e-3 * scale + 1e-12, err_msg=key)
