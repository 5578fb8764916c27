"""What `plan serve` says while it runs: a line per plan, change of mode, and fault."""

from __future__ import annotations

from collections.abc import Iterator

from foreserve.cli.views import note_row
from foreserve.planner.online import LivePolicy
from foreserve.planner.proposals import Proposal
from foreserve.runtime.gateway.feed import Feed
from foreserve.runtime.journal import Faulted, Refusal


class News:
    """Each call tells what is new since the last one."""

    def __init__(self, policy: LivePolicy, feed: Feed) -> None:
        self._policy, self._feed = policy, feed
        self._mode = policy.mode
        self._number = 0
        self._told: tuple[float, str] | None = None

    def lines(self) -> Iterator[str]:
        policy = self._policy
        if policy.mode != self._mode:
            self._mode = policy.mode
            yield f"mode is {self._mode}"
        for number, event in self._feed.since(self._number):
            self._number = number
            if isinstance(event, Faulted | Refusal):
                told = note_row(event)
                yield f"{told['kind']}: {told['text']}"
        latest = policy.proposals[-1] if policy.proposals else None
        if latest is not None:
            now = (latest.at_s, latest.fate)
            # One that is not looked at yet will be in a moment.
            if now != self._told and (
                latest.fate != "noted" or self._mode == "observe"
            ):
                self._told = now
                yield _of(latest)


def _of(proposal: Proposal) -> str:
    report, placement = proposal.report, proposal.placement
    by = "handed in" if proposal.origin == "operator" else "planned"
    took = f" in {proposal.took_s:.1f} s" if proposal.origin == "planner" else ""
    text = f"epoch {proposal.epoch} {by}{took}"
    if report is not None and report.objective is not None:
        text += (
            f", {report.status.value}, objective {report.objective:.4g} s, "
            f"bound {report.bound:.4g} s"
        )
    if placement is not None:
        active = sum(r.state == "ACTIVE" for r in placement.replicas)
        warm = len(placement.replicas) - active
        text += f", {active} ACTIVE and {warm} WARM"
    if proposal.reasons:
        text += f" (because {'; '.join(r.text for r in proposal.reasons)})"
    if proposal.fate == "pending":
        return f"{text}: plan approve {proposal.id}"
    return f"{text}: {proposal.failed or proposal.fate}"
