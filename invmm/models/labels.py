"""Class labels of class-conditional models."""

from __future__ import annotations

import torch
from torch import Tensor


def class_label(label: str | int | None, count: int) -> Tensor:
    """(1,) a label of a model with so many classes.

    Raises:
        ValueError: no such class.
    """
    if type(label) is not int or not 0 <= label < count:
        raise ValueError(
            f"{label!r} is not one of the model's classes; use prompt=class_label with a label "
            f"from 0 to {count - 1}"
        )
    return torch.tensor([label])
