"""When a record holds, on cases worked by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from invmm.engine.check import Check
from invmm.engine.criterion import Passing
from invmm.inversion.confirmation import Confirmation
from invmm.probability.certificate import clopper_pearson, log_p_certified, lower_rate
from invmm.verification.findings import Finding, table
from invmm.verification.verdict import (
    Claim,
    Rules,
    Verdict,
    chance_at_least,
    chance_at_most,
    combined,
    unfound,
)

DIMENSIONS = 48


def drawn(count: int, num_samples: int = 64, kl_nats: float = 24.0) -> Confirmation:
    similarities = torch.linspace(1, 0, num_samples)
    check = Check(similarities, torch.zeros(num_samples, 3, 4, 4), count, False, 1.0)
    return Confirmation(check=check, kl_nats=kl_nats)


def published(looks: int = 1, is_recorded: bool = True) -> Passing:
    """All of 8 samples at one of so many checks."""
    return Passing(count=8, num_samples=8, looks=looks, confidence=0.95, is_recorded=is_recorded)


CONFIRMED = Passing(count=58, num_samples=64, looks=4, confidence=1 - 0.05 / 4, is_recorded=True)
"""Nine tenths of 64 fresh samples at one of four looks."""
ALPHA = Rules(threshold=0.5).alpha(1)


def record(**changes) -> dict:
    """A distribution of 0.5 nats per dimension that passed a check of 8."""
    given = {"image_id": "it", "score": 0.5, "score_nats": 24.0, "replication_rate": 1.0,
             "columns": {"guidance_scale": 1.0}}  # fmt: skip
    return {**given, **changes}


def confirmed(count: int, confidence: float = 0.95, **columns) -> dict:
    low, high = clopper_pearson(count, 64, confidence)
    certified = log_p_certified(24.0, lower_rate(count, 64, confidence)) if count else None
    given = {"confirm_passed": count, "confirm_drawn": 64, "confirm_confidence": confidence,
             "rate_low": low, "rate_high": high, "log_p_certified": certified}  # fmt: skip
    return record(columns={**given, **columns}, replication_rate=count / 64)


def faults(given: dict, fresh: Confirmation, passing: Passing | None = None) -> list[str]:
    passing = passing or published()
    num_confirm = given["columns"].get("confirm_drawn", 0)
    return Claim.of(given, passing, num_confirm).faults(fresh, DIMENSIONS, passing, ALPHA)


def test_a_record_that_is_reproduced_holds():
    assert faults(record(), drawn(64)) == []
    assert faults(record(score=0.0, score_nats=0.0), drawn(64, kl_nats=0.0)) == []
    after = published(is_recorded=False)
    assert faults(confirmed(60), drawn(58), after) == []
    assert faults(confirmed(60), drawn(52), after) == []


@pytest.mark.parametrize("looks", [1, 20])
def test_no_rate_explains_what_is_refuted(looks):
    """The largest chance over a grid of rates, by hand."""
    rates = [index / 5000 for index in range(5001)]
    for count in (0, 20, 40, 64):
        chances = [
            sum(math.comb(64, k) * r**k * (1 - r) ** (64 - k) for k in range(count + 1))
            * (1 - (1 - r**8) ** looks)
            for r in rates
        ]
        found = chance_at_most(count, 64, published(looks))
        assert found == pytest.approx(max(chances), rel=1e-3)
        assert bool(faults(record(), drawn(count), published(looks))) == (found <= ALPHA)
    [fault] = faults(record(), drawn(5), published(looks))
    assert fault == (
        "5 of 64 fresh samples replicate; a search that asks for 8 of 8 at one of "
        f"{looks} looks would not have passed"
    )


def test_a_count_of_fresh_samples_binds_more_closely():
    after = published(looks=24, is_recorded=False)
    assert len(faults(confirmed(60), drawn(38), after)) == 1
    assert len(faults(confirmed(30), drawn(60), after)) == 1  # less was claimed than is true
    assert faults(record(), drawn(38), published(looks=24)) == []
    [fault] = faults(confirmed(64), drawn(50), after)
    assert fault == (
        "50 of 64 fresh samples replicate, recorded are 64 of 64: these are not of one rate"
    )


def runs_refuted(rate: float, passing: Passing, num_records: int, runs: int, seed: int) -> float:
    """The share of honest runs in which a record is refuted: each search draws until it passes."""
    rules, random = Rules(threshold=0.5), np.random.default_rng(seed)
    alpha, count = rules.alpha(num_records), rules.fresh_samples(num_records)
    shape = (runs, num_records)
    best = random.binomial(passing.num_samples, rate, (passing.looks, *shape)).max(0)
    fresh = random.binomial(count, rate, shape)
    is_refuted = np.zeros(shape, bool)
    passed = best >= passing.count
    for found, again in {*zip(best[passed], fresh[passed], strict=True)}:
        recorded = replace(passing, count=int(found))
        refuted = chance_at_most(int(again), count, passing) <= alpha or any(
            combined(chance(int(again), count, recorded)) <= alpha
            for chance in (chance_at_most, chance_at_least)
        )
        is_refuted |= refuted & (best == found) & (fresh == again)
    return is_refuted.any(1).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_honest_runs_are_hardly_ever_refuted(seed):
    """100 images at the rate where luck passes most often among those that fresh samples refute."""
    for passing in (published(24), CONFIRMED):
        rates = np.linspace(0.05, 0.95, 19)
        count, alpha = 64, Rules(threshold=0.5).alpha(100)
        refuting = max(k for k in range(65) if chance_at_most(k, count, passing) <= alpha)
        at_any = 1 - binom.cdf(passing.count - 1, passing.num_samples, rates) ** passing.looks
        worst = rates[np.argmax(binom.cdf(refuting, count, rates) * at_any)]
        for rate in (worst, 0.5, 0.75, 0.9, 0.99):
            assert runs_refuted(rate, passing, 100, 400, seed) <= 0.05, (passing, rate)


@pytest.mark.parametrize("num_records", [1, 28, 100, 1000])
def test_one_half_is_not_nine_tenths(num_records):
    """A true rate of 0.5, claimed as "58 of 64", is refuted in 95 % of the records."""
    rules = Rules(threshold=0.5)
    count = rules.fresh_samples(num_records)
    fresh = np.random.default_rng(0).binomial(count, 0.5, 4000)
    chances = {k: chance_at_most(int(k), count, CONFIRMED) for k in np.unique(fresh)}
    refuted = np.mean([chances[k] <= rules.alpha(num_records) for k in fresh])
    assert refuted >= 0.95
    assert count <= 64 or rules.fresh_samples(1) == 64


def test_what_the_rules_do_not_accept():
    rules = Rules(threshold=0.5)
    rules.refuse(CONFIRMED, 0.5)
    rules.refuse(published(1000), 0.6)
    for passing, threshold, words in (
        (CONFIRMED, -1.0, "a threshold of -1, this verification asks for at least 0.5; --min-thr"),
        (CONFIRMED, math.nan, "a threshold of nan"),
        (replace(CONFIRMED, count=32), 0.5, "a rate of 0.5, this verification asks for at least 0"),
        (replace(published(), count=1, num_samples=1), 0.5, "samples of a check: 1, this"),
        (published(50_000), 0.5, "at most 1000; --max-checks 50000 accepts it"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            rules.refuse(passing, threshold)


@pytest.mark.parametrize(("changes", "words"), [
    ({"score": 0.5001}, ["score is 0.5001, the KL of the saved distribution 0.5"]),
    ({"score": 0.49999}, ["score is 0.49999"]),
    ({"score_nats": 24.001}, ["score_nats is 24.001"]),
    ({"replication_rate": 0.95}, ["replication_rate is 0.95, its count 8 of 8"]),
    ({"score": 0.5 + 4e-7}, []),
])  # fmt: skip
def test_numbers_that_contradict_each_other(changes, words):
    found = faults(record(**changes), drawn(60))
    assert len(found) == len(words)
    assert all(word in fault for word, fault in zip(words, found, strict=True))


def test_a_certificate_is_what_its_count_proves():
    honest, after = drawn(60).log_p_certified, published(is_recorded=False)
    assert faults(confirmed(60), drawn(60), after) == []
    for claimed in (honest - 1, honest + 1e-3, None):
        [fault] = faults(confirmed(60, log_p_certified=claimed), drawn(60), after)
        assert fault.startswith("log_p_certified is")
    # Of four looks the count proves less, by their own confidence.
    given = confirmed(60, CONFIRMED.confidence, log_p_certified=honest)
    assert len(faults(given, drawn(60), CONFIRMED)) == 1
    [fault] = faults(confirmed(60, rate_low=0.9), drawn(60), after)
    assert fault.startswith("its interval is (0.9")


@pytest.mark.parametrize(("broken", "words"), [
    (record(score=None), "incomplete"), (record(score=math.nan), "incomplete"),
    (confirmed(60, log_p_certified=math.nan), "its log_p_certified is nan"),
    (record(replication_rate=None), "incomplete"),
    (confirmed(60, confirm_passed=None), "incomplete"), (confirmed(60, rate_low=[]), "incomplete"),
    (confirmed(60, confirm_passed=math.inf), "incomplete"),
    (record(columns={}), "incomplete: 'confirm_passed'"),
    (confirmed(16, confirm_drawn=16), "its fresh samples are 16 at a confidence of 0.95, those of"),
    (confirmed(60, confirm_confidence=0.9999), "at a confidence of 0.9999"),
    (confirmed(60, confirm_passed=65), "its count is 65 of 64"),
    (confirmed(60, confirm_passed=-1), "its count is -1 of 64"),
])  # fmt: skip
def test_a_record_that_says_nothing(broken, words):
    with pytest.raises(ValueError, match=words):
        Claim.of(broken, published(is_recorded=False), 64)


def test_what_is_recorded_as_not_found_and_is():
    assert unfound(drawn(57), CONFIRMED) == (Verdict.NO_SCORE, [])
    verdict, [reason] = unfound(drawn(58), CONFIRMED)
    assert verdict is Verdict.UNVERIFIED
    assert "58 of 64 fresh samples of its distribution replicate" in reason
    assert unfound(drawn(63), published())[0] is Verdict.NO_SCORE


def test_the_table_says_why():
    claim = Claim.of(record(), published(3), 0)
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
