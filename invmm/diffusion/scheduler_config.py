"""Reads the schedule that a model was trained with from the config of a diffusers scheduler.

Such a config mixes two things: the trained schedule (betas and the prediction type, or the shift of
a rectified flow) and how the pipeline samples (spacing, Karras sigmas, solver order, clipping).
Only the former is read here; `Sampler` replaces the latter. Classes and keys whose schedule cannot
be expressed by betas or a shift are refused. Torch and diffusers are imported only where they are
needed, so that checking a config is quick.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sized
from inspect import signature
from typing import Any

TRAINED_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""Keys of a scheduler config that belong to the trained model, not to a sampler."""

FLOW_KEYS = ("num_train_timesteps", "shift")
"""Keys of a rectified flow's scheduler config that belong to the trained model."""

BETA_SCHEDULERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers whose config describes a schedule of betas."""

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Schedulers whose config describes a rectified flow."""

DISTILLED = (
    "CMStochasticIterativeScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosDMDScheduler",
    "LCMScheduler",
    "SCMScheduler",
    "TCDScheduler",
)
"""Schedulers of models distilled to a few steps; other schedulers cannot sample those models."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""Prediction types of networks on a schedule of betas."""

_MAX_TIMESTEPS = 10_000
_NEUTRAL: Mapping[str, tuple[Any, str]] = {
    "timestep_type": ("discrete", "the network would get logarithms of sigmas as timesteps"),
    "sigma_min": (None, "it replaces the range of the betas"),
    "sigma_max": (None, "it replaces the range of the betas"),
    "use_flow_sigmas": (False, "a rectified flow would replace the betas"),
    "shift_terminal": (None, "it stretches the sigmas of a rectified flow"),
    "invert_sigmas": (False, "it reverses the time of a rectified flow"),
    "use_dynamic_shifting": (False, "the shift would depend on the image size"),
}
"""Key -> (the only value that keeps the trained schedule, what any other value would do)."""

_NEUTRAL_FLOW: Mapping[str, tuple[Any, str]] = {
    **{
        key: (
            False,
            "it changes the sigmas, from which alone the trained schedule of a flow is read",
        )
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    },
    "stochastic_sampling": (False, "it draws new noise at each step, as distilled models need"),
}
_CURES: Mapping[str, str] = {
    "use_flow_sigmas": "name a FlowMatchEulerDiscreteScheduler with shift={flow_shift} instead",
    "use_dynamic_shifting": "give the shift for this image size and use_dynamic_shifting=false",
}


def why_refused(class_name: str) -> str:
    """The reason and the cure in messages that refuse a scheduler class listed nowhere above."""
    if class_name.rpartition(".")[2] in DISTILLED:
        return (
            "it samples distilled models, which is not supported; measure the model that they were "
            "distilled from"
        )
    return "no trained schedule can be read from it; name the scheduler of the model's training"


def class_of(config: Mapping[str, Any]) -> str:
    """The scheduler class of a config; without `_class_name`, DDPM's, or a flow's for `shift`."""
    default = FLOW_SCHEDULERS[0] if "shift" in config else BETA_SCHEDULERS[0]
    return str(config.get("_class_name", default))


def check_config(config: Mapping[str, Any]) -> tuple[int, str]:
    """Refuses a schedule that cannot be read exactly; builds no scheduler.

    Args:
        config: of a scheduler, or some of the `TRAINED_KEYS` without a `_class_name`.

    Returns:
        The number of training timesteps and the prediction type ("flow" of a rectified flow).

    Raises:
        ValueError: naming the class or key, the value and the cure.
    """
    name = class_of(config)
    if name not in (*BETA_SCHEDULERS, *FLOW_SCHEDULERS):
        raise ValueError(f"{name} is not supported: {why_refused(name)}")
    is_flow = name in FLOW_SCHEDULERS
    for key, (neutral, effect) in {**_NEUTRAL, **(_NEUTRAL_FLOW if is_flow else {})}.items():
        value = config.get(key, neutral)
        if value != neutral and not (value is None and neutral is False):
            cure = _CURES.get(key, f"use {key}={shown(neutral)} if the model was trained so")
            shift = config.get("flow_shift", 1.0)
            raise ValueError(
                f"{key}={shown(value)} is not supported: {effect}; {cure.format(flow_shift=shift)}"
            )
    count = config.get("num_train_timesteps", 1000)
    if type(count) is not int or not 1 <= count <= _MAX_TIMESTEPS:
        raise ValueError(f"num_train_timesteps={count!r}; use 1 to {_MAX_TIMESTEPS}")
    if is_flow:
        _check_shift(config.get("shift", 1.0))
        return count, "flow"
    betas = config.get("trained_betas")
    if betas is not None and (isinstance(betas, str) or not isinstance(betas, Sized)):
        raise ValueError(f"trained_betas={betas!r} is no list of numbers; use null")
    if betas is not None and len(betas) != count:
        raise ValueError(
            f"num_train_timesteps={count} is not the {len(betas)} of trained_betas; use "
            f"num_train_timesteps={len(betas)}"
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTIONS:
        raise ValueError(
            f"prediction_type={prediction_type} is not supported; use one of "
            f"{', '.join(PREDICTIONS)}"
        )
    if config.get("rescale_betas_zero_snr") and prediction_type == "epsilon":
        raise ValueError(ZERO_TERMINAL_SNR)
    return count, prediction_type


ZERO_TERMINAL_SNR = (
    "rescale_betas_zero_snr=true leaves no signal at the last timestep, where a predicted noise "
    "(prediction_type=epsilon) does not determine the image; use rescale_betas_zero_snr=false or "
    "prediction_type=v_prediction, as the model was trained"
)


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The trained keys of a config; keys that it lacks get the defaults of its scheduler class.

    Raises:
        ValueError: as `check_config`; a key that the class ignores; or a package is missing.
    """
    check_config(config)
    scheduler = scheduler_class(class_of(config))
    parameters = signature(scheduler.__init__).parameters
    keys = FLOW_KEYS if scheduler.__name__ in FLOW_SCHEDULERS else TRAINED_KEYS
    ignored = "rescale_betas_zero_snr"
    if config.get(ignored) and ignored not in parameters:
        raise ValueError(
            f"{ignored}=true is ignored by the {scheduler.__name__}; name a DDIMScheduler if the "
            f"model was trained so, or use {ignored}=false"
        )
    return {k: config.get(k, parameters[k].default) for k in keys if k in parameters}


def scheduler_class(name: str) -> Any:
    """The class of that name in diffusers.

    Raises:
        ValueError: it needs a package that is not installed.
    """
    import diffusers

    scheduler = getattr(diffusers, name)
    # In place of classes that cannot be imported, diffusers has dummies with this attribute.
    if hasattr(scheduler, "_backends"):
        raise ValueError(
            f"{name} needs the packages {' and '.join(scheduler._backends)}; install them, or name "
            "a DDIMScheduler with the same betas"
        )
    return scheduler


def _check_shift(shift: Any) -> None:
    is_number = isinstance(shift, (int, float)) and not isinstance(shift, bool)
    if not is_number or not 0 < shift < math.inf:
        raise ValueError(
            f"shift={shift!r} cannot be the shift of a rectified flow; use a number above 0"
        )


def shown(value: Any) -> str:
    """A value as a JSON file spells it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
