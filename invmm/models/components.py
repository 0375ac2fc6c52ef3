"""The configs of a pipeline's parts, and the keys in which only one value is supported.

diffusers builds whatever a config.json describes, and its pipelines ignore keys that they do not
know. Here, a key that changes how a part must be called has the value that the family expects, or
is refused by name. The same checks serve folders, from raw JSON, and pipelines in memory;
docs/models.md lists the keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "UNet2DModel": {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (224, 448, 672, 896),
    },
    "UNet2DConditionModel": {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280},
    "DiTTransformer2DModel": {
        "in_channels": 4, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
    },
    "SD3Transformer2DModel": {
        "in_channels": 16, "out_channels": 16, "sample_size": 128, "patch_size": 2,
        "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 96,
    },
    "AutoencoderKL": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (64,),
        "scaling_factor": 0.18215,
    },
    "VQModel": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 3, "block_out_channels": (64,),
    },
    "CLIPTextModel": {"hidden_size": 512, "projection_dim": 512, "max_position_embeddings": 77},
    "T5EncoderModel": {"d_model": 512},
}  # fmt: skip
"""Class of a part -> key -> the library's default if a config leaves it out; others are None."""

_SAME_AS = {
    "Transformer2DModel": "DiTTransformer2DModel",
    "CLIPTextModelWithProjection": "CLIPTextModel",
}
"""Class -> the class with the same keys in its config, under which the tables here list it."""

_NO_LABELS = "its pipeline gives no class labels; give the model without classes"
_CONDITIONS = {
    "class_embed_type": (None, _NO_LABELS),
    "num_class_embeds": (None, _NO_LABELS),
    "time_embedding_type": (
        "positional", "only positional embeddings of the timesteps are supported; give such a model"
    ),
}  # fmt: skip
_OF_PICTURES = "an autoencoder of RGB pictures has 3; give the one that the model was trained with"
_PICTURES = {"in_channels": (3, _OF_PICTURES), "out_channels": (3, _OF_PICTURES)}

EXPECTED: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    "UNet2DModel": _CONDITIONS,
    "UNet2DConditionModel": {
        **_CONDITIONS,
        "time_cond_proj_dim": (
            None,
            "the guidance scale is an input of this distilled model, and sampling such models is "
            "not supported; give the model that it was distilled from",
        ),
        "encoder_hid_dim": (
            None,
            "it reads other embeddings than those of its text encoder; give a model that reads "
            "those",
        ),
        "encoder_hid_dim_type": (
            None,
            "it reads other embeddings than those of its text encoder; take an IP-Adapter off by "
            "pipeline.unload_ip_adapter()",
        ),
        "num_attention_heads": (None, "diffusers takes attention_head_dim only; rename it"),
        "attention_type": ("default", "grounded generation is not supported; give the base model"),
    },
    "DiTTransformer2DModel": {
        "norm_type": ("ada_norm_zero", "diffusers runs class-conditional ones as ada_norm_zero"),
    },
    "SD3Transformer2DModel": {},
    "AutoencoderKL": _PICTURES,
    "VQModel": {
        **_PICTURES,
        "lookup_from_codebook": (False, "it decodes tokens; give one that decodes latents"),
    },
}
"""Class of a part -> key -> (the only supported value, why any other is refused and the cure)."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The classes and configs of a pipeline's parts.

    Attributes:
        source: the model in messages, such as "model.path=FOLDER"; None for one in memory.
        classes: part -> the name of its class.
        configs: part -> its config.
    """

    source: str | None
    classes: Mapping[str, str]
    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def in_memory(
        cls, pipeline: Any, known: Mapping[str, Sequence[str]], optional: Sequence[str] = ()
    ) -> Parts:
        """Reads the parts of a pipeline object.

        Args:
            pipeline: of diffusers.
            known: part -> the classes that it may have, as "Name" or "library.Name".
            optional: parts that may be None.

        Raises:
            ValueError: a part is missing or of another class.
        """
        classes, configs = {}, {}
        for name, allowed in known.items():
            part = getattr(pipeline, name, None)
            if part is None and name in optional:
                continue
            part = getattr(part, "_orig_mod", part)  # what torch.compile wrapped
            own = [base.__name__ for base in type(part).__mro__]
            names = [one.rpartition(".")[2] for one in allowed]
            classes[name] = next((one for one in own if one in names), "")
            if not classes[name]:
                raise ValueError(
                    f"the {name} of the pipeline is a {own[0]}; supported are {', '.join(names)}"
                )
            configs[name] = _config_in_memory(part)
        return cls(source=None, classes=classes, configs=configs)

    def value(self, part: str, key: str) -> Any:
        """The value of a key; if the config leaves it out, the default of `DEFAULTS` or None."""
        config = self.configs[part]
        config = config.get("text_config") or config  # the config of a whole CLIP holds both towers
        if key in config:
            return config[key]
        return DEFAULTS.get(self._listed_class(part), {}).get(key)

    def integer(self, part: str, key: str) -> int:
        """As `value`; anything but an integer of 1 or more is refused."""
        value = self.value(part, key)
        if type(value) is not int or value < 1:
            self.refuse(part, key, "an integer of 1 or more is needed; save the model again")
        return value

    def number(self, part: str, key: str) -> float:
        """As `value`; anything but a finite number is refused."""
        value = self.value(part, key)
        if type(value) not in (int, float) or not math.isfinite(value):
            self.refuse(part, key, "a finite number is needed; give that of its training")
        return float(value)

    def length(self, part: str, key: str) -> int:
        """The length of a list of widths; anything but a list with entries is refused."""
        value = self.value(part, key)
        if not isinstance(value, (list, tuple)) or not value:
            self.refuse(part, key, "a list with a width for each level is needed")
        return len(value)

    def refuse(self, part: str, key: str, why: str) -> NoReturn:
        """Refuses the value of a key.

        Args:
            part: to which the key belongs.
            key: of its config.
            why: the reason and the cure.

        Raises:
            ValueError: always.
        """
        value = self.value(part, key)
        shown = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"the {part} of {self.named} has {key}={shown} in its config: {why}")

    @property
    def named(self) -> str:
        """The model's name in messages."""
        return self.source or "the pipeline"

    def is_a(self, part: str, class_name: str) -> bool:
        """Whether a part is of a class, or of one with the same keys in its config."""
        return self._listed_class(part) == class_name

    def check_expected(self, part: str) -> None:
        """Refuses values that `EXPECTED` does not allow for the part's class.

        Raises:
            ValueError: naming the key.
        """
        for key, (only, why) in EXPECTED.get(self._listed_class(part), {}).items():
            self.check(part, key, only, why)

    def check(self, part: str, key: str, only: Any, why: str) -> None:
        """Refuses a key with another value than `only`; a config may leave the key out.

        Raises:
            ValueError: naming the key.
        """
        given = self.configs[part].get(key, only)
        if given != only or type(given) is not type(only):
            self.refuse(part, key, why)

    def _listed_class(self, part: str) -> str:
        """The class under which the tables list a part."""
        own = self.classes[part]
        return _SAME_AS.get(own, own)


def _config_in_memory(part: Any) -> dict[str, Any]:
    if (config := getattr(part, "config", None)) is None:
        return {"model_max_length": part.model_max_length}  # of a tokenizer
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)
