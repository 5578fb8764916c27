"""Requests out of chance: renewal arrivals at a constant or daily rate, drawn lengths.

Gaps are Gamma with a coefficient of variation (CV): 1 is Poisson, 0 is a metronome, above
1 comes in bursts. A rate that changes bends the clock the gaps are laid on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from foreserve.models.errors import InvalidInput
from foreserve.traces.files import MAX_COUNT
from foreserve.traces.trace import Floats, Ints, Trace

DAY_S = 86_400.0
DECIMALS = 6
"""Digits of a second that are kept, so that files stay small."""
MAX_REQUESTS = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Lengths of one kind: all equal, or lognormal with this mean and CV."""

    mean: float
    cv: float = 0.0

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """``count`` lengths of at least 1 token."""
        variance = np.log1p(self.cv**2)
        drawn = rng.lognormal(
            np.log(self.mean) - variance / 2, np.sqrt(variance), count
        )
        return np.clip(np.rint(drawn), 1, MAX_COUNT).astype(np.int32)


def parse_tokens(value: str | float) -> Tokens:
    """``512``: always 512; ``lognormal:512,1.5``: mean 512, CV 1.5."""
    found = re.fullmatch(r"(?:lognormal:([0-9.]+),([0-9.]+)|([0-9.]+))", f"{value}")
    try:
        if found and found[3]:
            tokens = Tokens(mean=float(found[3]))
        elif found:
            tokens = Tokens(mean=float(found[1]), cv=float(found[2]))
        else:
            raise ValueError
        if not 1 <= tokens.mean <= MAX_COUNT or tokens.cv > 100:
            raise ValueError
    except ValueError:
        raise InvalidInput(
            f"{value!r} is not a number of tokens",
            hint="write e.g. 512, or lognormal:512,1.5 for mean 512 and CV 1.5",
        ) from None
    return tokens


def draw_gaps(cv: ArrayLike, count: int, rng: np.random.Generator) -> Floats:
    """``count`` Gamma gaps of mean 1; ``cv`` is one number or [gap]."""
    squared = np.maximum(np.square(np.asarray(cv, dtype=np.float64)), 1e-12)
    return rng.gamma(1 / squared, squared, count)


def spread(count: int, cv: float, rng: np.random.Generator) -> Floats:
    """``count`` sorted moments in [0, 1): gaps of this CV around a circle, turned by
    chance so that the start is no special moment."""
    gaps = draw_gaps(cv, count, rng) + 1e-12
    turned: Floats = np.sort((np.cumsum(gaps) / gaps.sum() + rng.random()) % 1.0)
    return turned


def renewals(until: float, cv: float, rng: np.random.Generator) -> Floats:
    """Moments in [0, ``until``) of a renewal process of rate 1 that began long ago."""
    squared = max(cv * cv, 1e-12)
    # At a random moment one is in a gap chosen by its length: Gamma with shape + 1.
    last = float(rng.random() * rng.gamma(1 / squared + 1, squared))
    parts = [np.array([last])]
    while last < until:
        count = int(until - last + 4 * (1 + cv) * np.sqrt(until - last) + 16)
        parts.append(last + np.cumsum(draw_gaps(cv, count, rng)))
        last = float(parts[-1][-1])
    moments = np.concatenate(parts)
    return moments[moments < until]


def daily_moments(
    *, rate_rps: float, span_s: float, cv: float, peak_ratio: float, seed: int
) -> Floats:
    """Sorted arrivals in [0, ``span_s``). The rate is a sine over the day, lowest at 0 h
    and highest at 12 h, where it is ``peak_ratio`` times as high; ``rate_rps`` is the
    mean of a whole day."""
    swing = (peak_ratio - 1) / (peak_ratio + 1)
    times: Floats = np.linspace(0.0, span_s, int(span_s / 60) + 2)
    waves = DAY_S / (2 * np.pi) * np.sin(2 * np.pi * times / DAY_S)
    expected = rate_rps * (times - swing * waves)
    moments = renewals(float(expected[-1]), cv, np.random.default_rng([seed, 0]))
    return np.interp(moments, expected, times)


def synth(
    llm: str,
    *,
    rate_rps: float,
    span_s: float,
    cv: float = 1.0,
    peak_ratio: float = 1.0,
    input_tokens: Tokens,
    output_tokens: Tokens,
    seed: int = 0,
) -> Trace:
    """A trace of one LLM; same arguments, same trace. Their number is up to chance, with
    ``rate_rps * span_s`` expected at a constant rate."""
    if not (rate_rps > 0 and span_s > 0 and cv >= 0 and peak_ratio >= 1):
        raise InvalidInput(
            "rate and span must be positive, the CV at least 0, the peak ratio at least 1"
        )
    if rate_rps * span_s > MAX_REQUESTS:
        raise InvalidInput(
            f"{rate_rps * span_s:.3g} requests are more than {MAX_REQUESTS}",
            hint="a shorter span, or a lower rate",
        )
    arrival_s = daily_moments(
        rate_rps=rate_rps, span_s=span_s, cv=cv, peak_ratio=peak_ratio, seed=seed
    )
    rng = np.random.default_rng([seed, 1])
    return Trace(
        arrival_s=in_span(arrival_s, span_s),
        llm=np.zeros(len(arrival_s), dtype=np.int32),
        llms=(llm,),
        input_tokens=input_tokens.draw(len(arrival_s), rng),
        output_tokens=output_tokens.draw(len(arrival_s), rng),
    )


def in_span(arrival_s: Floats, span_s: float) -> Floats:
    """Whole microseconds, all in [0, ``span_s``)."""
    return np.clip(np.round(arrival_s, DECIMALS), 0.0, span_s - 10**-DECIMALS)
