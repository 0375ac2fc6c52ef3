"""What invmm needs of a machine, each part tried out: packages, devices, SSCD, hub, folders."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from invmm.runtime.checks import Check, Skip, tried, within
from invmm.runtime.trainer import why_no_gpu

_HUB_SECONDS = 5.0
_GIB = 2**30


def checks(out: Path) -> Iterator[Check]:
    """All checks, one after the other.

    Args:
        out: folder that runs are to be written into.
    """
    for module, package in _CORE.items():
        yield tried(package, lambda m=module, p=package: _imported(m, p), essential=True)
    yield from _devices()
    yield tried("SSCD (replication=sscd)", _sscd, essential=True)
    for name, (modules, extra) in _EXTRAS.items():
        yield tried(name, lambda m=modules, e=extra: _extra(m, e))
    yield tried("Weights & Biases account", _wandb_account)
    yield tried("Hugging Face hub", lambda: within(2 * _HUB_SECONDS, _hub))
    yield tried(f"folder {out}", lambda: _folder(out), essential=True)
    yield tried("launcher (srun, torchrun)", _launch, essential=True)


_CORE = {
    "torch": "torch",
    "diffusers": "diffusers",
    "pytorch_lightning": "pytorch-lightning",
    "hydra": "hydra-core",
    "onnxruntime": "onnxruntime",
}
_EXTRAS = {
    "text models": (("transformers", "peft"), "text"),
    "hub data sets": (("datasets",), "data"),
    "HEIF images": (("pillow_heif",), "heif"),
    "logger=wandb": (("wandb",), "wandb"),
    "logger=tensorboard": (("tensorboard",), "tensorboard"),
    "hydra/launcher=slurm": (("submitit", "hydra_plugins.hydra_submitit_launcher"), "slurm"),
    "hydra/launcher=ray_local": (("ray", "hydra_plugins.hydra_ray_launcher"), "ray"),
}
"""Optional feature -> its modules, and the extra of invmm that installs them."""


def _imported(module: str, package: str) -> str:
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; pip install {package}") from None
    return version(package)


def _extra(modules: Sequence[str], extra: str) -> str:
    found = []
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            raise Skip(f"{error}; pip install 'invmm[{extra}]'") from None
        try:
            found.append(f"{module} {version(module)}")
        except PackageNotFoundError:
            continue  # a plugin, named after the package that it comes in
    return ", ".join(found)


def _devices() -> Iterator[Check]:
    """CPU and GPUs, their memory and the precisions that they compute in."""
    try:
        import torch
    except Exception:
        return  # reported by the check of torch
    yield tried("cpu", lambda: f"{os.cpu_count()} cores, {_size(_main_memory())} of memory")
    yield from _precisions("cpu")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield tried(f"cuda:{index}", lambda i=index: _gpu(i))
            yield from _precisions(f"cuda:{index}")
    elif torch.backends.mps.is_available():
        yield from _precisions("mps")
    else:
        yield tried("GPU (trainer=gpu)", _no_gpu)


def _precisions(device: str) -> Iterator[Check]:
    for name in ("float32", "float16", "bfloat16"):
        is_needed = (device, name) == ("cpu", "float32")
        action = lambda n=name: _computes(device, n)  # noqa: E731
        yield tried(f"{device} {name}", action, essential=is_needed)


def _computes(device: str, name: str) -> str:
    """Compares a convolution and a matrix product with float64 on the CPU."""
    import torch
    import torch.nn.functional as F

    rng = torch.Generator().manual_seed(0)
    image = torch.randn(2, 8, 16, 16, generator=rng)
    kernel = torch.randn(8, 8, 3, 3, generator=rng) / 72**0.5

    def computed(place: str, dtype: torch.dtype) -> torch.Tensor:
        x = F.conv2d(image.to(place, dtype), kernel.to(place, dtype), padding=1).flatten(1)
        return (x @ x.T / x.shape[1]).cpu().double()

    dtype = getattr(torch, name)
    error = (computed(device, dtype) - computed("cpu", torch.float64)).abs().max().item()
    # Ten units in the last place of a result of about 1; TF32 counts as float32.
    allowed = 10 * max(torch.finfo(dtype).eps, 2**-11 if device != "cpu" else 0)
    if not error <= allowed:
        raise ValueError(f"wrong results: off by {error:.1e}; rounding explains {allowed:.1e}")
    return f"convolution and matrix product within {error:.0e}"


def _gpu(index: int) -> str:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)}, {_size(free)} of {_size(total)} free"


def _no_gpu() -> str:
    raise Skip(f"{why_no_gpu()}; nvidia-smi tells whether a GPU and its driver are here")


def _main_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _sscd() -> str:
    import torch

    from invmm.replication.sscd import SscdOnnx

    recipe = SscdOnnx()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vectors = recipe.load(torch.device("cpu")).embed(pixels)
    norms = vectors.norm(dim=1)
    if not torch.allclose(norms, torch.ones(2), atol=1e-3):
        raise ValueError(f"embeddings have norms of {norms.tolist()} instead of 1")
    return f"unit-norm embeddings of {vectors.shape[1]}, SHA-256 {recipe.identity()['sha256']}"


def _wandb_account() -> str:
    import netrc
    from urllib.parse import urlparse

    if "WANDB_API_KEY" in os.environ:
        return "WANDB_API_KEY is set"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        if netrc.netrc().authenticators(host):
            return f"logged in at {host}"
    except (OSError, netrc.NetrcParseError):
        pass
    raise Skip("not logged in; run wandb login, or give logger=wandb logger.mode=offline")


def _hub() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise Skip("HF_HUB_OFFLINE is set: only what is in the cache can be used")
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise Skip(
            f"{constants.ENDPOINT} is not reached ({reason}); give models and data as folders"
        ) from None
    return constants.ENDPOINT


def _folder(out: Path) -> str:
    """Writes, locks and replaces a file where `out` is, or will be."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".invmm-doctor-") as folder:
            _lock_twice(Path(folder) / "lock")
    except OSError as error:
        raise ValueError(f"{place}: {error.strerror or error}; choose another run_dir") from None
    return f"can be written, and keeps locks; {_size(shutil.disk_usage(place).free)} free"


def _lock_twice(path: Path) -> None:
    with path.open("wb") as first, path.open("wb") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise ValueError(
        f"{path.parent.parent} does not support file locks (flock), by which processes share the "
        "images; choose another run_dir, or a folder of its own for each shard"
    )


def _launch() -> str:
    from invmm.runtime.launch import refuse_copies

    refuse_copies()
    return "a command is started once, not several times"


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"
