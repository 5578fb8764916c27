"""How KV pages are counted, promised, shared out and lent: pure functions.

The simulator and engines of ours decide by the same ones; whose turn it is, who is evicted
and whether he is swapped is `runtime.turns`. Pages are those on each GPU of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping


def tokens_per_page(page_bytes: int, token_bytes: int) -> int:
    """Whole tokens of all layers that a page holds. Not rounded to a power of two, which
    would waste up to half of it."""
    return page_bytes // token_bytes


def tail_waste(page_bytes: int, token_bytes: int) -> float:
    """Share of each page that no token fits into any more."""
    return page_bytes % token_bytes / page_bytes


def pages_of(tokens: int, per_page: int) -> int:
    """Pages of one request's tokens."""
    return -(-tokens // per_page)


def usual_pages(input_tokens: float, output_tokens: int, per_page: int) -> int:
    """Of one usual request of an LLM: the least that it is left with."""
    return pages_of(math.ceil(input_tokens) + output_tokens, per_page)


def promised_pages(
    input_tokens: int, expected_tokens: int, next_pages: int, per_page: int
) -> int:
    """What is set aside for a request that joins: its prompt and the output expected,
    whose last token never gets into the cache; ``next_pages`` if that is more."""
    most = pages_of(input_tokens + max(expected_tokens, 1) - 1, per_page)
    return max(most, next_pages)


def first_quotas(
    pages: int, least: Mapping[int, int], inflow: Mapping[int, float]
) -> dict[int, float]:
    """Shares of the pool by LLM: ``least`` each, and the rest in proportion to the KV
    bytes that come in; all of it by ``least`` where nothing is left or comes in."""
    spare, total = pages - sum(least.values()), sum(inflow.values())
    if spare <= 0 or total <= 0:
        share = pages / max(sum(least.values()), 1)
        return {s: share * own for s, own in least.items()}
    return {s: least[s] + spare * flow / total for s, flow in inflow.items()}


def spare_pages(capacity: int, requests: int, most: int, used: int) -> int:
    """Pages that can be lent: all beyond max(C Q / B, T + C / B), of C pages, Q requests
    in flight, at most B of them, and T pages in use (our reading of WarmServe's reserve).
    """
    kept = max(capacity * requests, used * most + capacity)
    return max(0, capacity - -(-kept // most))
