"""Every member of the LoRA family, on both engines: starts as its base, computes and trains as PEFT's own does."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from engines import ENGINES, make_batches, open_fresh
from peft_oracle import train_in_torch, transformers_model
from tiny_models import write_family

from common.adapters.adapter import EMBEDDING_KEY, HEAD_KEY, lora_of, peft_config, write_adapter
from common.batches import BatchPlan
from common.config import LoraConfig
from common.engine import Array, Engine, TrainState
from common.errors import UserError
from common.initial import initial_weights, starting_weights
from common.lora import as_stored, lora_a_key, lora_b_key, magnitude_key, saved_key

ROUNDING = 2e-5  # float32 sums in another order, relative to the largest entry
RATE, STEPS = 5e-3, 5

FAMILY = {
    "lora": LoraConfig(r=5),
    "rslora": LoraConfig(r=5, use_rslora=True),
    "dora": LoraConfig(r=5, use_dora=True),
    "dora of rslora": LoraConfig(r=5, use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "patterns": LoraConfig(
        r=5, rank_pattern={"down_proj": 3, r"layers\.1\..*q_proj": 7}, alpha_pattern={"mlp.(up|gate)_proj": 50}
    ),
    "patterns of rslora": LoraConfig(r=5, rank_pattern={"k_proj": 2}, alpha_pattern={"o_proj": 3}, use_rslora=True),
    "dora with patterns": LoraConfig(r=5, rank_pattern={"v_proj": 2}, use_dora=True),
    "head and embeddings": LoraConfig(r=5, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "norms": LoraConfig(r=5, target_modules=["v_proj"], modules_to_save=["input_layernorm", "model.norm"]),
    "head instead of its adapter": LoraConfig(r=5, target_modules=["lm_head", "q_proj"], modules_to_save=["lm_head"]),
    "gaussian": LoraConfig(r=5, init_lora_weights="gaussian"),
    "pissa": LoraConfig(r=5, init_lora_weights="pissa"),
    "pissa of rslora": LoraConfig(r=5, init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 3}),
    "olora": LoraConfig(r=5, init_lora_weights="olora", alpha_pattern={"q_proj": 7}),
    "dora from pissa": LoraConfig(r=5, init_lora_weights="pissa", use_dora=True),
}
ON_ONE_MODEL = pytest.mark.parametrize("lora", FAMILY.values(), ids=FAMILY)
ON_BOTH = pytest.mark.parametrize("name", ENGINES)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose projections have biases, and whose embeddings are its head."""
    return write_family(tmp_path_factory.mktemp("qwen"), "qwen2", tie_word_embeddings=True)


@ON_BOTH
@ON_ONE_MODEL
def test_a_fresh_adapter_leaves_the_base_as_it_is(name: str, lora: LoraConfig, llama: Path) -> None:
    assert_close(open_fresh(name, llama, lora).logits(tokens()), logits_of(transformers_model(llama)), rounding(lora))


@ON_BOTH
@ON_ONE_MODEL
def test_peft_loads_the_adapter_and_computes_the_same(name: str, lora: LoraConfig, llama: Path, tmp_path: Path) -> None:
    engine = open_fresh(name, llama, lora)
    state = moved(engine)
    engine.load_state(state)
    save(tmp_path, engine, state.weights, lora, llama)
    expected = logits_of(peft.PeftModel.from_pretrained(transformers_model(llama), tmp_path))
    assert np.abs(expected - logits_of(transformers_model(llama))).max() > 0.1
    assert_close(engine.logits(tokens()), expected, rounding(lora))


@ON_BOTH
@ON_ONE_MODEL
def test_training_is_that_of_peft(name: str, lora: LoraConfig, llama: Path) -> None:
    engine = open_fresh(name, llama, lora)
    plan = BatchPlan(make_batches(), 4, 1, 42, 2)
    expected, model = peft_training(llama, lora, engine, plan)
    np.testing.assert_allclose(train(engine, plan), expected, rtol=1e-4)
    # Five steps of Adam's unit size: an entry whose gradient is near zero may round to another direction.
    assert_close(engine.logits(tokens()), logits_of(model), 2e-3)


