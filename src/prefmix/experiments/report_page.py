"""The page of a run: one HTML file that loads nothing, readable on a phone, light and dark.

What it says comes from `RunData`; every picture is a function of `prefmix.evaluation.figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources

from prefmix import __version__
from prefmix.data.counted import counted
from prefmix.evaluation import figures
from prefmix.evaluation.figures.canvas import Figure, expert_colour, expert_name, html_table
from prefmix.evaluation.figures.quality import headline_rows, new_users_called
from prefmix.evaluation.intervals import Estimate
from prefmix.evaluation.report import new_users_note
from prefmix.experiments.report_texts import disputes_html, examples_html, findings_html
from prefmix.experiments.run_data import RunData
from prefmix.experiments.verdicts import interval_words, length_rule

# Nothing is fetched, whatever a text in it says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def report_html(data: RunData) -> str:
    """The page as one string."""
    parts = {
        "quality": ("How good", _quality(data)),
        "people": ("People", _people(data)),
        "experts": ("Experts", _experts(data)),
        "gate": ("Gate", _gate(data)),
        "texts": ("Texts", _texts(data)),
        "training": ("Training", _training(data)),
        "diagnosis": ("Diagnosis", _diagnosis(data)),
        "run": ("The run", _run(data)),
    }
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in parts.items())
    sections = "".join(
        f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, (title, body) in parts.items()
    )
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(data.name)} · prefmix report</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{_style()}</style></head><body>"
        f'<div class="bar"><div><nav aria-label="sections">{links}</nav>'
        '<button type="button" class="theme" aria-label="switch between light and dark">Dark</button></div></div>'
        f"<main>{_head(data)}{sections}"
        f"<footer>Written by prefmix {__version__} on {now}. The page loads nothing from anywhere.</footer></main>"
        f'<div id="tip" role="status"></div><script>{_file("report.js")}</script></body></html>\n'
    )


def _style() -> str:
    return _file("report.css").replace("DARK", _file("report_dark.css"))


def _file(name: str) -> str:
    return resources.files("prefmix.experiments").joinpath("files", name).read_text(encoding="utf-8")


def _head(data: RunData) -> str:
    """Name, verdict, and the few numbers that matter most."""
    read = data.facts.get("trained on", "")
    chips = ""
    if data.num_experts > 1:
        pressed = "".join(
            f'<button type="button" data-expert="{k}" aria-pressed="false" style="--c:{expert_colour(k)}">'
            f"{expert_name(k)}</button>"
            for k in range(data.num_experts)
        )
        chips = f'<div class="chips"><span>Highlight in every figure</span>{pressed}</div>'
    experts = f"{counted(data.num_experts, 'expert')} on {data.facts.get('base model', '')}"
    eyebrow = escape(", ".join(part for part in (experts, read) if part))
    return f'<p class="eyebrow">{eyebrow}</p><h1>{escape(data.name)}</h1>{_verdict(data)}{_tiles(data)}{chips}'


def _verdict(data: RunData) -> str:
    """One or two sentences that a reader may repeat."""
    report = data.evaluation
    if report is None:
        reason = escape(data.absent.get("quality", ""))
        return f'<p class="verdict">How good it is stands here once held-out rows are given: {reason}.</p>'
    best = report.best.accuracy
    way = "knowing each person's training comparisons" if report.personalised is not None else "by the gate alone"
    rows = report.num_known_rows if report.personalised is not None else report.num_comparisons
    words = [
        f"Of {counted(rows, 'held-out comparison')} it ranks {best.mean:.1%} as the person did, {way} "
        f"(95% interval over people: {best.low:.1%} to {best.high:.1%})."
    ]
    compared = []
    for name, (gain, loss) in data.gains.items():
        kind = "better" if gain.mean >= 0 else "worse"
        said = f"{100 * abs(gain.mean):.1f} points {kind} than" if _clear(gain) else "not clearly different from"
        losses = "" if _clear(loss) else ", not clear"
        compared.append(
            f"{said} {name} ({interval_words(gain, '+.1f', 100)}), log-loss {loss.mean:+.3f} "
            f"({interval_words(loss, '+.3f')}{losses})"
        )
    if compared:
        words.append(f"Paired over people, on all rows, that is {'; '.join(compared)}.")
    words += [f"{_capital(finding.what)}." for finding in data.verdicts]
    words += [f"{_capital(finding.remedy)}." for finding in data.verdicts[:1] if finding.level == "warning"]
    return f'<p class="verdict">{escape(" ".join(words))}</p>'


def _clear(difference: Estimate) -> bool:
    return difference.low > 0 or difference.high < 0


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _tiles(data: RunData) -> str:
    report = data.evaluation
    if report is None:
        return ""
    entries = [(name, other.best, "") for name, other in data.against.items()]
    entries.append(("gate alone", report.population, "" if report.personalised is not None else "best"))
    if report.personalised is not None:
        entries.append(("personalised", report.personalised, "best"))
    tiles = "".join(
        f'<div class="{kind}"><b>{f.accuracy.mean:.1%}</b><span>{escape(name)}<br>'
        f"log-loss {f.log_loss.mean:.3f}</span></div>"
        for name, f, kind in entries
    )
    rule = length_rule(report)
    length = f"<div><b>{rule.accuracy:.1%}</b><span>always the {rule.name} response</span></div>"
    return f'<div class="tiles">{length}{tiles}</div>'


def _quality(data: RunData) -> str:
    report = data.evaluation
    if report is None:
        return _absent(data, "quality")
    source = f" from {data.source}" if data.source else ""
    people = counted(report.num_users, "person", "people")
    sizes = f"{report.num_comparisons:,} by {people} over {counted(report.num_texts, 'text')}"
    intro = f"Held-out comparisons{source}: {sizes}."
    table = html_table(*headline_rows(report, data.against), kind="sortable")
    logits = {"gate alone": report.predictions["population"].logit}
    if report.personalised is not None:
        logits["personalised"] = report.predictions["personalised"].logit
    drawn: list[Figure | None] = [figures.accuracy_by_way(report, data.against), figures.reliability_diagram(logits)]
    if len(report.new_users) > 1:
        drawn.append(figures.new_people(report.new_users, report.new_users_met))
    notes = [reason for part, reason in data.absent.items() if part.startswith("against ")]
    under = ""
    if report.new_users:
        under = f"<p>{escape(_capital(new_users_note(report.new_users, new_users_called(report))))}.</p>"
    return f"<p>{escape(intro)}</p>{table}{under}{_grid(drawn)}" + "".join(
        f'<p class="absent">{escape(note)}.</p>' for note in notes
    )


def _people(data: RunData) -> str:
    if data.people is None:
        return _absent(data, "people")
    weights, names, groups, trained = data.people
    drawn = [figures.people_map(weights, names, groups), figures.people_plane(weights, names, groups)]
    intro = "What the training comparisons of each user say about which expert speaks for them."
    if trained is not None and trained != len(weights):
        known = "is known" if len(weights) == 1 else "are known"
        intro += f" Trained on {counted(trained, 'user')}; {len(weights):,} {known} (prefmix adapt adds users)."
    return f"<p>{intro}</p>{_grid([*drawn, figures.groups_matrix(weights, groups)])}"


def _experts(data: RunData) -> str:
    if data.experts is None:
        return _absent(data, "experts")
    drawn = [
        figures.expert_rewards(data.experts),
        figures.expert_displacement(data.experts),
        figures.expert_length(data.experts),
    ]
    missing = ""
    if data.divergence:
        drawn.append(figures.expert_divergence(data.divergence))
    else:
        reason = escape(data.absent.get("answers", "none was measured"))
        missing = f'<p class="absent">No distance from the reference: {reason}.</p>'
    intro = "What each expert wants, and how far it went from the reference for it, on held-out rows."
    return f"<p>{intro}</p>{_grid(drawn)}{missing}"


def _gate(data: RunData) -> str:
    if not data.gate:
        return _absent(data, "gate")
    drawn = [figures.weights_by(view.title, view.rows, view.caption) for view in data.gate]
    return f"<p>Which expert speaks where, averaged over held-out rows.</p>{_grid(drawn)}"


def _texts(data: RunData) -> str:
    if not data.disputes and not data.examples:
        return _absent(data, "examples" if "examples" in data.absent else "answers")
    intro = "<p>What the experts write, and what they make of what people compared.</p>"
    answers = examples_html(data.examples)
    if not data.examples:
        answers = f'<p class="absent">{escape(data.absent.get("answers", "No answers were generated"))}.</p>'
    return f"{intro}{answers}{disputes_html(data.disputes)}"


def _training(data: RunData) -> str:
    drawn = [
        figures.bound_over_training(data.log),
        figures.held_out_over_training(data.log),
        figures.group_losses_over_training(data.log),
        figures.usage_over_training(data.log),
        figures.certainty_over_training(data.log),
        figures.margins_over_training(data.log),
    ]
    if not any(drawn):
        return _absent(data, "training")
    return f"<p>From the run's own log, one point for each line of it.</p>{_grid(drawn)}"


def _diagnosis(data: RunData) -> str:
    if data.diagnosis is None:
        return _absent(data, "diagnosis")
    return f"<p>What usually goes wrong, looked for on the held-out rows.</p>{findings_html(data.diagnosis)}"


def _run(data: RunData) -> str:
    cost = _facts(data.cost) if data.cost else ""
    head = "<h3>Cost</h3>" if cost else ""
    return f"<p>What was trained on what, and what it took.</p>{_facts(data.facts)}<br>{head}{cost}"


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>'


def _grid(drawn: Sequence[Figure | None]) -> str:
    return f'<div class="figures">{"".join(figure.html() for figure in drawn if figure is not None)}</div>'


def _absent(data: RunData, part: str) -> str:
    reason = data.absent.get(part, "there is nothing to show")
    return f'<p class="absent">Left out: {escape(reason)}.</p>'
