"""The table, the summary and the pictures of a run written by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import written
from PIL import Image

from invmm.analysis import pictures
from invmm.analysis import table as table_module
from invmm.analysis.report import report
from invmm.analysis.style import COLOURS, one_line
from invmm.analysis.table import accounting, duplicate_groups, summary, table
from invmm.engine.outcomes import Outcome, Status
from invmm.results.collect import collect, score_table
from invmm.results.ownership import OwnedRunFolder


@pytest.fixture
def frame(run_dir):
    return score_table([run_dir])


def test_the_table_has_one_aligned_line_an_image_most_memorized_first(frame):
    header, rule, *lines = table(frame).splitlines()
    assert [line.split()[-6] for line in lines[:2]] == ["REPLICATED", "REPLICATED"]
    assert lines[0].startswith("a $caption{ (many)")
    first, last = lines[0].split(), lines[-1].split()
    assert first[3:] == ["8", "REPLICATED", "0.020", "1.0", "0.90", "2", "48"]
    assert last == ["z-failed", "1", "FAILED", "0", "0"]
    assert {len(line) for line in (header, rule, *lines)} == {len(header)}


def test_fresh_samples_are_shown_with_their_interval(frame):
    confirmed = {"confirm_passed": 60, "confirm_drawn": 64, "rate_low": 0.818, "rate_high": 0.9891}
    columns = pd.DataFrame(confirmed, index=frame.index[frame.image_id == "many"])
    header, _, first, *others = table(frame.join(columns)).splitlines()
    assert header.endswith("fresh replicas (95 %)")
    assert first.endswith("  60 of 64 (82% to 99%)")
    assert not any("of 64" in line for line in others)


def test_repeats_are_shown_with_their_range(frame):
    own = pd.DataFrame({"image_id": ["many", "single"], "repeats": [3, 3], "num_found": [2, 0],
                        "score_low": [0.01, np.nan], "score_high": [0.0349, np.nan]})  # fmt: skip
    header, _, *lines = table(frame.merge(own, how="left")).splitlines()
    assert header.endswith("  found, score of 3 repeats")
    (many,) = [line for line in lines if "(many)" in line]
    assert many.endswith("  2, 0.010 to 0.035")
    (single,) = [line for line in lines if line.startswith("single ")]
    assert single.endswith("  0")


def test_a_long_table_says_what_it_leaves_out(frame, monkeypatch):
    monkeypatch.setattr(table_module, "MAX_ROWS", 2)
    lines = table(frame).splitlines()
    assert len(lines) == 5
    assert lines[-1] == "... and 4 more in scores.csv"


def test_a_long_list_of_errors_says_what_it_leaves_out(frame, monkeypatch):
    monkeypatch.setattr(table_module, "MAX_ROWS", 2)
    failed = frame.assign(status="FAILED", error=[str(n) + "e" * 400 for n in range(len(frame))])
    failed["score"] = float("nan")
    lines = summary(failed).splitlines()
    errors = [line.partition(": ")[2] for line in lines if line.startswith("FAILED ")]
    assert [error[:2] for error in errors] == ["0e", "1e"]
    assert {len(error) for error in errors} == {300}
    assert lines[-1] == f"... and {len(frame) - 2} more without a result in scores.csv"


def test_the_summary_counts_by_group_with_intervals(frame):
    lines = summary(frame).splitlines()
    assert lines[0].startswith("duplicated: replicated 2 of 2 (95 % interval 16% to 100%)")
    assert lines[1].startswith("single: replicated 0 of 1")
    assert lines[2].startswith("held_out (false alarms): replicated 0 of 2")
    assert lines[3:7] == [
        "AUROC duplicated against held_out, score, ties broken by best similarity: 1.000 "
        "(95 % interval 0.34 to 1.00)",
        "  true positives at <= 1 % false ones: 100% (95 % interval 16% to 100%)",
        "AUROC duplicated against held_out, score alone: 1.000 (95 % interval 0.34 to 1.00)",
        "  true positives at <= 1 % false ones: 100% (95 % interval 16% to 100%)",
    ]
    assert lines[7:] == ["FAILED z-failed: truncated"]


def test_the_two_aurocs_differ_where_similarity_separates(tmp_path):
    with OwnedRunFolder(tmp_path, config={}, digest="d") as folder:
        for name, copies, similarity in (("a", 4, 0.8), ("b", 4, 0.3), ("c", 0, 0.4)):
            result = written.outcome(Status.NOT_REPLICATED, similarity=similarity)
            written.write(folder, written.entry(name, copies), result)
    text = summary(score_table([tmp_path]))
    assert "ties broken by best similarity: 0.500" in text
    assert "score alone: 0.500" in text
    with OwnedRunFolder(tmp_path, config={}, digest="d") as folder:
        result = written.outcome(Status.NOT_REPLICATED, similarity=0.9)
        written.write(folder, written.entry("d", 4), result)
    text = summary(score_table([tmp_path]))
    assert "ties broken by best similarity: 0.667" in text
    assert "score alone: 0.500" in text


def test_names_of_any_origin_are_printable_and_short():
    assert one_line("a\nb\x1b[31m", 20) == "a?b?[31m"
    assert one_line("x" * 50, 10) == "xxxxxxx..."
    assert one_line("x" * 10, 10) == "x" * 10


def test_the_report_writes_everything_and_the_same_bytes_again(run_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = report(run_dir)
    assert "z-failed" in text
    names = ("gallery.png", "scores.png", "scores.csv", "scores.parquet")
    before = [(run_dir / name).read_bytes() for name in names]
    assert report(run_dir) == text
    assert [(run_dir / name).read_bytes() for name in names] == before


def test_the_report_names_damaged_records(run_dir):
    with OwnedRunFolder(run_dir, config=written.CONFIG, digest=written.DIGEST) as folder:
        path = folder.record_folder("few") / "record.json"
    path.write_text("{")
    text = report(run_dir)
    assert f"left out: {path} cannot be read" in text
    assert "few" not in pd.read_csv(run_dir / "scores.csv").image_id.tolist()


def test_the_gallery_shows_captions_as_they_are_and_groups_by_colour(run_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: seen.append(figure))
    pictures.gallery(run_dir, collect(run_dir))
    (figure,) = seen
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert texts[0] == "a $caption{, 8x in training\nreplicated, score 0.020, similarity 0.90"
    assert texts[2] == "held-near, 0x in training\nnot replicated, similarity 0.45"
    assert len(texts) == 5
    assert not any(text.get_parse_math() for axis in figure.axes for text in axis.texts)
    assert figure.get_suptitle() == "image, then its closest samples (1 more in scores.csv)"
    first = figure.axes[0]
    assert first.images[0].get_interpolation() == "nearest"
    assert first.images[0].get_array().max() == 255
    assert figure.axes[1].images[0].get_array().max() == 0


def test_the_gallery_is_limited(run_dir, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_GALLERY_ROWS", 2)
    seen = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: seen.append(figure))
    pictures.gallery(run_dir, collect(run_dir))
    assert seen[0].get_suptitle() == "image, then its closest samples (4 more in scores.csv)"
    assert sum(len(axis.images) for axis in seen[0].axes) == 2 * 3


def test_the_histogram_keeps_the_unreplicated_apart(run_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: seen.append(figure))
    pictures.score_histogram(run_dir, collect(run_dir))
    scores, censored = seen[0].axes
    assert sum(patch.get_height() for patch in scores.patches) == 2
    assert min(patch.get_x() for patch in scores.patches) == pytest.approx(0, abs=1e-9)
    heights = [patch.get_height() for patch in censored.patches]
    assert sum(heights) == 3
    assert censored.get_xticklabels()[0].get_text() == "not found\nwithin the budget"


def test_nothing_measured_is_a_report_too(tmp_path):
    with OwnedRunFolder(tmp_path, config={}, digest="d"):
        pass
    report(tmp_path)
    assert np.array(Image.open(tmp_path / "gallery.png")).size > 0
    assert (tmp_path / "scores.png").stat().st_size > 0


def test_only_failures_are_a_report_too(tmp_path):
    with OwnedRunFolder(tmp_path, config={}, digest="d") as folder:
        failed = Outcome(status=Status.FAILED, error="no image")
        written.write(folder, written.entry("a", None), failed, loaded=None, second_opinion=None)
    assert "FAILED a: no image" in report(tmp_path)


def test_groups_are_told_apart_by_the_colour_blind():
    """Okabe and Ito's palette, and no two groups alike in lightness and hue."""
    assert len(set(COLOURS.values())) == 4
    assert {COLOURS[g] for g in ("duplicated", "single", "held_out")} == {
        "#D55E00", "#0072B2", "#009E73",
    }  # fmt: skip


