"""`invmm-verify` on a run of a tiny real model, honest and tampered with."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pipelines
import pytest
import tiny
import torch
import written
from PIL import Image
from safetensors.torch import load_file, save_file

import invmm
from invmm.cli import measure, verify
from invmm.data.dataset import LoadedImage
from invmm.data.images import load_image, to_pixels
from invmm.engine.outcomes import Outcome, Status
from invmm.inversion.frequency import to_frequencies
from invmm.probability.certificate import clopper_pearson, log_p_certified, lower_rate
from invmm.results.collect import collect
from invmm.results.damage import VOUCHING
from invmm.results.ownership import OwnedRunFolder
from invmm.results.records import read_records
from invmm.results.seal import contents, root_hash
from invmm.runtime.worker import image_generator
from invmm.verification import verify as verify_module


@pytest.fixture
def run(finished, tmp_path):
    """The finished run, copied."""
    return shutil.copytree(finished[0], tmp_path / "copied")


ACCEPTED = ("--min-threshold", "0.05", "--min-samples", "3")
"""What the tiny runs are judged by."""


@pytest.fixture
def verified(run, model, monkeypatch, capsys):
    """Runs the command on a folder; (exit code, output, verification.json by image id)."""

    def verified(*arguments: object, folder: Path = run, own: Path | None = model):
        given = [str(folder), *ACCEPTED, *(["--model", str(own)] if own else [])]
        monkeypatch.setattr(sys, "argv", ["invmm-verify", *given, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            verify.main()
        captured = capsys.readouterr()
        path = folder / "verification.json"
        report = json.loads(path.read_bytes()) if path.exists() else {"images": []}
        by_id = {image["image_id"]: image for image in report["images"]}
        return ended.value.code, captured.out + captured.err, by_id

    return verified


def sealed(run: Path) -> tuple[str, str]:
    """The option with the root hash that a run lists now."""
    return "--expect", json.loads((run / "manifest.json").read_bytes())["root_hash"]


def replicated(run: Path) -> dict:
    return next(r for r in read_records(run) if r["status"] == "REPLICATED" and r["score"] > 0)


def tamper(run: Path, record: dict, **changes) -> None:
    written.vouch(run / "records" / record["folder"], **changes)


def tamper_arrays(run: Path, record: dict, change) -> None:
    path = run / "records" / record["folder"] / "arrays.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)
    written.vouch(path.parent)


def test_a_run_holds_and_says_so(run, images, verified):
    before = tiny.records(run)
    code, output, found = verified("--images", images, *sealed(run))
    assert code == 0, output
    assert tiny.records(run) == before
    table = {record["image_id"]: record for record in read_records(run)}
    assert found.keys() == table.keys()
    for image_id, image in found.items():
        if table[image_id]["status"] != "REPLICATED":
            assert image["verdict"] == "NO_SCORE"
            continue
        assert image["verdict"] == "HOLDS"
        assert image["pixels_from"] == "data set"
        assert image["fresh"]["kl_nats"] == pytest.approx(table[image_id]["score_nats"], rel=1e-5)
        similarities = np.array(image["fresh"]["similarities"])
        assert len(similarities) == 64
        assert (similarities >= 0.05).sum() == image["fresh"]["confirm_passed"]
        assert f"{image['fresh']['confirm_passed']} of 64" in output
    assert "claimed, not verified: that the search found nothing for 5 of the images" in output
    assert "copies of images where the images here have none" in output
    # Without the images their pictures and captions are claims, without the root hash the list.
    code, output, found = verified(*sealed(run))
    assert code == 0
    assert "captions, splits and copies of images, and their pictures" in output
    assert {image["pixels_from"] for image in found.values()} == {None, "target.png"}
    code, output, _ = verified("--images", images)
    assert code == 4
    assert "not verified that none is missing" in output
    code, output, _ = verified(own=None)
    assert code == 2
    assert "which only the folder names; give --model FOLDER" in output


def test_repeats_end_as_a_median_that_holds(model, images, verified, tmp_path):
    """In any number of slots; another number of repeats is another run."""
    folders = [tmp_path / "one", tmp_path / "all"]
    for folder, slots in zip(folders, ("1", "auto"), strict=True):
        searched = ("repeats=3", "replication.threshold=-0.1", "inversion.check_prior=false")
        command = tiny.command(model, images, folder, *searched, f"engine.slots={slots}")
        result = tiny.invmm(command)
        assert result.returncode == 0, result.stderr
        assert "found, score of 3 repeats" in result.stdout
    assert tiny.records(folders[0]) == tiny.records(folders[1])
    found = [record for record in read_records(folders[0]) if record["columns"].get("num_found")]
    assert {record["columns"]["repeats"] for record in found} == {3}
    for record in found:
        low, high = record["columns"]["score_low"], record["columns"]["score_high"]
        if record["score"] is None:
            assert record["columns"]["num_found"] == 1
        else:
            assert low <= record["score"] <= high
    ranges = [(record["columns"]["score_low"], record["columns"]["score_high"]) for record in found]
    assert any(low < high for low, high in ranges), ranges
    code, output, _ = verified("--min-threshold", -0.1, *sealed(folders[0]), folder=folders[0])
    assert code == 0, output


def test_other_samples_by_another_seed_the_same_by_the_same(run, verified):
    record = replicated(run)
    drawn = []
    for seed in (1, 1, 0, 2):
        arguments = (record["image_id"], "--seed", seed, "--num-samples", 5)
        _, _, images = verified(*arguments)
        assert list(images) == [record["image_id"]]
        drawn.append(images[record["image_id"]]["fresh"]["similarities"])
    assert drawn[0] == drawn[1]
    assert len({str(similarities) for similarities in drawn}) == 3


def test_a_run_of_an_earlier_version_holds(run, verified):
    """Its records say schema_version 2 and vouch for nothing themselves."""
    for path in run.glob("records/*/record.json"):
        record = json.loads(path.read_bytes())
        kept = {name: value for name, value in record.items() if name not in VOUCHING}
        path.write_text(json.dumps({**kept, "schema_version": 2}))
    assert collect(run).schema_version.unique().tolist() == [2]
    manifest = json.loads((run / "manifest.json").read_bytes())
    manifest["contents"] = contents(run)
    manifest["root_hash"] = root_hash(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))
    code, output, _ = verified(replicated(run)["image_id"], *sealed(run))
    assert code == 0, output


def test_a_full_disk_takes_nothing_from_what_is_printed(run, verified, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    record = replicated(run)
    monkeypatch.setattr(verify_module, "write_atomically", full)
    code, output, _ = verified(record["image_id"], *sealed(run))
    assert code == 0
    assert f"not written: {run / 'verification.json'}: No space left on device" in output
    assert record["image_id"] in output


def root_of(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("root hash")]
    return line.rpartition(" ")[2]


def forge_status(run: Path, place: Path, manifest: dict) -> None:
    record = json.loads((place / "record.json").read_bytes())
    record |= {"status": "NOT_REPLICATED", "score": None, "score_nats": None}
    (place / "record.json").write_text(json.dumps(record))


def rename(run: Path, place: Path, manifest: dict) -> None:
    place.rename(place.with_name("another-0123456789ab"))


def copy_to_another(run: Path, place: Path, manifest: dict) -> None:
    shutil.copytree(place, place.with_name("another-0123456789ab"))


def list_anew(run: Path, place: Path, manifest: dict) -> None:
    """All fits together again, but not to the hash that the run printed."""
    shutil.rmtree(place)
    manifest["contents"] = contents(run)
    manifest["root_hash"] = root_hash(manifest)


@pytest.mark.parametrize(("forge", "line"), [
    (lambda run, place, manifest: shutil.rmtree(place), "/record.json is missing"),
    (forge_status, "/record.json was altered"),
    (rename, "records/another-0123456789ab/arrays.safetensors is none of the run's files"),
    (copy_to_another, "records/another-0123456789ab/record.json is none of the run's files"),
    (lambda run, place, manifest: (place / "target.png").write_bytes(b"x"), "target.png was alter"),
    (lambda run, place, manifest: (run / "gallery.png").unlink(), "gallery.png is missing"),
    (lambda run, place, manifest: manifest["inputs"].update(dataset="0"), "root hash of manifest"),
    (lambda run, place, manifest: manifest.pop("contents"), "manifest.json has no root hash"),
    (list_anew, "the root hash of manifest.json is "),
])  # fmt: skip
def test_files_that_are_not_those_of_the_root_hash(forge, line, finished, run, verified):
    root = root_of(finished[1].stdout)
    place = run / "records" / replicated(run)["folder"]
    manifest = json.loads((run / "manifest.json").read_bytes())
    forge(run, place, manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))
    other = next(r["image_id"] for r in read_records(run) if r["status"] == "REPLICATED")
    code, output, _ = verified(other, "--num-samples", 1, "--expect", root)
    assert code == 1, output
    assert line in output


def test_the_files_of_a_run_have_its_root_hash(finished, run, model, images, verified, tmp_path):
    """Another run of the same command has the same, whatever its folder, slots and seconds."""
    root = root_of(finished[1].stdout)
    again = tiny.invmm(tiny.command(model, images, tmp_path / "again", "engine.slots=2"))
    assert root_of(again.stdout) == root
    code, output, _ = verified("--expect", root)
    assert code == 0, output
    assert f"files: those of the run with the root hash {root}" in output
    (run / "config.json").write_text((run / "config.json").read_text().replace("0.05", "0.04"))
    code, output, _ = verified()
    assert code == 2
    assert "manifest.json was altered: config.json has another config" in output


def test_the_randomness_is_never_that_of_the_run(run, verified, monkeypatch):
    seeds, confirm = [], verify_module.confirm

    async def watched(noise, target, setting, rng, **options):
        seeds.append((target.image_id, rng.initial_seed()))
        return await confirm(noise, target, setting, rng, **options)

    monkeypatch.setattr(verify_module, "confirm", watched)
    verified("--seed", 0, "--num-samples", 2)  # the run had this seed too
    assert seeds
    for image_id, seed in seeds:
        assert seed != image_generator(0, image_id).initial_seed()


def test_a_tampered_distribution(run, verified):
    record = replicated(run)
    image = to_pixels(Image.open(run / "records" / record["folder"] / "target.png"))
    away = image.mean() - image
    tamper_arrays(run, record, lambda arrays: arrays.update(
        mean=(away * arrays["mean"].norm() / away.norm()).contiguous()
    ))  # fmt: skip
    code, _, images = verified(record["image_id"])
    assert code == 1
    # Its KL is that of the one that was found, but what is drawn from it is no replica.
    [reason] = images[record["image_id"]]["reasons"]
    assert reason.startswith(
        "0 of 64 fresh samples replicate; a search that asks for 3 of 3 at one"
    )
    tamper_arrays(run, record, lambda arrays: arrays["mean"].mul_(1.01))
    code, output, images = verified(record["image_id"])
    assert code == 1
    assert "the KL of the saved distribution" in output
    assert images[record["image_id"]]["verdict"] == "FAILS"


@pytest.mark.parametrize("name", ["score", "score_nats", "replication_rate"])
def test_a_tampered_number(name, run, verified):
    record = replicated(run)
    tamper(run, record, **{name: 0.99 * record[name]})
    code, output, images = verified()
    assert code == 1
    assert f"{name} is " in output
    verdicts = [image["verdict"] for image in images.values()]
    assert verdicts.count("FAILS") == 1
    assert images[record["image_id"]]["verdict"] == "FAILS"


def test_another_model_is_refused_and_the_moved_one_is_not(run, model, verified, tmp_path):
    other = tiny.save_model(tmp_path / "other", seed=1)
    code, output, images = verified(own=other)
    assert (code, images) == (2, {})
    assert "was measured with other inputs (model.unet/diffusion_pytorch_model" in output
    code, output, _ = verified(own=tmp_path / "nowhere")
    assert code == 2
    assert "no folder here" in output
    moved = shutil.copytree(model, tmp_path / "moved")
    assert verified(*sealed(run), own=moved)[0] == 0


def test_another_image_is_not_taken_for_it(finished, model, images, verified, tmp_path):
    copied = shutil.copytree(images, tmp_path / "images")
    run_dir = tmp_path / "run"
    assert tiny.invmm(tiny.command(model, copied, run_dir)).returncode == 0
    record = replicated(run_dir)
    Image.new("RGB", (8, 8), "red").save(copied / record["image_id"])
    code, output, found = verified("--images", copied, folder=run_dir)
    assert code == 4
    assert f"had the SHA-256 {record['sha256']} and has" in output
    assert found[record["image_id"]]["verdict"] == "UNVERIFIED"
    # A record that can be checked and does not hold weighs more than one that cannot be.
    others = [r for r in read_records(run_dir) if r["status"] == "REPLICATED"]
    tamper(run_dir, others[-1], score=9.0)
    assert verified("--images", copied, folder=run_dir)[0] == 1
    # An image that is not there cannot be verified, nor one that the run should have measured.
    (copied / record["image_id"]).rename(copied / "new.png")
    code, output, found = verified("--images", copied, folder=run_dir)
    assert "it is none of the images here" in output
    assert found["new.png"]["reasons"] == ["the run has no record of this image"]
    # Without images the record's own picture stands in: its similarities are those of the image.
    shutil.rmtree(copied)
    _, output, found = verified(record["image_id"], folder=run_dir)
    from_picture = found[record["image_id"]]
    assert from_picture["pixels_from"] == "target.png"
    run_dir = shutil.copytree(finished[0], tmp_path / "c")
    _, _, found = verified(record["image_id"], "--images", images, folder=run_dir)
    expected = found[record["image_id"]]
    assert expected["pixels_from"] == "data set"
    assert from_picture["fresh"] == expected["fresh"]


def test_the_picture_of_a_record_holds_the_very_pixels(tmp_path):
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    loaded = LoadedImage(pixels=to_pixels(Image.fromarray(values)), sha256="ab" * 32)
    with OwnedRunFolder(tmp_path, config=written.CONFIG, digest=written.DIGEST) as folder:
        written.write(folder, written.entry("it"), Outcome(status=Status.FAILED), loaded=loaded)
        content = (folder.record_folder("it") / "target.png").read_bytes()
    assert torch.equal(load_image(content, size=16, resize="crop").pixels, loaded.pixels)


def test_a_searched_prompt_is_drawn_with_again(tmp_path, monkeypatch, verified):
    monkeypatch.setattr(sys, "argv", ["invmm"])
    pipelines.seeded(pipelines.MAKERS["sd1 epsilon"]).save_pretrained(tmp_path / "model")
    images, run = tiny.save_images(tmp_path / "images", 2), tmp_path / "searched"
    overrides = [
        *tiny.command(tmp_path / "model", images, run)[3:], "prompt=learned",
        "replication.threshold=-1", "replication.num_confirm=0", "sampler.guidance_scales=[1,3]",
    ]  # fmt: skip
    assert measure.COMMAND.run(overrides) == 0
    own, accepted = tmp_path / "model", ("--min-threshold", -1)
    code, output, found = verified(*accepted, *sealed(run), folder=run, own=own)
    assert code == 0, output
    assert [image["verdict"] for image in found.values()].count("HOLDS") == 2
    # each check may have looked at both guidance scales
    assert {image["recorded"]["looks"] for image in found.values() if image["recorded"]} == {2}
    record = next(r for r in read_records(run) if r["status"] == "REPLICATED")
    tamper_arrays(run, record, lambda arrays: arrays.pop("prompt_embedding"))
    code, output, _ = verified(*accepted, folder=run, own=own)
    assert code == 1  # the file was altered
    assert "has no prompt_embedding" in output


@pytest.mark.parametrize(("change", "words"), [
    (lambda arrays: arrays.pop("log_variance"), "has no log_variance"),
    (lambda arrays: arrays.update(mean=arrays["mean"][:1].clone()), "its mean has the shape (1,"),
    (lambda arrays: arrays["mean"][0, 0].fill_(float("nan")), "its mean is not finite"),
])  # fmt: skip
def test_arrays_that_cannot_be_drawn_from(change, words, run, verified):
    record = replicated(run)
    tamper_arrays(run, record, change)
    code, output, images = verified(record["image_id"])
    assert code == 1
    assert f"records/{record['folder']}/arrays.safetensors was altered" in output
    assert words in output
    assert images[record["image_id"]]["verdict"] == "UNVERIFIED"


def test_missing_and_damaged_files(run, verified):
    record = replicated(run)
    place = run / "records" / record["folder"]
    (place / "arrays.safetensors").write_bytes(b"nothing")
    assert "its arrays.safetensors is damaged" in verified()[1]
    (place / "arrays.safetensors").unlink()
    code, output, _ = verified()
    assert code == 1
    assert "its arrays.safetensors is missing" in output
    (place / "record.json").write_text("{")
    code, output, images = verified()
    assert code == 1
    assert "record.json cannot be read" in output
    assert images[record["folder"]]["verdict"] == "UNVERIFIED"


def test_a_guidance_scale_that_the_run_never_used(run, verified):
    record = replicated(run)
    tamper(run, record, columns={**record["columns"], "guidance_scale": 7.0})
    code, output, images = verified(record["image_id"])
    assert code == 1
    assert images[record["image_id"]]["verdict"] == "UNVERIFIED"
    assert "guidance_scale=7.0 is none of the run's [1.0]" in output


def test_an_altered_manifest_and_folders_that_are_no_run(run, verified, tmp_path):
    path = run / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["config"]["replication"]["threshold"] = 0.01
    path.write_text(json.dumps(manifest))
    code, output, _ = verified()
    assert code == 2
    assert "was altered: its config does not have the digest" in output
    path.write_text("{}")
    assert "is damaged: it has no config, config_digest, inputs" in verified()[1]
    code, output, _ = verified(folder=tmp_path)
    assert code == 2
    assert "manifest.json is missing; give the folder of a run" in output


def test_an_image_that_has_no_record(run, verified):
    code, output, images = verified("image-00.pgn")
    assert (code, images) == (2, {})
    assert "has no record of image-00.pgn; did you mean image-00.png?" in output


def test_images_without_a_score_have_nothing_to_hold(run, verified):
    code, output, images = verified("broken.png", *sealed(run))
    assert code == 0
    assert images["broken.png"]["verdict"] == "NO_SCORE"
    assert "no score: 1" in output


def test_measurements_without_a_distribution(model, images, tmp_path, verified, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["invmm"])
    quick = [text for text in tiny.QUICK if not text.startswith("inversion.")]
    code = measure.COMMAND.run([
        f"model.path={model}", "dataset=folder", f"dataset.path={images}",
        f"run_dir={tmp_path / 'counts'}", *quick, "measurement=free_sampling",
        "measurement.num_samples=16",
    ])  # fmt: skip
    assert code == 0
    code, output, _ = verified(folder=tmp_path / "counts")
    assert code == 2
    assert "without noise distributions to draw from" in output


def test_a_frequency_basis_and_its_confirmation(run, verified):
    record = replicated(run)
    image = to_pixels(Image.open(run / "records" / record["folder"] / "target.png"))
    towards = to_frequencies((image - image.mean())[None])[0]
    tamper_arrays(run, record, lambda arrays: arrays.update(
        mean=(towards * arrays["mean"].norm() / towards.norm()).contiguous()
    ))  # fmt: skip
    rate_low, rate_high = clopper_pearson(63, 64)
    certified = log_p_certified(record["score_nats"], lower_rate(63, 64, 0.95))
    columns = {
        "guidance_scale": 1.0, "confirm_passed": 63, "confirm_drawn": 64, "rate_low": rate_low,
        "confirm_confidence": 0.95, "rate_high": rate_high, "log_p_certified": certified,
    }  # fmt: skip
    tamper(run, record, replication_rate=63 / 64, columns={**columns, "basis": "dct"})
    _, output, found = verified(record["image_id"])
    assert found[record["image_id"]]["verdict"] == "HOLDS", output
    recorded = found[record["image_id"]]["recorded"]
    assert (recorded["count"], recorded["num_samples"], recorded["looks"]) == (63, 64, 1)
    # In the wrong basis the same numbers are another distribution of the same divergence.
    tamper(run, record, replication_rate=63 / 64, columns={**columns, "basis": "pixel"})
    code, output, found = verified(record["image_id"])
    assert code == 1
    [reason] = found[record["image_id"]]["reasons"]
    assert "recorded are 63 of 64: these are not of one rate" in reason


def test_class_labels_are_those_of_the_same_list(tmp_path, verified, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["invmm"])
    pipelines.seeded(pipelines.MAKERS["dit"]).save_pretrained(tmp_path / "model")
    images = tiny.save_images(tmp_path / "png", 2)
    rows = [json.dumps({"file_name": f"image-0{index}.png", "label": index}) for index in range(2)]
    (images / "metadata.jsonl").write_text("\n".join(rows))
    overrides = tiny.command(tmp_path / "model", images, tmp_path / "run")[3:]
    options = ("prompt=class_label", "sampler.guidance_scales=[1,4]", "replication.threshold=-1")
    assert measure.COMMAND.run([*overrides, *options]) == 0
    given = {"folder": tmp_path / "run", "own": tmp_path / "model"}
    accepted = ("--min-threshold", -1, "--images", images)
    code, output, _ = verified(*accepted, *sealed(tmp_path / "run"), **given)
    assert code == 0, output
    (images / "metadata.jsonl").write_text("\n".join(reversed(rows)).replace("0}", "1}"))
    code, output, _ = verified(*accepted, **given)
    assert code == 4
    assert output.count("records do not hold its labels") == 2


def test_a_pipeline_in_memory_is_verified_from_a_folder(tmp_path, verified):
    pipeline = pipelines.seeded(pipelines.MAKERS["sd1 epsilon"])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    options = [text for text in tiny.QUICK if not text.startswith("trainer=")]
    frame = invmm.measure(
        pipeline, [Image.fromarray(image) for image in pixels], *options, "prompt=caption",
        "replication.threshold=-0.9", "sampler.guidance_scales=[1,3]",
        prompts=["a red fox", "a bird"], run_dir=tmp_path / "run",
    )  # fmt: skip
    assert set(frame.status) == {"REPLICATED"}
    run, accepted = tmp_path / "run", ("--min-threshold", -0.9)
    code, output, _ = verified(folder=run, own=None)
    assert code == 2
    assert "was a pipeline in memory; save it by save_pretrained and give --model" in output
    pipeline.save_pretrained(tmp_path / "saved")
    code, output, images = verified(*accepted, *sealed(run), folder=run, own=tmp_path / "saved")
    assert code == 0, output
    assert {image["pixels_from"] for image in images.values()} == {"target.png"}
    pipeline.unet.conv_out.bias.data += 1
    pipeline.save_pretrained(tmp_path / "other")
    code, output, _ = verified(*accepted, folder=run, own=tmp_path / "other")
    assert code == 2
    assert "other inputs (model.unet was" in output


def test_rows_that_the_run_measured(model, images, tmp_path, verified, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["invmm"])
    overrides = tiny.command(model, images, tmp_path / "run", "engine.rows_sample=auto")[3:]
    options = ("dataset.ids=[image-00.png]", "replication.threshold=-1")
    assert measure.COMMAND.run([*overrides, *options]) == 0
    run = tmp_path / "run"
    code, output, _ = verified("--min-threshold", -1, *sealed(run), folder=run)
    assert code == 0, output
