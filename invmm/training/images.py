"""The training set in memory, and the batch of each step as a function of seed and step."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from invmm.data.dataset import ImageDataset, ImageError
from invmm.data.manifest import ManifestEntry, TrainingManifest


@dataclass(frozen=True, eq=False)
class Batch:
    """What one optimiser step sees.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1].
        noise: (B, 3, H, W) standard normal.
        timesteps: (B,).
        dropout_seed: for the network's own randomness.
        captions: B texts, empty where an image has none or it was dropped.
    """

    pixels: Tensor
    noise: Tensor
    timesteps: Tensor
    dropout_seed: int
    captions: list[str]


class TrainingImages:
    """All training images, each once, with their numbers of copies.

    A batch depends on seed and step alone, so a training that was killed goes on exactly.

    Args:
        pixels: (n, 3, H, W) uint8.
        copies: n numbers.
        captions: n texts, None where an image has none.
        seed: of the run.
    """

    def __init__(
        self, pixels: Tensor, copies: Sequence[int], captions: Sequence[str | None], seed: int
    ) -> None:
        self._pixels, self._captions, self._seed = pixels, captions, seed
        self._weights = torch.tensor(copies, dtype=torch.float64)

    def batch(
        self,
        step: int,
        size: int,
        *,
        num_timesteps: int,
        mirror: bool,
        caption_dropout: float = 0.0,
        caption_templates: Sequence[str] = ("{}",),
    ) -> Batch:
        """The batch of a step: images drawn in proportion to their copies.

        Args:
            step: counted from 0.
            size: B.
            num_timesteps: T.
            mirror: half of the images.
            caption_dropout: probability, in [0, 1], that a caption is replaced by the empty one.
            caption_templates: of an image's copies, in turn; {} is its caption.
        """
        digest = hashlib.sha256(f"{self._seed}:{step}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        chosen = torch.multinomial(self._weights, size, replacement=True, generator=rng)
        pixels = self._pixels[chosen].float() / 127.5 - 1
        noise = torch.randn(pixels.shape, generator=rng)
        timesteps = torch.randint(num_timesteps, (size,), generator=rng)
        if mirror:
            flip = torch.rand(size, generator=rng) < 0.5
            pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
        dropout_seed = int(torch.randint(2**62, (), generator=rng))
        # In [0, 1): a probability of 1 drops all, one of 0 none.
        keep = torch.rand(size, generator=rng) >= caption_dropout
        copies = (torch.rand(size, generator=rng) * self._weights[chosen]).long().tolist()

        def caption(index: int, copy: int) -> str:
            template = caption_templates[copy % len(caption_templates)]
            return template.replace("{}", self._captions[index] or "")

        captions = [
            caption(index, copy) if kept else ""
            for index, copy, kept in zip(chosen.tolist(), copies, keep.tolist(), strict=True)
        ]
        return Batch(pixels, noise, timesteps, dropout_seed, captions)


def read_training_set(dataset: ImageDataset, seed: int) -> tuple[TrainingImages, TrainingManifest]:
    """Loads all training images; unusable ones are reported and left out.

    Raises:
        ValueError: nothing is left.
    """
    pixels, entries = [], []
    for entry in tqdm(dataset.training_entries(), unit="image", desc="reading", leave=False):
        try:
            loaded = dataset.load(entry)
        except ImageError as error:
            print(f"left out of the training: {entry.image_id}: {error}", file=sys.stderr)
            continue
        pixels.append(((loaded.pixels + 1) * 127.5).round().to(torch.uint8))
        entries.append(
            ManifestEntry(
                image_id=entry.image_id,
                sha256=loaded.sha256,
                split="train",
                copies=entry.copies or 1,
                caption=entry.caption,
            )
        )
    if not pixels:
        raise ValueError("the data set has no image to train on")
    copies = [entry.copies for entry in entries]
    manifest = TrainingManifest(entries=tuple(entries), source=dataset.source)
    captions = [entry.caption for entry in entries]
    return TrainingImages(torch.stack(pixels), copies, captions, seed), manifest
