"""Moments to plan for: how many requests of each LLM are in flight, all LLMs at once."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from foreserve.traces.forecast import Forecast
from foreserve.traces.trace import Floats


def joint_scenarios(
    forecast: Forecast, count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """``count`` equally likely moments of each epoch: [scenario, llm, epoch] load.

    An LLM is busy in a share ``1 - exp(-mean_load)`` of the moments (Poisson arrivals),
    though in at least one if any load is forecast, and idle (0) in the others. Where it
    is busy it is taken at its worst: the mid-quantiles of its peak, not below the mean
    load. Which LLMs are high together is taken from past epochs (`joint_peaks`).
    """
    peaks = joint_peaks(forecast, count, rng)
    levels = np.zeros_like(peaks)
    for llm, epoch in np.ndindex(forecast.peak_load.shape):
        mean = float(forecast.mean_load[llm, epoch])
        if max(float(forecast.peak_high[llm, epoch]), mean) <= 0:
            continue
        busy = max(1, round(count * (1 - np.exp(-mean))))
        moments = rng.permutation(count)[:busy]
        margin = _margin(forecast, llm, epoch, busy)
        rank = peaks[moments, llm, epoch].argsort(kind="stable").argsort(kind="stable")
        levels[moments, llm, epoch] = np.maximum(margin[rank], mean)
    return levels


def joint_peaks(
    forecast: Forecast, count: int, rng: np.random.Generator, *, together: bool = True
) -> NDArray[np.float64]:
    """``count`` equally likely peaks of all LLMs: [scenario, llm, epoch].

    Each LLM takes the mid-quantiles of its own distribution, in the order in which it
    missed its forecast at ``count`` past epochs, the same for all LLMs (a Schaake shuffle:
    bursts that came together stay together). Those epochs are spread evenly over the
    distribution of the sum. Not ``together``: every LLM in an order of its own.
    """
    samples, llms, epochs = forecast.peak_errors.shape
    found = np.zeros((count, llms, epochs))
    for epoch in range(epochs):
        errors = forecast.peak_errors[:, :, epoch]
        if samples and together:
            by_sum = errors.sum(axis=1).argsort(kind="stable")
            picks = by_sum[
                ((np.arange(count) + rng.random()) * samples / count).astype(int)
            ]
            picked = errors[rng.permutation(picks)]
        else:
            picked = rng.random((count, llms))
        # Equal errors (an LLM without load) must not look like an order.
        jitter = rng.random((count, llms))
        for llm in range(llms):
            rank = np.lexsort((jitter[:, llm], picked[:, llm])).argsort()
            found[:, llm, epoch] = _margin(forecast, llm, epoch, count)[rank]
    return found


def _margin(forecast: Forecast, llm: int, epoch: int, count: int) -> Floats:
    """``count`` mid-quantiles of the peak of one LLM, ascending, at least 0.

    Past errors, stretched on either side of the forecast so that 95 % lie below
    ``peak_high`` and above ``peak_low``; Normal with a Poisson's deviation while there
    are none.
    """
    peak = float(forecast.peak_load[llm, epoch])
    at = (np.arange(count) + 0.5) / count
    errors = forecast.peak_errors[:, llm, epoch]
    if not len(errors):
        unit = [NormalDist().inv_cdf(q) for q in at.tolist()]
        poisson: Floats = np.maximum(0.0, peak + np.sqrt(peak) * np.array(unit))
        return poisson
    quantiles: Floats = np.quantile(errors, at)
    for sign, bound in ((1, forecast.peak_high), (-1, forecast.peak_low)):
        tracked = sign * (float(bound[llm, epoch]) - peak)
        reached = float(np.quantile(sign * errors, 0.95))
        # A bound of 0 says nothing of how far errors below it go.
        if tracked > 0 and reached > 0 and (sign > 0 or tracked < peak):
            stretched = quantiles * (tracked / reached)
            quantiles = np.where(sign * quantiles > 0, stretched, quantiles)
    found: Floats = np.maximum(0.0, peak + quantiles)
    return found
