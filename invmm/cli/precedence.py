"""What wins where a preset and the command line speak of the same group.

Hydra merges an `experiment=` preset last, so that it may set any value. Its values would then
outlive an option that the command line chose for the same group: those of `replication:` in the
preset would be laid over `replication=sscd`. An option that is given wins whole instead, as if the
preset said nothing of its group; a key that is given wins over both, as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from invmm.cli.overrides import key_of

PRESETS = "experiment"
"""The group whose options set values of other groups."""


def options_win(
    config: DictConfig,
    config_name: str,
    overrides: Sequence[str],
    *,
    conf: str,
    groups: Collection[str],
) -> DictConfig:
    """A composed config in which options of the command line win whole.

    Args:
        config: as Hydra composed it.
        config_name: of the primary config.
        overrides: that it was composed with.
        conf: the module of the configs.
        groups: names of config groups.

    Returns:
        The config, without Hydra's own node if anything had to be changed.
    """
    keys = [key_of(override) for override in overrides]
    chosen = {key for key in keys if key in groups and key != PRESETS}
    if PRESETS not in keys or not chosen:
        return config
    own = [
        override
        for key, override in zip(keys, overrides, strict=True)
        if key.partition(".")[0] in chosen
    ]
    content = _unresolved(config)
    instead = _composed(conf, config_name, tuple(own))
    return OmegaConf.create({**content, **{key: instead[key] for key in chosen if key in instead}})


@lru_cache(maxsize=64)
def _composed(conf: str, config_name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """A config without a preset; Hydra asks for that of a job several times."""
    is_ready = GlobalHydra().is_initialized()  # within a job that Hydra runs
    hydra = (
        contextlib.nullcontext() if is_ready else initialize_config_module(conf, version_base="1.3")
    )
    with hydra:
        return _unresolved(compose(config_name, list(overrides)))


def _unresolved(config: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return {str(key): node for key, node in content.items() if key != "hydra"}