def test_the_accounting_adds_up():
    frame = pd.DataFrame({
        "evaluations_forward": [1000, 2000], "evaluations_sampler": [500, 0],
        "evaluations_backward": [300, 1],
    })  # fmt: skip
    one = {
        "seconds": 10.0, "by_kind": {"network": 6.0, "sampler": 2.0}, "consumer": 0.5, "slots": 4,
        "idle_slot_seconds": 0.0, "tail_slot_seconds": 8.0, "rows": 90, "padding": 10,
    }  # fmt: skip
    other = {**one, "by_kind": {"network": 8.0, "similarity": 1.0}, "idle_slot_seconds": 1.5}
    assert accounting([], frame) == (
        "network evaluations: 3,000 forward (500 of them in samplers) and 301 backward rows"
    )
    assert accounting([one, other], frame).splitlines()[1:] == [
        "time of 2 processes, 20 s: network 70.0%, sampler 10.0%, similarity 5.0%, "
        "measurement 0.0%, preparation 0.0%, writing 5.0%, rest 10.0%",
        "slots idle: 1.5 slot-seconds while images waited, 20.0% of all in the tail; 10.0% of the "
        "rows computed were padding",
    ]


def test_membership_scores_have_a_table_of_their_own(scored_dir):
    header, rule, *lines = table(score_table([scored_dir])).splitlines()
    assert header.split() == ["image", "copies", "status", "score", "evaluations"]
    assert [line.split() for line in lines] == [
        ["dup", "8", "SCORED", "1.5e-07", "0"], ["twice", "2", "SCORED", "0.0125", "0"],
        ["out", "0", "SCORED", "0.25", "0"], ["once", "1", "SCORED", "0.5", "0"],
        ["far", "0", "SCORED", "12", "0"], ["nan", "1", "DIVERGED", "0"],
    ]  # fmt: skip
    assert {len(line) for line in (header, rule, *lines)} == {len(header)}


