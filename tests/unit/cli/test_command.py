"""The harness: which folder a job gets, what runs, and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from invmm.cli.command import Command
from invmm.config.compose import compose_job
from invmm.config.runs import run_digest
from invmm.faults import Fault

GIVEN = ("model.path=m", "dataset=folder", "dataset.path=i")


def digest(*overrides: str) -> str:
    return run_digest("measure", compose_job("measure", [*GIVEN, *overrides], []))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs `invmm` in an empty folder with a stand-in for the work; (exit code, jobs)."""
    monkeypatch.chdir(tmp_path)

    def run(
        *overrides: str, work=lambda config: 0, lacks=lambda config: []
    ) -> tuple[int, list[SimpleNamespace]]:
        monkeypatch.setattr(sys, "argv", ["invmm"])
        jobs = []

        def execute(config, folder: Path) -> int:
            jobs.append(SimpleNamespace(
                config=config, digest=run_digest("measure", config),
                folder=Path(folder).resolve().relative_to(tmp_path).as_posix(),
            ))  # fmt: skip
            return work(config)

        command = Command(
            name="invmm",
            config_name="measure",
            groups=("sampler",),
            help="A stand-in.",
            check=lambda config, faults: dict(config),
            dry_run=lambda recipes, config: f"seed {config['seed']}",
            execute=execute,
            check_machine=lambda config, faults: faults.extend(lacks(config)),
        )
        return command.run([*GIVEN, *overrides]), jobs

    return run


def test_a_run_without_a_folder_gets_one_of_its_own(ran):
    code, (job,) = ran("seed=3")
    assert code == 0
    assert job.folder == f"results/runs/{digest('seed=3')}"
    assert job.digest == digest("seed=3")
    assert job.config["seed"] == 3
    assert "hydra" not in job.config


def test_run_dir_is_taken_as_it_is(ran):
    _, (job,) = ran("run_dir=results/mine")
    assert job.folder == "results/mine"


