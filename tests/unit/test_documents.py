"""The documents are true of the project: links, files, commands, targets of make, floors, site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import documents
import pytest
import yaml
from documents import DOCUMENTS, ROOT, read
from unit.test_floors import FLOORS

import invmm
from invmm.cli import collect, doctor, verify
from invmm.config.compose import composed_job, groups, jobs
from invmm.config.runs import built, check_threshold
from invmm.faults import Fault

README = read(ROOT / "README.md")
COMMANDS = sorted({command for path in DOCUMENTS for command in documents.commands(read(path))})
HYDRA = {"invmm": "measure", "invmm-train": "train", "invmm-threshold": "threshold"}
"""Command -> its primary config."""
PARSERS: dict[str, Callable] = {
    "invmm-verify": verify._parser,
    "invmm-collect": collect._parser,
    "invmm-doctor": doctor._parser,
}
NEEDED = ["model.path=x", "dataset=folder", "dataset.path=x"]
"""What `...` at the end of a command stands for, where the command does not give it."""


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def faults_of(command: str) -> list[str]:
    """What is wrong with a command line; nothing is loaded, and paths need not exist."""
    name, *given = documents.words(command)
    arguments = [word for word in given if word != "..."]
    if name in PARSERS:
        try:
            PARSERS[name]().parse_intermixed_args(arguments)
        except SystemExit:
            return [f"{name} does not take these arguments"]
        return []
    overrides = [word for word in arguments if not word.startswith("-")]
    faults: list[Fault | str] = [
        f"{word} is no flag" for word in arguments if word.startswith("-") and word != "--multirun"
    ]
    if len(arguments) < len(given):
        keys = {override.partition("=")[0] for override in overrides}
        overrides += [word for word in NEEDED if word.partition("=")[0] not in keys]
    for job in jobs(overrides, multirun="--multirun" in arguments, faults=faults):
        config = composed_job(HYDRA[name], job, faults).plain
        if not config:
            continue
        if name == "invmm-threshold":
            check_threshold(config, faults)
        else:
            built(HYDRA[name], config, faults)
    return [*map(str, faults)]


def test_the_readme_is_short():
    assert len(README.path.read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_link_leads_somewhere(path):
    assert documents.broken_links(read(path)) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_file_that_is_named_exists(path):
    assert documents.missing_files(read(path)) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_target_of_make_and_every_study_exists(path):
    rules = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    document = read(path)
    assert documents.make_targets(document) <= {*rules}
    assert all((ROOT / "experiments" / name / "run.sh").exists()
               for name in documents.studies(document))  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_given(command):
    assert faults_of(command) == []


def test_the_commands_are_found():
    """Those of blocks, of prose and of tables, of every command of Hydra and of argparse."""
    assert len(COMMANDS) > 50
    assert {command.split()[0] for command in COMMANDS} == {*HYDRA, *PARSERS}
    folder = "invmm model.path=FOLDER dataset=folder dataset.path=IMAGES"
    assert f"{folder} prompt=class_label 'sampler.guidance_scales=[1,4]'" in COMMANDS
    assert "invmm experiment=paper_ffhq" in COMMANDS


@pytest.mark.parametrize("command", [
    "invmm experiment=demoo",
    "invmm smapler=ddim ...",
    "invmm dataset=folder dataset.path=IMAGES sampler.steps=3 ...",
    "invmm model.path=FOLDER sampler.num_inference_steps=0",
    "invmm 'dataset.ids=[a' ...",
    "invmm model.path=FOLDER dataset=folder",
    "invmm --multi-run seed=0,1 ...",
    "invmm-train experiment=demo",
    "invmm-threshold allowed_rate=2",
    "invmm-verify",
    "invmm-verify results/demo --hash ROOT_HASH",
    "invmm-collect RUN_DIR ... --join",
])  # fmt: skip
def test_a_command_that_cannot_be_given_is_seen(command):
    assert faults_of(command)


def test_what_leads_nowhere_is_seen():
    text = """\
# A page

