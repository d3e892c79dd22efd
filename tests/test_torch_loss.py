"""The loss of a frozen head on torch, chunk by chunk: the formula's, in little more memory than a chunk's logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from allocations import allocations_of
from engines import make_batches, open_fresh
from plain_loss import AFTER, compare_with_plain, plain_loss
from tiny_models import write_family
from torch.nn import functional as F

import torch_backend.loss
from common.batches import BatchPlan
from common.config import LoraConfig
from common.logits import AfterHead
from common.sampling import Sampling
from torch_backend.head import Head, find_head
from torch_backend.loss import LinearCrossEntropy, softmax_error_


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("after", AFTER, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradient_in_chunks_are_those_of_the_formula(
    rows: int, after: AfterHead, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(301, 24, generator=rng), torch.randn(17, 24, generator=rng).requires_grad_()
    targets, counted = torch.randint(0, 301, (17,), generator=rng), torch.arange(17).remainder(3).clamp(max=1).float()
    bias = torch.randn(301, generator=rng) if with_bias else None
    losses, derivative = plain_loss(F.linear(hidden, weight, bias), targets, counted, after)
    monkeypatch.setattr(torch_backend.loss, "CHUNK_BYTES", 4 * 301 * rows)
    found = LinearCrossEntropy.apply(hidden, Head(weight, bias, after), targets, counted, softmax_error_)
    (ours,) = torch.autograd.grad(2 * found, hidden)
    torch.testing.assert_close(found, losses.sum().float())  # float32 rounding, torch's own bound
    torch.testing.assert_close(ours, 2 * (derivative @ weight.double()).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 2, 301, 40_001])
@pytest.mark.parametrize("after", AFTER, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_their_derivative_are_those_of_the_formula(
    vocabulary: int, after: AfterHead, dtype: torch.dtype
) -> None:
    compare_with_plain(softmax_error_, dtype, vocabulary, after, "cpu")


@pytest.mark.parametrize("after", AFTER, ids=str)
@pytest.mark.parametrize(("dtype", "arrays"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_beside_the_logits_one_float32_array_is_alive_or_two(after: AfterHead, dtype: torch.dtype, arrays: int) -> None:
    output, targets, counted = torch.randn(256, 5000).to(dtype), torch.zeros(256, dtype=torch.long), torch.ones(256)
    peak = max(np.cumsum(allocations_of(lambda: softmax_error_(output, targets, counted, after))))
    assert peak == pytest.approx(4 * output.numel() * arrays, rel=0.01)


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
    plan = BatchPlan(make_batches(), 4, 1, 42, 2)
    results = [trained.fetch(trained.train_step(plan.step_batch(step), 5e-3)) for step in range(1, 8)]
    assert np.isfinite([result.loss_sum for result in results]).all()
    assert len(list(trained.generate([[5, 6, 7]], Sampling(4)))) == 4
    engine = open_fresh("torch", llama)
    engine._base.lm_head.register_forward_hook(lambda _, __, logits: logits * 3)
    assert find_head(engine._base, engine._selection) is None