@pytest.mark.parametrize("flags", [(), ("--multirun", "seed=0,1")])
@pytest.mark.parametrize("run_dir", ["file", "file/inside"])
def test_a_folder_that_cannot_be_made_is_one_line(run_dir, flags, ran, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, jobs = ran(f"run_dir={run_dir}", *flags)
    assert (code, jobs) == (2, [])
    errors = capsys.readouterr().err
    assert errors.startswith("invmm: ")
    assert run_dir in errors
    assert errors.count("\n") == 1


def test_jobs_of_a_sweep_get_the_folders_of_single_runs(ran):
    _, jobs = ran("--multirun", "seed=0,1", "out=o")
    assert [job.folder for job in jobs] == [f"o/{digest('seed=0')}", f"o/{digest('seed=1')}"]
    _, (single,) = ran("seed=1", "out=o", "engine.slots=2", "trainer=gpu")
    assert single.folder == jobs[1].folder


def test_jobs_of_a_sweep_share_their_run_dir(ran):
    _, jobs = ran("-m", "sampler=ddim,ddpm", "run_dir=mine", "dataset.ids=[a.png],[b.png]")
    assert len({job.folder for job in jobs}) == 4
    assert all(job.folder == f"mine/{job.digest}" for job in jobs)
    chosen = {(job.config["sampler"]["scheduler"], *job.config["dataset"]["ids"]) for job in jobs}
    assert chosen == {("ddim", "a.png"), ("ddim", "b.png"), ("ddpm", "a.png"), ("ddpm", "b.png")}


def test_presets_and_their_values_are_sweepable(ran):
    _, jobs = ran("--multirun", "inversion=adaptive,paper_ddpm", "inversion.check_every=10,20")
    steps = [(job.config["inversion"]["num_steps"], job.config["inversion"]["check_every"])
             for job in jobs]  # fmt: skip
    assert {every for _, every in steps} == {10, 20}
    assert {count for count, _ in steps} == {600, 2000}
    assert all(job.config["measurement"] == job.config["inversion"] for job in jobs)


def test_keys_that_only_the_class_knows_reach_the_run(ran):
    """A field with a default need not stand in the YAML file."""
    _, (job,) = ran("sampler.unlisted=1")
    assert job.config["sampler"]["unlisted"] == 1


def test_flags_may_stand_anywhere(ran):
    code, jobs = ran("seed=0,1", "--multirun", "out=o")
    assert (code, len(jobs)) == (0, 2)


@pytest.mark.parametrize("code", [0, 2, 3])
def test_the_exit_code_is_the_run_s(code, ran):
    assert ran(work=lambda config: code)[0] == code


def test_a_faulty_job_does_not_keep_the_others_from_running(ran, capsys):
    def work(config) -> int:
        if config["seed"] == 0:
            raise ValueError("dataset.path=i holds no image; give another")
        return 0

    code, jobs = ran("--multirun", "seed=0,1", work=work)
    assert code == 2
    assert len(jobs) == 2
    assert capsys.readouterr().err == "invmm: dataset.path=i holds no image; give another\n"


def test_missing_images_of_one_job_are_the_sweep_s_exit_code(ran):
    code, jobs = ran("--multirun", "seed=0,1,2", work=lambda config: 3 * (config["seed"] == 1))
    assert (code, len(jobs)) == (3, 3)


@pytest.mark.parametrize(("codes", "expected"), [
    ((0, 3, 0), 3), ((3, 2), 2), ((2, 3), 2), ((4, 0), 4), ((1, 4), 1), ((0, 0), 0),
])  # fmt: skip
def test_the_most_urgent_code_of_its_jobs_is_the_sweep_s(codes, expected, ran):
    jobs = ",".join(map(str, range(len(codes))))
    code, found = ran("-m", f"seed={jobs}", work=lambda config: codes[config["seed"]])
    assert (code, len(found)) == (expected, len(codes))


@pytest.mark.parametrize("flags", [(), ("--multirun",)])
def test_an_option_wins_over_a_preset_in_what_runs_too(flags, ran):
    """Hydra's own task, its folder and its digest agree with the check."""
    given = ["experiment=duplication_cifar10", "replication=sscd", "sampler=euler", "out=o"]
    _, (job,) = ran(*given, *flags)
    checked = compose_job("measure", [*GIVEN, *given], [])
    assert job.config == checked
    assert job.config["replication"]["similarity"]["path"] is None
    assert job.config["sampler"]["num_inference_steps"] == 50
    assert job.folder == f"o/{run_digest('measure', checked)}"
    assert job.digest == run_digest("measure", checked)


def test_presets_and_options_are_swept_together(ran):
    _, jobs = ran("-m", "experiment=demo,paper_cifar10", "sampler=ddim,euler",
                  "sampler.num_inference_steps=7")  # fmt: skip
    assert [(job.config["run_dir"], job.config["sampler"]["scheduler"]) for job in jobs] == [
        ("results/demo", "ddim"), ("results/demo", "euler"), (None, "ddim"), (None, "euler"),
    ]  # fmt: skip
    assert {job.config["sampler"]["num_inference_steps"] for job in jobs} == {7}


def no_gpu(config) -> list[Fault]:
    return [Fault("there is no GPU here")] if config["trainer"]["accelerator"] == "gpu" else []


def test_the_machine_is_checked_where_the_job_runs(ran, capsys):
    assert ran("trainer=gpu", "seed=x", lacks=no_gpu) == (2, [])
    assert capsys.readouterr().err == "invmm: 1 fault\n  there is no GPU here\n"
    assert ran("trainer=gpu", "--multirun", "seed=0,1", lacks=no_gpu) == (2, [])
    assert ran("trainer=gpu", "dry_run=true", lacks=no_gpu) == (0, [])
    assert ran("trainer=cpu", lacks=no_gpu)[0] == 0


def test_a_launcher_submits_what_its_own_machine_cannot_run(ran, capsys, monkeypatch):
    """On a login node nothing is refused; where the job runs, one line is."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    submitted = []
    monkeypatch.setattr(
        Command, "_run_sweep", lambda self, overrides: submitted.append(overrides) or 0
    )
    sweep = ("-m", "hydra/launcher=slurm", "trainer=gpu", "shard=0/2,1/2")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert ran(*sweep, lacks=no_gpu)[0] == 2
    assert "\n  hydra/launcher=slurm needs srun, which is not here; " in capsys.readouterr().err
    assert ran(*sweep, "dry_run=true", lacks=no_gpu)[0] == 0
    assert submitted == []
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert ran(*sweep, lacks=no_gpu)[0] == 0
    assert len(submitted) == 1
    assert ran("hydra/launcher=slurm", "trainer=gpu", lacks=no_gpu)[0] == 2  # no sweep, no launcher
    capsys.readouterr()
    executed = []
    command = Command(
        name="invmm", config_name="measure", groups=(), help="",
        check=lambda config, faults: config, dry_run=lambda recipes, config: "",
        execute=lambda *arguments: executed.append(arguments) or 0,
        check_machine=lambda config, faults: faults.extend(no_gpu(config)),
    )  # fmt: skip
    job = compose_job("measure", [*GIVEN, "trainer=gpu"], [])
    assert command.work(job, Path()) == 2
    assert executed == []
    assert capsys.readouterr().err == "invmm: there is no GPU here\n"


@pytest.mark.parametrize("empty", ["seed=range(0,0)", "sampler=glob(zz*)"])
def test_a_sweep_without_jobs_is_refused(empty, ran, capsys):
    assert ran("--multirun", empty) == (2, [])
    assert capsys.readouterr().err == (
        f"invmm: 1 fault\n  {empty} names no value, so there is no job to run; name one or more\n"
    )


@pytest.mark.parametrize("signal_code", [130, 143])
def test_a_signal_ends_the_sweep(signal_code, ran):
    done = []

    def work(config) -> int:
        done.append(config["seed"])
        return signal_code

    with pytest.raises(SystemExit) as ended:
        ran("--multirun", "seed=0,1,2", work=work)
    assert ended.value.code == signal_code
    assert done == [0]


def test_faults_of_the_program_keep_their_traceback(ran):
    def work(config) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ran(work=work)


def test_a_dry_run_of_a_sweep_describes_every_job(ran, capsys, tmp_path):
    code, jobs = ran("--multirun", "seed=4,5", "dry_run=true")
    assert (code, jobs) == (0, [])
    assert capsys.readouterr().out == "seed 4\nseed 5\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--cfg", "--config-dir", "--bogus"])
def test_unknown_flags_are_refused(flag, ran, capsys):
    with pytest.raises(SystemExit) as ended:
        ran(flag)
    assert ended.value.code == 2
    assert flag in capsys.readouterr().err


def test_help_lists_the_options_of_each_group(ran, capsys):
    assert ran("--help")[0] == 0
    assert (
        "  sampler      ddim ddpm dpmsolver euler flow_euler flow_heun heun unipc"
        in capsys.readouterr().out
    )
