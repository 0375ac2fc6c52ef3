"""Checks that the outputs of all networks are finite, and names the first stage that was not.

A clamp turns infinity into 1, rounding to bytes turns NaN into a colour, and a comparison with NaN
reads as "no replica"; so every output is checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum

import torch
from torch import Tensor

from invmm.diffusion.guidance import Condition
from invmm.engine.outcomes import NonFiniteError, Outcome

_CURE = "use model.dtype=float32 without execution.autocast; with both set so, the weights are"


class Stage(StrEnum):
    """What produced a tensor; the value is the error if the tensor is not finite, with the cure."""

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
    RESULT = (
        f"the result of the measurement is not finite; lower the learning rate, or {_CURE} damaged"
    )


class Watch:
    """The largest magnitude of each stage's outputs for one image, kept on the device.

    Reading every output would make the host wait for the device at every step of a search; one
    read at the end is enough.
    """

    def __init__(self) -> None:
        self._largest: dict[Stage, Tensor] = {}

    def see(self, stage: Stage, *answers: Tensor) -> None:
        """Records outputs of a stage.

        Outputs after a non-finite one of another stage count as 0: that stage is the cause.
        """
        for answer in answers:
            largest = magnitude(answer)
            for before in self._largest.values():
                if before is not self._largest.get(stage):
                    largest = torch.where(before.isfinite(), largest, 0.0)
            own = self._largest.get(stage)
            self._largest[stage] = largest if own is None else torch.maximum(own, largest)

    def fault(self) -> Stage | None:
        """The first stage whose output was not finite; None if all were."""
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
    """The largest absolute value, a scalar without a graph; NaN if any value is NaN."""
    return torch.linalg.vector_norm(values.detach().float(), ord=math.inf)


def row_magnitudes(values: Tensor) -> Tensor:
    """(B, ...) -> (B,), the `magnitude` of each row."""
    return torch.linalg.vector_norm(values.detach().float().flatten(1), ord=math.inf, dim=1)


def are_finite(answers: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor is finite throughout; waits for the device once."""
    if not answers:
        return []
    return torch.stack([magnitude(answer) for answer in answers]).isfinite().tolist()


def check_finite(answers: Iterable[tuple[Stage, Tensor | Condition | None]]) -> None:
    """Refuses tensors that are not finite; waits for the device once.

    Args:
        answers: tensors or conditions and the stages that produced them; None is skipped.

    Raises:
        NonFiniteError: naming the first stage and the cure.
    """
    tensors = [(stage, value) for stage, answer in answers for value in _floats(answer)]
    finite = are_finite([value for _, value in tensors])
    for (stage, _), is_finite in zip(tensors, finite, strict=True):
        if not is_finite:
            raise NonFiniteError(stage)


def outcome_is_finite(outcome: Outcome) -> bool:
    """Whether all numbers of an outcome, its tensors and its samples are finite."""
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