@ON_BOTH
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_are_trained_as_one_matrix(name: str, names: list[str], qwen: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=5, target_modules=["q_proj"], modules_to_save=names)
    engine = open_fresh(name, qwen, lora)
    assert [key for key in engine.adapter_shapes() if ".lora_" not in key] == [saved_key("model.embed_tokens")]
    plan = BatchPlan(make_batches(), 4, 1, 42, 2)
    expected, model = peft_training(qwen, lora, engine, plan)
    np.testing.assert_allclose(train(engine, plan), expected, rtol=1e-4)
    assert_close(engine.logits(tokens()), logits_of(model), 2e-3)
    save(tmp_path, engine, engine.read_state().weights, lora, qwen)
    assert_close(engine.logits(tokens()), logits_of(peft.PeftModel.from_pretrained(transformers_model(qwen), tmp_path)))


@ON_BOTH
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"packing": True}], ids=str)
def test_dora_over_biases_trains_as_peft_does(name: str, settings: dict, qwen: Path) -> None:
    lora = LoraConfig(r=5, use_dora=True, modules_to_save=["post_attention_layernorm"])
    engine, plan = open_fresh(name, qwen, lora, **settings), BatchPlan(make_batches(), 4, 1, 42, 2)
    expected, _ = peft_training(qwen, lora, engine, plan)
    np.testing.assert_allclose(train(engine, plan), expected, rtol=1e-4)


@ON_BOTH
def test_dora_applies_dropout_as_peft_does(name: str, llama: Path) -> None:
    lora = LoraConfig(r=5, use_dora=True, lora_dropout=0.5)
    engine, without = open_fresh(name, llama, lora), open_fresh(name, llama, LoraConfig(r=5, use_dora=True))
    state = moved(engine)
    batch = BatchPlan(make_batches(), 4, 1, 42, 1).step_batch(1)
    losses = []
    for each in (engine, without):
        each.load_state(state)
        losses.append(each.fetch(each.train_step(batch, 0.0)).loss_sum)
    assert abs(losses[0] / losses[1] - 1) > 1e-3
    assert_close(engine.logits(tokens()), without.logits(tokens()))


@ON_BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("member", ["dora", "head and embeddings", "norms", "pissa"])
def test_half_precision_keeps_trained_tensors_in_float32(name: str, dtype: str, member: str, llama: Path) -> None:
    lora, plan = FAMILY[member], BatchPlan(make_batches(), 4, 1, 42, 2)
    exact = train(open_fresh(name, llama, lora), plan)
    engine = open_fresh(name, llama, lora, dtype=dtype)
    assert train(engine, plan) == pytest.approx(exact, rel=0.03)  # 8 bits of mantissa over a few layers
    weights = engine.read_state().weights
    assert all(value.dtype == np.float32 for value in weights.values())
    # Steps of 5e-3 are lost in bfloat16's 8 bits where a weight is of order 1: float32 keeps them.
    trained = [value for key, value in weights.items() if ".lora_A" not in key and ".lora_B" not in key]
    assert all((value != value.astype(np.float16)).any() for value in trained)


@ON_BOTH
@pytest.mark.parametrize("member", ["pissa", "olora", "pissa of rslora"])
def test_the_start_of_pissa_and_olora_stays_as_it_is(name: str, member: str, llama: Path) -> None:
    lora = FAMILY[member]
    engine = open_fresh(name, llama, lora, weight_decay=0.5)
    before = starting_weights(engine, lora, 42)
    train(engine, BatchPlan(make_batches(), 4, 1, 42, 2))
    for key, value in engine.read_state().weights.items():
        parts = np.split(value, 2, axis=0 if ".lora_A." in key else 1)
        starts = np.split(before[key], 2, axis=0 if ".lora_A." in key else 1)
        np.testing.assert_array_equal(parts[1], starts[1])
        assert (parts[0] != starts[0]).any()


