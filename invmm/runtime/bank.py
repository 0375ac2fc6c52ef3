"""Drawing a bank of free samples: block by block, by all processes of a run, kept in its folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from invmm.engine.engine import Engine
from invmm.engine.finiteness import Stage, check_finite
from invmm.engine.outcomes import NonFiniteError, Outcome, Status
from invmm.engine.protocols import Setting, Target
from invmm.engine.slots import Job
from invmm.probability.bank import Bank, DrawnBank
from invmm.results.free_samples import read_block, write_block
from invmm.results.locks import Lease
from invmm.results.run_folder import RunFolder

_SECONDS_BETWEEN_LOOKS = 0.5


def draw_bank(
    bank: Bank, target: Target, setting: Setting, engine: Engine, folder: RunFolder
) -> DrawnBank:
    """The bank, once every block is drawn.

    Blocks that another process is drawing are waited for, and taken over if it dies.

    Args:
        bank: of samples.
        target: carries the condition that all images share.
        setting: sampler and criterion.
        engine: draws.
        folder: keeps the blocks, for the other processes and for a rerun.

    Raises:
        ValueError: a block could not be drawn.
        NonFiniteError: the embedding of a sample is not finite; the whole bank is unusable then.
    """
    files = [folder.bank_block(block) for block in range(bank.num_blocks)]
    files[0].parent.mkdir(exist_ok=True)
    while missing := [block for block, file in enumerate(files) if not file.exists()]:
        if not _draw_blocks(missing, files, bank, target, setting, engine, folder):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    embeddings = torch.from_numpy(np.concatenate([read_block(file) for file in files]))
    check_finite([(Stage.SIMILARITY, embeddings)])
    return DrawnBank(bank, embeddings)


def _draw_blocks(
    blocks: list[int],
    files: list[Path],
    bank: Bank,
    target: Target,
    setting: Setting,
    engine: Engine,
    folder: RunFolder,
) -> int:
    """Draws those blocks that nobody else does; how many."""
    claims: dict[str, tuple[Lease, Path]] = {}

    async def embeddings(block: int) -> Outcome:
        vectors = await bank.vectors(block, target, setting)
        return Outcome(status=Status.ESTIMATED, tensors={"embeddings": vectors})

    def jobs() -> Iterator[Job]:
        for block in blocks:
            if claim := folder.claim_file(files[block]):
                key = f"free samples, block {block}"
                claims[key] = claim, files[block]
                yield Job(key, lambda block=block: embeddings(block))

    drawn = 0
    for job, outcome in engine.run(jobs()):
        claim, file = claims.pop(job.key)
        with claim:
            if outcome.status is Status.DIVERGED:
                raise NonFiniteError(outcome.error)
            if outcome.error is not None:
                raise ValueError(f"{job.key} could not be drawn: {outcome.error}")
            write_block(file, outcome.tensors["embeddings"].numpy())
        drawn += 1
    return drawn
