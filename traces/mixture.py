"""The default forecast: a mixture of simple rules, weighted by what each would have cost.

Every member is the last value, tilted by the rhythm of earlier days, held up by what
yesterday saw next, widened where the series is restless, and lifted by its usual level.
Which of these help differs from series to series and changes with time, so again and
again the members are scored on the past: the capacity each would have provided with the
one factor that covers 95 % of the epochs. A member's weight falls exponentially with the
logarithm of that cost; a short past is filled up with the median over all series. Nothing
is fitted by gradient, so a short or dead series cannot send it astray.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from foreserve.traces.rules import (
    Series,
    day_mean,
    filled,
    lagged,
    last_value,
    whole_days,
)
from foreserve.traces.trace import Floats

COVER = 0.95
SHARPNESS = 40.0
"""How fast a weight falls with the logarithm of the cost (a member that costs 5 % more
has e^-2 of the weight). This and `COMMON_EPOCHS` were chosen on clients that are not
among those of the published benchmark."""
COMMON_EPOCHS = 100
"""A series' own record counts half after so many epochs."""
RECORD_EPOCHS = 720
"""Members are scored on as many of the latest epochs."""
LEAST_RECORD = 24
"""Epochs before the first score, and at least between two."""
RESTLESS_EPOCHS = 36
"""Half-life of the mean size of changes."""
LEAST_LEVEL = 0.02
"""Of the mean so far: values below it are not told from it by their ratio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One rule of the mixture."""

    within: float
    """Share (in logarithms) of the last epoch's mean, against its peak."""
    rhythm: float
    """Share of the change over the same time on earlier days."""
    level: float
    """Of the mean of the last day and of all time, added."""
    before: float
    """Of the larger of the two epochs that came next a day ago: not below."""
    restless: float
    """Times the mean size of changes (logarithm), as a margin."""


MEMBERS = tuple(
    Member(within=w, rhythm=r, level=v, before=b, restless=s)
    for w, r, v, b, s in itertools.product(
        (0.0, 0.5), (0.0, 0.75), (0.0, 0.3), (0.0, 0.7), (0.0, 1.0)
    )
)


