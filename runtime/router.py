"""Which replica takes a request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[int] | NDArray[np.int64]

NEVER = -2
"""No replica could ever hold the request."""


def choose(
    in_flight: Numbers,
    cap: Numbers,
    room_tokens: Numbers,
    tokens: int,
) -> int:
    """Index of the ACTIVE replica that takes a request of ``tokens`` in the KV cache.

    Of those whose KV caches have ``room_tokens`` for it, the one with the fewest requests
    ``in_flight``, below its ``cap``; ties go to the first, so list them by id. -1 where
    each has as many as its cap, `NEVER` where none has room. All are of the request's LLM.
    Plain arithmetic, as the simulator compiles it.
    """
    best, able = -1, len(in_flight) == 0
    for i in range(len(in_flight)):
        if room_tokens[i] < tokens:
            continue
        able = True
        if in_flight[i] < cap[i] and (best < 0 or in_flight[i] < in_flight[best]):
            best = i
    return best if able else NEVER
