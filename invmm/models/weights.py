"""The weight files of a part of a model, and whether a loaded part holds those weights.

diffusers leaves parameters without weights on the meta device and says nothing, transformers draws
them at random, and both take from an index the names of the files to read. So the files are found
here, once, by the rules that both follow; whatever else was loaded is found by comparing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invmm.files import file_sha256
from invmm.models.json_files import read_json

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Library of a part -> how the names of its weight files begin."""


def weight_files(folder: Path, class_name: str, variant: str | None) -> list[Path]:
    """The safetensors files that the weights of a part are read from; empty if there are none.

    One whole file, or the shards that an index lists. Links are followed, as the hub's cache
    consists of them.

    Args:
        folder: of the part.
        class_name: "library.Name", since each library has its own file names.
        variant: of the files, such as fp16.

    Raises:
        ValueError: there are both, an adapter beside them, or an index that cannot be read, names
            a missing file, or one that is not in this folder.
    """
    library = class_name.partition(".")[0]
    stem, dotted = STEMS[library], f".{variant}" if variant else ""
    whole = f"{stem}{dotted}.safetensors"
    index = f"{stem}.safetensors.index{dotted}.json"
    older = f"{stem}.safetensors{dotted}.index.json"  # diffusers reads it too
    adapter = "adapter_config.json"  # with it, transformers loads further weights
    names = dict.fromkeys((whole, index, older if library == "diffusers" else adapter))
    found = [name for name in names if (folder / name).exists()]
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {' and '.join(found)}, and it is open which of them are the weights; "
            "keep one of them"
        )
    if not found or found == [adapter]:
        return []
    names = found if found == [whole] else _shards(folder / found[0])
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            state = "is no regular file" if file.exists() else "is missing"
            raise ValueError(f"{file} {state}; save the model again by save_pretrained")
    return files


def weights_sha256(file: Path) -> str:
    """SHA-256 of a safetensors file that is as long as its header says.

    Raises:
        ValueError: it is not; nothing more of it was read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); save the model again by save_pretrained"
        ) from error
    return file_sha256(file)


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists."""
    content = read_json(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(content.get("metadata"), dict):
        raise ValueError(
            f"{index} is no index: it needs weight_map and metadata; save the model again"
        )
    for key, name in places.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{index} says that {key[:100]!r} is in {str(name)[:100]!r}, which is no name of a "
                "safetensors file in this folder; save the model again"
            )
    return sorted(set(places.values()))


def check_loaded(
    part: torch.nn.Module, info: Mapping[str, Any], files: Sequence[Path], owner: str
) -> None:
    """Refuses a loaded part unless its weights are those of its files, all of them and no others.

    The fingerprint of a model is that of its files. Reads them once more.

    Args:
        part: as loaded, in any precision.
        info: what `from_pretrained` says of the loading.
        files: see `weight_files`.
        owner: whose weights they are, as errors name it.

    Raises:
        ValueError: weights are missing, unexpected, of another shape, not finite, or not those of
            the files.
    """
    if faults := _faults(part, info):
        raise ValueError(
            f"{owner} does not hold the weights its config.json describes ({faults}); export the "
            "model again"
        )
    refuse_non_finite(part, owner)
    _refuse_other_weights(part, files, owner)


def _refuse_other_weights(part: torch.nn.Module, files: Sequence[Path], owner: str) -> None:
    """A weight may have another name in a file, as the libraries rename those of old releases."""
    from safetensors import safe_open

    stored: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if key in stored:
                    raise ValueError(
                        f"{owner} has {key} in two files, one of them {file.name}; save it again"
                    )
                stored[key] = tensors.get_tensor(key)
    other = [
        key
        for key, value in part.state_dict().items()
        if not (key in stored and _is_cast(stored[key], value))
        and not any(_is_cast(one, value) for one in stored.values())
    ]
    if other:
        raise ValueError(
            f"{owner} was loaded with other weights than {', '.join(file.name for file in files)} "
            f"holds ({', '.join(other[:3])}{' ...' if len(other) > 3 else ''}); leave the files "
            "alone while they are read, or save the model again"
        )


def _is_cast(stored: Tensor, value: Tensor) -> bool:
    return stored.shape == value.shape and torch.equal(stored.to(value.dtype), value)


def refuse_non_finite(
    part: torch.nn.Module, owner: str, cure: str = "export the model again"
) -> None:
    """Refuses weights that are no numbers: an infinite one can leave finite samples, but others.

    Args:
        part: with its weights in the precision that it is measured in.
        owner: whose weights they are, as the error names it.
        cure: as the error ends.

    Raises:
        ValueError: a weight or buffer holds NaN or an infinite number.
    """
    found = {
        key: value.dtype
        for key, value in part.state_dict().items()
        if value.is_floating_point() and not value.float().isfinite().all()
    }
    if not found:
        return
    if torch.float16 in found.values():
        cure = f"float16 ends at 65504: use bfloat16 or float32, or {cure}"
    dtypes = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in found.values()}))
    named = ", ".join(sorted(found)[:3]) + (" ..." if len(found) > 3 else "")
    raise ValueError(f"{owner} holds NaN or infinite weights in {dtypes} ({named}); {cure}")


def _faults(part: torch.nn.Module, info: Mapping[str, Any]) -> str:
    """Weights that are missing, unexpected or of another shape, in one line; "" if none are."""
    faults = [
        f"{kind.removesuffix('_keys')} {', '.join(sorted(map(str, info[kind]))[:3])}"
        f"{' ...' if len(info[kind]) > 3 else ''}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind)
    ]
    faults += [key for key, value in part.named_parameters() if value.is_meta][:3]
    return "; ".join(faults)


_WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.safetensors"
)


def no_weights(path: str, folder: Path, part: str | None, variant: str | None) -> ValueError:
    """The error for a folder without weights that can be loaded, with the reason and the cure.

    Args:
        path: of the model, as the user gave it.
        folder: in which the weights were expected.
        part: of a pipeline; None for a bare network.
        variant: that the user asked for, such as fp16.
    """
    files = [file.name for file in sorted(folder.glob("*")) if file.is_file()]
    found = {match.group(1) for name in files if (match := _WEIGHT_FILE.fullmatch(name))}
    others = [name for name in files if Path(name).suffix in (".bin", ".pt", ".ckpt", ".msgpack")]
    wanted = f" of variant {variant}" if variant else ""
    if variant in found:
        return ValueError(
            f"the weights in {folder} lie in several files without an index that lists them; save "
            "the model again by save_pretrained"
        )
    if None in found:
        cure = "give model.variant=null"
    elif found:
        cure = f"give model.variant={min(map(str, found))}"
    elif others:
        cure = f"{', '.join(others[:3])} is a pickle and is never loaded; save with safetensors"
    elif not folder.is_dir():
        cure = "the folder is missing; save the whole model by save_pretrained"
    else:
        cure = "save the model with safetensors"
    if found:
        has = [f"variant {one}" if one else "no variant" for one in sorted(found, key=str)]
        cure = f"its files are of {', '.join(has)}; {cure}, the same for all parts"
    named = f"the {part} of model.path={path}" if part else f"model.path={path}"
    return ValueError(f"{named} has no safetensors files{wanted} in {folder}: {cure}")
