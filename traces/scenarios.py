"""Bursts to plan for: peak loads drawn from the forecast and its error."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from foreserve.traces.forecast import Forecast


def independent_scenarios(
    forecast: Forecast, count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """``count`` equally likely peak loads: [scenario, llm, epoch].

    Each LLM gets the ``count`` mid-quantiles of Normal(peak, peak_std), not below its
    mean load, in an order of its own (Latin hypercube): exact margins, bursts of
    different LLMs independent of each other.
    """
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    num_llms = len(forecast.peak_load)
    order = rng.permuted(np.tile(np.array(quantiles), (num_llms, 1)), axis=1)
    levels = forecast.peak_load + order.T[:, :, None] * forecast.peak_std
    return np.maximum(levels, forecast.mean_load)
