"""Everything the simulator's core knows, in arrays; it is `core` and `flow` that act.

Records of engines and jobs refer to each other by number. Rows come from pools that double
when they are used up, so memory follows what is there at once, not the length of a run.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from foreserve.models import gaps
from foreserve.runtime import router

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """``function`` as machine code: no fast-math, so that it computes as Python does.

    It must not make arrays: those it gets are not counted as references (``_nrt``), which
    took three quarters of the time. Kept on disk for the next process, beside the code or
    where the user's caches are.
    """
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, cache_folder()
    compiler = numba.njit(cache=True, error_model="numpy", _nrt=False)
    try:
        return cast(Function, compiler(function))
    finally:
        numba.config.CACHE_DIR = before


@functools.cache
def cache_folder() -> str:
    """A folder for this version of the sources. numba looks at the file of a function
    alone, and would go on with what that function called when it was compiled."""
    own = Path(__file__).parent
    files = [own / f"{n}.py" for n in ("blocks", "core", "flow", "layout", "pace")]
    files += [Path(module.__file__ or "") for module in (gaps, router)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    parent = own / "__pycache__"
    if not os.access(parent if parent.exists() else own, os.W_OK):
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        parent = Path(caches) / "foreserve"
    folder = parent / f"core-{digest[:16]}"
    if not folder.exists():
        for old in parent.glob("core-*"):
            shutil.rmtree(old, ignore_errors=True)
    return str(folder)


FIRST_JOBS, FIRST_ENGINES = 1024, 16
"""Room to begin with."""

UNFINISHED, FINISHED, FAILED = 0, 1, 2
"""What came of a request."""

NONE = -1

TIMES = (
    "prefill_base_s",
    "prefill_s_per_token",
    "prefill_s_per_token2",
    "prefill_floor_s",
    "decode_base_s",
    "decode_s_per_seq",
    "decode_s_per_context_token",
    "decode_experts_s",
    "expert_share",
)
"""Fields of `IterationTime` that an engine has too."""

ENGINE = np.dtype(
    [
        *((name, "f8") for name in TIMES),
        # `EngineLimits`.
        *((name, "i8") for name in ("max_tokens", "max_seqs", "block")),
        ("unit", "i8"),  # blocks in one of a prompt's prefixes, or 0: none are shared
        *((name, "?") for name in ("whole", "mixes", "caches")),
        ("llm", "i8"),
        ("lane", "i8"),  # place among the LLM's engines that take requests, or NONE
        ("life", "i8"),  # what its owner calls it
        ("in_flight", "i8"),
        ("idle_since_s", "f8"),
        ("watched", "?"),  # `run` stops when it falls idle
        ("preemptions", "i8"),
        ("blocks", "i8"),
        ("free", "i8"),
        ("lent", "i8"),  # neither free nor in use; taken back where they are missed
        ("revoked", "?"),  # they were
        ("taken", "i8"),  # blocks taken so far, but for those that were found again
        ("step", "i8"),  # steps of decoding so far
        ("joins", "i8"),
        ("context", "i8"),  # tokens that the next step of the decoding jobs reads
        # Those that decode, in the order of joining; and as a heap by their ends (`ends`).
        ("decoding", "i8"),
        ("decoding_first", "i8"),
        ("decoding_last", "i8"),
        ("waiting", "i8"),
        ("waiting_first", "i8"),
        ("waiting_last", "i8"),
        ("prompt", "i8"),  # whose prompt is under way, the last to join, or NONE
        ("resumed", "i8"),  # whose prompt was under way before: the first chunk is its
        # The stretch under way: `count` iterations alike, with `steps` (0 or as many) of
        # each decoding job in them. With `chunks` of prompts in it there is one.
        ("chunks", "i8"),
        ("count", "i8"),
        ("steps", "i8"),
        ("start_s", "f8"),
        ("next_s", "f8"),  # its end, or infinity
        (
            "paused",
            "?",
        ),  # there were iterations of prompts alone since the last step, ...
        ("last_s", "f8"),  # ... which ended here
    ]
)

LINKS = (
    "decoding_first",
    "decoding_last",
    "waiting_first",
    "waiting_last",
    "prompt",
    "resumed",
)
"""Fields of an engine that name a job, or NONE."""

JOB = np.dtype(
    [
        *((name, "i8") for name in ("request", "llm", "input", "output")),
        ("given", "i8"),  # output tokens so far; while it decodes, as of `begun`
        ("computed", "i8"),  # tokens in the KV cache, likewise
        ("first_s", "f8"),  # its first token, or NaN
        (
            "last_s",
            "f8",
        ),  # the token before it began to decode, or before its preemption
        ("preemptions", "i8"),
        ("begun", "i8"),  # the engine's step before its first
        ("joined", "i8"),
        ("end", "i8"),  # the engine's step after which it ends
        ("place", "i8"),  # in `ends`
        # Since it was preempted: tokens that were computed, and the engine's count of
        # blocks taken at which the first of its own goes.
        *((name, "i8") for name in ("cached", "lost_from")),
        (
            "held",
            "i8",
        ),  # its first prefixes, of which the cache knows that it uses them
        ("doubles", "i8"),  # of these, others use a copy of their own
        *((name, "i8") for name in ("next", "previous")),
    ]
)

TOP = np.dtype(
    [
        ("now_s", "f8"),
        ("arrived", "i8"),
        ("ended", "i8"),
        ("free_job", "i8"),  # first of a chain by `next`
        ("engines", "i8"),  # in `heap`
        # Why `run` stopped.
        ("full", "?"),  # no job is free: there must be more
        ("woken", "?"),
        ("emptied", "i8"),  # an engine that takes no requests and has none, or NONE
        ("revoked", "?"),
        ("foreign", "i8"),  # a request for an LLM that others serve, or NONE
    ]
)


class Columns(NamedTuple):
    """Requests that will come: [request] arrival, in order, index of the LLM, tokens."""

    arrival_s: NDArray[np.float64]
    llm: NDArray[np.int32]
    input_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    prefix_starts: NDArray[np.int64] = np.zeros(0, np.int64)
    """[request + 1] where its prefixes begin in ``prefix_ids``; empty: nobody has any."""
    prefix_ids: NDArray[np.int32] = np.zeros(0, np.int32)


class State(NamedTuple):
    """Everything there is, in arrays: E engines, J jobs, L LLMs, R requests."""

    top: NDArray[np.void]
    engines: NDArray[np.void]
    """[E]; free rows are not in ``heap``."""
    jobs: NDArray[np.void]
    """[J]"""
    phase: NDArray[np.int64]
    """[E, block] decoding jobs by the step, modulo the block, in which they need one."""
    ends: NDArray[np.int64]
    """[E, sequences] heap of decoding jobs by (end, joined)."""
    chunk_job: NDArray[np.int64]
    """[E, sequences] jobs of which this iteration computes a chunk ..."""
    chunk_end: NDArray[np.int64]
    """... up to this token."""
    heap: NDArray[np.int64]
    """[E] engines by (next_s, number)."""
    place: NDArray[np.int64]
    """[E] where in ``heap``."""
    lanes: NDArray[np.int64]
    """[L] engines of the LLM that take requests ..."""
    lane_engine: NDArray[np.int64]
    """[L, E] ... in the order of their ids, ..."""
    lane_load: NDArray[np.int64]
    """... with their requests in flight, ..."""
    lane_cap: NDArray[np.int64]
    """... the most they take, ..."""
    lane_room: NDArray[np.int64]
    """... and the tokens that their KV caches hold."""
    foreign: NDArray[np.bool_]
    """[L] served by others too."""
    queue: NDArray[np.int64]
    """[L] requests that nobody has taken yet, ..."""
    queue_first: NDArray[np.int64]
    queue_last: NDArray[np.int64]
    arrival_s: NDArray[np.float64]
    """[R], in order."""
    llm: NDArray[np.int32]
    input_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    prefix_starts: NDArray[np.int64]
    """[R + 1] where a request's prefixes begin in ..."""
    prefix_ids: NDArray[np.int32]
    """... this list: equal ids are equal tokens from a prompt's first one on."""
    prefix_users: NDArray[np.int64]
    """[E, id] jobs that use the prefix's blocks ..."""
    prefix_lost: NDArray[np.int64]
    """... and if none does: `taken` at which the first of the blocks goes."""
    found_tokens: NDArray[np.int64]
    """[L] prompt tokens that were not computed because an earlier request had been."""
    first_s: NDArray[np.float64]
    """[R] NaN until it is known."""
    end_s: NDArray[np.float64]
    result: NDArray[np.int8]
    where: NDArray[np.int32]
    """[R] life that it was worked on last, or NONE."""
    preempted: NDArray[np.int16]
    """[R] how often."""
    order: NDArray[np.int32]
    """[R] requests in the order of their ends."""
    gaps: NDArray[np.int64]
    """[L, bin] gaps between tokens (`models.gaps`)."""
    gaps_s: NDArray[np.float64]
    """[L] their sum."""


