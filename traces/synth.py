"""Requests out of chance: arrivals at a constant or daily rate, drawn lengths."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from foreserve.models.errors import InvalidInput
from foreserve.traces.arrivals import in_span, renewals
from foreserve.traces.files import MAX_COUNT
from foreserve.traces.trace import Floats, Ints, Trace

DAY_S = 86_400.0
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
    if not (rate_rps > 0 and span_s > 0 and min(cv, seed) >= 0 and peak_ratio >= 1):
        raise InvalidInput(
            "rate and span must be positive, CV and seed at least 0, peak ratio at least 1"
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
