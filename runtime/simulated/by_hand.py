"""What `flow` does with requests, one at a time: for LLMs that others serve, too."""

from __future__ import annotations

from foreserve.runtime.simulated import core, flow
from foreserve.runtime.simulated.layout import FAILED, NONE, State


def lane(state: State, llm: int) -> list[int]:
    """The engines that take requests for the LLM."""
    found: list[int] = state.lane_engine[llm, : state.lanes[llm]].tolist()
    return found


def submit(state: State, e: int, slot: int) -> None:
    """Give the engine the job."""
    core.submit(state, e, slot, float(state.top[0]["now_s"]))
    flow.place_engine(state, e)


def fail(state: State, slot: int) -> None:
    """Nobody could ever hold it."""
    core.end(state, slot, FAILED, NONE, float(state.top[0]["now_s"]))


def head(state: State, llm: int) -> tuple[int, int] | None:
    """Whose turn it is in the LLM's queue, and who comes after it."""
    slot = int(state.queue_first[llm])
    return None if slot == NONE else (slot, int(state.jobs[slot]["next"]))
