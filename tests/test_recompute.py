"""What MLX computes again in the backward pass changes no gradient, and is not kept meanwhile."""

import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from engines import Step, gradient_of, make_batches, open_fresh
from tiny_models import FAMILIES, write_family

import mlx_backend.engine
from common.batches import BatchPlan
from common.config import LoraConfig, QuantizationConfig
from mlx_backend.lora import DoRALinear
from mlx_backend.low_rank import adapted_products
from mlx_backend.origin import Origin
from mlx_backend.recompute import is_mlp, is_norm, keep_products

TOLERANCE = 2e-4  # of the largest entry of a tensor: sums in another order, which recurrent layers multiply

DENSE = [name for name, family in FAMILIES.items() if not any("experts" in key for key in family.settings)]
CASES = [
    *((family, {}, {}) for family in FAMILIES),
    ("llama", {"gradient_checkpointing": True}, {}),
    ("llama", {}, {"lora_dropout": 0.2}),
    ("llama", {"gradient_checkpointing": True}, {"lora_dropout": 0.2}),
    ("llama", {}, {"use_dora": True}),
    ("llama", {}, {"use_dora": True, "lora_dropout": 0.2}),
    ("llama", {}, {"target_modules": ["q_proj", "up_proj"]}),
    ("llama", {}, {"rank_pattern": {"k_proj": 3, "up_proj": 5}}),
    ("llama", {"gradient_checkpointing": True}, {"use_dora": True}),
    ("llama", {}, {"modules_to_save": ["input_layernorm", "post_attention_layernorm"]}),
    ("llama", {"quantization": QuantizationConfig(load_in_4bit=True)}, {}),
    ("llama", {"packing": True, "max_seq_length": 120}, {}),
]


def keep(monkeypatch: pytest.MonkeyPatch, products_alone: bool) -> None:
    """Let engines opened from here on keep products alone or what MLX by itself does, whatever their device."""
    monkeypatch.setattr(
        mlx_backend.engine,
        "keep_products",
        lambda model, _, checkpointing: keep_products(model, True, checkpointing) if products_alone else Origin(),
    )


@pytest.mark.parametrize(("family", "settings", "lora"), CASES)
def test_no_gradient_changes(family, settings, lora, tmp_path, monkeypatch):
    model = write_family(tmp_path / "model", family)
    common = {"max_grad_norm": 0, "max_seq_length": FAMILIES[family].max_seq_length}

    capacity = settings["max_seq_length"] if settings.get("packing") else None
    batch = BatchPlan(make_batches(8), 4, 2, 0, 1, capacity=capacity).step_batch(1)

    def step() -> Step:
        return gradient_of(open_fresh("mlx", model, LoraConfig(**lora), **(common | settings)), batch)

    keep(monkeypatch, products_alone=False)
    expected = step()
    keep(monkeypatch, products_alone=True)
    found = step()
    assert found[0] == pytest.approx(expected[0], rel=2e-6)
    for key, tensor in expected[1].items():
        np.testing.assert_allclose(found[1][key], tensor, rtol=0, atol=TOLERANCE * np.abs(tensor).max(), err_msg=key)
        assert np.abs(tensor).max() > 0


def test_generation_and_evaluation_go_the_plain_way(tmp_path, monkeypatch):
    keep(monkeypatch, products_alone=True)
    engine = open_fresh("mlx", write_family(tmp_path / "model", "llama"))
    batch = BatchPlan(make_batches(8), 4, 1, 0, 1).step_batch(1)
    gradient_of(engine, batch)
    tokens = np.arange(12).reshape(1, 12)
    engine.logits(tokens)
    assert not engine._origin.followed
    engine.fetch(engine.eval_step(batch.micro_batches[0]))
    assert not engine._origin.followed


