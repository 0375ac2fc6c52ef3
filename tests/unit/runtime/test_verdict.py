"""When a record holds, on cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from invmm.engine.check import Check
from invmm.inversion.confirmation import Confirmation
from invmm.runtime.findings import Finding, table
from invmm.runtime.verdict import Claim, Verdict

DIMENSIONS = 48


def drawn(count: int, num_samples: int = 64, kl_nats: float = 24.0) -> Confirmation:
    similarities = torch.linspace(1, 0, num_samples)
    check = Check(similarities, torch.zeros(num_samples, 3, 4, 4), count, False, 1.0)
    return Confirmation(check=check, kl_nats=kl_nats)


def record(**changes) -> dict:
    """A distribution of 0.5 nats per dimension that passed a check of 8."""
    given = {"image_id": "it", "score": 0.5, "score_nats": 24.0, "replication_rate": 1.0,
             "columns": {"guidance_scale": 1.0}}  # fmt: skip
    return {**given, **changes}


def confirmed(count: int, num_samples: int = 64, **columns) -> dict:
    given = {"confirm_passed": count, "confirm_drawn": num_samples, **columns}
    return record(columns=given, replication_rate=count / num_samples)


def faults(given: dict, fresh: Confirmation, *, looks: int = 1) -> list[str]:
    return Claim.of(given, num_samples=8, looks=looks).faults(fresh, DIMENSIONS)


def test_a_record_that_is_reproduced_holds():
    assert faults(record(), drawn(64)) == []
    assert faults(record(score=0.0, score_nats=0.0), drawn(64, kl_nats=0.0)) == []


@pytest.mark.parametrize(("looks", "least"), [(1, 0.025 ** (1 / 8)), (20, (0.025 / 20) ** (1 / 8))])
def test_8_of_8_at_the_best_of_many_checks_takes_a_lower_rate(looks, least):
    """The chance of 8 of 8 in that many checks is 2.5 % where each sample succeeds with `least`."""
    claim = Claim.of(record(), num_samples=8, looks=looks)
    assert claim.interval == (pytest.approx(least), 1.0)
    upper = {count: drawn(count).interval[1] for count in range(65)}
    for count in range(65):
        assert bool(faults(record(), drawn(count), looks=looks)) == (upper[count] < least)
    assert faults(record(), drawn(45), looks=looks) == []  # a rate of 0.7, as is to be expected
    [fault] = faults(record(), drawn(5), looks=looks)
    assert fault.startswith("8 of 8")
    assert "5 of 64" in fault


def test_a_count_of_fresh_samples_binds_more_closely():
    assert faults(confirmed(60), drawn(58)) == []
    assert faults(confirmed(60), drawn(52)) == []
    assert len(faults(confirmed(60), drawn(42))) == 1
    assert faults(confirmed(60, confirm_confidence=1 - 0.05 / 3), drawn(47)) == []
    assert faults(confirmed(40), drawn(64)) == []  # more than was claimed is no fault


def test_a_true_record_is_hardly_ever_refuted():
    """Rate 0.75, a search that checks 30 times until 8 of 8 pass, 64 fresh samples."""
    generator = torch.Generator().manual_seed(0)
    refuted = passed = 0
    for _ in range(2000):
        checks = torch.rand(30, 8, generator=generator) < 0.75
        successes = checks.all(1).nonzero()
        if not len(successes):
            continue
        fresh = int((torch.rand(64, generator=generator) < 0.75).sum())
        passed += 1
        refuted += bool(faults(record(), drawn(fresh), looks=int(successes[0]) + 1))
    assert passed > 1500
    assert refuted <= 0.01 * passed


@pytest.mark.parametrize(("changes", "words"), [
    ({"score": 0.5001}, ["score is 0.5001, the KL of the saved distribution 0.5"]),
    ({"score": 0.49999}, ["score is 0.49999"]),
    ({"score_nats": 24.001}, ["score_nats is 24.001"]),
    ({"replication_rate": 0.95}, ["replication_rate is 0.95, its count 8 of 8"]),
    ({"score": math.nan}, ["score is nan"]),
    ({"score": 0.5 + 4e-7}, []),
])  # fmt: skip
def test_numbers_that_contradict_each_other(changes, words):
    found = faults(record(**changes), drawn(60))
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


def test_a_certificate_beyond_its_count():
    honest = drawn(60).log_p_certified
    for shift, expected in ((-1.0, 0), (0.0, 0), (1e-3, 1)):
        found = faults(confirmed(60, log_p_certified=honest + shift), drawn(60))
        assert len(found) == expected
    assert found[0].startswith("log_p_certified is")
    # Of three looks the count proves less, by their own confidence.
    columns = {"confirm_confidence": 1 - 0.05 / 3, "log_p_certified": honest}
    assert len(faults(confirmed(60, **columns), drawn(60))) == 1


@pytest.mark.parametrize("broken", [
    record(score=None), record(replication_rate=None), confirmed(60, confirm_passed=None),
    record(columns={"confirm_drawn": 64}),
])  # fmt: skip
def test_a_record_that_says_nothing(broken):
    with pytest.raises(ValueError, match="incomplete"):
        Claim.of(broken, num_samples=8, looks=1)


def test_counts_that_are_impossible():
    with pytest.raises(ValueError, match=r"successes=65 must lie in \[0, trials=64\]"):
        faults(confirmed(65), drawn(60))


def test_the_table_says_why():
    claim = Claim.of(record(), num_samples=8, looks=3)
    findings = [
        Finding(record={**record(), "caption": "a fox"}, verdict=Verdict.FAILS, claim=claim,
                reasons=["the reason"], fresh=drawn(3), pixels_from="target.png"),
        Finding(record={"image_id": "lost"}, verdict=Verdict.UNVERIFIED, reasons=["no file"]),
        Finding(record={"image_id": "quiet"}, verdict=Verdict.NO_SCORE),
    ]  # fmt: skip
    lines = table(findings).splitlines()
    assert " ".join(lines[2].split()) == (
        "a fox (it) 0.500 8 of 8, 3 checks 3 of 64 (1% to 13%) "
        f"{drawn(3).log_p_certified:.1f} does not hold"
    )
    assert lines[3] == "    the reason"
    assert lines[4].split(maxsplit=1) == ["lost", "cannot be verified"]
    assert lines[5] == "    no file"
    assert "holds: 0, does not hold: 1, cannot be verified: 1, no score: 1" in lines
    assert "images that are not in the data set here: 1" in lines[-1]
    shown = findings[0].as_dict()
    assert shown["recorded"]["looks"] == 3
    assert shown["fresh"]["confirm_passed"] == 3
