"""Checkpoints in one file, as Stable Diffusion was first released, read by diffusers.

model.path=FILE.safetensors model.config=FOLDER: the folder says what the parts are, how the model
was trained and how it reads words; all weights come from the file. diffusers renames them, leaves
those that it does not know, and keeps parts without weights as they are. Here, each weight of the
file must belong to a part, and each of a part must come from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invmm.models.weights import refuse_non_finite

FAMILIES = ("stable_diffusion", "sdxl")
"""Families that are read from one file."""

_SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "logvar"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "posterior_variance"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1"),
    *("posterior_mean_coef2", "posterior_log_variance_clipped", "denoiser.sigmas"),
    *("model_ema.decay", "model_ema.num_updates"),
)
"""Buffers of training, in place of which the scheduler of the folder is read."""
_NO_WEIGHTS = (".position_ids", ".logit_scale", ".attn_mask")
"""How names of tensors end that diffusers computes or needs for training alone."""
_OPEN_CLIP = {
    "text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model.",
}  # fmt: skip
"""Part -> how the names of its weights begin if they are those of OpenCLIP."""


def checkpoint_file(path: str, config: str) -> Path:
    """The file that `model.path` names.

    Raises:
        ValueError: it is missing, a folder, or a file of another kind.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        state = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(
            f"model.path={path} {state}, and model.config={config} describes a single file; give a "
            "safetensors file, or leave model.config out"
        )
    if file.suffix != ".safetensors":
        raise ValueError(
            f"model.path={path} is no safetensors file; a pickle is never loaded, convert it"
        )
    return file


def config_folder(config: str) -> Path:
    """The folder that `model.config` names.

    Raises:
        ValueError: it holds no pipeline.
    """
    folder = Path(config).expanduser()
    if not (folder / "model_index.json").is_file():
        state = "has no model_index.json" if folder.is_dir() else "is no folder here"
        raise ValueError(
            f"model.config={config} {state}; give a folder of diffusers with the configs, the "
            "scheduler and the tokenizers of this architecture"
        )
    return folder


def state_of(file: Path) -> str:
    """Tells a file from what it is after a change, without reading it."""
    status = file.stat()
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"


def check_names(file: Path, named: str, parts: Mapping[str, Any]) -> None:
    """Refuses a file whose weights are not those of the parts, by their names and shapes.

    Args:
        file: whose header alone is read.
        named: the model in messages.
        parts: on the meta device.

    Raises:
        ValueError: the file is damaged, a part lacks weights, or no part takes a weight.
    """
    shapes = _shapes(file, named)
    if len(shapes) > torch.iinfo(torch.int16).max:
        raise ValueError(f"{named} has {len(shapes):,} weights, more than any model of its family")
    # Each tensor is full of its own number, by which it is known after any renaming and slicing.
    numbers = {key: number for number, key in enumerate(shapes)}
    stand_ins = {
        key: torch.tensor(number, dtype=torch.int16).expand(shapes[key])
        for key, number in numbers.items()
    }
    widths = [part.config.hidden_size for name, part in parts.items() if name in _OPEN_CLIP]
    if len(set(widths)) < len(widths):
        raise ValueError(
            f"{named} has two text encoders of the width {widths[0]}, and diffusers tells those of "
            "a single file apart by their widths; convert it to a folder"
        )
    taken: set[int] = set()
    for name, part in parts.items():
        found = _converted(name, part, stand_ins, named)
        faults = [
            f"{key} is {'missing' if found.get(key) is None else list(found[key].shape)}"
            for key, wanted in part.state_dict().items()
            if found.get(key) is None or found[key].shape != wanted.shape
        ]
        if faults:
            raise ValueError(
                f"{named} does not hold the weights of the {name} that its config describes "
                f"({', '.join(faults[:3])}{' ...' if len(faults) > 3 else ''}); give the "
                "model.config of this architecture, or the whole checkpoint"
            )
        taken |= {int(found[key].flatten()[0]) for key in part.state_dict()}
    left = [key for key, number in numbers.items() if number not in taken and not _is_idle(key)]
    if left:
        is_average = any(key.startswith("model_ema.") for key in left)
        raise ValueError(
            f"{named} holds weights that no part takes ({', '.join(left[:3])}"
            f"{' ...' if len(left) > 3 else ''}); "
            + (
                "save the file with the averaged weights (model_ema) or the others, not both"
                if is_average
                else "give the model.config of this architecture"
            )
        )


