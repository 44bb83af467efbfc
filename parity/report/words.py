"""A localization in words: one sentence, and a summary in Markdown."""

import html
import math
import re
from collections.abc import Sequence

from parity.comparison import verdict
from parity.comparison.trajectory import first_departure
from parity.localize.findings import EXACT, LOCAL, Explanation, Finding, Localization, TapError
from parity.model import definition
from parity.oracle.oracle import UPSTREAM

VERDICTS = {
    verdict.AGREE: "✓ AGREES",
    verdict.DIVERGE: "✗ DIVERGES",
    verdict.INCONCLUSIVE: "? INCONCLUSIVE",
    verdict.UNUSABLE: "! UNUSABLE",
}
# Findings after the first that the sentence names, and hypotheses that failed.
FURTHER, FAILED = 12, 3


def sentence(localization: Localization) -> str:
    """Return the verdict and the first finding in one sentence."""
    return f"{VERDICTS[localization.verdict]}: {said(localization)}"


def said(localization: Localization) -> str:
    """Return what `sentence` says after the verdict."""
    first = localization.first
    if localization.verdict == verdict.AGREE:
        text = _agreement(localization.taps, localization.exact)
    elif localization.verdict == verdict.DIVERGE and first:
        # What is to be equal is told by what was done instead; an error is a number that asks for an explanation.
        text = (
            f"{_beginning(first)}{'explanation: ' if first.explained and first.kind != EXACT else ''}{explained(first)}"
            f"{_further(localization.findings[1:])}"
        )
    else:
        text = localization.reason or "nothing was compared"
    return f"{text.strip().rstrip('.')}."


def _further(findings: Sequence[Finding]) -> str:
    """Return what else is wrong by itself, by its cause where that is known."""
    if not findings:
        return ""
    causes = [f.cause_names if f.explained else f.component for f in findings]
    shown = ", ".join(dict.fromkeys(causes[:FURTHER]))
    return f"; wrong by itself too: {shown}" + (f" and {len(causes) - FURTHER} more" if len(causes) > FURTHER else "")


def explained(finding: Finding) -> str:
    """Return the best explanation in words, or plainly that there is none."""
    best = next(iter(finding.explanations), None)
    if best is None:
        return "no hypothesis explains it"
    if finding.explained:
        if finding.part is not None:
            return f"{finding.cause_names} (accounts for {percent(finding.part)} of the values that differ)"
        if not finding.certain:
            left = "" if best.left is None else f", which leaves {times(best.left)} times the floor"
            return f"a hint{left}: {_removing(finding)}"
        return _removing(finding)
    tried = len(finding.explanations)
    return f"no hypothesis explains it (the best of {tried} removes {percent(best.residual_removed)})"


def _removing(finding: Finding) -> str:
    return f"{finding.cause_names} (removes {percent(finding.explanations[0].residual_removed)} of the difference)"


def failures(finding: Finding) -> str:
    """Return in a line which hypotheses could not be tried and what they raised; nothing where none failed."""
    count = len(finding.failed)
    shown = "; ".join(f"{name} ({error})" for name, error in finding.failed[:FAILED])
    more = f"; and {count - FAILED} more" if count > FAILED else ""
    return f"{count} hypothes{'i' if count == 1 else 'e'}s failed: {shown}{more}" if count else ""


def multiple(finding: Finding | TapError) -> float | None:
    """Return a finding's local error as a multiple of its floor, None without either; infinite over a floor of 0."""
    if isinstance(finding, TapError):
        return finding.ratio
    if finding.local_error is None or finding.floor is None:
        return None
    if finding.floor == 0:
        return math.inf if finding.local_error else 0.0
    return finding.local_error / finding.floor


def times(ratio: float | None) -> str:
    """Return a multiple with two or three digits: 2.31, 270,000, 3.1e9; a dash where there is none."""
    if ratio is None:
        return "–"
    if not math.isfinite(ratio):
        return "NaN" if math.isnan(ratio) else "∞"
    if ratio < 1000:
        return f"{ratio:.3g}"
    if ratio < 1e7:
        return f"{int(float(f'{ratio:.2g}')):,}"
    return f"{ratio:.1e}".replace("e+0", "e").replace("e+", "e")


def percent(share: float) -> str:
    """Return a share of 1 in percent; what is below nothing is nothing."""
    if not math.isfinite(share):
        return "an unknown part"
    return f"{100 * max(share, 0.0):.3g} %" if share < 0.9995 else f"{100 * min(share, 1.0):.4g} %"