@pytest.mark.parametrize("member", ["pissa", "pissa of rslora", "olora", "dora from pissa"])
def test_a_converted_start_is_what_peft_starts_from(member: str, llama: Path) -> None:
    lora = FAMILY[member]
    found = starting_weights(open_fresh("torch", llama, lora), lora, 42)
    model = peft_model(llama, lora)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_submodule(f"base_model.model.{module}")
        expected = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().numpy()
        rank = layer.r["default"]
        a, b = found[lora_a_key(module)], found[lora_b_key(module)]
        assert a.shape[0] == b.shape[1] == 2 * rank
        assert_close(b[:, :rank] @ a[:rank], expected)
        np.testing.assert_array_equal(a[rank:], -a[:rank])


def test_a_few_subspace_iterations_come_near_the_whole_decomposition(llama: Path) -> None:
    rng = np.random.default_rng(0)
    spectrum = 0.9 ** np.arange(60)
    weight = np.linalg.qr(rng.normal(size=(90, 60)))[0] * spectrum @ np.linalg.qr(rng.normal(size=(60, 60)))[0]
    shapes = {lora_a_key("m"): (16, 60), lora_b_key("m"): (90, 16)}
    halves = []
    for method in ("pissa", "pissa_niter_4"):
        start = initial_weights(
            shapes, 1, LoraConfig(r=8, init_lora_weights=method), lambda _: weight.astype(np.float32)
        )
        halves.append(start[lora_b_key("m")][:, :8] @ start[lora_a_key("m")][:8])
    # What is left of the 9th component after 4 double iterations of ratio 0.9 with 8 columns to spare: under a percent.
    assert np.linalg.norm(halves[0] - halves[1]) < 0.01 * np.linalg.norm(halves[0])


@ON_ONE_MODEL
def test_both_engines_name_and_draw_the_same_tensors(lora: LoraConfig, llama: Path) -> None:
    first, second = (open_fresh(name, llama, lora) for name in ENGINES)
    assert first.adapter_shapes() == second.adapter_shapes()
    assert first.target_modules() == second.target_modules()
    ours, theirs = (starting_weights(engine, lora, 7) for engine in (first, second))
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])


@ON_ONE_MODEL
def test_settings_come_back_from_an_adapters_files(lora: LoraConfig, llama: Path, tmp_path: Path) -> None:
    engine = open_fresh("mlx", llama, lora)
    save(tmp_path, engine, moved(engine).weights, lora, llama)
    found = lora_of(peft_config(as_stored(lora), engine.target_modules(), "base", None), tmp_path)
    assert open_fresh("mlx", llama, found).adapter_shapes() == engine.adapter_shapes()
    assert found.model_dump(exclude={"target_modules"}) == as_stored(lora).model_dump(exclude={"target_modules"})


