"""A loss of named parts that can be used wherever one number is expected."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


class LossComponents(dict[str, Tensor]):
    """Named scalar losses that behave as their sum where one number is wanted.

    `SentenceTransformerTrainer` sums and logs a dict of losses. `old_fit` calls `backward()` on what a loss returns
    and `MatryoshkaLoss` weights and adds it; these few operations let them do so. Go through it by `keys()`, `values()`
    or `items()`: iterating is refused, since `GradScaler.scale()`, which knows tensors and lists of them only, would
    take the names for the losses and fail in words that nobody understands.
    """

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "LossComponents is not iterated. If this comes from a GradScaler: it cannot scale a dict of losses, so "
            "pass it `loss(...).total()`; in place of `old_fit(use_amp=True)` call `fit(use_amp=True)`, or train by "
            "SentenceTransformerTrainer with fp16=True or bf16=True. To read the parts use .items()."
        )

    def total(self) -> Tensor:
        """Return the sum of the components."""
        return torch.stack(list(self.values())).sum()

    def backward(self) -> None:
        """Back-propagate the sum."""
        torch.autograd.backward(self.total())

    def __mul__(self, weight: float) -> LossComponents:
        return LossComponents({name: value * weight for name, value in self.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LossComponents:
        return self * (1 / divisor)

    def __add__(self, other: LossComponents | Tensor | float) -> LossComponents:
        """Add another loss by name; a plain tensor counts as a component named `other`, the number 0 as nothing."""
        if isinstance(other, (int, float)) and other == 0:  # the start of `sum()` and of the wrappers' loops
            return self
        parts = other if isinstance(other, LossComponents) else {"other": torch.as_tensor(other)}
        return LossComponents({**self, **{name: self[name] + v if name in self else v for name, v in parts.items()}})

    __radd__ = __add__
