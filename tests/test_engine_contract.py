"""One suite for both engines: what common.engine.Engine promises, with PEFT and transformers as oracles."""

from pathlib import Path

import numpy as np
import pytest
from engines import DEVICE, ENGINES, make_batches, open_fresh
from peft_oracle import train_in_torch, transformers_model
from safetensors.numpy import load_file

from common.adapters.adapter import peft_config, write_adapter
from common.batches import BatchPlan
from common.config import LoraConfig, TrainConfig
from common.engine import TrainState, open_engine
from common.initial import initial_weights
from common.sampling import Sampling
from common.trainer import total_loss

# Float32 sums in another order: some rounding errors of 6e-8 add up over a few thousand terms.
ROUNDING = 2e-5

pytestmark = pytest.mark.parametrize("name", ENGINES)


def random_state(engine, seed: int = 3) -> TrainState:
    """Return a state whose B is not zero, so that the adapter matters."""
    rng = np.random.default_rng(seed)
    weights = {key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in engine.adapter_shapes().items()}
    return TrainState.fresh(weights)


def losses(engine, plan: BatchPlan, steps: int, rate: float = 5e-3) -> list[float]:
    results = [engine.fetch(engine.train_step(plan.step_batch(step), rate)) for step in range(1, steps + 1)]
    return [result.loss_sum / result.num_loss_tokens for result in results]


def test_state_comes_back_bit_for_bit(name: str, llama: Path) -> None:
    engine = open_fresh(name, llama)
    state = random_state(engine)
    state.moment1 = {key: value * 2 for key, value in state.weights.items()}
    state.moment2 = {key: value**2 for key, value in state.weights.items()}
    state.update_count = 7
    engine.load_state(state)
    back = engine.read_state()
    assert back.update_count == 7
    for key in state.weights:
        np.testing.assert_array_equal(back.weights[key], state.weights[key])
        np.testing.assert_array_equal(back.moment1[key], state.moment1[key])
        np.testing.assert_array_equal(back.moment2[key], state.moment2[key])


def test_untrained_adapter_leaves_the_base_as_transformers_has_it(name: str, llama: Path) -> None:
    engine, data = open_fresh(name, llama), make_batches()
    loss_sum, count = total_loss(engine, data, 3)
    assert loss_sum == pytest.approx(transformers_loss(llama, None, data), rel=ROUNDING)
    assert count == int(data.loss_mask.sum())


def test_an_engine_without_an_adapter_is_the_base_as_transformers_has_it(name: str, llama: Path) -> None:
    engine, data = open_engine(name, TrainConfig(device=DEVICE, dtype="float32"), llama, None), make_batches()
    assert total_loss(engine, data, 3)[0] == pytest.approx(transformers_loss(llama, None, data), rel=ROUNDING)
    assert engine.adapter_shapes() == {}


def test_adapter_gives_the_same_loss_in_peft(name: str, llama: Path, tmp_path: Path) -> None:
    engine, data = open_fresh(name, llama), make_batches()
    state = random_state(engine)
    engine.load_state(state)
    write_adapter(tmp_path, state.weights, peft_config(LoraConfig(), engine.target_modules(), str(llama), None))
    base = transformers_loss(llama, None, data)
    expected = transformers_loss(llama, tmp_path, data)
    assert abs(expected - base) > 1  # the adapter does something
    assert total_loss(engine, data, 3)[0] == pytest.approx(expected, rel=ROUNDING)


def test_logits_are_those_of_peft_at_every_position(name: str, llama: Path, tmp_path: Path) -> None:
    engine = open_fresh(name, llama)
    state = random_state(engine)
    engine.load_state(state)
    write_adapter(tmp_path, state.weights, peft_config(LoraConfig(), engine.target_modules(), str(llama), None))
    token_ids = np.random.default_rng(0).integers(0, 400, (2, 19)).astype(np.int32)
    expected = peft_logits(llama, tmp_path, token_ids)
    np.testing.assert_allclose(engine.logits(token_ids), expected, atol=ROUNDING * np.abs(expected).max())


def test_without_an_adapter_the_logits_are_those_of_the_base(name: str, llama: Path) -> None:
    engine = open_engine(name, TrainConfig(device=DEVICE, dtype="float32"), llama, None)
    token_ids = np.random.default_rng(0).integers(0, 400, (2, 19)).astype(np.int32)
    expected = peft_logits(llama, None, token_ids)
    np.testing.assert_allclose(engine.logits(token_ids), expected, atol=ROUNDING * np.abs(expected).max())


@pytest.mark.parametrize("module", ["model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"])
def test_base_weight_is_that_of_the_checkpoint(name: str, module: str, llama: Path) -> None:
    expected = load_file(llama / "model.safetensors")[f"{module}.weight"]
    np.testing.assert_array_equal(open_fresh(name, llama).base_weight(module), expected)