def test_membership_scores_are_summarised_by_quartiles_and_ranks(scored_dir):
    assert summary(score_table([scored_dir])).splitlines() == [
        "membership scores: lower is more like a training image",
        "duplicated: median 0.00625 (quartiles 0.00313 to 0.00938) of 2",
        "single: median 0.5 (quartiles 0.5 to 0.5) of 1",
        "held_out: median 6.12 (quartiles 3.19 to 9.06) of 2",
        "AUROC training against held_out: 0.833 (95 % interval 0.24 to 0.99)",
        "  true positives at <= 1 % false ones: 67% (95 % interval 9% to 99%)",
        "AUROC duplicated against held_out: 1.000 (95 % interval 0.34 to 1.00)",
        "  true positives at <= 1 % false ones: 100% (95 % interval 16% to 100%)",
        "DIVERGED nan: the score is nan",
    ]


def test_the_pictures_of_membership_scores(scored_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: seen.append(figure))
    frame = collect(scored_dir)
    pictures.gallery(scored_dir, frame)
    pictures.score_histogram(scored_dir, frame)
    gallery, histogram = seen
    assert gallery.get_suptitle() == "most like a training image first (1 more in scores.csv)"
    assert [len(axis.images) for axis in gallery.axes] == [1] * 5
    texts = [text.get_text() for axis in gallery.axes for text in axis.texts]
    assert texts[0] == "dup, 8x in training\nscore 1.5e-07"
    scores, censored = histogram.axes
    assert scores.get_xlabel() == "membership score (lower: more like a training image)"
    assert sum(patch.get_height() for patch in scores.patches) == 5
    assert not censored.get_visible()


