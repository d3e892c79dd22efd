"""The adapter's weights and gradient in one flat buffer each, under the names that PEFT's files use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from common.flat import FlatLayout
from torch_backend.low_rank import plain_layers

# PEFT's names of parameters, and of the same in its files.
FILE_NAMES = {
    ".lora_magnitude_vector.default.weight": ".lora_magnitude_vector",
    ".modules_to_save.default.": ".",
    ".default.weight": ".weight",
}


class Adapter:
    """Hold the adapter's weights in one flat float32 buffer, and the gradient of a step likewise.

    The parameters of the layers are views of the weights, and backward passes add to views of the gradient. Where all
    of them are plain LoRA's and the run is in half precision, they are rounded copies instead, in another flat buffer
    or on a card at the border of the base's weights: one operation a step, where layers that round for themselves take
    fourteen small ones each, forward and backward, and as many for their gradients; and until a backward pass has ended
    there is no gradient in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        placed: Sequence[nn.Parameter] = (),
        triton: bool = False,
    ) -> None:
        """Move the trainable parameters of a model that runs in a dtype into one buffer.

        Those that are `placed` stay where they are, and get a copy of the weights there, by Triton's kernel or by
        torch's own.
        """
        parameters = trainable_parameters(model)
        self.layout = FlatLayout({key: tuple(parameter.shape) for key, parameter in parameters.items()})
        self.weights = torch.zeros(self.layout.size, device=device)
        self._copied = bool(placed) or (dtype != torch.float32 and is_plain(model))
        self.gradient = torch.zeros(0 if self._copied else self.layout.size, device=device)
        self._parameters = [parameters[key] for key in self.layout.shapes]
        kept = {id(parameter) for parameter in placed}
        self._rounded = self.weights.to(dtype) if self._copied and len(kept) < len(parameters) else None
        places, targets = [], []
        for parameter, (_, place, shape) in zip(self._parameters, self.layout.slices(), strict=True):
            if id(parameter) in kept:
                places.append(place)
                targets.append(parameter.data)
                continue
            parameter.data = (self.weights if self._rounded is None else self._rounded)[place].view(shape)
            if not self._copied:
                parameter.grad = self.gradient[place].view(shape)
        self._copy_to_places = _copying(places, targets, triton)

    def show_weights(self) -> None:
        """Let the layers see the weights as they are now."""
        if self._rounded is not None:
            self._rounded.copy_(self.weights)
        self._copy_to_places(self.weights)

    def zero_gradient(self) -> None:
        """Begin a step's gradient, whatever became of the last one."""
        if not self._copied:
            self.gradient.zero_()
        else:
            self.gradient = self.gradient.new_zeros(0)
            self._forget_rounded()

    def collect_gradient(self) -> None:
        """Add what a backward pass left with the layers to the step's gradient."""
        if not self._copied:
            return  # it has been added
        left = (torch.zeros_like(each) if each.grad is None else each.grad for each in self._parameters)
        gradient = torch.cat([each.reshape(-1) for each in left]).float()
        self._forget_rounded()
        self.gradient = self.gradient.add_(gradient) if len(self.gradient) else gradient

    def _forget_rounded(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _copying(places: Sequence[slice], targets: Sequence[torch.Tensor], triton: bool) -> Callable[[torch.Tensor], None]:
    """Return what copies parts of a flat array to matrices, with Triton all in one kernel."""
    if targets and triton:
        from torch_backend.copy_kernel import Copies

        return Copies(places, targets).make

    def copy_each(flat: torch.Tensor) -> None:
        for place, target in zip(places, targets, strict=True):
            target.copy_(flat[place].view(target.shape))

    return copy_each


def is_plain(model: nn.Module) -> bool:
    """Tell whether nothing but plain LoRA is trained in a model."""
    plain = {id(parameter) for layer in plain_layers(model) for parameter in layer.parameters()}
    return all(id(parameter) in plain for parameter in trainable_parameters(model).values())


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that PEFT left trainable, by the name they have in PEFT's files."""
    parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for inside, outside in FILE_NAMES.items():
                name = name.replace(inside, outside)
            parameters[name] = parameter
    return parameters
