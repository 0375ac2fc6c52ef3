"""Whether what the networks answer is finite, and which of them was the first that was not.

A clamp turns infinity into 1, a rounding to bytes turns NaN into a colour, a comparison turns it
into "no replica": so every answer is looked at before anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition
from invmm.engine.outcomes import NonFiniteError, Outcome

_CURE = "use model.dtype=float32 without execution.autocast; if that is so already, its weights are"


class Stage(StrEnum):
    """Where numbers come from; the value says that they are not finite, and the cure."""

    PROMPT = f"a text encoder's embeddings of the prompt are not finite; {_CURE} damaged"
    ENCODER = f"the autoencoder's latents of the image are not finite; {_CURE} damaged"
    TARGET = (
        "the similarity network's embedding of the image is not finite; give another "
        "replication.similarity, this one is damaged"
    )
    PREDICTION = (
        f"the denoiser's prediction is not finite; {_CURE} damaged or the learning rate too high"
    )
    SAMPLE = f"the sampler's latents are not finite; {_CURE} damaged or the learning rate too high"
    DECODER = f"the autoencoder's decoded pixels are not finite; {_CURE} damaged"
    SIMILARITY = (
        "the similarity network's embedding of a sample is not finite; give another "
        "replication.similarity, this one is damaged"
    )
    SECOND_OPINION = (
        "an embedding of the second opinion is not finite; give another "
        "replication.second_opinion, this one is damaged"
    )
    RESULT = f"what was found is not finite; lower the learning rate, or {_CURE} damaged"


class Watch:
    """The largest magnitude that one image was answered at each stage, left on the device.

    Looking at every answer of a search would make the host wait for the device at every step; one
    look at the end suffices.
    """

    def __init__(self) -> None:
        self._largest: dict[Stage, Tensor] = {}

    def see(self, stage: Stage, *answers: Tensor) -> None:
        """Takes note of an answer; what follows on a broken one of another stage is no cause."""
        for answer in answers:
            largest = magnitude(answer)
            for before in self._largest.values():
                if before is not self._largest.get(stage):
                    largest = torch.where(before.isfinite(), largest, 0.0)
            own = self._largest.get(stage)
            self._largest[stage] = largest if own is None else torch.maximum(own, largest)

    def fault(self) -> Stage | None:
        """The first stage with a number that was not finite."""
        finite = are_finite(list(self._largest.values()))
        return next(
            (
                stage
                for stage, is_finite in zip(self._largest, finite, strict=True)
                if not is_finite
            ),
            None,
        )


def magnitude(values: Tensor) -> Tensor:
    """The largest absolute value, a scalar without a graph; NaN if there is one."""
    return torch.linalg.vector_norm(values.detach().float(), ord=math.inf)


def row_magnitudes(values: Tensor) -> Tensor:
    """(B, ...) -> (B,), as `magnitude` of each row."""
    return torch.linalg.vector_norm(values.detach().float().flatten(1), ord=math.inf, dim=1)


def are_finite(answers: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor is finite throughout; waits for the device once."""
    if not answers:
        return []
    return torch.stack([magnitude(answer) for answer in answers]).isfinite().tolist()


def check_finite(answers: Iterable[tuple[Stage, Tensor | Condition | None]]) -> None:
    """Refuses to go on from numbers that are not finite; waits for the device once.

    Raises:
        NonFiniteError: naming the first stage and the cure.
    """
    found = [(stage, value) for stage, answer in answers for value in _floats(answer)]
    finite = are_finite([value for _, value in found])
    for (stage, _), is_finite in zip(found, finite, strict=True):
        if not is_finite:
            raise NonFiniteError(stage)


def outcome_is_finite(outcome: Outcome) -> bool:
    """Whether what a measurement found holds finite numbers only."""
    scalars = (
        outcome.score, outcome.score_nats, outcome.replication_rate, outcome.best_similarity
    )  # fmt: skip
    tensors = [value for value in outcome.tensors.values() if value.is_floating_point()]
    tensors += [] if outcome.samples is None else [outcome.samples]
    return all(value is None or math.isfinite(value) for value in scalars) and all(
        are_finite([value]) == [True] for value in tensors if value.numel()
    )


def _floats(answer: Tensor | Condition | None) -> Iterator[Tensor]:
    values = [answer] if isinstance(answer, Tensor) else (answer or {}).values()
    return (value for value in values if value.is_floating_point() and value.numel())
