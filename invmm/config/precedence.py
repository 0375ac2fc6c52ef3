"""Which value holds where a preset and the command line set the same config group.

Hydra merges an `experiment=` preset last, so that it may set any value. With `replication=sscd` on
the command line, a preset's `replication.similarity.path` would then still hold, in a network that
it is not meant for. Here an option of the command line replaces the whole group, as if the preset
did not mention the group. A single key of the command line overrides both, as usual in Hydra.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from invmm.config.overrides import key_of

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
    """A composed config in which options of the command line replace whole groups of a preset.

    Args:
        config: as Hydra composed it.
        config_name: of the primary config.
        overrides: that it was composed with.
        conf: the module of the configs.
        groups: names of config groups.

    Returns:
        The config itself if no group is set by both, else a changed copy without the node `hydra`.
    """
    keys = [key_of(override) for override in overrides]
    chosen = {key for key in keys if key in groups and key != PRESETS}
    if PRESETS not in keys or not chosen:
        return config
    of_chosen = [
        override
        for key, override in zip(keys, overrides, strict=True)
        if key.partition(".")[0] in chosen
    ]
    content = _unresolved(config)
    plain = _composed(conf, config_name, tuple(of_chosen))
    return OmegaConf.create({**content, **{key: plain[key] for key in chosen if key in plain}})


@lru_cache(maxsize=64)
def _composed(conf: str, config_name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """A config composed without a preset; cached, as Hydra's resolvers need it several times."""
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
