"""What `flow` does with requests, one at a time: for LLMs that others serve, too."""

from __future__ import annotations

from foreserve.runtime.simulated import core, flow
from foreserve.runtime.simulated.layout import FAILED, NONE, State


def lane(state: State, llm: int) -> list[int]:
    """The engines that take requests for the LLM."""
    found: list[int] = state.lane_engine[llm, : state.lanes[llm]].tolist()
    return found


def free(state: State, slot: int) -> None:
    """The job is over, or somebody else works on its request now."""
    top = state.top[0]
    state.jobs[slot]["next"] = top["free_job"]
    top["free_job"] = slot


def submit(state: State, e: int, slot: int) -> None:
    """Give the engine the job."""
    core.submit(state, e, slot, float(state.top[0]["now_s"]))
    flow.place_engine(state, e)


def fail(state: State, slot: int) -> None:
    """Nobody could ever hold it."""
    core.end(state, slot, FAILED, NONE, float(state.top[0]["now_s"]))


def enqueue(state: State, slot: int, *, first: bool) -> None:
    """Put the job at the head or the tail of its LLM's queue."""
    flow.enqueue(state, slot, first)


def head(state: State, llm: int) -> tuple[int, int] | None:
    """Whose turn it is in the LLM's queue, and who comes after it."""
    slot = int(state.queue_first[llm])
    return None if slot == NONE else (slot, int(state.jobs[slot]["next"]))


def pop(state: State, llm: int, following: int) -> None:
    """The head of the queue has left it; ``following`` came after it."""
    state.queue_first[llm] = following
    if following == NONE:
        state.queue_last[llm] = NONE
    state.queue[llm] -= 1


def record(
    state: State, request: int, result: int, life: int, first_s: float, preemptions: int
) -> None:
    """Write down what came of a request that somebody else has worked on until now."""
    top = state.top[0]
    state.first_s[request], state.end_s[request] = first_s, top["now_s"]
    state.result[request], state.where[request] = result, life
    state.preempted[request] = preemptions
    state.order[top["ended"]] = request
    top["ended"] += 1
    if top["ended"] == len(state.arrival_s):
        top["woken"] = True