Write to [us](https://example.org), see [this](#a-page), [that](#no-page), [it](docs/gone.md),
[this one](docs/trust.md#what-holds-means) and not [this](docs/trust.md#gone), ![](no.png);
`[code](is no link)`, `invmm/no_file.py` and `conf/GROUP/OPTION.yaml`. Try `make study STUDY=none`.

    make setup nothing  # a comment
    invmm seed=1 \\
        repeats=2 | head

* A list

```
invmm-train seed=2
```
"""
    document = documents.parsed(ROOT / "PAGE.md", text)
    assert documents.broken_links(document) == [
        "#no-page", "docs/gone.md", "docs/trust.md#gone", "no.png",
    ]  # fmt: skip
    assert documents.missing_files(document) == ["invmm/no_file.py"]
    assert documents.make_targets(document) == {"setup", "nothing", "study"}
    assert documents.studies(document) == {"none"}
    assert [documents.words(line) for line in documents.commands(document)] == [
        ["invmm", "seed=1", "repeats=2"], ["invmm-train", "seed=2"],
    ]  # fmt: skip


def test_every_study_is_in_the_table():
    there = {path.parent.name for path in ROOT.glob("experiments/*/run.sh")}
    for path in (README.path, ROOT / "docs" / "studies.md"):
        prose = read(path).prose
        rows = re.findall(r"^\| \[(\w+)\]\(\S*experiments/(\w+)/README\.md\)", prose, re.MULTILINE)
        assert all(label == folder for label, folder in rows)
        assert {folder for _, folder in rows} == there
        assert len(rows) == len(there)


def test_the_table_of_the_demo_is_the_same_wherever_it_stands():
    def rows(path: Path) -> list[str]:
        return re.findall(r"^\| .* of 64 \(.*\|$", read(path).prose, re.MULTILINE)

    assert len(rows(README.path)) == 7
    assert rows(README.path) == rows(ROOT / "docs" / "quickstart.md")


def test_the_page_of_the_design_has_the_floors_of_the_code():
    prose = read(ROOT / "docs" / "design.md").prose
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", prose, re.MULTILINE)
    shown = {int(level): {*re.findall(r"`(\w+)`", rooms)} for level, rooms in rows}
    assert shown == {level: rooms for level, rooms in enumerate(FLOORS, start=1)}


def test_the_page_of_extending_has_the_protocols_of_the_code():
    """Each one that a person may implement; some are only seams within the package."""
    inner = {"Fingerprinted", "Named", "DescribesItself"}
    classes = re.compile(r"^class ([A-Z]\w+)\(.*\bProtocol\):", re.MULTILINE)
    protocols = {
        name
        for path in Path(invmm.__file__).parent.rglob("*.py")
        for name in classes.findall(path.read_text())
    }
    assert inner < protocols
    page = read(ROOT / "docs" / "extending.md")
    assert protocols - inner <= {*page.spans}
    opening, _, _ = page.prose.partition("\n## ")
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|", opening, re.MULTILINE)
    in_table = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}
    in_headings = {*re.findall(r"\w+", "\n".join(re.findall(r"^## .+", page.prose, re.MULTILINE)))}
    assert in_table - {"LatentNetwork"} == in_headings & protocols
    assert len(in_table) > 10


def test_every_option_that_the_table_of_presets_names_exists():
    """And every inversion, measurement and sampler is named."""
    prose = read(ROOT / "docs" / "your-model.md").prose
    table = prose[prose.index("| preset | what | source |") :].split("\n\n")[0]
    shown: dict[str, set[str]] = {}
    for row in table.splitlines()[2:]:
        first, *more = re.findall(r"`([^`]+)`", row.split("|")[1])
        group, _, options = first.partition("=")
        names = {option for option in " ".join([options, *more]).split() if "=" not in option}
        shown.setdefault(group, set()).update(names)
    known = groups()
    assert all(names <= {*known[group]} for group, names in shown.items())
    for group in ("inversion", "measurement", "sampler", "prompt", "replication"):
        assert shown[group] == {*known[group]}


def test_every_page_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r": (\S+\.md)$", text, re.MULTILINE)
    there = [os.path.relpath(path, ROOT / "docs") for path in DOCUMENTS if path.parent != ROOT]
    assert sorted(pages) == sorted(there)
    assert yaml.safe_load(text)["theme"]["font"] is False


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material", reason="pip install '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path / "site"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > len(DOCUMENTS) - 3
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]+src="(\w+:)?//|<link[^>]+stylesheet[^>]+"https?:'
    )
    assert [page for page in pages if loaded.search(page.read_text())] == []
