"""Scheduler configs: read through their class's own defaults, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from invmm.diffusion.schedule import NoiseSchedule, read_scheduler
from invmm.diffusion.scheduler_config import check_config, resolved

EULER, DPM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"


def of(name: str, **keys):
    return {"_class_name": name, **keys}


def test_keys_left_out_take_the_defaults_of_their_own_class():
    heun, ddpm = of("HeunDiscreteScheduler"), of("DDPMScheduler")
    assert (resolved(heun)["beta_start"], resolved(heun)["beta_end"]) == (0.00085, 0.012)
    assert (resolved(ddpm)["beta_start"], resolved(ddpm)["beta_end"]) == (1e-4, 0.02)
    betas = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)
    found = NoiseSchedule.from_config(heun).alphas_cumprod.double()
    torch.testing.assert_close(found, (1 - betas).cumprod(0), rtol=1e-4, atol=0)


def test_what_only_a_sampler_reads_leaves_the_schedule_alone():
    sampling = {
        "use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1,
        "interpolation_type": "log_linear", "final_sigmas_type": "sigma_min",
        "clip_sample": True, "thresholding": True, "set_alpha_to_one": False, "unheard_of": 3,
    }  # fmt: skip
    plain = NoiseSchedule.from_config(of(EULER))
    found = NoiseSchedule.from_config(of(EULER, **sampling))
    assert torch.equal(found.alphas_cumprod, plain.alphas_cumprod)
    assert found.trained == plain.trained


CURE = "if the model was trained so"
REFUSED = {
    "continuous": (of(EULER, timestep_type="continuous"),
                   rf"timestep_type=continuous .* use timestep_type=discrete {CURE}"),
    "left behind": (of("PNDMScheduler", timestep_type="continuous"), "timestep_type=continuous"),
    "sigma_max": (of(EULER, sigma_max=700.0), rf"sigma_max=700\.0 .* sigma_max=null {CURE}"),
    "sigma_max 1": (of(EULER, sigma_max=1), r"sigma_max=1 is not supported"),
    "sigma_min": (of("UniPCMultistepScheduler", sigma_min=0.1), r"sigma_min=0\.1"),
    "flow sigmas": (of(DPM, use_flow_sigmas=True, flow_shift=3.0),
                    r"use_flow_sigmas=true .*FlowMatchEulerDiscreteScheduler with shift=3\.0"),
    "flow prediction": (of(DPM, prediction_type="flow_prediction"),
                        "prediction_type=flow_prediction is not supported; use one of epsilon"),
    "no prediction": (of(DPM, prediction_type=None), "prediction_type=None is not supported"),
    "terminal": (of(FLOW, shift_terminal=0.1), r"shift_terminal=0\.1 .*shift_terminal=null"),
    "terminal of betas": (of("UniPCMultistepScheduler", shift_terminal=0.1), "shift_terminal"),
    "inverted": (of(FLOW, invert_sigmas=True), "invert_sigmas=true .* invert_sigmas=false"),
    "dynamic": (of(FLOW, shift=3.0, use_dynamic_shifting=True),
                "use_dynamic_shifting=true .* give the shift for this image size"),
    "flow karras": (of(FLOW, use_karras_sigmas=True), "use_karras_sigmas=true"),
    "flow beta": (of(FLOW, use_beta_sigmas=True), "use_beta_sigmas=true"),
    "flow exponential": (of(FLOW, use_exponential_sigmas=True), "use_exponential_sigmas=true"),
    "stochastic": (of(FLOW, stochastic_sampling=True), "stochastic_sampling=true"),
    "no shift": (of(FLOW, shift=0), "shift=0 cannot be the shift"),
    "shift as text": (of(FLOW, shift="3"), "shift='3' cannot be the shift"),
    "shift nan": (of(FLOW, shift=float("nan")), "shift=nan cannot be the shift"),
    "zero snr": (of("DDIMScheduler", rescale_betas_zero_snr=True),
                 "rescale_betas_zero_snr=true leaves no signal .*v_prediction, as the model was"),
    "no timesteps": (of(EULER, num_train_timesteps=0), "num_train_timesteps=0; use 1 to 10000"),
    "absurd": (of(EULER, num_train_timesteps=10**12), "use 1 to 10000"),
    "true timesteps": (of(EULER, num_train_timesteps=True), "num_train_timesteps=True"),
    "other length": (of(EULER, trained_betas=[0.1] * 50), "use num_train_timesteps=50"),
    "betas as text": (of(EULER, trained_betas="0.1"), "trained_betas='0.1' is no list"),
    "beta as number": (of(EULER, trained_betas=0.1), r"trained_betas=0\.1 is no list"),
    "consistency": (of("LCMScheduler"), "LCMScheduler is not supported: it samples distilled"),
    "edm": (of("EDMEulerScheduler", sigma_max=80), "EDMEulerScheduler is not supported"),
    "list": (of(["my_code", "DDIMScheduler"]), "my_code"),  # pyright: ignore[reportArgumentType]
}  # fmt: skip
"""Found from the config alone, without diffusers."""

BUILT = {
    "unknown formula": (of(EULER, beta_schedule="sigmoid"),
                        "beta_schedule=sigmoid is unknown to EulerDiscreteScheduler; use linear"),
    "ignored zero snr": (
        of("HeunDiscreteScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        "rescale_betas_zero_snr=true is ignored by the HeunDiscreteScheduler.*DDIMScheduler"),
    "negative": (of(EULER, beta_start=-0.1), "the betas reach from -0.1 to 0.02"),
    "zero": (of(EULER, beta_start=0.0), "the betas reach from 0 to 0.02"),
    "one": (of(EULER, beta_end=1.0), "the betas reach from 0.0001 to 1"),
    "above one": (of(EULER, beta_end=2.0), "the betas reach from 0.0001 to 2"),
    "nan": (of(EULER, beta_end=float("nan")), "the betas reach from nan"),
    "null": (of(EULER, beta_start=None), "the noise schedule of it is unusable"),
    "text": (of(EULER, trained_betas=["x"] * 1000), "the noise schedule of it is unusable"),
    "underflow": (of("DDPMScheduler", num_train_timesteps=10_000),
                  "the betas leave no signal at the last timestep"),
}  # fmt: skip
"""Found when the schedule is built."""


@pytest.mark.parametrize("fault", REFUSED)
def test_what_the_config_alone_shows_is_refused_by_key_value_and_cure(fault):
    config, message = REFUSED[fault]
    for read in (check_config, NoiseSchedule.from_config):
        with pytest.raises(ValueError, match=message) as raised:
            read(config)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", BUILT)
def test_what_building_shows_is_refused_in_one_line(fault):
    config, message = BUILT[fault]
    with pytest.raises(ValueError, match=message) as raised:
        read_scheduler("it", lambda: NoiseSchedule.from_config(config))
    assert "\n" not in str(raised.value)


def test_the_zero_snr_of_other_predictions_is_read():
    for prediction_type in ("v_prediction", "sample"):
        config = of("DDIMScheduler", rescale_betas_zero_snr=True, prediction_type=prediction_type)
        found = NoiseSchedule.from_config(config)
        assert found.signals[-1] == 0
        assert found.importance_weights.isfinite().all()


def test_a_config_of_dynamic_shifting_that_is_off_is_read():
    """As Stable Diffusion 3's files have it: keys of what is switched off mean nothing."""
    config = of(FLOW, shift=3.0, use_dynamic_shifting=False, base_shift=0.5, max_shift=1.15,
                base_image_seq_len=256, max_image_seq_len=4096, time_shift_type="exponential",
                shift_terminal=None, invert_sigmas=False, use_karras_sigmas=None)  # fmt: skip
    sigmas = torch.arange(1, 1001, dtype=torch.float64) / 1000
    expected = 3 * sigmas / (1 + 2 * sigmas)
    found = NoiseSchedule.from_config(config)
    torch.testing.assert_close(found.noise_scales.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.timesteps.double(), expected * 1000, atol=1e-3, rtol=0)