def test_one_step_is_torch_adamw_with_clipping(name: str, llama: Path) -> None:
    """The update follows from the gradient by torch.optim.AdamW, checked over three steps of PEFT's own training."""
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.5, "adam_beta2": 0.99}
    engine, data = open_fresh(name, llama, **settings), make_batches()
    plan = BatchPlan(data, 4, 1, 42, 1)
    engine.load_state(random_state(engine))
    expected, norms = peft_training(llama, engine.target_modules(), random_state(engine), plan, 3, settings)
    for step in range(1, 4):
        result = engine.fetch(engine.train_step(plan.step_batch(step), 1e-2))
        assert result.grad_norm == pytest.approx(norms[step - 1], rel=1e-4)
    found = engine.read_state().weights
    # Three steps of 1e-2: an entry whose gradient is near zero may round to a different Adam direction. On a card MLX
    # rounds what its products multiply, too.
    tolerance = 1e-3 if name == "mlx" and DEVICE != "cpu" else 2e-4
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=tolerance, err_msg=key)


def test_loss_falls_while_training(name: str, llama: Path) -> None:
    engine = open_fresh(name, llama)
    curve = losses(engine, BatchPlan(make_batches(), 4, 1, 42, 10), 15, 1e-2)
    assert np.mean(curve[-3:]) < 0.9 * curve[0]


def test_accumulation_equals_one_large_batch(name: str, llama: Path) -> None:
    data = make_batches()
    states = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        engine = open_fresh(name, llama)
        losses(engine, BatchPlan(data, batch_size, accumulation, 42, 1), 2)
        states.append(engine.read_state().weights)
    for other in states[1:]:
        for key in other:
            np.testing.assert_allclose(other[key], states[0][key], atol=2e-4, err_msg=key)


def test_padding_changes_nothing(name: str, llama: Path) -> None:
    engine, data = open_fresh(name, llama), make_batches()
    engine.load_state(random_state(engine))
    together = total_loss(engine, data, len(data))[0]
    alone = sum(total_loss(engine, data, 1)[:1])
    assert together == pytest.approx(alone, rel=ROUNDING)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(name: str, dropout: float, llama: Path) -> None:
    lora = LoraConfig(lora_dropout=dropout)
    plan = BatchPlan(make_batches(), 4, 1, 42, 1)
    plain = losses(open_fresh(name, llama, lora=lora), plan, 3)
    recomputed = losses(open_fresh(name, llama, lora=lora, gradient_checkpointing=True), plan, 3)
    assert recomputed == pytest.approx(plain, rel=ROUNDING)


def test_dropout_depends_on_the_step_and_spares_evaluation(name: str, llama: Path) -> None:
    lora, plan = LoraConfig(lora_dropout=0.5), BatchPlan(make_batches(), 4, 1, 42, 1)
    engine = open_fresh(name, llama, lora=lora)
    state = random_state(engine)
    batch = plan.step_batch(1)

    def loss_at(step: int) -> float:
        engine.load_state(state)
        moved = type(batch)(step, *list(vars(batch).values())[1:])
        return engine.fetch(engine.train_step(moved, 0.0)).loss_sum

    assert loss_at(1) == loss_at(1)
    assert loss_at(1) != loss_at(2)
    engine.load_state(state)
    without = open_fresh(name, llama)
    without.load_state(state)
    micro = batch.micro_batches[0]
    found, expected = (each.fetch(each.eval_step(micro)).loss_sum for each in (engine, without))
    assert found == pytest.approx(expected, rel=ROUNDING)


