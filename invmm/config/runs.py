"""Building the runs of all commands from configs, and what must hold between their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge, Gt, Lt

from invmm.config.schema import Faulty, build
from invmm.data.dataset import DatasetRecipe
from invmm.data.prompt import Prompt
from invmm.diffusion.guidance import is_guided
from invmm.diffusion.sampling import Sampler
from invmm.engine.protocols import Measurement, Use
from invmm.engine.settings import EngineSettings
from invmm.faults import Fault, fault_of
from invmm.files import json_digest
from invmm.identity import Run, digest_of
from invmm.models.adapter import ModelInfo, ModelRecipe
from invmm.replication.replication import Replication
from invmm.runtime.run import MeasureRun, Shard
from invmm.runtime.trainer import TrainerSettings
from invmm.training.run import TrainRun


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """Everything `invmm-threshold` can be told."""

    dataset: DatasetRecipe
    replication: Replication
    image_size: Annotated[int, Ge(1)]
    allowed_rate: Annotated[float, Gt(0), Lt(1)]
    dry_run: bool


_RUNS: dict[str, type[Run]] = {"measure": MeasureRun, "train": TrainRun}
"""Name of a primary config -> the run that it describes."""
_built: dict[str, tuple[Run | None, list[Fault]]] = {}


def forget_built() -> None:
    """A command builds its runs anew."""
    _built.clear()


def built(config_name: str, config: Mapping[str, Any], faults: list[Fault]) -> Any:
    """The run that a config describes, built once in a process; None if a part has faults.

    Args:
        config_name: "measure" or "train".
        config: plain containers, or objects in their place.
        faults: gets a line for each fault within the parts.
    """
    try:
        key = json_digest({"": config_name, **config})
    except TypeError:  # objects of whoever calls from Python
        return _build(config_name, config, faults)
    if key not in _built:
        found: list[Fault] = []
        _built[key] = _build(config_name, config, found), found
    run, found = _built[key]
    faults += found
    return run


def _build(config_name: str, config: Mapping[str, Any], faults: list[Fault]) -> Run | None:
    found: list[Fault] = []
    given = _with_inversion(config, found) if config_name == "measure" else config
    run = build(_RUNS[config_name], given, "", found)
    order = {key: place for place, key in enumerate(config)}
    faults += sorted(found, key=lambda fault: order.get(_group(fault), len(order)))
    return None if found else run


def _group(fault: Fault) -> str:
    """The key at the top of a config that a fault is about."""
    return fault.keys[0].partition(".")[0] if fault.keys else ""


def run_digest(config_name: str, config: Mapping[str, Any]) -> str:
    """The digest of the run that a config describes; of the config itself if that has faults."""
    run = built(config_name, config, [])
    return digest_of(config) if run is None else run.digest


def check_measure(config: Mapping[str, Any], faults: list[Fault]) -> MeasureRun | None:
    """Builds a run of `invmm` and lists every fault within and between its parts."""
    run: MeasureRun | None = built("measure", config, faults)
    # A faulty key is left at its default below, and what is wrong with that is nobody's fault.
    faulty, listed = {key for fault in faults for key in fault.keys}, len(faults)
    _check_between(_Parts(run, config if run else _with_inversion(config, [])), faults)
    faults[listed:] = [f for f in faults[listed:] if faulty.isdisjoint(f.keys[:1])]
    return None if faults else run


def _with_inversion(config: Mapping[str, Any], faults: list[Fault]) -> dict[str, Any]:
    """A config without the group `inversion`, which `measurement=inversion` only refers to.

    The group is built under its own key, by which a person sets it, and stands as the measurement.
    """
    given = dict(config)
    inversion, measurement = given.pop("inversion", None), given.get("measurement")
    refers = measurement == inversion
    if isinstance(measurement, Mapping) and "_target_" not in measurement:
        # Keys given to what is only a reference take its place.
        faults += [
            Fault(f"measurement.{name} is read only; give inversion.{name}", f"measurement.{name}")
            for name in measurement
        ]
        refers = True
    if inversion is not None:
        built = build(Measurement, inversion, "inversion", faults)
        if refers:
            given["measurement"] = built or Faulty(inversion)
    return given


def check_train(config: Mapping[str, Any], faults: list[Fault]) -> TrainRun | None:
    """Builds a run of `invmm-train` and lists every fault within and between its parts."""
    run: TrainRun | None = built("train", config, faults)
    model, dataset = config.get("model") or {}, config.get("dataset") or {}
    _check_size(dataset.get("size"), model.get("image_size"), faults)
    if not faults and run is not None:
        _collect(lambda: run.training.check_devices(run.trainer.devices), faults)
    return None if faults else run


def check_threshold(config: Mapping[str, Any], faults: list[Fault]) -> ThresholdConfig | None:
    """Builds the settings of `invmm-threshold` and lists every fault."""
    settings = build(ThresholdConfig, config, "", faults)
    return None if faults else settings


def check_machine(config: Mapping[str, Any], faults: list[Fault]) -> None:
    """Appends a fault if this machine does not have the devices of the config.

    A dry run plans for another machine and skips this check.
    """
    trainer: TrainerSettings | None = _readable(TrainerSettings, config.get("trainer"))
    if trainer is not None:
        _collect(trainer.check_machine, faults)


class _Parts:
    """The parts of a run; of one with faults, those that can be read nevertheless.

    Args:
        run: the built run, None if it has faults.
        config: that it was built from.
    """

    def __init__(self, run: MeasureRun | None, config: Mapping[str, Any]) -> None:
        self._run, self.config = run, config

    def __call__(self, name: str, expected: Any) -> Any:
        """A part by its key, None if it cannot be read."""
        if self._run is not None:
            return getattr(self._run, name)
        return _readable(expected, self.config.get(name))


def _check_between(part: _Parts, faults: list[Fault]) -> None:
    """Faults between the parts of a run, as far as they can be read."""
    config = part.config
    sampler: Sampler | None = part("sampler", Sampler)
    model: ModelRecipe | None = part("model", ModelRecipe)
    _check_shard(part, faults)
    info: ModelInfo | None = _collect(model.describe, faults) if model else None
    if info is None or model is None:
        return
    dataset = config.get("dataset")
    size = dataset.get("size") if isinstance(dataset, Mapping) else None
    _check_size(size, info.image_size, faults)
    prompt: Prompt | None = part("prompt", Prompt)
    if prompt is not None and prompt.kind not in info.prompts:
        cure = " or ".join(f"prompt={option}" for option in info.prompts)
        line = f"prompt={prompt.kind} has no meaning for a {info.family} model; use {cure}"
        faults.append(Fault(line, "prompt"))
    measurement: Measurement | None = part("measurement", Measurement)
    if sampler is not None:
        _collect(lambda: sampler.check_steps(info.num_train_timesteps), faults)
        scales = list(sampler.guidance_scales)
        if (kind := _unguided(info)) and any(map(is_guided, scales)):
            line = (
                f"sampler.guidance_scales={scales} has no meaning for {kind}; use "
                "sampler.guidance_scales=[1]"
            )
            faults.append(Fault(line, "sampler.guidance_scales"))
        _collect(lambda: sampler.check_kind(info.prediction_type), faults)
    replication: Replication | None = part("replication", Replication)
    schedule = lru_cache(model.schedule)
    if sampler is not None and not faults:
        _collect(lambda: sampler.check_schedule(schedule()), faults)
    is_plan = bool(config.get("dry_run"))
    if sampler is not None and measurement is not None and replication is not None:
        use = Use(
            model=model,
            schedule=schedule,
            sampler=sampler,
            criterion=replication,
            searches_prompt=prompt is not None and prompt.kind == "learned",
            repeats=config.get("repeats", 1),
            is_plan=is_plan or bool(faults),
        )
        _collect(lambda: measurement.check(use), faults)
    if isinstance(model, _CanBeTriedOut) and not faults and not is_plan:
        _collect(model.try_out, faults)  # in a dry run the estimate of the cost does the same


def _unguided(info: ModelInfo) -> str | None:
    """What kind of model has no guidance, for messages; None for a model that has it."""
    if info.prompts == ("none",):
        return "an unconditional model"
    if info.family == "pixel":
        return "a class-conditional pixel model, which has no unconditional class"
    return None


@runtime_checkable
class _CanBeTriedOut(Protocol):
    """A model whose parts can be run on the meta device, without weights."""

    def try_out(self) -> None: ...


def _check_shard(part: _Parts, faults: list[Fault]) -> None:
    shard = part.config.get("shard")
    if not isinstance(shard, str):
        return
    _collect(lambda: Shard.parse(shard), faults)
    engine: EngineSettings | None = part("engine", EngineSettings)
    if engine is not None and engine.rows_to_measure:
        line = (
            f"engine.{engine.rows_to_measure[0]}=auto may be measured differently on each machine, "
            f"and shard={shard} is to give the records of one run; give a number of rows"
        )
        faults.append(Fault(line, f"engine.{engine.rows_to_measure[0]}", "shard"))


def _check_size(dataset_size: Any, model_size: Any, faults: list[Fault]) -> None:
    if isinstance(dataset_size, int) and isinstance(model_size, int) and dataset_size != model_size:
        line = f"dataset.size={dataset_size} is not the model's {model_size}; use dataset.size=null"
        faults.append(Fault(line, "dataset.size"))


def _readable(expected: Any, node: Any) -> Any:
    """The object of a node, faulty keys left at their defaults (they are listed elsewhere)."""
    if isinstance(node, expected):
        return node
    node = node.node if isinstance(node, Faulty) else node
    if not isinstance(node, Mapping):
        return None
    faults: list[Fault] = []
    built = build(expected, node, "", faults)
    if built is None:
        faulty = set(map(_group, faults))
        built = build(expected, {k: v for k, v in node.items() if k not in faulty}, "", [])
    return built


def _collect(action: Callable[[], Any], faults: list[Fault]) -> Any:
    try:
        return action()
    except ValueError as error:
        faults.append(fault_of(error))
        return None