# Objects ------------------------------------------------------------------------------------


def test_a_scheduler_that_was_changed_after_it_was_made_is_refused():
    """Assigned betas are a popular way to zero terminal SNR, and the config knows nothing."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    changed = DDIMScheduler()
    changed.alphas_cumprod = changed.alphas_cumprod * 0.999
    with pytest.raises(ValueError, match=r"alphas_cumprod of the DDIMScheduler .* trained_betas="):
        NoiseSchedule.from_scheduler(changed)
    changed.alphas_cumprod[3] = torch.nan
    with pytest.raises(ValueError, match="alphas_cumprod of the DDIMScheduler"):
        NoiseSchedule.from_scheduler(changed)
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted.set_timesteps(5)
    assert NoiseSchedule.from_scheduler(shifted).trained["shift"] == 3.0
    shifted.set_shift(5.0)
    with pytest.raises(ValueError, match=r"the shift of the FlowMatchEuler.* with shift="):
        NoiseSchedule.from_scheduler(shifted)


def test_a_class_of_ones_own_is_refused_whatever_its_name():
    from diffusers import DDIMScheduler

    own = type("DDIMScheduler", (DDIMScheduler,), {})()
    with pytest.raises(ValueError, match="this DDIMScheduler is not diffusers' own"):
        NoiseSchedule.from_scheduler(own)
    with pytest.raises(ValueError, match="MyScheduler is not supported"):
        NoiseSchedule.from_scheduler(type("MyScheduler", (DDIMScheduler,), {})())
    with pytest.raises(ValueError, match="object is not supported"):
        NoiseSchedule.from_scheduler(object())


def test_betas_of_an_array_and_a_converted_scheduler_are_those_of_the_object():
    from diffusers import DDPMScheduler, HeunDiscreteScheduler

    betas = np.linspace(1e-3, 0.05, 40)
    given = DDPMScheduler(num_train_timesteps=40, trained_betas=betas, prediction_type="sample")
    found = NoiseSchedule.from_scheduler(given)
    assert torch.equal(found.signals, given.alphas_cumprod.sqrt())
    json.dumps(dict(found.trained))
    # Converting drops what was left at its default: diffusers then draws with Heun's own betas.
    converted: Any = HeunDiscreteScheduler.from_config(DDPMScheduler().config)
    found = NoiseSchedule.from_scheduler(converted)
    torch.testing.assert_close(found.alphas_cumprod, converted.alphas_cumprod, atol=1e-6, rtol=0)
