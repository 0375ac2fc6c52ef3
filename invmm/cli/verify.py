"""`invmm-verify`: does what a run recorded hold?"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invmm.cli.entry import run_command
from invmm.exits import HELP

if TYPE_CHECKING:
    from invmm.runtime.plan import MeasureRun

DESCRIPTION = """
Verifies the records of a run from the distributions that it saved, without repeating the search:
the score is computed again, and fresh samples are drawn and compared with the image. Writes
verification.json into the folder of the run.
"""
EPILOG = (
    """
A record holds if its score is the KL of the saved distribution, if the recorded count of replicas
and the fresh one may come from one rate (with 95 % intervals, the recorded one widened for the
number of checks that it was selected from), and if its certificate claims no more than its count
proves. Exit code 4: some records cannot be verified, and all others hold. Exit code 2: no record
can be verified, because the run, its model or its similarity network is missing or has changed.
"""
    + HELP
)


def main() -> None:
    """Console script."""
    sys.exit(run_command("invmm-verify", lambda: _verify(_parser().parse_args())))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("invmm-verify", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="ids; all images if none")
    parser.add_argument(
        "--num-samples", type=_positive, default=64, metavar="N", help="fresh samples an image"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the fresh samples")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="where the model is now; its weights must be the same"
    )
    parser.add_argument(
        "--expect", metavar="ROOT_HASH", help="that the run printed: all its files must be there"
    )
    return parser


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is no number of samples; use 1 or more")
    return int(text)


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    from invmm.inversion.saved import read_manifest
    from invmm.runtime.verify import Verification, verify

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here; use --device cpu")
    manifest = read_manifest(arguments.run)
    return verify(
        Verification(
            run=_rebuilt(arguments.run, manifest, arguments.model),
            manifest=manifest,
            image_ids=arguments.images,
            num_samples=arguments.num_samples,
            seed=arguments.seed,
            device=torch.device(name),
            command=shlex.join(["invmm-verify", *sys.argv[1:]]),
            root_hash=arguments.expect,
        )
    )


def _rebuilt(run_dir: Path, manifest: Mapping[str, Any], model: str | None) -> MeasureRun:
    """The recipes of a run, from its manifest.

    Raises:
        ValueError: the config was altered, or something that it names is not here.
    """
    from invmm.cli.compose import digest_of, identity_of
    from invmm.cli.recipes import check_measure, plan_of
    from invmm.results.run_folder import stored_config

    config = manifest["config"]
    if digest_of(config) != manifest["config_digest"]:
        raise ValueError(
            f"{run_dir / 'manifest.json'} was altered: its config does not have the digest "
            f"{manifest['config_digest']}"
        )
    stored = stored_config(run_dir)
    if stored is not None and stored["config"] != identity_of(config):
        raise ValueError(f"{run_dir / 'manifest.json'} was altered: config.json has another config")
    faults: list[str] = []
    given = {**config, "model": _model(config, model), "dataset": _dataset(config)}
    recipes = check_measure(given, faults)
    if recipes is None:
        has_moved = any("model.path=" in fault for fault in faults)
        hint = "; --model FOLDER says where the model is now" if has_moved else ""
        raise ValueError(f"{run_dir} cannot be verified here: {'; '.join(faults)}{hint}")
    return plan_of(recipes, folder=run_dir, config=config, identity=identity_of(config))


def _model(config: Mapping[str, Any], path: str | None) -> Any:
    if "_target_" in config["model"]:
        return {**config["model"], "path": path} if path else config["model"]
    if path is None:
        raise ValueError(
            "the model of this run was a pipeline in memory; save it by save_pretrained and give "
            "--model FOLDER"
        )
    scale = config["model"].get("latent_scale")  # not in the saved config of a VQ autoencoder
    return {"_target_": "invmm.models.auto.AutoModel", "path": path, "latent_scale": scale}


def _dataset(config: Mapping[str, Any]) -> Any:
    """The data set's node; images in memory are gone, and the records stand in for them."""
    from invmm.data.memory import MemoryImages

    dataset = config["dataset"]
    if "_target_" in dataset:
        return dataset
    if "path" in dataset:
        return {"_target_": "invmm.data.folder.ImageFolder", **dataset}
    return MemoryImages(images={}, prompts={})


if __name__ == "__main__":
    main()
