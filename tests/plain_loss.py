"""The loss of a head's output by its formula, in float64, with torch's own gradient: what ours are held against."""

import torch
from torch.nn import functional as F

from common.logits import AfterHead

AFTER = [AfterHead(), AfterHead(0.125), AfterHead(soft_cap=5.0), AfterHead(2, 30)]


def plain_loss(
    output: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, after: AfterHead
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted loss of each row (N,), and the derivative of their sum by the output (N, V)."""
    output = output.detach().double().requires_grad_()
    logits = output * after.factor
    if after.soft_cap is not None:
        logits = after.soft_cap * torch.tanh(logits / after.soft_cap)
    losses = F.cross_entropy(logits, targets, reduction="none") * counted
    (derivative,) = torch.autograd.grad(losses.sum(), output)
    return losses.detach(), derivative


def compare_with_plain(overwrite, dtype: torch.dtype, vocabulary: int, after: AfterHead, device: str) -> None:
    """Hold a function as LinearCrossEntropy takes it against the formula, on rows with gaps between them."""
    torch.manual_seed(0)
    wide = (9 * torch.randn(8, vocabulary + 24, device=device)).to(dtype)
    wide[0] = -300  # the largest of no row is 0
    wide[6, : vocabulary // 2] = -torch.inf
    output, before = wide[:, :vocabulary], wide.clone()
    targets = torch.randint(0, vocabulary, (8,), device=device)
    targets[2], targets[3], targets[6] = 0, vocabulary - 1, vocabulary - 1
    counted = torch.tensor([1.0, 0, 0.5, 1, 1, 2, 1, 1], device=device)
    losses, derivative = plain_loss(output, targets, counted, after)
    found = overwrite(output, targets, counted, after)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=5e-5)  # float32 has 300 to 3e-5
    assert (found[1] == 0) and (output[1] == 0).all()
    # Triton's interpreter cuts numbers off where a card rounds them.
    rounding = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), derivative, rtol=rounding, atol=1e-6)
    assert (wide[:, vocabulary:] == before[:, vocabulary:]).all()
