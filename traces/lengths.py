"""How long requests are, as quantiles: what rate sources say about lengths."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foreserve.models.errors import InvalidInput
from foreserve.traces.files import MAX_COUNT, need_columns, numbers, read_frames
from foreserve.traces.trace import Floats, Ints, Trace

COLUMNS = {
    "min": 0.0,
    "p1": 0.01,
    "p5": 0.05,
    **{f"p{percent}": percent / 100 for percent in range(10, 100, 10)},
    "p95": 0.95,
    "p99": 0.99,
    "p99_9": 0.999,
    "max": 1.0,
}
"""Columns of a table of quantiles, and their levels."""
FIELDS = ("input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LengthQuantiles:
    """Distributions of prompt and output lengths, each [window, level], read-only.

    What is drawn lies between neighbouring quantiles, linearly; prompt and output are
    independent, since quantiles say nothing of both at once.
    """

    input_tokens: Floats
    output_tokens: Floats
    starts_s: Floats
    """[window], increasing; a time between belongs to the window that starts nearest."""
    levels: Floats
    """[level], from 0 to 1."""

    def __post_init__(self) -> None:
        shape = (len(self.starts_s), len(self.levels))
        steps = np.diff(self.levels)
        if not len(self.starts_s) or len(self.levels) < 2 or (steps <= 0).any():
            raise InvalidInput("lengths: a window and two rising levels are needed")
        for tokens in (self.input_tokens, self.output_tokens):
            if tokens.shape != shape or not (np.diff(tokens, axis=1) >= 0).all():
                raise InvalidInput("lengths: quantiles must rise, [window, level]")
            tokens.setflags(write=False)
        self.starts_s.setflags(write=False)
        self.levels.setflags(write=False)

    @classmethod
    def of_trace(cls, trace: Trace) -> LengthQuantiles:
        """The lengths of a trace's requests, all its time as one window."""
        levels = np.array(list(COLUMNS.values()))
        return cls(
            input_tokens=np.quantile(trace.input_tokens, levels)[None],
            output_tokens=np.quantile(trace.output_tokens, levels)[None],
            starts_s=np.zeros(1),
            levels=levels,
        )

    def draw(self, at_s: Floats, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """(input, output) tokens of requests that arrive at ``at_s``; at least 1."""
        middle = (self.starts_s[1:] + self.starts_s[:-1]) / 2
        window = np.searchsorted(middle, at_s, side="right")
        drawn = []
        for quantiles in (self.input_tokens, self.output_tokens):
            chance = rng.random(len(at_s))
            tokens = np.ones(len(at_s))
            for index in np.unique(window):
                mask = window == index
                tokens[mask] = np.interp(chance[mask], self.levels, quantiles[index])
            drawn.append(np.clip(np.rint(tokens), 1, MAX_COUNT).astype(np.int32))
        return drawn[0], drawn[1]


def read_lengths(path: str | os.PathLike[str]) -> dict[str, LengthQuantiles]:
    """Lengths per series, named as in `read_rates`.

    From a table ``client,t_s,field,min,p1,...,p99_9,max`` or from a ServeGen folder,
    whose histograms become the same quantiles. A client whose prompts or outputs are
    never recorded is absent.
    """
    file = os.fspath(path)
    rows = _histograms(Path(path)) if Path(path).is_dir() else _quantile_rows(file)
    found: dict[str, dict[float, dict[str, Floats]]] = {}
    for client, t_s, field, quantiles in rows:
        found.setdefault(client, {}).setdefault(t_s, {})[field] = quantiles
    lengths = {}
    for client, windows in found.items():
        whole = {t: both for t, both in sorted(windows.items()) if len(both) == 2}
        if whole:
            lengths[client] = LengthQuantiles(
                input_tokens=np.array([w["input_tokens"] for w in whole.values()]),
                output_tokens=np.array([w["output_tokens"] for w in whole.values()]),
                starts_s=np.array(list(whole)),
                levels=np.array(list(COLUMNS.values())),
            )
    if not lengths:
        raise InvalidInput("no lengths of prompts and outputs", file=file)
    return lengths


Row = tuple[str, float, str, Floats]
"""client, t_s, field, quantiles [level]"""


def _quantile_rows(file: str) -> Iterator[Row]:
    import pandas as pd

    table = pd.concat(read_frames(file))
    need_columns(
        file, list(table.columns), ("client", "t_s", "field", *COLUMNS), ("mean",)
    )
    table = table[table["field"].isin(FIELDS)]
    t_s = numbers(file, table["t_s"])
    quantiles = np.array([numbers(file, table[c], least=0) for c in COLUMNS]).T
    falls = (np.diff(quantiles, axis=1) < 0).any(axis=1)
    if falls.any():
        line = int(table.index[int(falls.argmax())])
        raise InvalidInput("quantiles do not rise", file=file, line=line)
    clients = table["client"].astype(str).str.strip()
    yield from zip(clients, t_s.tolist(), table["field"], quantiles, strict=True)


def _histograms(folder: Path) -> Iterator[Row]:
    """The ``chunk-<client>-dataset.json`` files: {t_s: {field: "{tokens: share}"}}."""
    for path in sorted(folder.glob("chunk-*-dataset.json")):
        file, client = str(path), path.name.split("-")[1]
        try:
            windows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidInput(f"not valid JSON: {error}", file=file) from None
        if not isinstance(windows, dict):
            raise InvalidInput("not a JSON object", file=file)
        for t_s, fields in windows.items():
            for field in FIELDS:
                if isinstance(fields, dict) and field not in fields:
                    continue
                try:
                    quantiles = _quantiles(fields[field])
                    yield client, float(t_s), field, quantiles
                except (
                    ValueError,
                    TypeError,
                    SyntaxError,
                    RecursionError,
                    MemoryError,
                ):
                    raise InvalidInput(
                        "not a map of tokens to their shares",
                        file=file,
                        field=f"{t_s}.{field}",
                    ) from None


def _quantiles(cell: Any) -> Floats:
    """The smallest lengths not exceeded by a share of ``COLUMNS`` of the requests."""
    # Python's literals, for keys are integers, which JSON does not allow; never eval.
    shares: Mapping[Any, Any] = (
        ast.literal_eval(cell) if isinstance(cell, str) else cell
    )
    pairs = sorted(
        (float(k), float(v)) for k, v in dict(shares).items() if float(v) > 0
    )
    tokens, weight = np.array(pairs).T
    if not (np.isfinite(tokens).all() and np.isfinite(weight).all()) or tokens[0] < 0:
        raise ValueError
    reached = np.cumsum(weight) / weight.sum()
    at = np.searchsorted(reached, np.array(list(COLUMNS.values())) - 1e-9)
    found: Floats = tokens[np.minimum(at, len(tokens) - 1)]
    return found
