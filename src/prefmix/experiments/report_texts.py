"""Words of a report's page: findings, answers and disputes as HTML; whatever a text holds is shown as text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from prefmix.evaluation.figures.canvas import expert_colour, expert_name
from prefmix.evaluation.figures.charts import clipped
from prefmix.experiments.diagnosis import Diagnosis
from prefmix.experiments.run_data import Dispute, Example


def findings_html(diagnosis: Diagnosis) -> str:
    """Warnings first, then notes, then what is fine; remedies where there is something to mend."""
    ordered = sorted(diagnosis.findings, key=lambda finding: ("warning", "note", "fine").index(finding.level))
    parts = []
    for finding in ordered:
        what = finding.what[:1].upper() + finding.what[1:]
        remedy = finding.remedy if finding.level != "fine" else ""
        mend = f'<p class="remedy">{escape(remedy[:1].upper() + remedy[1:])}.</p>' if remedy else ""
        parts.append(
            f'<div class="finding"><span class="level {finding.level}">{finding.level}</span>'
            f"<div><b>{escape(finding.check.capitalize())}</b><p>{escape(what)}.</p>{mend}</div></div>"
        )
    return "".join(parts)


def examples_html(examples: Sequence[Example]) -> str:
    """Each prompt a fold, the first one open: every answer with how the experts and the people like it."""
    if not examples:
        return ""
    parts = ["<h3>Answers</h3><p>Drawn from the policy as it is, at temperature 1. Meters: how often an expert prefers "
             "the answer to another of these; the mark is one half.</p>"]  # fmt: skip
    for place, example in enumerate(examples):
        answers = "".join(_answer(example, c) for c in range(len(example.answers)))
        opened = " open" if place == 0 else ""
        parts.append(
            f'<details class="example"{opened}><summary>{escape(clipped(example.title, 110))}</summary>'
            f'<p class="quote prompt">{escape(example.prompt)}</p><div class="answers">{answers}</div></details>'
        )
    return "".join(parts)


def disputes_html(disputes: Sequence[Dispute]) -> str:
    """Comparisons of which experts say the most different things."""
    if not disputes:
        return ""
    parts = ["<br><h3>Disputes</h3><p>Held-out comparisons that experts disagree about most. Meters: the probability "
             "that the preferred response is the better one.</p>"]  # fmt: skip
    for place, dispute in enumerate(disputes):
        who = f"preferred by {dispute.user}" if dispute.user else "preferred"
        likely = max(range(len(dispute.weights)), key=lambda k: dispute.weights[k])
        with_expert = f", who is with {expert_name(likely)} at {dispute.weights[likely]:.0%}" if dispute.user else ""
        meters = "".join(_meter(k, value) for k, value in enumerate(dispute.probability))
        opened = " open" if place == 0 else ""
        parts.append(
            f'<details class="example"{opened}><summary>{escape(clipped(dispute.title, 110))}</summary>'
            f'<p class="quote prompt">{escape(dispute.prompt)}</p><div class="answers">'
            f'<div class="answer"><h4>{escape(who + with_expert)}</h4>'
            f'<p class="quote">{escape(dispute.chosen)}</p></div><div class="answer"><h4>rejected</h4>'
            f'<p class="quote">{escape(dispute.rejected)}</p></div></div><div class="meters">{meters}</div></details>'
        )
    return "".join(parts)


def _answer(example: Example, place: int) -> str:
    colour = expert_colour(place) if place < len(example.score) else "var(--soft)"
    meters = "".join(_meter(k, row[place]) for k, row in enumerate(example.score))
    first = f", first for {example.people[place]:.0%} of the users" if example.people else ""
    text = escape(example.answers[place]) or "<em>(empty: it ended at once)</em>"
    return (
        f'<div class="answer" style="--c:{colour}"><h4>{escape(example.writers[place])}{first}</h4>'
        f'<p class="quote">{text}</p><div class="meters">{meters}</div></div>'
    )


def _meter(expert: int, value: float) -> str:
    return (
        f'<div class="meter" style="--c:{expert_colour(expert)};--v:{100 * value:.0f}%">'
        f"<span>{expert_name(expert)}</span><i><b></b></i><span>{value:.0%}</span></div>"
    )
