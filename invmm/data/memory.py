"""Images in memory, for callers from Python."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from invmm.data.dataset import ImageEntry, ImageError, LoadedImage
from invmm.data.images import Resize, load_image, read_bytes, upright
from invmm.data.problems import short_repr
from invmm.data.values import label_of


@dataclass(frozen=True, kw_only=True)
class MemoryImages:
    """Pictures by id.

    Attributes:
        images: id -> a Pillow image or the path of a file.
        prompts: id -> caption or class label; images without a prompt have no key.
        resize: what happens to images that are not square: crop, squash or pad (on white).
    """

    images: Mapping[str, Image.Image | str | Path]
    prompts: Mapping[str, str | int]
    resize: Resize = "crop"

    @classmethod
    def of(cls, images: Any, prompts: Any = None) -> MemoryImages:
        """From a mapping by id, or a sequence whose ids are 0, 1, ...

        Args:
            images: Pillow images or paths.
            prompts: captions or class labels, by the same ids or in the same order; None, NaN or no
                key where there is none.

        Raises:
            ValueError: there are no images, other values than images, or prompts that do not fit.
        """
        named = _by_id(images, "images")
        prompt_by_id = {} if prompts is None else _by_id(prompts, "prompts")
        if not named:
            raise ValueError("images is empty; give at least one")
        for key, image in named.items():
            if not isinstance(image, (Image.Image, str, Path)):
                raise ValueError(
                    f"images[{key!r}] is a {type(image).__name__}; give a PIL image or a path"
                )
        is_list = not isinstance(prompts, Mapping) and not isinstance(images, Mapping)
        if prompt_by_id and is_list and len(prompt_by_id) != len(named):
            raise ValueError(
                f"prompts has {len(prompt_by_id)} entries for {len(named)} images; give one for "
                "each, None where there is none"
            )
        if unknown := sorted(prompt_by_id.keys() - named.keys()):
            raise ValueError(
                f"prompts has {unknown[0]!r}, which is none of the images; give prompts by the ids "
                "of the images"
            )
        read = {key: _prompt(key, prompt) for key, prompt in prompt_by_id.items()}
        return cls(
            images=named, prompts={k: prompt for k, prompt in read.items() if prompt is not None}
        )

    def fingerprint(self) -> dict[str, str]:
        """Id -> SHA-256 of the picture, or its path."""
        return {
            key: hashlib.sha256(_header(i).encode() + i.tobytes()).hexdigest()
            if isinstance(i, Image.Image)
            else str(i)
            for key, i in self.images.items()
        }

    def described(self) -> dict[str, Any]:
        """What identifies them in the config of a run."""
        return {"images": self.fingerprint(), "prompts": dict(self.prompts)}

    def open(self, size: int) -> OpenMemoryImages:
        """See `DatasetRecipe`."""
        entries = []
        for key, image in self.images.items():
            prompt = self.prompts.get(key)
            entries.append(
                ImageEntry(
                    image_id=key,
                    path="in memory" if isinstance(image, Image.Image) else str(image),
                    caption=prompt if isinstance(prompt, str) else None,
                    label=prompt if isinstance(prompt, int) else None,
                )
            )
        return OpenMemoryImages(recipe=self, entries=entries, size=size)


@dataclass(frozen=True, kw_only=True)
class OpenMemoryImages:
    """See `ImageDataset`."""

    recipe: MemoryImages
    entries: Sequence[ImageEntry]
    size: int
    problems: Sequence[str] = ()
    source: str = "images in memory"

    def load(self, entry: ImageEntry) -> LoadedImage:
        """See `ImageDataset`."""
        image = self.recipe.images[entry.image_id]
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            try:
                upright(image).save(buffer, "PNG")
            except (OSError, ValueError) as error:
                raise ImageError(f"the image cannot be read: {error}") from error
            content = buffer.getvalue()
        else:
            content = read_bytes(Path(image))
        return load_image(content, size=self.size, resize=self.recipe.resize)

    def training_entries(self) -> Sequence[ImageEntry]:
        """See `ImageDataset`; nothing is known of a training set."""
        return self.entries


def _prompt(key: str, value: Any) -> str | int | None:
    """A caption or a class label, which may be 3.0 in pandas and numpy; None if absent."""
    if isinstance(value, str):
        return value
    try:
        return label_of(value)
    except ValueError:
        raise ValueError(
            f"prompts[{key!r}]={short_repr(value)} is neither a caption nor a class label"
        ) from None


def _header(image: Image.Image) -> str:
    """What tells apart pictures of the same bytes: mode, size, palette, orientation."""
    colours = (image.getpalette(), image.info.get("transparency"), image.getexif().get(0x0112))
    return f"{image.mode} {image.size}" + (f" {colours}" * any(c is not None for c in colours))


def _by_id(values: Any, name: str) -> dict[str, Any]:
    if isinstance(values, Mapping):
        named = {str(key): value for key, value in values.items()}
        if len(named) < len(values):
            raise ValueError(
                f"{name} has two keys with the same text, such as 1 and '1'; give each its own"
            )
        return named
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        width = len(str(max(len(values) - 1, 0)))
        return {f"{index:0{width}}": value for index, value in enumerate(values)}
    raise ValueError(f"{name} is a {type(values).__name__}; give a mapping by id or a list")