def test_nonfinite_update_is_skipped(name: str, llama: Path) -> None:
    engine = open_fresh(name, llama)
    state = random_state(engine)
    key = next(iter(state.weights))
    state.weights[key][0, 0] = np.inf
    engine.load_state(state)
    result = engine.fetch(engine.train_step(BatchPlan(make_batches(), 4, 1, 42, 1).step_batch(1), 1e-2))
    assert not result.updated
    back = engine.read_state()
    assert back.update_count == 0
    for key, value in state.weights.items():
        np.testing.assert_array_equal(back.weights[key], value)
    assert not any(value.any() for value in back.moment2.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_with_float32_adapters(name: str, dtype: str, llama: Path) -> None:
    plan = BatchPlan(make_batches(), 4, 1, 42, 4)
    exact, half = open_fresh(name, llama), open_fresh(name, llama, dtype=dtype)
    # 8 bits of mantissa (bfloat16) over a handful of layers: 2% of a loss of 6.
    assert losses(half, plan, 4) == pytest.approx(losses(exact, plan, 4), rel=0.02)
    state = half.read_state()
    assert state.update_count == 4
    assert all(value.dtype == np.float32 for value in state.weights.values())


def test_greedy_generation_is_that_of_transformers(name: str, llama: Path) -> None:
    engine = open_fresh(name, llama)
    prompts = [[5, 9, 11], [7], list(range(20, 40))]
    expected = [transformers_generate(llama, prompt, 12) for prompt in prompts]
    assert generate_all(engine, prompts, Sampling(12)) == expected
    assert [generate_all(engine, [prompt], Sampling(12))[0] for prompt in prompts] == expected


def test_generation_stops_at_the_stop_token_and_sampling_repeats_by_seed(name: str, llama: Path) -> None:
    engine, prompts = open_fresh(name, llama), [[5, 9, 11], [7]]
    free = generate_all(engine, prompts, Sampling(12))
    stop = free[0][3]
    stopped = generate_all(engine, prompts, Sampling(12, stop_ids=frozenset([stop])))
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    warm = Sampling(12, temperature=1.5, top_p=0.9, seed=1)
    assert generate_all(engine, prompts, warm) == generate_all(engine, prompts, warm)
    assert generate_all(engine, prompts, warm) != generate_all(engine, prompts, Sampling(12, temperature=1.5, seed=2))


def test_prompts_with_a_common_beginning_are_answered_as_each_alone(name: str, llama: Path) -> None:
    engine, beginning = open_fresh(name, llama), list(range(30, 42))
    prompts = [[*beginning, 7, 9], beginning, [*beginning, 5, 6, 7, 8, 9, 10, 11], [*beginning, 300]]
    expected = [transformers_generate(llama, prompt, 10) for prompt in prompts]
    assert generate_all(engine, prompts, Sampling(10)) == expected


def test_rows_that_end_leave_the_others_as_they_are(name: str, llama: Path) -> None:
    engine, prompts = open_fresh(name, llama), [[n, n + 1, n + 2] for n in range(20, 120, 10)]
    free = generate_all(engine, prompts, Sampling(16))
    stops = frozenset(row[place] for row, place in zip(free, range(1, 9), strict=False))  # most end, at many places
    expected = [row[: next((i + 1 for i, token in enumerate(row) if token in stops), 16)] for row in free]
    assert len({len(row) for row in expected}) > 4
    assert generate_all(engine, prompts, Sampling(16, stop_ids=stops)) == expected
    warm = [generate_all(engine, prompts, Sampling(16, temperature=0.8, stop_ids=ids)) for ids in (frozenset(), stops)]
    for whole, row in zip(*warm, strict=True):
        assert row == whole[: len(row)]  # a row's draws do not depend on who else is still there


def test_generation_after_training_uses_the_trained_weights(name: str, llama: Path) -> None:
    engine = open_fresh(name, llama)
    before = generate_all(engine, [[5, 9, 11]], Sampling(8))
    engine.load_state(random_state(engine))
    after = generate_all(engine, [[5, 9, 11]], Sampling(8))
    engine.load_state(TrainState.fresh(initial_weights(engine.adapter_shapes(), 42)))
    assert before == generate_all(engine, [[5, 9, 11]], Sampling(8))
    assert before != after


def test_targets_named_in_the_config_are_the_ones_trained(name: str, llama: Path) -> None:
    engine = open_fresh(name, llama, lora=LoraConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]))
    modules = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in engine.adapter_shapes()}
    assert modules == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert engine.target_modules() == ["down_proj", "q_proj"]


def test_memory_is_measured(name: str, llama: Path) -> None:
    use = open_fresh(name, llama).memory()
    assert 0 < use.active_bytes <= use.peak_bytes * 1.01  # the two are read one after the other


def generate_all(engine, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for row, token in engine.generate(prompts, sampling):
        rows[row].append(token)
    return rows


def transformers_loss(directory: Path, adapter: Path | None, data) -> float:
    """Sum the loss row by row, without padding, over plain transformers logits."""
    import torch
    from torch.nn import functional as F

    model, total = transformers_model(directory, adapter), 0.0
    for row in range(len(data)):
        tokens = torch.tensor(data.tokens(row).astype(np.int64))
        mask = torch.tensor(data.mask(row))[1:]
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1]
        total += F.cross_entropy(logits[mask], tokens[1:][mask], reduction="sum").item()
    return total


def peft_logits(directory: Path, adapter: Path | None, token_ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return transformers_model(directory, adapter)(torch.from_numpy(token_ids.astype(np.int64))).logits.numpy()


def transformers_generate(directory: Path, prompt: list[int], length: int) -> list[int]:
    import torch

    model = transformers_model(directory, None)
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, use_cache=False)
    return out[0, len(prompt) :].tolist()


def peft_training(llama: Path, targets, state: TrainState, plan: BatchPlan, steps: int, settings: dict):
    """Train with PEFT, torch.optim.AdamW and clip_grad_norm_; returns the weights by PEFT key and the norms."""
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    model = get_peft_model(
        transformers_model(llama, None), PeftLoraConfig(r=16, lora_alpha=32, target_modules=list(targets))
    )
    parameters = {n.replace(".default.", "."): p for n, p in model.named_parameters() if ".lora_" in n}
    for key, parameter in parameters.items():
        parameter.data = torch.from_numpy(state.weights[key].copy())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=1e-2, betas=(0.9, settings["adam_beta2"]), weight_decay=settings["weight_decay"]
    )
    _, norms = train_in_torch(model, list(parameters.values()), optimizer, plan, steps, settings["max_grad_norm"])
    return {key: parameter.detach().numpy() for key, parameter in parameters.items()}, norms


def test_config_defaults_are_what_these_tests_assume(name: str) -> None:
    assert (TrainConfig().lora.r, TrainConfig().lora.lora_alpha, TrainConfig().adam_beta1) == (16, 32, 0.9)
