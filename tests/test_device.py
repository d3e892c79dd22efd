"""What each generation of cards can do: dtype, attention and compilation are chosen in one place, and refused there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import make_batches, open_fresh

import torch_backend.engine
from common.batches import BatchPlan
from common.errors import MachineError
from torch_backend.device import Hardware, look_at

TURING = Hardware("cuda", (7, 5), has_triton=True)


@pytest.mark.parametrize(
    ("hardware", "dtype", "varlen", "cudnn", "compiles"),
    [
        (Hardware("cpu"), "float32", False, False, False),
        (Hardware("mps"), "float32", False, False, False),
        (Hardware("cuda", (6, 1), has_triton=True), "float16", False, False, False),
        (TURING, "float16", False, False, True),
        (Hardware("cuda", (8, 0), has_triton=True), "bfloat16", True, False, True),
        (Hardware("cuda", (8, 9), has_triton=False), "bfloat16", True, False, False),  # Windows, as torch comes
        (Hardware("cuda", (9, 0), has_triton=True), "bfloat16", True, True, True),
        (Hardware("cuda", (12, 0), has_triton=True), "bfloat16", True, True, True),
    ],
    ids=str,
)
def test_what_auto_means_by_kind_and_generation(
    hardware: Hardware, dtype: str, varlen: bool, cudnn: bool, compiles: bool
) -> None:
    assert hardware.dtype == dtype
    assert hardware.has_varlen(dtype) == varlen
    assert hardware.prefers_cudnn == cudnn
    assert hardware.compiles(dtype) == compiles


def test_float32_has_no_kernel_for_packed_rows_on_any_card() -> None:
    assert not Hardware("cuda", (9, 0)).has_varlen("float32")


def test_bfloat16_on_a_card_without_it_is_trained_uncompiled() -> None:
    assert not TURING.compiles("bfloat16")
    assert TURING.why_not_compiled("bfloat16") == "this card has no bfloat16; write dtype: float16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_a_machine_without_a_card_is_looked_at() -> None:
    assert look_at(torch.device("cpu")) == Hardware("cpu")


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine take the CPU for a Turing card."""
    monkeypatch.setattr(torch_backend.engine, "look_at", lambda _: TURING)


@pytest.mark.usefixtures("turing")
@pytest.mark.parametrize("packing", [False, True])
def test_a_turing_card_trains_in_float16_and_attends_example_by_example(packing: bool, llama: Path) -> None:
    engine = open_fresh("torch", llama, device="cpu", dtype="auto", packing=packing)
    exact = open_fresh("torch", llama, device="cpu", dtype="float32", packing=packing)
    plan = BatchPlan(make_batches(), 2, 1, 42, 1, capacity=64 if packing else None)
    losses = []
    for each in (engine, exact):
        results = [each.fetch(each.train_step(plan.step_batch(step), 1e-3)) for step in (1, 2, 3)]
        assert all(result.updated for result in results)
        losses.append([result.loss_sum / result.num_loss_tokens for result in results])
    assert engine.dtype == "float16"
    np.testing.assert_allclose(losses[0], losses[1], rtol=5e-3)  # float16 has 11 bits


@pytest.mark.usefixtures("turing")
def test_compiling_what_the_card_cannot_is_refused(llama: Path) -> None:
    with pytest.raises(MachineError, match=r"torch_compile: true: .* has no bfloat16; write dtype: float16"):
        open_fresh("torch", llama, device="cpu", dtype="bfloat16", torch_compile=True)


def test_compiling_without_triton_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend.engine, "look_at", lambda _: Hardware("cuda", (8, 9), has_triton=False))
    with pytest.raises(MachineError, match=r"torch_compile: true: .*Triton is not installed"):
        open_fresh("torch", llama, device="cpu", torch_compile=True)
