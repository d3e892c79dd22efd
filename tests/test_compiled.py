"""Compiled layers, offloaded activations, the chunked loss of the torch engine: only speed and memory change."""

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import DEVICE, make_batches, open_fresh
from tiny_models import write_family, write_llama
from torch.nn import functional as F

import torch_backend.loss
from common.batches import BatchPlan
from common.config import LoraConfig
from common.errors import UserError
from common.logits import AfterHead
from common.sampling import Sampling
from torch_backend.head import Head, find_head
from torch_backend.loss import LinearCrossEntropy, softmax_error

needs_card = pytest.mark.skipif(DEVICE == "cpu", reason="on a card alone: TWINTUNE_TEST_DEVICE=gpu")
SETTINGS = [{}, {"gradient_checkpointing": True}, {"packing": True}]


def curve(llama: Path, lora: LoraConfig | None = None, **settings: object) -> list[float]:
    engine, plan = open_fresh("torch", llama, lora, **settings), BatchPlan(make_batches(), 4, 1, 42, 2)
    results = [engine.fetch(engine.train_step(plan.step_batch(step), 5e-3)) for step in range(1, 8)]
    assert len(list(engine.generate([[5, 6, 7]], Sampling(4)))) == 4  # with the layers' own code
    return [result.loss_sum / result.num_loss_tokens for result in results]


@needs_card  # a C++ compiler takes a minute for what Triton does in seconds
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(use_dora=True, modules_to_save=["lm_head"])], ids=str)
def test_compiled_layers_train_as_plain_ones(settings: dict, lora: LoraConfig, llama: Path) -> None:
    expected = curve(llama, lora, torch_compile=False, **settings)
    assert curve(llama, lora, torch_compile=True, **settings) == pytest.approx(expected, rel=1e-4)


@needs_card
@pytest.mark.parametrize("compiled", [False, True])
def test_offloaded_activations_come_back_as_they_were(compiled: bool, tmp_path: Path) -> None:
    base = write_llama(tmp_path, hidden_size=4096, num_hidden_layers=4)  # a hidden state of over a megabyte
    settings = {"gradient_checkpointing": True, "torch_compile": compiled}
    expected = curve(base, **settings)
    assert curve(base, activation_offloading=True, **settings) == expected


@pytest.mark.skipif(DEVICE != "cpu", reason="this machine has a card to offload from")
def test_offloading_without_a_card_is_refused(llama: Path) -> None:
    with pytest.raises(UserError, match="activation_offloading: true: moves activations from a card's memory"):
        open_fresh("torch", llama, gradient_checkpointing=True, activation_offloading=True)


@pytest.mark.parametrize("name", ["torch_compile", "activation_offloading"])
def test_mlx_refuses_what_only_torch_does(name: str, llama: Path) -> None:
    with pytest.raises(UserError, match=f"{name}: true: .*; delete it"):
        open_fresh("mlx", llama, gradient_checkpointing=True, **{name: True})


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(("factor", "soft_cap"), [(1.0, None), (0.125, None), (1.0, 5.0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_chunked_loss_and_its_gradient_are_torchs_own(
    rows: int, factor: float, soft_cap: float | None, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(301, 24, generator=rng), torch.randn(17, 24, generator=rng).requires_grad_()
    targets, counted = torch.randint(0, 301, (17,), generator=rng), torch.arange(17).remainder(3).clamp(max=1).float()
    head = Head(weight, torch.randn(301, generator=rng) if with_bias else None, AfterHead(factor, soft_cap))
    expected = (F.cross_entropy(head(hidden), targets, reduction="none") * counted).sum()
    (gradient,) = torch.autograd.grad(2 * expected, hidden)
    monkeypatch.setattr(torch_backend.loss, "CHUNK_BYTES", 4 * 301 * rows)
    found = LinearCrossEntropy.apply(hidden, head, targets, counted, softmax_error)
    (ours,) = torch.autograd.grad(2 * found, hidden)
    torch.testing.assert_close(found, expected)  # float32 rounding, torch's own bound
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {}, (1.0, None)),
        ("gemma2", {"final_logit_softcapping": 3.0}, (1.0, 3.0)),
        ("granite", {"logits_scaling": 4.0}, (0.25, None)),
    ],
)
def test_what_follows_the_head_is_found_by_measuring(
    family: str, settings: dict, expected: tuple, tmp_path: Path
) -> None:
    engine = open_fresh("torch", write_family(tmp_path, family, **settings))
    head = find_head(engine._base, engine._selection)
    assert (head.after.factor, head.after.soft_cap) == expected


def test_a_head_that_is_trained_or_does_something_unknown_takes_the_plain_way(llama: Path) -> None:
    trained = open_fresh("torch", llama, LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert find_head(trained._base, trained._selection) is None
    engine = open_fresh("torch", llama)
    engine._base.lm_head.register_forward_hook(lambda _, __, logits: logits * 3)
    assert find_head(engine._base, engine._selection) is None
    assert np.isfinite(curve(llama, LoraConfig(target_modules=["q_proj", "lm_head"]))).all()
