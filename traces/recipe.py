"""The recipe of a composed trace: what a person writes to make a fleet out of records.

YAML (or JSON); quantities take units (``20m``, ``7d``). `foreserve.traces.compose` says
how each key is carried out, docs/traces.md shows examples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from foreserve.models.codec import did_you_mean, read_text, read_yaml, structure
from foreserve.models.errors import InvalidInput
from foreserve.models.quantities import Seconds
from foreserve.models.record import Record
from foreserve.traces.synth import parse_tokens

Group = str | int
"""One LLM of a trace, or one series of a rate table, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthsPart(Record):
    """Lengths from elsewhere: another source, or stated (``512``, ``lognormal:512,1``)."""

    source: str | None = None
    group: Group | None = None
    input_tokens: str | float | None = None
    output_tokens: str | float | None = None

    def __post_init__(self) -> None:
        stated = (self.input_tokens, self.output_tokens)
        if (self.source is None) == (None in stated):
            raise InvalidInput(
                "lengths: give either source, or input_tokens and output_tokens"
            )
        for value in stated:
            if value is not None:
                parse_tokens(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmPart(Record):
    """One LLM of the fleet, and who plays it."""

    name: str
    source: str
    group: Group | None = None
    """Default: the whole source."""
    rate: float | None = None
    """Requests per second over the span."""
    share: float | None = None
    """Of the requests that ``popularity.rate_rps`` gives."""
    phase: Seconds = 0.0
    """The source is played from this much later on than ``start``."""
    wrap: bool = False
    """Begin the source again where it ends."""
    compress: float = 1.0
    """Seconds of the source in one second of the trace."""
    cv: float | None = None
    """Burstiness of the arrivals; as recorded if not given."""
    lengths: LengthsPart | None = None
    max_input: int | None = None
    min_output: int | None = None
    prefill: Seconds | None = None
    decode: Seconds | None = None
    """For the history, where they differ from ``history``'s."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise InvalidInput("name: must not be empty")
        if self.rate is not None and self.share is not None:
            raise InvalidInput("give rate or share, not both")
        _need(self.rate is None or self.rate >= 0, "rate", "must be at least 0")
        share_ok = self.share is None or 0 <= self.share <= 1
        _need(share_ok, "share", "must be from 0 to 1")
        _need(self.compress > 0, "compress", "must be positive")
        _need(self.cv is None or 0 <= self.cv <= 100, "cv", "must be from 0 to 100")
        for key, time_s in (("prefill", self.prefill), ("decode", self.decode)):
            _need(time_s is None or time_s >= 0, key, "must be at least 0")
        for key, value in (
            ("max_input", self.max_input),
            ("min_output", self.min_output),
        ):
            _need(value is None or 1 <= value <= 2**31 - 1, key, "must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PopularityPart(Record):
    """How many requests there are in all; with ``alpha``, who gets them: LLM ``i`` of the
    list (from 0) a share in proportion to ``(i + 1) ** -alpha``."""

    rate_rps: float
    alpha: float | None = None

    def __post_init__(self) -> None:
        _need(self.rate_rps > 0, "rate_rps", "must be positive")
        alpha_ok = self.alpha is None or 0 <= self.alpha <= 10
        _need(alpha_ok, "alpha", "must be from 0 to 10")


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertPart(Record):
    """Extra requests, at even chance over ``duration``, with the LLM's own lengths."""

    llm: str
    at: Seconds
    duration: Seconds
    requests: int

    def __post_init__(self) -> None:
        _need(self.requests >= 1, "requests", "must be at least 1")
        _need(self.at >= 0, "at", "must be at least 0")
        _need(self.duration > 0, "duration", "must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryPart(Record):
    """The demand of the time before ``start``, from the same sources, by the same rules.

    A request is taken to be in flight for ``prefill`` plus its output tokens times
    ``decode``.
    """

    span: Seconds
    epoch: Seconds = 300.0
    prefill: Seconds = 0.035
    decode: Seconds = 0.015

    def __post_init__(self) -> None:
        _need(self.epoch > 0, "epoch", "must be positive")
        epochs = self.span / self.epoch
        whole = self.span > 0 and math.isclose(epochs, round(epochs), abs_tol=1e-9)
        _need(whole, "span", "must be a whole number of epochs")
        _need(self.prefill >= 0, "prefill", "must be at least 0")
        _need(self.decode >= 0, "decode", "must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Record):
    """A fleet's trace: same recipe, same sources, same trace."""

    span: Seconds
    sources: Mapping[str, str]
    """Name -> file (relative to the recipe) or ``sample:NAME``."""
    llms: tuple[LlmPart, ...]
    start: Seconds = 0.0
    """The trace's second 0 on the sources' clock."""
    seed: int = 0
    popularity: PopularityPart | None = None
    insert: tuple[InsertPart, ...] = ()
    history: HistoryPart | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    """For people; carried over to the trace's sidecar."""

    def __post_init__(self) -> None:
        _need(self.span > 0, "span", "must be positive")
        _need(self.seed >= 0, "seed", "must be at least 0")
        _need(bool(self.llms), "llms", "at least one LLM is needed")
        names = [llm.name for llm in self.llms]
        for index, llm in enumerate(self.llms):
            twice = names.index(llm.name) < index
            _need(not twice, f"llms.{index}.name", f"{llm.name!r} is listed twice")
            self._known(llm.source, f"llms.{index}.source")
            if llm.lengths and llm.lengths.source:
                self._known(llm.lengths.source, f"llms.{index}.lengths.source")
            self._check_share(llm, f"llms.{index}")
        for index, burst in enumerate(self.insert):
            if burst.llm not in names:
                raise InvalidInput(
                    f"no LLM {burst.llm!r}",
                    field=f"insert.{index}.llm",
                    hint=did_you_mean(burst.llm, names),
                )
            inside = burst.at + burst.duration <= self.span
            _need(inside, f"insert.{index}.at", "the burst must end within the span")
        if self.popularity and self.popularity.alpha is None:
            used = any(llm.share is not None for llm in self.llms)
            _need(used, "popularity", "of no use without alpha, or the share of an LLM")
        shares = sum(llm.share or 0.0 for llm in self.llms)
        _need(
            shares <= 1 + 1e-9, "llms", f"the shares make {shares:.6g} in all, over 1"
        )

    def _known(self, source: str, field: str) -> None:
        if source not in self.sources:
            hint = did_you_mean(source, list(self.sources))
            raise InvalidInput(f"no source {source!r}", field=field, hint=hint)

    def _check_share(self, llm: LlmPart, field: str) -> None:
        powers = self.popularity is not None and self.popularity.alpha is not None
        if powers and (llm.rate is not None or llm.share is not None):
            raise InvalidInput(
                "popularity.alpha says already how many requests each LLM gets",
                field=field,
                hint="leave out alpha, or rate and share",
            )
        if llm.share is not None and self.popularity is None:
            raise InvalidInput(
                "share: of how many requests?",
                field=field,
                hint="give popularity: {rate_rps: ...}",
            )


def _need(fine: bool, field: str, what: str) -> None:
    """Raise `InvalidInput` at ``field``, a dotted path from the record, unless fine."""
    if not fine:
        raise InvalidInput(what, field=field)


def wanted(recipe: Recipe) -> tuple[int | None, ...]:
    """Requests per LLM that the recipe asks for, without inserts; None: as recorded.

    In all ``N = floor(span * rate_rps)``, of which an LLM gets ``floor(N * share)``: a
    few of the N may go to nobody.
    """
    popularity = recipe.popularity
    total = _floor(recipe.span * popularity.rate_rps) if popularity else 0
    if popularity and popularity.alpha is not None:
        weights = [(i + 1.0) ** -popularity.alpha for i in range(len(recipe.llms))]
        return tuple(_floor(total * weight / sum(weights)) for weight in weights)
    counts: list[int | None] = []
    for llm in recipe.llms:
        if llm.share is not None:
            counts.append(_floor(total * llm.share))
        else:
            counts.append(None if llm.rate is None else _floor(recipe.span * llm.rate))
    return tuple(counts)


def _floor(value: float) -> int:
    """Floor of what should be exact: 0.29 * 100 is 29."""
    return math.floor(round(value, 6))


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe; each fault is an `InvalidInput` with file, line and field."""
    file, text = os.fspath(path), read_text(path)
    plain = read_yaml(text, file)
    if not isinstance(plain, dict):
        what = "empty file" if plain is None else "a mapping of keys is expected"
        raise InvalidInput(what, file=file, hint="docs/traces.md shows recipes")
    return structure(Recipe, plain, text=text, file=file)


def recipe_path(name: str) -> Path:
    """Path of the shipped recipe ``name``."""
    folder = Path(str(files("foreserve.traces") / "recipes"))
    path = folder / f"{name}.yaml"
    if not path.exists():
        known = sorted(each.stem for each in folder.glob("*.yaml"))
        raise InvalidInput(f"no recipe {name!r}", hint=did_you_mean(name, known))
    return path
