"""The shape of the primary configs, and what must hold between their parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from annotated_types import Ge, Gt, Lt, MinLen

from invmm.config.schema import build
from invmm.data.dataset import DatasetRecipe
from invmm.data.prompt import Prompt
from invmm.diffusion.guidance import is_guided
from invmm.diffusion.sampling import Sampler
from invmm.diffusion.schedule import NoiseSchedule
from invmm.engine.protocols import Measurement
from invmm.engine.repeated import Repeated
from invmm.engine.settings import EngineSettings
from invmm.files import json_digest
from invmm.inversion.inversion import Inversion
from invmm.inversion.replay import Replay
from invmm.inversion.trajectory import Trajectory
from invmm.models.adapter import ModelInfo, ModelRecipe
from invmm.models.execution import Execution
from invmm.probability.bank import BankMeasurement, only_guidance_scale
from invmm.replication.replication import Replication
from invmm.results.ownership import differences
from invmm.runtime.loggers import RunLog
from invmm.runtime.plan import MeasureRun, Shard
from invmm.runtime.trainer import TrainerSettings
from invmm.training.architectures import TrainableModel
from invmm.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Everything `invmm` can be told."""

    measurement: Measurement
    inversion: Measurement
    model: ModelRecipe
    dataset: DatasetRecipe
    prompt: Prompt
    sampler: Sampler
    replication: Replication
    execution: Execution
    engine: EngineSettings
    trainer: TrainerSettings
    logger: RunLog
    seed: Annotated[int, Ge(0)]
    repeats: Annotated[int, Ge(1)] = 1
    out: Annotated[str, MinLen(1)]
    run_dir: Annotated[str, MinLen(1)] | None
    shard: str | None
    retry_failed: bool
    dry_run: bool

    @property
    def repeated(self) -> Measurement:
        """What is done to each image."""
        if self.repeats == 1:
            return self.measurement
        return Repeated(measurement=self.measurement, repeats=self.repeats)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything `invmm-train` can be told."""

    model: TrainableModel
    dataset: DatasetRecipe
    training: TrainingSettings
    trainer: TrainerSettings
    seed: Annotated[int, Ge(0)]
    out: Annotated[str, MinLen(1)]
    run_dir: Annotated[str, MinLen(1)] | None
    dry_run: bool


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """Everything `invmm-threshold` can be told."""

    dataset: DatasetRecipe
    replication: Replication
    image_size: Annotated[int, Ge(1)]
    allowed_rate: Annotated[float, Gt(0), Lt(1)]
    dry_run: bool


def check_measure(config: Mapping[str, Any], faults: list[str]) -> MeasureConfig | None:
    """Builds the recipes of `invmm` and lists every fault within and between them."""
    measurement = config.get("measurement")
    if isinstance(measurement, Mapping) and "_target_" not in measurement:
        # Keys given to what is only a reference take its place.
        faults += [
            f"measurement.{name} is read only; give inversion.{name}" for name in measurement
        ]
        config = {**config, "measurement": config["inversion"]}
    if "measurement" in config and config["measurement"] == config.get("inversion"):
        # One and the same node: name its faults once, by the key that a person types.
        inner: list[str] = []
        recipes = build(MeasureConfig, config, "", inner)
        faults += [fault for fault in inner if not fault.startswith("measurement.")]
    else:
        recipes = build(MeasureConfig, config, "", faults)
    # A faulty key is left at its default below, and what is wrong with that is nobody's fault.
    faulty, listed = {fault.partition("=")[0] for fault in faults}, len(faults)
    _check_between(config, faults)
    faults[listed:] = [f for f in faults[listed:] if f.partition("=")[0] not in faulty]
    return None if faults else recipes


def plan_of(
    recipes: MeasureConfig,
    *,
    folder: Path | None,
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> MeasureRun:
    """The run that checked recipes describe.

    Args:
        recipes: from `check_measure`.
        folder: of the run; None gives it one of its own.
        config: resolved, for the manifest.
        identity: what the run folder belongs to.
    """
    digest = json_digest(identity)
    return MeasureRun(
        measurement=recipes.repeated,
        model=recipes.model,
        dataset=recipes.dataset,
        prompt=recipes.prompt,
        sampler=recipes.sampler,
        replication=recipes.replication,
        execution=recipes.execution,
        engine=recipes.engine,
        trainer=recipes.trainer,
        logger=recipes.logger,
        seed=recipes.seed,
        shard=Shard.parse(recipes.shard) if recipes.shard else None,
        run_dir=folder or Path(recipes.out) / digest,
        retry_failed=recipes.retry_failed,
        config=config,
        identity=identity,
        digest=digest,
    )


def check_train(config: Mapping[str, Any], faults: list[str]) -> TrainConfig | None:
    """Builds the recipes of `invmm-train` and lists every fault within and between them."""
    recipes = build(TrainConfig, config, "", faults)
    model, dataset = config.get("model") or {}, config.get("dataset") or {}
    _check_size(dataset.get("size"), model.get("image_size"), faults)
    if not faults and recipes is not None:
        _collect(lambda: recipes.training.check_devices(recipes.trainer.devices), faults)
    return None if faults else recipes


def check_threshold(config: Mapping[str, Any], faults: list[str]) -> ThresholdConfig | None:
    """Builds the recipes of `invmm-threshold` and lists every fault."""
    recipes = build(ThresholdConfig, config, "", faults)
    return None if faults else recipes


def check_machine(config: Mapping[str, Any], faults: list[str]) -> None:
    """Appends a fault if this machine does not have the devices of the config.

    A dry run plans for another machine and skips this check.
    """
    trainer: TrainerSettings | None = _readable(TrainerSettings, config.get("trainer"))
    if trainer is not None:
        _collect(trainer.check_machine, faults)


def _check_between(config: Mapping[str, Any], faults: list[str]) -> None:
    """Faults between the nodes, as far as the nodes can be read."""
    sampler: Sampler | None = _readable(Sampler, config.get("sampler"))
    model: ModelRecipe | None = _readable(ModelRecipe, config.get("model"))
    _check_shard(config, faults)
    info: ModelInfo | None = _collect(model.describe, faults) if model else None
    if info is None or model is None:
        return
    dataset = config.get("dataset")
    size = dataset.get("size") if isinstance(dataset, Mapping) else None
    _check_size(size, info.image_size, faults)
    prompt: Prompt | None = _readable(Prompt, config.get("prompt"))
    if prompt is not None and prompt.kind not in info.prompts:
        cure = " or ".join(f"prompt={option}" for option in info.prompts)
        faults.append(f"prompt={prompt.kind} has no meaning for a {info.family} model; use {cure}")
    measurement: Measurement | None = _readable(Measurement, config.get("measurement"))
    is_learned = prompt is not None and prompt.kind == "learned"
    if is_learned and measurement is not None and not isinstance(measurement, Inversion):
        faults.append(
            f"prompt=learned cannot be searched by a {type(measurement).__name__}; use "
            "measurement=inversion with inversion=paper_sd, or prompt=caption"
        )
    if isinstance(measurement, BankMeasurement) and config.get("repeats", 1) != 1:
        faults.append(
            f"repeats={config['repeats']} has no meaning for a {type(measurement).__name__}, whose "
            "interval holds the chance of its draws; give repeats=1, and other seeds for more draws"
        )
    replication: Replication | None = _readable(Replication, config.get("replication"))
    if isinstance(measurement, Trajectory) and replication is not None:
        _collect(lambda: measurement.check_criterion(replication), faults)
    if isinstance(measurement, Replay):
        _collect(measurement.manifest, faults)
        if sampler is not None:
            _collect(lambda: only_guidance_scale(sampler), faults)
    if sampler is not None:
        _collect(lambda: sampler.check_steps(info.num_train_timesteps), faults)
        scales = list(sampler.guidance_scales)
        if (kind := _unguided(info)) and any(map(is_guided, scales)):
            faults.append(
                f"sampler.guidance_scales={scales} has no meaning for {kind}; use "
                "sampler.guidance_scales=[1]"
            )
        _collect(lambda: sampler.check_kind(info.prediction_type), faults)
        if not faults:  # building the schedule takes a second that a faulty config need not wait
            _collect(lambda: _check_schedule(model.schedule(), sampler, measurement), faults)
    if isinstance(model, _CanBeTriedOut) and not faults and not config.get("dry_run"):
        _collect(model.try_out, faults)  # in a dry run the estimate of the cost does the same
    if isinstance(measurement, Replay) and not faults and not config.get("dry_run"):
        _collect(lambda: _check_source(measurement, model), faults)


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


@runtime_checkable
class _NeedsLevels(Protocol):
    """A measurement that asks for noise levels which a model may not have."""

    def check_schedule(self, schedule: NoiseSchedule) -> None: ...


def _check_schedule(
    schedule: NoiseSchedule, sampler: Sampler, measurement: Measurement | None
) -> None:
    sampler.check_schedule(schedule)
    if isinstance(measurement, Trajectory):
        measurement.short_of(sampler, schedule)
    if isinstance(measurement, _NeedsLevels):
        measurement.check_schedule(schedule)


def _check_source(measurement: Replay, model: ModelRecipe) -> None:
    """Reads the weights, which a dry run does not."""
    searched = measurement.manifest()["inputs"]
    changed = differences(searched["model"], model.fingerprint(), "model")
    if "model_settings" in searched:
        changed += differences(searched["model_settings"], model.settings(), "model")
    if changed:
        raise ValueError(
            f"measurement.source={measurement.source} searched another model "
            f"({'; '.join(changed)}); give the model.path of that run, or a run of this model"
        )


def _check_shard(config: Mapping[str, Any], faults: list[str]) -> None:
    shard = config.get("shard")
    if not isinstance(shard, str):
        return
    _collect(lambda: Shard.parse(shard), faults)
    engine: EngineSettings | None = _readable(EngineSettings, config.get("engine"))
    if engine is not None and engine.open:
        faults.append(
            f"engine.{engine.open[0]}=auto may be measured differently on each machine, and "
            f"shard={shard} is to give the records of one run; give a number of rows"
        )


def _check_size(dataset_size: Any, model_size: Any, faults: list[str]) -> None:
    if isinstance(dataset_size, int) and isinstance(model_size, int) and dataset_size != model_size:
        faults.append(
            f"dataset.size={dataset_size} is not the model's {model_size}; use dataset.size=null"
        )


def _readable(expected: Any, node: Any) -> Any:
    """The object of a node, faulty keys left at their defaults (they are listed elsewhere)."""
    if isinstance(node, expected):
        return node
    if not isinstance(node, Mapping):
        return None
    faults: list[str] = []
    built = build(expected, node, "", faults)
    if built is None:
        faulty = {re.split(r"[=. ]", fault)[0] for fault in faults}
        built = build(expected, {k: v for k, v in node.items() if k not in faulty}, "", [])
    return built


def _collect(action: Callable[[], Any], faults: list[str]) -> Any:
    try:
        return action()
    except ValueError as error:
        faults.append(str(error))
        return None
