"""What must hold of a batch after faults."""

from __future__ import annotations

from tests.chaos.chaos import Plan, Report

# Of the largest movement. A pack that goes on without a member multiplies other matrices, so sums
# are rounded otherwise; the adapter's own float16 deltas are no finer than this.
TOLERANCE = 1e-3


def problems(plan: Plan, report: Report) -> list[str]:
    """Return what does not hold, a sentence each."""
    found = []
    if len(report.happened) != plan.faults:
        found.append(f"only {len(report.happened)} of {plan.faults} faults happened")
    for name, state in report.states.items():
        if state not in ("trained", "already"):
            found.append(f"{name} is {state}: {report.errors.get(name, 'no reason given')}")
        if report.versions[name] != 1:
            found.append(f"{name} has {report.versions[name]} versions")
        if not report.apart.get(name, 1.0) <= TOLERANCE:  # NaN is no agreement
            found.append(f"{name} is {report.apart[name]:.1e} of the largest movement off")
    if len(report.states) != plan.concepts:
        found.append(f"there are {len(report.states)} concepts")
    return found