BY_ENGINE = (
    *("phase", "ends", "chunk_job", "chunk_end", "heap", "place"),
    *("prefix_users", "prefix_lost"),
)
"""Arrays of the state whose first axis is E, ..."""
BY_LANE = ("lane_engine", "lane_load", "lane_cap", "lane_room")
"""... and those whose second is."""


def empty(llms: int, requests: Columns) -> State:
    count = len(requests.arrival_s)
    jobs = np.zeros(FIRST_JOBS, JOB)
    chain(jobs, 0, NONE)
    engines = np.zeros(FIRST_ENGINES, ENGINE)
    engines["llm"] = NONE
    top = np.zeros(1, TOP)
    for name in ("emptied", "foreign"):
        top[name] = NONE
    lane = (llms, FIRST_ENGINES)
    kinds = int(requests.prefix_ids.max(initial=-1)) + 1
    return State(
        top=top,
        engines=engines,
        jobs=jobs,
        phase=np.zeros((FIRST_ENGINES, 16), np.int64),
        ends=np.zeros((FIRST_ENGINES, 256), np.int64),
        chunk_job=np.zeros((FIRST_ENGINES, 256), np.int64),
        chunk_end=np.zeros((FIRST_ENGINES, 256), np.int64),
        heap=np.zeros(FIRST_ENGINES, np.int64),
        place=np.zeros(FIRST_ENGINES, np.int64),
        prefix_users=np.zeros((FIRST_ENGINES, kinds), np.int64),
        prefix_lost=np.full((FIRST_ENGINES, kinds), -1, np.int64),
        found_tokens=np.zeros(llms, np.int64),
        lanes=np.zeros(llms, np.int64),
        lane_engine=np.zeros(lane, np.int64),
        lane_load=np.zeros(lane, np.int64),
        lane_cap=np.zeros(lane, np.int64),
        lane_room=np.zeros(lane, np.int64),
        foreign=np.zeros(llms, np.bool_),
        queue=np.zeros(llms, np.int64),
        queue_first=np.full(llms, NONE, np.int64),
        queue_last=np.full(llms, NONE, np.int64),
        **{name: _fixed(column) for name, column in requests._asdict().items()},
        first_s=np.full(count, math.nan),
        end_s=np.full(count, math.nan),
        result=np.zeros(count, np.int8),
        where=np.full(count, NONE, np.int32),
        preempted=np.zeros(count, np.int16),
        order=np.zeros(count, np.int32),
        gaps=np.zeros((llms, gaps.GAP_BINS), np.int64),
        gaps_s=np.zeros(llms),
    )


def _fixed(column: NDArray[Any]) -> NDArray[Any]:
    """Read-only and in one piece, as the core is compiled for."""
    column = np.ascontiguousarray(column).view()
    column.setflags(write=False)
    return column


def chain(jobs: NDArray[np.void], begin: int, rest: int) -> None:
    """Link the jobs from ``begin`` on to a chain of free ones, ``rest`` behind them."""
    jobs["next"][begin:] = np.arange(begin + 1, len(jobs) + 1)
    jobs["next"][-1] = rest


def doubled(array: NDArray[Any], axis: int) -> NDArray[Any]:
    return np.concatenate([array, np.zeros_like(array)], axis=axis)
