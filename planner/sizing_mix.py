"""The least price over mixtures of GPU types, by trial.

More GPUs of a type are assumed to do no harm, as in `sizing`: what is not enough rules out
all that has no more of any type, and what is enough all that costs as much or more. The
candidate in the middle of what is left, by price, is tried next, so that either answer
rules out much. Mixtures that not even a perfect system could serve the mean rate on are
never tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreserve.models.problem import Fleet
from foreserve.planner.sizing import Trial

Counts = tuple[int, ...]
"""GPUs of each type, in the order of the types."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Needs:
    """What requests take of each GPU type, at true rates."""

    types: tuple[str, ...]
    usd_per_h: Floats
    """[type] of a GPU."""
    gpu_s: Floats
    """[llm, type] GPU-seconds of a request; infinite where it does not run there."""
    rate_rps: Floats
    """[llm, epoch]"""

    @classmethod
    def of(cls, fleet: Fleet, rate_rps: Floats, max_load: float) -> Needs:
        """``rate_rps`` has the fleet's LLMs in their order."""
        types = fleet.cluster.gpu_types
        gpu_s = np.full((len(fleet.llms), len(types)), np.inf)
        row = {llm.name: i for i, llm in enumerate(fleet.llms)}
        column = {kind.name: j for j, kind in enumerate(types)}
        for option in fleet.options:
            at = row[option.llm], column[option.gpu_type]
            gpu_s[at] = min(gpu_s[at], option.tp * max_load / option.rate_rps)
        return cls(
            types=tuple(kind.name for kind in types),
            usd_per_h=np.array([kind.price_usd_per_h for kind in types]),
            gpu_s=gpu_s,
            rate_rps=rate_rps,
        )

    def price(self, counts: Counts) -> float:
        """Dollars per hour."""
        return float(self.usd_per_h @ np.array(counts))

    @property
    def bound_usd_per_h(self) -> float:
        """Of a perfect system in the busiest epoch: each request where it is cheapest."""
        cheapest = (self.gpu_s * self.usd_per_h).min(axis=1)
        return float((cheapest @ self.rate_rps).max())

    def gpus(self, rate_rps: Floats) -> float:
        """GPUs of that system at these rates, of all types together."""
        at = (self.gpu_s * self.usd_per_h).argmin(axis=1)
        return float(self.gpu_s[np.arange(len(at)), at] @ rate_rps)

    def may_serve(self, counts: Counts) -> bool:
        """Whether a perfect system on these GPUs might hold the mean rate.

        For any weights of the types, the least weighted GPU time of the requests must be
        there. Weights that make an LLM's requests weigh the same on all types decide it
        for two types (it is then the linear programme's dual); with more, what is not
        served may pass here, never the other way round.
        """
        here = np.array(counts) > 0
        # A type that is not there weighs as much as needed.
        gpu_s = np.where(here, self.gpu_s, np.inf)
        if np.isinf(gpu_s).all(axis=1).any():
            return False
        weights = [np.where(here, 1.0, 0.0), *np.where(here, np.eye(len(here)), 0.0)]
        weights += list(1 / gpu_s)
        mean_rps = self.rate_rps.mean(axis=1)
        for weight in weights:
            known = np.where(np.isinf(gpu_s), 1.0, gpu_s)
            weighted = np.where(np.isinf(gpu_s), np.inf, known * weight)
            needed = float(weighted.min(axis=1) @ mean_rps)
            if needed > float(weight @ np.array(counts)) * (1 + 1e-9):
                return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class MixSearch:
    """What was tried, and what might still be cheaper."""

    trials: tuple[Trial, ...]
    """By price."""
    undecided: tuple[Counts, ...]
    """Cheaper than all that was enough, and not ruled out, by price: none if the search
    came to its end."""


def mixtures(
    needs: Needs, *, most: int, step: int, below_usd: float
) -> Iterator[Counts]:
    """Counts of two types or more, cheaper than ``below_usd``, in multiples of ``step``."""

    def extend(counts: Counts, left: int) -> Iterator[Counts]:
        if len(counts) == len(needs.types):
            mixes = sum(count > 0 for count in counts) > 1
            if mixes and needs.may_serve(counts):
                yield counts
            return
        rest = len(needs.types) - len(counts) - 1
        for count in range(0, left + 1, step):
            if needs.price((*counts, count) + (0,) * rest) >= below_usd - 1e-9:
                break
            yield from extend((*counts, count), left - count)

    yield from extend((), most)


def search_mix(
    attempt: Callable[[Mapping[str, int]], Trial],
    needs: Needs,
    known: Sequence[Trial],
    *,
    most: int,
    step: int,
    attempts: int,
) -> MixSearch:
    """Try mixtures below the cheapest of ``known`` (clusters of one type) that is enough,
    ``attempts`` of them at most."""
    cheapest = min((t.usd_per_h for t in known if t.passed), default=np.inf)
    left = sorted(
        mixtures(needs, most=most, step=step, below_usd=cheapest),
        key=lambda counts: (needs.price(counts), counts),
    )
    trials: list[Trial] = []
    while left and len(trials) < attempts:
        tried = left.pop(len(left) // 2)
        trial = attempt(
            {gpu: n for gpu, n in zip(needs.types, tried, strict=True) if n}
        )
        trials.append(trial)
        if trial.passed:
            price = needs.price(tried) - 1e-9
            left = [counts for counts in left if needs.price(counts) < price]
        else:
            left = [
                counts
                for counts in left
                if any(c > t for c, t in zip(counts, tried, strict=True))
            ]
    trials.sort(key=lambda trial: trial.usd_per_h)
    return MixSearch(trials=tuple(trials), undecided=tuple(left))


def cheapest(trials: Sequence[Trial]) -> Trial | None:
    """The cheapest that was enough; nothing with as many of each type was not."""

    def holds(one: Trial, other: Trial) -> bool:
        kinds = {*one.counts, *other.counts}
        return all(other.counts.get(k, 0) >= one.counts.get(k, 0) for k in kinds)

    failed = [trial for trial in trials if not trial.passed]
    enough = (
        trial
        for trial in trials
        if trial.passed and not any(holds(trial, other) for other in failed)
    )
    return min(enough, key=lambda trial: trial.usd_per_h, default=None)