def test_the_report_of_membership_scores_warns_of_nothing(scored_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "AUROC training against held_out" in report(scored_dir)
    stored = pd.read_parquet(scored_dir / "scores.parquet").set_index("image_id")
    assert stored.score["twice"] == 0.0125
    assert stored.loc["twice", ["score_nats", "best_similarity", "replication_rate"]].isna().all()
    assert (stored.num_samples == 0).all()


def test_near_duplicates_are_listed_and_stored(bank_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = report(bank_dir).splitlines()
    at = lines.index("near-duplicates, replicated by the same free samples: 4 images in 2 groups")
    assert lines[at - 2].startswith("free samples that replicate any training image: 10 of 100 (")
    assert lines[at - 1].startswith("free samples that replicate any held_out image: 2 of 100 (")
    assert lines[at + 1 : at + 3] == ["  common, alike", "  alike too, twin"]
    assert not any(line.startswith("...") for line in lines)
    for stored in (pd.read_csv(bank_dir / "scores.csv"), score_table([bank_dir])):
        groups = stored.set_index("image_id").near_duplicate_group.dropna().to_dict()
        assert groups == {
            "common": "common", "alike": "common", "alike too": "alike too", "twin": "alike too",
        }  # fmt: skip


def test_a_long_list_of_near_duplicates_says_what_it_leaves_out(bank_dir, monkeypatch):
    monkeypatch.setattr(table_module, "MAX_ROWS", 1)
    lines = duplicate_groups(score_table([bank_dir])).splitlines()
    assert lines[1:] == ["  common, alike", "... and 1 more in scores.csv"]


def test_images_with_banks_of_their_own_share_no_samples(bank_dir):
    (bank_dir / "free_samples").rmdir()
    text = report(bank_dir)
    assert "free samples" not in text
    assert "\n\n" not in text.partition("duplicated:")[2]
    assert score_table([bank_dir]).near_duplicate_group.isna().all()


def test_the_gallery_of_counts_keeps_near_duplicates_together(bank_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: seen.append(figure))
    pictures.gallery(bank_dir, collect(bank_dir))
    firsts = [axis for axis in seen[0].axes if axis.texts]
    texts = [axis.texts[0].get_text() for axis in firsts]
    assert [text.split(",")[0] for text in texts] == [
        "common", "alike", "alike too", "twin", "rare", "never",
    ]  # fmt: skip
    assert texts[0] == (
        "common, 8x in training\n6 of 100 free samples, similarity 0.75\n"
        "one in 17 (8 to 33) draws\none of 2 near-duplicates"
    )
    assert texts[-1] == (
        "never, 0x in training\n0 of 100 free samples, similarity 0.75\none in more than 40 draws"
    )
    assert [len(axis.patches) for axis in firsts] == [1, 0, 1, 0, 0, 0]
    assert all(
        axis.patches[0].xy1[0] == axis.patches[0].xy2[0] < 0 for axis in firsts if axis.patches
    )


def test_a_large_group_does_not_fill_the_gallery(bank_dir, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_GALLERY_DUPLICATES", 1)
    seen = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: seen.append(figure))
    pictures.gallery(bank_dir, collect(bank_dir))
    texts = [text.get_text() for axis in seen[0].axes for text in axis.texts]
    assert [text.split(",")[0] for text in texts] == ["common", "alike too", "rare", "never"]
    assert texts[0].endswith("one of 2 near-duplicates")
    assert seen[0].get_suptitle() == "image, then its closest samples (3 more in scores.csv)"


def test_the_report_replaces_links_and_never_writes_through_them(run_dir, tmp_path):
    for name in ("gallery.png", "scores.png", "scores.csv", "scores.parquet"):
        elsewhere = tmp_path / f"mine-{name}"
        elsewhere.write_bytes(b"mine")
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(elsewhere)
    report(run_dir)
    for name in ("gallery.png", "scores.png", "scores.csv", "scores.parquet"):
        assert (tmp_path / f"mine-{name}").read_bytes() == b"mine"
        assert not (run_dir / name).is_symlink()
        assert (run_dir / name).stat().st_size > 4


def test_probabilities_that_are_all_out_of_reach_are_none_of_inversion(tmp_path):
    with OwnedRunFolder(tmp_path / "run", config=written.CONFIG, digest=written.DIGEST) as folder:
        for name, copies in (("a", 4), ("b", 0)):
            outcome = written.outcome(Status.CENSORED, similarity=0.4)
            written.write(folder, written.entry(name, copies), outcome)
    text = report(tmp_path / "run")
    assert "duplicated: p estimated for 0 of 1 " in text
    assert "replicated" not in text.partition("held_out (false alarms)")[2].splitlines()[0]
