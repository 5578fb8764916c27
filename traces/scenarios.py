"""Moments to plan for: how many requests of each LLM are in flight, all LLMs at once."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from foreserve.traces.forecast import Forecast


def independent_scenarios(
    forecast: Forecast, count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """``count`` equally likely moments of each epoch: [scenario, llm, epoch] load.

    An LLM is busy in a share ``1 - exp(-mean_load)`` of the moments (Poisson arrivals),
    though in at least one if any load is forecast, and idle (0) in the others. Where it
    is busy it is taken at its worst: the mid-quantiles of Normal(peak, peak_std), not
    below the mean load. Each LLM has them in an order of its own (Latin hypercube), so
    margins are exact and LLMs independent of each other.
    """
    levels = np.zeros((count, *forecast.peak_load.shape))
    for llm, epoch in np.ndindex(forecast.peak_load.shape):
        mean = float(forecast.mean_load[llm, epoch])
        peak = float(forecast.peak_load[llm, epoch])
        if peak <= 0 and forecast.peak_std[llm, epoch] <= 0:
            continue
        busy = max(1, round(count * (1 - np.exp(-mean))))
        quantiles = [NormalDist().inv_cdf((i + 0.5) / busy) for i in range(busy)]
        loads = peak + np.array(quantiles) * forecast.peak_std[llm, epoch]
        moments = rng.permutation(count)[:busy]
        levels[moments, llm, epoch] = np.maximum(loads, mean)
    return levels
