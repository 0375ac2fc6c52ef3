"""What a verification found out, as a table and as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from invmm.analysis.style import one_line
from invmm.inversion.confirmation import Confirmation
from invmm.verification.verdict import Claim, Verdict

_NAME_WIDTH = 34


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found out about one record.

    Attributes:
        record: the record.
        verdict: of it.
        reasons: for a verdict against it.
        claim: what the record says; None if that was not looked at.
        fresh: the samples that were drawn, None if none could be.
        pixels_from: "data set", or "target.png" of the record.
    """

    record: Mapping[str, Any]
    verdict: Verdict
    reasons: Sequence[str] = ()
    claim: Claim | None = None
    fresh: Confirmation | None = None
    pixels_from: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "image_id": self.record["image_id"],
            "verdict": self.verdict.name,
            "reasons": list(self.reasons),
            "pixels_from": self.pixels_from,
            "recorded": asdict(self.claim) if self.claim else None,
            "fresh": {
                "kl_nats": self.fresh.kl_nats,
                **self.fresh.columns(),
                "similarities": self.fresh.check.similarities.tolist(),
            }
            if self.fresh
            else None,
        }


def table(findings: Sequence[Finding]) -> str:
    """One line for each record with a score, the reasons below, and the counts."""
    header = (
        f"{'image':{_NAME_WIDTH}} {'score':>7} {'recorded':>19} {'fresh (95 %)':>26} "
        f"{'log p >=':>9}  verdict"
    )
    lines = [header, "-" * len(header)]
    for finding in findings:
        if finding.verdict is not Verdict.NO_SCORE:
            lines += [_line(finding), *(f"    {reason}" for reason in finding.reasons)]
    counts = Counter(finding.verdict for finding in findings)
    lines += ["", ", ".join(f"{verdict}: {counts[verdict]}" for verdict in Verdict)]
    if stand_ins := sum(finding.pixels_from == "target.png" for finding in findings):
        lines.append(
            f"images that are not in the data set here: {stand_ins}; target.png holds the pixels "
            "that were measured, but no hash vouches for it"
        )
    return "\n".join(lines)


def _line(finding: Finding) -> str:
    record, claim, fresh = finding.record, finding.claim, finding.fresh
    caption = record.get("caption")
    name = f"{caption} ({record['image_id']})" if caption else record["image_id"]
    score = recorded = drawn = certified = ""
    if claim is not None:
        score, recorded = f"{claim.score:.3f}", claim.counted
    if fresh is not None:
        low, high = fresh.interval
        drawn = f"{fresh.count} of {fresh.num_samples} ({low:.0%} to {high:.0%})"
        certified = f"{fresh.log_p_certified:.1f}"
    return (
        f"{one_line(name, _NAME_WIDTH):{_NAME_WIDTH}} {score:>7} {recorded:>19} {drawn:>26} "
        f"{certified:>9}  {finding.verdict}"
    )