@ON_BOTH
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "w1"]}, "target_modules: 'w1' matches no linear module"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"train embed_tokens whole, write modules_to_save"),
        ({"modules_to_save": ["head"]}, "modules_to_save: 'head' matches no module with a weight"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save: 'mlp' matches no module with a weight"),
        ({"rank_pattern": {"proj_q": 4}}, "rank_pattern: 'proj_q' is the pattern of no targeted module"),
        ({"alpha_pattern": {".*": 4, "q_proj": 8}}, "alpha_pattern: 'q_proj' is the pattern of no targeted module"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(name: str, lora: dict, message: str, llama: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_fresh(name, llama, LoraConfig(**lora))


@ON_BOTH
def test_a_module_with_a_bias_is_not_trained_whole(name: str, qwen: Path) -> None:
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj has a bias, which can't be trained whole"):
        open_fresh(name, qwen, LoraConfig(target_modules=["v_proj"], modules_to_save=["q_proj"]))


@pytest.mark.parametrize(("name", "quantization"), [("mlx", {"bits": 4}), ("torch", {"load_in_4bit": True})])
def test_a_quantised_module_is_not_trained_whole(name: str, quantization: dict, tmp_path: Path) -> None:
    base = write_family(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj is quantised, and can't be trained whole"):
        open_fresh(
            name, base, LoraConfig(target_modules=["v_proj"], modules_to_save=["q_proj"]), quantization=quantization
        )


@pytest.mark.parametrize(("name", "quantization"), [("mlx", {"bits": 4}), ("torch", {"load_in_4bit": True})])
def test_dora_starts_from_the_norms_of_a_quantised_base(name: str, quantization: dict, tmp_path: Path) -> None:
    base = write_family(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    lora = LoraConfig(use_dora=True)
    engine = open_fresh(name, base, lora, quantization=quantization)
    plain = open_fresh(name, base, quantization=quantization)
    key, module = magnitude_key("model.layers.0.mlp.up_proj"), "model.layers.0.mlp.up_proj"
    np.testing.assert_allclose(
        starting_weights(engine, lora, 1)[key], np.linalg.norm(engine.base_weight(module), axis=1), rtol=1e-6
    )
    assert_close(engine.logits(tokens()), plain.logits(tokens()), 1e-3)  # 4-bit matmuls round their inputs


def rounding(lora: LoraConfig) -> float:
    """Allow for the halves of PiSSA and OLoRA, which are as large as the base and cancel but for rounding."""
    return ROUNDING if as_stored(lora).r == lora.r else 3 * ROUNDING


def tokens() -> Array:
    return np.random.default_rng(1).integers(0, 400, (2, 17)).astype(np.int32)


def moved(engine: Engine, seed: int = 3) -> TrainState:
    """Return the engine's state with noise on every tensor, so that each matters."""
    rng = np.random.default_rng(seed)
    weights = engine.read_state().weights
    return TrainState.fresh(
        {key: (value + rng.normal(0, 0.1, value.shape)).astype(np.float32) for key, value in weights.items()}
    )


def train(engine: Engine, plan: BatchPlan) -> list[float]:
    results = [engine.fetch(engine.train_step(plan.step_batch(step), RATE)) for step in range(1, STEPS + 1)]
    return [result.loss_sum / result.num_loss_tokens for result in results]


def save(folder: Path, engine: Engine, weights: dict[str, Array], lora: LoraConfig, base: Path) -> None:
    write_adapter(
        folder, weights, peft_config(as_stored(lora), engine.target_modules(), str(base), None, engine.tied_embeddings)
    )


def logits_of(model: torch.nn.Module) -> Array:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens().astype(np.int64))).logits.numpy()


def peft_model(base: Path, lora: LoraConfig) -> torch.nn.Module:
    """Let PEFT itself make the adapter that a config of ours describes, its own start included."""
    settings = lora.model_dump(exclude={"target_modules", "layers_to_transform", "exclude_modules"})
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    saved = list(lora.modules_to_save) if lora.modules_to_save else None
    parameters = list(lora.target_parameters) if lora.target_parameters else None
    settings |= {
        "target_modules": targets,
        "target_parameters": parameters,
        "modules_to_save": saved,
        "ensure_weight_tying": bool(saved),
    }
    return peft.get_peft_model(transformers_model(base), peft.LoraConfig(**settings))


def peft_training(base: Path, lora: LoraConfig, engine: Engine, plan: BatchPlan) -> tuple[list[float], torch.nn.Module]:
    """Train with PEFT, torch.optim.AdamW and clip_grad_norm_ from the same start; returns losses a token and model."""
    model = peft_model(base, lora)
    if as_stored(lora).r == lora.r:  # a start of its own is compared by itself, above
        weights = engine.read_state().weights
        if engine.tied_embeddings and EMBEDDING_KEY in weights:
            weights[HEAD_KEY] = weights[EMBEDDING_KEY]
        peft.set_peft_model_state_dict(model, {key: torch.from_numpy(value) for key, value in weights.items()})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses, _ = train_in_torch(model, parameters, optimizer, plan, STEPS, 1.0)
    return losses, model


def assert_close(found: Array, expected: Array, tolerance: float = ROUNDING) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)
