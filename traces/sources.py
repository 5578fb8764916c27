"""What a recipe's sources hold: requests, counts per window, or lengths."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from foreserve.models.codec import did_you_mean
from foreserve.models.errors import InvalidInput
from foreserve.traces.files import read_header
from foreserve.traces.formats import read_trace
from foreserve.traces.lengths import LengthQuantiles, read_lengths
from foreserve.traces.rates import Rates, is_rates, read_rates
from foreserve.traces.recipe import Group
from foreserve.traces.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """What a file or folder holds: requests, or counts, or lengths (or the last two)."""

    trace: Trace | None = None
    rates: Rates | None = None
    lengths: Mapping[str, LengthQuantiles] | None = None


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read a trace, a rate table, a table of lengths or a ServeGen folder."""
    if is_rates(path):
        both = Path(path).is_dir()
        return Source(
            rates=read_rates(path), lengths=read_lengths(path) if both else None
        )
    if Path(path).suffix in (".csv", ".gz") and "field" in read_header(os.fspath(path)):
        return Source(lengths=read_lengths(path))
    return Source(trace=read_trace(path))


def group_of(trace: Trace, group: Group | None, field: str = "group") -> Trace:
    """The requests of one LLM of a trace, or all of them."""
    if group is None:
        return trace
    if str(group) not in trace.llms:
        hint = did_you_mean(str(group), trace.llms)
        raise InvalidInput(f"the source has no {str(group)!r}", field=field, hint=hint)
    return trace.take(trace.llm == trace.llms.index(str(group)))


def begun(lengths: LengthQuantiles, before_s: float) -> LengthQuantiles:
    """Without the windows that start later: a history does not know them."""
    count = max(1, int(np.searchsorted(lengths.starts_s, before_s)))
    return replace(
        lengths,
        input_tokens=lengths.input_tokens[:count],
        output_tokens=lengths.output_tokens[:count],
        starts_s=lengths.starts_s[:count],
    )


def series_of(rates: Rates, group: Group | None) -> Rates:
    """One series of a rate table, or the sum of all (Poisson: its CV is not known)."""
    if group is None and len(rates.names) == 1:
        group = rates.names[0]
    if group is None:
        name, counts, cv = "all", rates.counts.sum(axis=0)[None], None
    elif str(group) not in rates.names:
        hint = did_you_mean(str(group), rates.names)
        raise InvalidInput(
            f"the source has no {str(group)!r}", field="group", hint=hint
        )
    else:
        name, row = str(group), [rates.names.index(str(group))]
        counts, cv = rates.counts[row], None if rates.cv is None else rates.cv[row]
    if not np.isfinite(counts).any():
        raise InvalidInput(f"all counts of {name!r} are unknown", field="group")
    return replace(rates, names=(name,), counts=counts, cv=cv)
