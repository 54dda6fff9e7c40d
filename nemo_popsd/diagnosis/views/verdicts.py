"""A sentence about each scored target, and one about the best target.

| kind | rule |
|---|---|
| nothing | the target is the student: KL(P ‖ π_θ) is 0 |
| harms | the interval of the gain is below 0 |
| thinks less | the markers fall by more than `KEPT`, with the interval of the change below 0 |
| helps | the intervals of the gain, and of teacher minus reference-only teacher at uncertain tokens, are above 0 |
| undecided | otherwise |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_popsd.diagnosis.views.record import Score

KEPT = 0.10
"""Maximum relative decrease of markers at which the student is said to think as before."""
NOTHING = 1e-7
"""KL per token, in nats, below which a target counts as equal to the student; allows for fp32 rounding."""
KINDS = ("helps", "undecided", "thinks less", "harms", "nothing")
"""From best to worst."""

Scores = Mapping[str, Score | None]


@dataclass(frozen=True)
class Verdict:
    """The expected effect of one target."""

    name: str
    kind: str
    """One of `KINDS`."""
    sentence: str
    gain: float
    """Value of the gain; 0 if undefined."""


def verdict(name: str, scores: Scores) -> Verdict:
    """The verdict about one target."""
    distance, gain, beats = scores["distance"], scores["gain"], scores["uncertain_teacher_over_reference"]
    markers = scores["markers_share"]
    if distance is None or distance["value"] < NOTHING:
        return Verdict(name, "nothing", f"{name}: no effect, since its target is the student itself.", 0.0)
    if gain is not None and gain["high"] < 0:
        kind, what = "harms", "expected to harm"
    elif markers is not None and markers["value"] < -KEPT and markers["high"] < 0:
        kind, what = "thinks less", "expected to make the student think less"
    elif gain is not None and gain["low"] > 0 and beats is not None and beats["low"] > 0:
        kind, what = "helps", "expected to help"
    else:
        kind, what = "undecided", "undecided at this number of problems"
    reasons = []
    if gain is not None:
        reasons.append(f"to first order the accuracy changes by {shown(gain)} points per nat")
    if beats is not None:
        relation = "beats" if beats["low"] > 0 else "loses against" if beats["high"] < 0 else "does not beat"
        reasons.append(
            f"the teacher {relation} the reference-only teacher where the student is uncertain ({shown(beats, 3)})"
        )
    if markers is not None:
        reasons.append(f"markers change by {shown(markers, 0, 100)} %")
    return Verdict(name, kind, f"{name}: {what}: {'; '.join(reasons)}.", gain["value"] if gain else 0.0)


def ranking(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts from best to worst, by kind, then by gain."""
    return sorted(verdicts, key=lambda one: (KINDS.index(one.kind), -one.gain))


def best(ordered: Sequence[Verdict], lead: Score | None) -> str:
    """The sentence about the best target.

    Args:
        ordered: verdicts from `ranking`.
        lead: paired difference between the gains of the first two; None if unknown.
    """
    first = ordered[0]
    if first.kind == "helps":
        text = f"Best: {first.name}"
    elif first.kind == "undecided":
        text = f"None is expected to help at this number of problems; the best is {first.name}"
    else:
        return f"None is expected to help; the best is {first.name}, which {_EXPECTED[first.kind]}."
    if lead is None or len(ordered) < 2:
        return f"{text}."
    sure = "" if lead["low"] > 0 or ordered[1].kind != first.kind else ", which is not significant"
    return f"{text}; its gain is {shown(lead)} points above that of {ordered[1].name}{sure}."


_EXPECTED = {
    "thinks less": "is expected to make the student think less",
    "harms": "is expected to harm",
    "nothing": "has no effect",
}


def shown(score: Score, decimals: int = 1, scale: float = 1.0) -> str:
    """A score with its interval, as text."""
    value, low, high = (f"{scale * number:+.{decimals}f}" for number in (score["value"], score["low"], score["high"]))
    return f"{value} [{low}, {high}]"