def tenths(share: float) -> str:
    """Return a share of 1 in percent with one decimal, so that those of a column stand below each other."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "–"


def number(value: float | None) -> str:
    """Return an error with three digits, a dash where there is none."""
    return "–" if value is None else "0" if value == 0 else f"{value:.3g}"


def departs(localization: Localization) -> str:
    """Return in words after which step the free-running state departs first, and how far off each arm is there."""
    steps, alarm = localization.trajectory, localization.alarm
    if not steps or alarm is None:
        return ""
    beyond = f"farther off than {times(alarm.threshold)} times what one rounding of the first state does"
    first = first_departure(steps, alarm.threshold)
    if first is None:
        return f"No state is {beyond}."
    velocity = next(step.velocity for step in steps if step.step == first)
    arms = ", ".join(f"{definition().ARMS.get(arm, arm)} {number(off)}" for arm, off in velocity.items())
    return f"The state departs first after step {first}: it is {beyond}. From the oracle's state there: {arms}."


def false_alarms(localization: Localization) -> str:
    """Return in words how often a right implementation would be called wrong."""
    alarm = localization.alarm
    if alarm is None:
        return "How often a right implementation would be called wrong was not measured for this run."
    return (
        f"A right implementation, which differs in its order of rounding alone, is called wrong in at most "
        f"{percent(alarm.rate)} of such runs by the model of the bounds, all {alarm.taps:,} taps together. A tap "
        f"alarms from at most {times(alarm.threshold)} times its floor, measured with {alarm.samples:,} right variants."
    )


def counted(localization: Localization) -> str:
    """Return how much was compared."""
    taps, wrong = len(localization.taps), sum(tap.wrong for tap in localization.taps)
    estimated = sum(tap.accuracy is not None for tap in localization.taps)
    said = f"{taps:,} tap{'s' * (taps != 1)}"
    captured = sum(tap.source == UPSTREAM for tap in localization.taps)
    said += f" ({captured:,} captured, the others as the reference computes them from those)" if captured < taps else ""
    said += f", {estimated:,} of them by sketches" if estimated else ""
    said += f", {wrong:,} of them wrong from the oracle's own input" if wrong else ""
    return "; ".join([said, *_exact(localization.exact)])


def _exact(names: Sequence[str]) -> list[str]:
    weights = sum(name.startswith("weights/") for name in names)
    counts = ((len(names) - weights, "integer input"), (weights, "weight"))
    return [f"{count:,} {what}{'s' * (count != 1)}" for count, what in counts if count]


def _agreement(taps: Sequence[TapError], exact: Sequence[str]) -> str:
    rated = [tap for tap in taps if tap.ratio is not None]
    worst = max(rated, key=lambda tap: tap.ratio, default=None)
    text = f"none of {len(taps):,} taps is farther from the oracle than rounding allows"
    if worst is not None and worst.ratio:
        text += f" (the farthest, {worst.tap.component} in {worst.tap.call}, by {times(worst.ratio)} times its floor)"
    equal = " and ".join(_exact(exact))
    return text + (f", and {equal} {'is' if len(exact) == 1 else 'are'} equal" if equal else "")


def _beginning(finding: Finding) -> str:
    verb = "are" if re.search(r"^[^.]*(?<!s)s$", finding.component) else "is"
    if finding.kind == EXACT:
        what = finding.component
        if finding.tap.startswith("weights/"):
            what, verb = f"the weight {finding.tap.removeprefix('weights/')}", "is"
        elif arm := next((arm for arm in definition().ARMS if re.search(rf"(^|[./]){arm}\b", finding.tap)), None):
            what += f" of the {definition().ARMS[arm]} arm"
        # An explanation says more than the first numbers that differ.
        detail = "" if finding.explained or not finding.detail else f"{finding.detail.rstrip('.')}; "
        return f"{what} {verb} wrong first: {detail}"
    start = f"{finding.component} {verb} wrong first{f', in {finding.call}' if finding.call else ''}: "
    if finding.kind == LOCAL and finding.local_error is not None:
        ratio = multiple(finding)
        over = f", {times(ratio)} times the floor" if ratio is not None and math.isfinite(ratio) else ""
        over += f" where {number(finding.allowed)} is allowed" if over and finding.allowed else ""
        held = f", most of it in {finding.slice}" if finding.slice else ""
        return f"{start}local error {number(finding.local_error)}{over}{held}; "
    return f"{start}{(finding.detail or 'it cannot be compared').rstrip('.')}; "


def localization_markdown(localization: Localization) -> str:
    """Return a compact summary in Markdown: the sentence, a table of the findings, what explains each."""
    run = [localization.bundle, localization.impl, localization.task, localization.entry, localization.dtype]
    lines = [f"**{VERDICTS[localization.verdict]}**: {_plain(said(localization))}", ""]
    lines += [" · ".join(_code(word) for word in run if word) + f" · {counted(localization)}", ""]
    if localization.faults:
        lines += ["Faults put in on purpose: " + ", ".join(map(_code, localization.faults)), ""]
    if localization.findings:
        lines += [
            "| # | component | tap | local error | × floor | slice | best explanation | removes |",
            "|--:|---|---|--:|--:|---|---|--:|",
            *(_row(place, finding) for place, finding in enumerate(localization.findings, 1)),
            "",
        ]
    for place, finding in enumerate(localization.findings, 1):
        lines += [f"**{place}. {_code(finding.component)}**: {_plain(finding.detail or explained(finding))}"]
        lines += [f"- {_tried(explanation)}" for explanation in finding.explanations[:5]]
        lines += ["- no hypothesis changes anything there"] if not finding.explanations else []
        lines += [f"- {_plain(failures(finding))}"] if finding.failed else []
        lines += (
            [f"- the same cause: {len(finding.also)} more tap{'s' * (len(finding.also) != 1)}"] if finding.also else []
        )
        lines += [""]
    return "\n".join([*lines, _plain(false_alarms(localization)), ""])


def _row(place: int, finding: Finding) -> str:
    best = next(iter(finding.explanations), None) if finding.explained else None
    over = "exact" if finding.kind == EXACT else times(multiple(finding))
    cells = [str(place), _cell(finding.component), _cell(finding.tap), number(finding.local_error), over]
    cells += [_plain(finding.slice or "–"), _plain(finding.cause_names if best else "none")]
    cells += [percent(best.residual_removed) if best else "–"]
    return f"| {' | '.join(cells)} |"


def _tried(explanation: Explanation) -> str:
    second = "" if explanation.second is None else f", {percent(explanation.second)} on a second input"
    return f"{_plain(explanation.name)}: removes {percent(explanation.residual_removed)}{second}"


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line; underscores within a word mean nothing there."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*\[\]|#~$]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _code(text: str) -> str:
    """Return a name as code, on one line; a backtick would end it."""
    return f"`{' '.join(text.split()).replace('`', chr(0x2CB))}`"


def _cell(text: str) -> str:
    """Return a name as code in a table, where a bar would end the cell."""
    return _code(text).replace("|", "\\|")
