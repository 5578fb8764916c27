"""What the status page shows of the past: a bounded fold over a journal's events."""

from __future__ import annotations

from foreserve.models.observed import Observed, ObservedReplica, Phase
from foreserve.models.placement import Action, Placement
from foreserve.models.plan import LlmDemand
from foreserve.models.specs import GpuId
from foreserve.runtime.journal import (
    Decision,
    Faulted,
    PhaseChange,
    Refusal,
    RequestEnd,
)
from foreserve.runtime.timeline import MOST_EPOCHS, MOST_STAYS, Timeline

GPUS = (GpuId(node="n", index=0),)


def made() -> Timeline:
    return Timeline(epoch_s=10.0, keep_s=100.0, recent_s=5.0)


def phase(at_s: float, phase: Phase | None, *, lost: bool = False) -> PhaseChange:
    return PhaseChange(at_s=at_s, llm="a", gpus=GPUS, phase=phase, lost=lost)


def ended(at_s: float, first_s: float | None, result: str = "finished") -> RequestEnd:
    return RequestEnd(
        at_s=at_s,
        request=0,
        llm="a",
        arrival_s=at_s - 1.0,
        input_tokens=1,
        output_tokens=1,
        result=result,  # type: ignore[arg-type]
        first_token_s=first_s,
    )


def test_phases_become_stays() -> None:
    """Loading, WARM, then lost: two stays that ended, one after the other; one that is told
    again, as after a restart, goes on."""
    timeline = made()
    for event in (phase(1.0, "LOADING"), phase(3.0, "WARM"), phase(4.0, "WARM")):
        timeline.record(event)
    assert [(s.phase, s.start_s, s.end_s) for s in timeline.stays()] == [
        ("LOADING", 1.0, 3.0),
        ("WARM", 3.0, None),
    ]
    version = timeline.version
    timeline.record(phase(9.0, None, lost=True))
    assert timeline.version > version
    assert [(s.phase, s.end_s, s.lost) for s in timeline.stays()] == [
        ("LOADING", 3.0, False),
        ("WARM", 9.0, True),
    ]


def test_it_forgets() -> None:
    """Stays that ended ``keep_s`` ago, more of them than it keeps, and old epochs."""
    timeline = made()
    for event in (phase(1.0, "LOADING"), phase(2.0, None), phase(150.0, "LOADING")):
        timeline.record(event)
    assert [s.start_s for s in timeline.stays()] == [150.0]
    for i in range(MOST_STAYS + 50):
        timeline.record(phase(150.0 + i / 1000, "WARM" if i % 2 else "LOADING"))
    assert len(timeline.stays()) <= MOST_STAYS + 1
    for epoch in range(100):
        timeline.sample(epoch * 10.0, {"a": 1}, {})
    assert len(timeline.epochs()) == MOST_EPOCHS
    timeline.record(ended(5.0, None))  # of an epoch that is forgotten: no fault
    assert timeline.epochs()[-1].index == 99


def test_peaks_are_the_most_that_anybody_saw() -> None:
    """Samples and decisions count; waiting and in flight together; by epoch, with what was
    planned for it."""
    timeline = made()
    row = LlmDemand(llm="a", rate_rps=1.0, mean_load=1.0, peak_load=2.0, peak_high=3.0)
    timeline.sample(1.0, {"a": 2}, {"a": 1, "b": 4})
    timeline.planned(10.0, (row,))
    working = ObservedReplica(llm="a", gpus=GPUS, phase="ACTIVE", in_flight=5)
    timeline.saw(Observed(now_s=12.0, replicas=(working,), waiting={"a": 1}))
    timeline.sample(13.0, {}, {"a": 2})
    timeline.record(ended(14.0, None))
    first, second = timeline.epochs()
    assert (first.peaks, first.demand) == ({"a": 3, "b": 4}, ())
    assert (second.peaks, second.demand) == ({"a": 6}, (row,))
    assert second.arrived == {"a": 1}
    assert [s.at_s for s in timeline.samples(after_s=1.0)] == [13.0]


def test_lately() -> None:
    """Of the last five seconds: two of three requests; delays of those that had a token."""
    timeline = made()
    for event in (
        ended(2.0, 1.5),
        ended(8.0, 7.25),
        ended(9.0, None, "failed"),
    ):
        timeline.record(event)
    recent = timeline.recent(10.0)["a"]
    assert (recent.ended, recent.failed) == (2, 1)
    assert (recent.ttft_p50_s, recent.ttft_p99_s) == (0.25, 0.25)
    assert timeline.recent(100.0) == {}


def test_a_refusal_lasts_until_something_else_is_wanted() -> None:
    """Steps on the way to what was wanted before do not end it; notes have both, and the
    fault, the latest first."""
    timeline = made()
    step = Action(kind="load", llm="a", gpus=GPUS)
    timeline.record(Refusal(at_s=1.0, desired=Placement(), violations=("(C1) no",)))
    timeline.record(Decision(at_s=2.0, actions=(step,)))
    timeline.record(Faulted(at_s=3.0, kind="node-loss", target="n"))
    refused = timeline.refused()
    assert refused is not None
    assert refused.violations == ("(C1) no",)
    assert [note.at_s for note in timeline.notes(2)] == [3.0, 2.0]
    timeline.record(Decision(at_s=4.0, desired=Placement()))
    assert timeline.refused() is None