def mixture(past: Series, ahead: int) -> Floats:
    """The mixture, scaled so that it was right on average so far."""
    values, days = past.values, past.days
    parts = _Parts.of(past, ahead)
    found = last_value(past, ahead)
    columns = found.shape[1]
    begin, step = LEAST_RECORD + ahead, max(LEAST_RECORD, days.per_day // 3)
    for start in range(begin + LEAST_RECORD + ahead, columns, step):
        known = slice(max(begin, start - ahead + 1 - RECORD_EPOCHS), start - ahead + 1)
        ahead_of = slice(start, min(start + step, columns))
        actual = values[:, known]
        members = [parts.shape(m, known) for m in MEMBERS]
        factor, cost, middle = _scores(np.stack(members), actual)
        weight = _weights(cost, actual.shape[1])
        shapes = np.stack([parts.shape(m, ahead_of) for m in MEMBERS])
        capacity = np.einsum("ms,mst->st", weight * factor, shapes)
        seen = np.einsum("ms,mst->st", weight * factor, np.stack(members))
        offered = np.where(np.isnan(actual), 0.0, seen).mean(axis=1)
        mixed = (
            capacity
            * (np.nan_to_num(actual).mean(axis=1) / np.maximum(offered, 1e-300))[
                :, None
            ]
        )
        usable = np.isfinite(mixed) & (middle > 0)[:, None]
        found[:, ahead_of] = np.where(usable, mixed, found[:, ahead_of])
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """What the members are made of, [series, epoch + ahead] each."""

    last: Floats
    within: Floats
    rhythm: Floats
    level: Floats
    before: Floats
    restless: Floats

    @classmethod
    def of(cls, past: Series, ahead: int) -> _Parts:
        days, per_day = past.days, past.days.per_day
        values = np.nan_to_num(filled(past.values))
        means = np.nan_to_num(filled(past.means))
        number = np.arange(1, values.shape[1] + 1)
        mean = np.cumsum(values, axis=1) / number
        total = np.cumsum(np.pad(values, ((0, 0), (per_day, 0))), axis=1)
        of_day = (total[:, per_day:] - total[:, :-per_day]) / np.minimum(
            number, per_day
        )
        least = np.maximum(LEAST_LEVEL * mean, 1e-12)
        log = np.log(np.maximum(values, least))
        change = np.zeros_like(log)
        change[:, ahead:] = np.clip(log[:, ahead:] - log[:, :-ahead], -0.5, 0.5)
        step = np.abs(np.diff(log, axis=1, prepend=log[:, :1]))
        whole = whole_days(ahead, days)
        before = np.fmax(
            lagged(values, whole, ahead), lagged(values, max(whole - 1, ahead), ahead)
        )
        aside = per_day // 48
        # Far enough back that the epochs after it were known as well.
        rhythm = day_mean(_smooth(change, aside), ahead + aside, days)
        rhythm = rhythm[:, : rhythm.shape[1] - aside]
        return cls(
            last=lagged(np.maximum(values, least), ahead, ahead),
            within=np.log(
                lagged(
                    np.maximum(means, least) / np.maximum(values, least), ahead, ahead
                )
            ),
            rhythm=np.nan_to_num(rhythm),
            level=lagged((mean + of_day) / 2, ahead, ahead),
            before=np.nan_to_num(before),
            restless=lagged(_decayed_mean(np.minimum(step, 1.5)), ahead, ahead),
        )

    def shape(self, member: Member, at: slice) -> Floats:
        """The member's capacity up to a factor."""
        tilt = member.within * self.within[:, at] + member.rhythm * self.rhythm[:, at]
        found = self.last[:, at] * np.exp(tilt)
        if member.before:
            found = np.maximum(found, member.before * self.before[:, at])
        if member.restless:
            found = found * np.exp(member.restless * self.restless[:, at])
        return found + member.level * self.level[:, at]


def _scores(shapes: Floats, actual: Floats) -> tuple[Floats, Floats, Floats]:
    """Factor that covers, log of the capacity it costs ([member, series] each), and the
    mean of the series; ``shapes`` is [member, series, epoch]."""
    known = ~np.isnan(actual)
    count = np.maximum(known.sum(axis=1), 1)
    ratio = np.where(known, actual / np.maximum(shapes, 1e-300), -np.inf)
    # The smallest factor for which at least COVER of the known epochs are covered.
    missed = count - np.ceil(COVER * count - 1e-9).astype(np.int64)
    place = actual.shape[1] - 1 - missed
    ratio.partition(np.unique(place), axis=2)
    at = np.broadcast_to(place, ratio.shape[:2])
    factor = np.take_along_axis(ratio, at[..., None], axis=2)[..., 0]
    factor = np.maximum(factor, 0.0)
    provided = factor * (shapes * known).sum(axis=2) / count
    mean = np.where(known, actual, 0.0).sum(axis=1) / count
    cost = np.log(np.maximum(provided, 1e-12) / np.maximum(mean, 1e-12))
    return factor, cost, mean


def _weights(cost: Floats, epochs: int) -> Floats:
    """Shares of the members, [member, series]."""
    own = cost - cost.mean(axis=0)
    common = np.median(own, axis=1, keepdims=True)
    record = (own * epochs + common * COMMON_EPOCHS) / (epochs + COMMON_EPOCHS)
    weight = np.exp(-SHARPNESS * (record - record.min(axis=0)))
    share: Floats = weight / weight.sum(axis=0)
    return share


def _smooth(values: Floats, each_side: int) -> Floats:
    """Mean over ``each_side`` columns before and after; fewer at the ends."""
    if each_side < 1:
        return values
    done = values.shape[1]
    total = np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], 1)
    low = np.maximum(np.arange(done) - each_side, 0)
    high = np.minimum(np.arange(done) + each_side + 1, done)
    smooth: Floats = (total[:, high] - total[:, low]) / (high - low)
    return smooth


def _decayed_mean(values: Floats) -> Floats:
    """Exponentially weighted mean of all columns so far."""
    keep = 0.5 ** (1 / RESTLESS_EPOCHS)
    found = np.empty_like(values)
    total, weight = np.zeros(len(values)), 0.0
    for column in range(values.shape[1]):
        total = keep * total + values[:, column]
        weight = keep * weight + 1.0
        found[:, column] = total / weight
    return found
