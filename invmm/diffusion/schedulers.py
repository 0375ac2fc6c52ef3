"""The diffusers schedulers that draw here: all that is known of one stands in its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

Spacing = Literal["trailing", "leading", "linspace"]


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """What is known of a scheduler of diffusers.

    Attributes:
        class_name: in diffusers.
        samples_flows: it draws from models of a rectified flow; from those of noise otherwise.
        evaluations: of the network in each step but the last, which takes one.
        is_stochastic: it draws noise of its own at any `eta`.
        takes_eta: it adds as much noise as `eta` says.
        can_clip: it can clip the predicted clean latents.
        must_divide: the number of steps must divide that of the training timesteps.
        rescales_betas: its class has the key `rescale_betas_zero_snr`; for others the betas are
            rescaled beforehand.
        spacings: that it can take.
        fixed: further options that it is built with.
    """

    class_name: str
    samples_flows: bool = False
    evaluations: int = 1
    is_stochastic: bool = False
    takes_eta: bool = False
    can_clip: bool = False
    must_divide: bool = False
    rescales_betas: bool = True
    spacings: tuple[Spacing, ...] = ("trailing", "leading", "linspace")
    fixed: Mapping[str, Any] = field(default_factory=dict)


SCHEDULERS: Mapping[str, Scheduler] = {
    "ddim": Scheduler(
        class_name="DDIMScheduler",
        takes_eta=True,
        can_clip=True,
        must_divide=True,
        fixed={"set_alpha_to_one": True},
    ),
    "ddpm": Scheduler(
        class_name="DDPMScheduler",
        is_stochastic=True,
        can_clip=True,
        fixed={"variance_type": "fixed_small"},
    ),
    "dpmsolver": Scheduler(
        class_name="DPMSolverMultistepScheduler",
        fixed={"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"},
    ),
    "euler": Scheduler(class_name="EulerDiscreteScheduler", fixed={"final_sigmas_type": "zero"}),
    "heun": Scheduler(
        class_name="HeunDiscreteScheduler", evaluations=2, can_clip=True, rescales_betas=False
    ),
    "unipc": Scheduler(class_name="UniPCMultistepScheduler", fixed={"final_sigmas_type": "zero"}),
    "flow_euler": Scheduler(
        class_name="FlowMatchEulerDiscreteScheduler",
        samples_flows=True,
        spacings=("linspace", "trailing"),
    ),
    "flow_heun": Scheduler(
        class_name="FlowMatchHeunDiscreteScheduler",
        samples_flows=True,
        evaluations=2,
        spacings=("linspace",),
    ),
}
"""`sampler.scheduler` -> its row; one more is one more row here, and a preset in conf/sampler."""

if TYPE_CHECKING:
    SchedulerName = str
else:
    SchedulerName = Literal[tuple(SCHEDULERS)]