def load_single_file(
    pipeline_class: Any,
    file: Path,
    folder: Path,
    named: str,
    *,
    dtype: Any,
    parts: Mapping[str, Any],
    absent: tuple[str, ...],
) -> Any:
    """The pipeline on the CPU, as diffusers loads it, every weight that of the file.

    Args:
        pipeline_class: of diffusers.
        file: see `check_names`, which it must have passed.
        folder: see `config_folder`.
        named: the model in messages.
        dtype: of the weights.
        parts: those with weights.
        absent: parts that are not loaded.

    Raises:
        ValueError: it cannot be loaded, or its weights are not finite or not those of the file.
    """
    from safetensors.torch import load_file

    try:
        pipeline = pipeline_class.from_single_file(
            str(file), config=str(folder), local_files_only=True, torch_dtype=dtype,
            **dict.fromkeys(absent),
        )  # fmt: skip
    except Exception as error:  # whatever a foreign config makes the constructors raise
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{named} cannot be loaded ({reason}); export it again") from error
    tensors = load_file(file)
    for name in parts:
        part = getattr(pipeline, name)
        refuse_non_finite(part, f"the {name} of {named}")
        found = _converted(name, part, tensors, named)
        other = [
            key
            for key, value in part.state_dict().items()
            if value.is_meta or not torch.equal(found[key].to(value.dtype), value)
        ]
        if other:
            raise ValueError(
                f"the {name} of {named} was loaded with other weights than those of the file "
                f"({', '.join(other[:3])}{' ...' if len(other) > 3 else ''}); leave the file alone "
                "while it is read, or convert it by from_single_file(...).save_pretrained(FOLDER)"
            )
    return pipeline


def _converted(name: str, part: Any, tensors: Mapping[str, Tensor], named: str) -> dict[str, Any]:
    """The tensors of a file under the names that they have in a part of diffusers.

    Raises:
        ValueError: diffusers cannot tell.
    """
    from diffusers.loaders import single_file_utils as names

    prefix, whole = _OPEN_CLIP.get(name, ""), dict(tensors)
    try:
        if name == "unet":
            return names.convert_ldm_unet_checkpoint(whole, dict(part.config))
        if name == "vae":
            return names.convert_ldm_vae_checkpoint(whole, dict(part.config))
        if prefix + "token_embedding.weight" in whole:
            found = names.convert_open_clip_checkpoint(part, whole, prefix=prefix)
        else:
            found = names.convert_ldm_clip_checkpoint(whole)
    except Exception as error:  # whatever is missing in a foreign file
        raise ValueError(
            f"{named} does not hold the weights of the {name} that its config describes "
            f"({type(error).__name__}: {error}); give the model.config of this architecture"
        ) from error
    if hasattr(part, "text_model"):
        return found
    return {key.removeprefix("text_model."): value for key, value in found.items()}


def _is_idle(key: str) -> bool:
    """Whether no part needs a tensor, in any model of these families."""
    from diffusers.loaders.single_file_utils import SD_2_TEXT_ENCODER_KEYS_TO_IGNORE

    # Stable Diffusion 2 reads the last but one layer, and its configs leave the last one out.
    return key in (*_SCHEDULE, *SD_2_TEXT_ENCODER_KEYS_TO_IGNORE) or key.endswith(_NO_WEIGHTS)


def _shapes(file: Path, named: str) -> dict[str, list[int]]:
    """Key -> shape, from the header.

    Raises:
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{named} is damaged ({error}); fetch the file again") from error