@pytest.mark.parametrize(
    ("lora", "products"),
    [
        ({}, [3, 1, 2, 1]),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, [2, 1]),
        ({"lora_dropout": 0.1}, [3, 1, 2, 1]),
    ],
)
def test_adapters_that_read_the_same_are_computed_at_once(lora, products, tmp_path, monkeypatch):
    counts: list[int] = []

    def counted(x, source, compute, layers):
        counts.append(len(layers))
        return adapted_products(x, source, compute, layers)

    for module in ("siblings", "lora"):
        monkeypatch.setattr(f"mlx_backend.{module}.adapted_products", counted)
    keep(monkeypatch, products_alone=True)
    engine = open_fresh("mlx", write_family(tmp_path / "model", "llama"), LoraConfig(**lora))
    step = BatchPlan(make_batches(2), 2, 1, 0, 1).step_batch(1)
    gradient_of(engine, step)
    passes = len(engine._parts(step.micro_batches[0])) * len(engine._model.layers)
    assert counts[: passes * len(products)] == products * passes  # of the forward pass, which comes first


def test_no_zeros_are_added_to_the_gradient_of_what_is_computed_again(tmp_path):
    origin, layer = Origin(), DoRALinear(nn.Linear(8, 8), 2, 1.0, 0.0, mx.float32)  # whose function leaves W x out
    origin.followed = True

    def out(hidden: mx.array) -> mx.array:
        x = origin.note(hidden, mx.square)
        return adapted_products(x, *origin.of(x), [layer])[0]

    _, gradients = mx.vjp(out, [mx.ones((4, 8))], [mx.ones((4, 8))])
    mx.export_to_dot(str(tmp_path / "graph.dot"), *gradients)
    graph = (tmp_path / "graph.dot").read_text()
    assert "Matmul" in graph
    assert "Add" not in graph


@pytest.mark.parametrize("family", DENSE)
def test_every_dense_layer_has_an_mlp_and_its_norms_found(family, tmp_path):
    model = write_family(tmp_path / "model", family)
    engine = open_fresh("mlx", model, max_seq_length=FAMILIES[family].max_seq_length)
    for layer in engine._model.layers:
        assert sum(is_mlp(module) for module in layer.modules()) == 1
        assert sum(is_norm(child) for child in layer.children().values()) >= 1


PEAKS = """
import sys
from mlx_backend.blas import use_fast_blas
use_fast_blas()
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.llama import MLP, ModelArgs
from mlx_backend.lora import LoRALinear
from mlx_backend.recompute import keep_products

TOKENS, WIDTH, INNER = 512, 96, 384


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(WIDTH), MLP(args)
        for name, linear in self.mlp.children().items():
            self.mlp[name] = LoRALinear(linear, 2, 1.0, 0.0, mx.float32)
            linear.freeze()
        self.norm.freeze()

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.layers = [Layer() for _ in range(number)]


args = ModelArgs("llama", WIDTH, 1, INNER, 1, 1e-5, 8)
peaks = []
for number in (4, 12):
    model = Stack(number)
    if sys.argv[1] == "True":
        keep_products(model, True, False).followed = True

    def loss(weights, x):
        model.update(weights)
        for layer in model.layers:
            x = layer(x)
        return x.sum()

    x = mx.ones((1, TOKENS, WIDTH))
    weights = model.trainable_parameters()
    mx.eval(model.parameters(), x)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(loss)(weights, x))
    peaks.append(mx.get_peak_memory() - held)
print((peaks[1] - peaks[0]) / 8 / (4 * TOKENS * WIDTH))
"""


def test_a_layer_keeps_products_alone():
    kept = [float(subprocess.check_output([sys.executable, "-c", PEAKS, each])) for each in ("False", "True")]
    # In arrays of the hidden states, of which four are an MLP's width: gate and up, the layer's input, and on a CPU,
    # where a norm is many operations, two of it; without, SwiGLU's sigmoid, what it multiplies and the product too.
    assert kept[0] > 18
    assert kept[1] < 12.5
