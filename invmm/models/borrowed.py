"""A pipeline that somebody holds in memory, measured and given back as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from invmm.diffusion.guidance import repeated
from invmm.diffusion.schedule import NoiseSchedule, schedule_of
from invmm.models.adapter import ModelInfo
from invmm.models.cost import CallCost, call_cost
from invmm.models.execution import Execution, LoadedNetwork
from invmm.models.json_files import settings_digest
from invmm.models.loading import PIPELINES as PIXEL_PIPELINES
from invmm.models.loading import check_components
from invmm.models.parts import index_of
from invmm.models.pipeline import PIPELINES as LATENT_PIPELINES
from invmm.models.pixel import PixelNetwork, try_out_pixels
from invmm.models.trial import try_out
from invmm.models.weights import refuse_non_finite


@dataclass(frozen=True, eq=False)
class BorrowedModel:
    """A diffusers pipeline object, see `ModelRecipe`.

    Attributes:
        pipeline: of any supported family.
        latent_scale: see `LatentPipeline`.

    Raises:
        ValueError: it is not of a supported family, has other parts than its family, or a
            weight is not finite.
    """

    pipeline: Any
    latent_scale: float | None = None

    def __post_init__(self) -> None:
        index, source = index_of(self.pipeline), "the pipeline in memory"
        known = (*PIXEL_PIPELINES, *LATENT_PIPELINES)
        if (name := index["_class_name"]) not in known:
            raise ValueError(f"a {name} is not supported; give one of {', '.join(known)}")
        if name in LATENT_PIPELINES:
            LATENT_PIPELINES[name].family.classes(source, index)
        else:
            check_components(source, index)
        for part, module in self._parts().items():
            if _is_offloaded(module):
                raise ValueError(
                    f"the {part} of the pipeline is offloaded, and would move between devices at "
                    "every call; make the pipeline anew without offloading and call .to(DEVICE)"
                )
            refuse_non_finite(module, f"the {part} of the pipeline", "load the pipeline again")

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Puts back what measuring changes: which weights are trained, and the mode of modules."""
        modules = [module for part in self._parts().values() for module in part.modules()]
        modes = [(module, module.training) for module in modules]
        trained = [(p, p.requires_grad) for module in modules for p in module.parameters(False)]
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

    def describe(self) -> ModelInfo:
        """See `ModelRecipe`."""
        with self.as_it_was():
            network: Any = self.load(self.device)
        name = type(self.pipeline).__name__
        scale = None
        if name in LATENT_PIPELINES:
            family, prompts = network.family.name, network.family.prompts
            size, scale = network.image_size, network.codec.scale
        else:
            if self.latent_scale is not None:
                raise ValueError(
                    f"model.latent_scale={self.latent_scale} has no meaning for a {name}; leave "
                    "it at its default"
                )
            family, size = "pixel", network.latent_shape[1]
            has_classes = network.denoiser.config.num_class_embeds
            prompts = ("class_label",) if has_classes else ("none",)
        return ModelInfo(
            family=family,
            latent_shape=network.latent_shape,
            image_size=size,
            num_train_timesteps=network.schedule.num_train_timesteps,
            prediction_type=network.schedule.prediction_type,
            weight_bytes=sum(
                value.numel() * value.element_size()
                for part in self._parts().values()
                for value in part.parameters()
            ),
            prompts=prompts,
            latent_scale=scale,
        )

    def schedule(self) -> NoiseSchedule:
        """See `ModelRecipe`."""
        return schedule_of(self.pipeline)

    def try_out(self) -> None:
        """Builds its parts anew on the meta device and runs them, without weights.

        Raises:
            ValueError: they do not fit together.
        """
        with self.as_it_was():
            network: Any = self.load(self.device)
        config = network.denoiser.config
        if isinstance(network, PixelNetwork):
            try_out_pixels("the pipeline", config, network.latent_shape)
            return
        family, tokenizer = network.family, getattr(self.pipeline, "tokenizer", None)
        tokens = tokenizer.model_max_length if tokenizer else 0
        condition = network.blank_condition(config, 1, tokens)
        meta = {name: value.to("meta") for name, value in condition.items()}

        def blank(name: str) -> Any:
            part = getattr(self.pipeline, name)
            part = getattr(part, "_orig_mod", part)
            return type(part).from_config(part.config).eval()

        try_out(
            "the pipeline",
            lambda: (blank(family.denoiser), blank(family.autoencoder)),
            lambda denoiser, latents, steps: network.evaluate(denoiser, latents, steps, meta),
            network.latent_shape,
            network.codec.factor,
        )

    def call_cost(self, rows: int, execution: Execution) -> CallCost:
        """See `ModelRecipe`; runs a real call."""
        with self.as_it_was():
            network = self.load(self.device)
            latents = torch.zeros(rows, *network.latent_shape, device=self.device)
            latents.requires_grad_()
            timesteps = torch.zeros(rows, dtype=torch.long, device=self.device)
            blank = {"none": None, "class_label": 0}.get(self.describe().prompts[0], "")
            condition = repeated(network.condition(blank), rows)
            return call_cost(
                network.denoiser,
                lambda: network.predict(latents, timesteps, condition),
                autocast=execution.autocast,
            )

    def load(self, device: torch.device) -> LoadedNetwork:
        """See `ModelRecipe`; the pipeline stays on its own device."""
        network = LATENT_PIPELINES.get(type(self.pipeline).__name__)
        if network is None:
            return PixelNetwork.from_pipeline(self.pipeline)
        return network(self.pipeline, self.device, latent_scale=self.latent_scale)

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the weights of each part, as they are now."""
        found = {}
        for name, part in self._parts().items():
            digest = hashlib.sha256()
            for key, value in sorted(part.state_dict().items()):
                content = value.detach().cpu().contiguous()
                digest.update(f"{key} {content.dtype} {tuple(content.shape)}".encode())
                digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
            found[name] = digest.hexdigest()
        return found

    def described(self) -> dict[str, Any]:
        """What identifies it in the config of a run: its weights, and its scale of latents."""
        scale = self.describe().latent_scale
        return (
            self.fingerprint() if scale is None else {**self.fingerprint(), "latent_scale": scale}
        )

    def settings(self) -> dict[str, str]:
        """SHA-256 of the configs, and of the adapters in use with their strengths, as they are now.

        Of the tokenizers only the words count.
        """
        found = {}
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                found[f"{name} adapters"] = settings_digest(_adapters(part))
            if callable(vocabulary := getattr(part, "get_vocab", None)):
                found[name] = settings_digest({"words": vocabulary()})
            elif (config := getattr(part, "config", None)) is not None:
                is_plain = isinstance(config, Mapping)
                found[name] = settings_digest(config if is_plain else config.to_dict())
        return found

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        part = getattr(self.pipeline, "unet", None)
        # A compiled part has no truth value.
        return self.pipeline.transformer.device if part is None else part.device

    def _parts(self) -> dict[str, nn.Module]:
        components = self.pipeline.components.items()
        return {name: part for name, part in components if isinstance(part, nn.Module)}


def _adapters(part: nn.Module) -> dict[str, Any]:
    """Layer -> the adapters that act in it, with their strengths (`scaling` of peft)."""
    layers: Iterable[tuple[str, Any]] = list(part.named_modules())
    return {
        name: [[one, layer.scaling.get(one)] for one in layer.active_adapters]
        for name, layer in layers
        if hasattr(layer, "scaling")
        and hasattr(layer, "active_adapters")
        and not getattr(layer, "disable_adapters", False)
    }


def _is_offloaded(part: nn.Module) -> bool:
    """Whether some weights lie elsewhere than where they are used."""
    for module in part.modules():
        hook = getattr(module, "_hf_hook", None)  # of accelerate
        for one in getattr(hook, "hooks", [hook]):
            if type(one).__name__ == "CpuOffload" or getattr(one, "offload", False):
                return True
    return any(value.is_meta for value in part.parameters())
