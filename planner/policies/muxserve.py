"""Placement as in MuxServe: which LLMs share which GPUs, at which shares of their SMs.

Written from a description of the published planner (its throughput formula, its greedy
search over splits of the nodes), in seconds, GB and GiB as there. A *mesh* is n GPUs; each
hosts a shard (TP = n) of every LLM placed on it, whose prompts and decodes run beside each
other, each with a part of the streaming multiprocessors (SMs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement

from foreserve.planner.policies.muxserve_profile import (
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    SIZES,
    Size,
    SmProfile,
)

GPU_GB, ACTIVATION_GB = 80.0, 6.0
FILL = 0.9 * 0.6
"""Share of the memory that weights may take."""
SM_STEPS = range(30, 100, 10)
NODE_SPLITS: tuple[tuple[int, ...], ...] = (
    (8,),
    (4, 4),
    (4, 2, 2),
    (4, 2, 1, 1),
    (4, 1, 1, 1, 1),
    (2, 2, 2, 2),
    (2, 2, 2, 1, 1),
    (2, 2, 1, 1, 1, 1),
    (2, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 1, 1, 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxLlm:
    """One LLM to be placed."""

    name: str
    size: str
    rate_rps: float

    @property
    def of(self) -> Size:
        return SIZES[self.size]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """An LLM on meshes of n GPUs: the percent of SMs its decodes get, and its batch."""

    decode_sm: int
    batch: int
    throughput_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """``gpus`` GPUs and the LLMs on them, in the order of their placement."""

    gpus: int
    llms: tuple[tuple[MuxLlm, Share], ...]
    served_rps: tuple[float, ...]
    """Estimated throughput of each, which may be above its rate."""
    value_rps: float
    """Rate-weighted mean of the LLMs' estimated throughput."""

    @property
    def rate_rps(self) -> float:
        return sum(llm.rate_rps for llm, _ in self.llms)

    @property
    def capped_rps(self) -> tuple[float, ...]:
        """Throughput of each, but no more than its rate."""
        pairs = zip(self.llms, self.served_rps, strict=True)
        return tuple(min(llm.rate_rps, rps) for (llm, _), rps in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxPlacement:
    """All meshes, and the rate-weighted mean throughput that they are chosen by."""

    meshes: tuple[Mesh, ...]
    score_rps: float

    @property
    def idle_gpus(self) -> int:
        return sum(mesh.gpus for mesh in self.meshes if not mesh.llms)

    @property
    def capped_score_rps(self) -> float:
        """The score with throughputs of no more than the rates."""
        total = sum(mesh.rate_rps for mesh in self.meshes)
        weighted = sum(
            rps * llm.rate_rps
            for mesh in self.meshes
            for rps, (llm, _) in zip(mesh.capped_rps, mesh.llms, strict=True)
        )
        return weighted / total

    @property
    def served_rps(self) -> float:
        """Requests served, of each LLM no more than its rate."""
        return sum(sum(mesh.capped_rps) for mesh in self.meshes)


def place(
    llms: Sequence[MuxLlm],
    profile: SmProfile,
    *,
    nodes: int,
    corrected: bool,
) -> MuxPlacement | None:
    """The best placement over all splits of ``nodes`` nodes of 8 GPUs; None if no split
    holds all LLMs.

    The published planner compares the increase of a mesh's value with what it stored at
    the mesh's *position* in a list that it sorts again after every placement;
    ``corrected`` stores it with the mesh.
    """
    planner = _Planner(llms, profile, nodes)
    best: MuxPlacement | None = None
    for splits in combinations_with_replacement(NODE_SPLITS, nodes):
        sizes = [n for split in splits for n in split]
        if len(sizes) > len(llms) or max(sizes) < planner.least_gpus:
            continue
        found = planner.greedy(sizes, corrected)
        if found and (best is None or found.score_rps > best.score_rps):
            best = found
    return best


@dataclass(slots=True, eq=False)
class _Open:
    """A mesh that is being filled."""

    gpus: int
    free_gb: float
    tag: float = 0.0
    sm: int = 100
    llms: tuple[int, ...] = ()
    value_rps: float = 0.0


@dataclass(eq=False)
class _Planner:
    llms: Sequence[MuxLlm]
    profile: SmProfile
    nodes: int

    def __post_init__(self) -> None:
        self._served: dict[tuple[int, tuple[int, ...]], tuple[float, ...]] = {}

    @cached_property
    def candidates(self) -> list[dict[int, Share]]:
        """By LLM and n (5.3)."""
        total_gb = GPU_GB * 8 * self.nodes
        used = sum(llm.of.weight_gb + ACTIVATION_GB for llm in self.llms) / total_gb
        return [
            {
                n: self._candidate(llm, n, used * GPU_GB * n)
                for n in self.profile.tps[llm.size]
                if n >= llm.of.base_gpus
            }
            for llm in self.llms
        ]

    @cached_property
    def least_gpus(self) -> int:
        """What the largest mesh must have."""
        return max(min(shares) for shares in self.candidates)

    def _candidate(self, llm: MuxLlm, n: int, cache_gb: float) -> Share:
        best: Share | None = None
        for sm in SM_STEPS:
            cap = self._cap(llm, n, sm, cache_gb)
            batch, rps = self._bisect(llm, n, sm, cap)
            if _slack(rps) > llm.rate_rps:
                return Share(decode_sm=sm, batch=batch, throughput_rps=llm.rate_rps)
            if best is None or rps > best.throughput_rps:
                best = Share(decode_sm=sm, batch=batch, throughput_rps=rps)
        if best is None:
            raise ValueError("no share of SMs to try")
        return best

    def _cap(self, llm: MuxLlm, n: int, sm: int, cache_gb: float) -> int:
        sequence = (INPUT_TOKENS + OUTPUT_TOKENS) * llm.of.kv_gib_per_token
        most = self.profile.most_decodes(llm.size, n, sm)
        return min(math.floor(cache_gb / sequence), most)

    def _bisect(self, llm: MuxLlm, n: int, sm: int, cap: int) -> tuple[int, float]:
        """Batch at which the throughput meets the rate, and the throughput there."""
        low, high = 1.0, float(max(2, cap))
        batch = rps = 0.0
        while high - low >= 1:
            batch = (low + high) / 2
            step_s = self.profile.decode_s(llm.size, n, sm, batch)
            rps = batch / (
                OUTPUT_TOKENS * step_s + self.profile.prefill_s(llm.size, n, batch)
            )
            if rps >= llm.rate_rps:
                high = batch
            else:
                low = batch
        return math.floor(batch), rps

    def value_rps(self, n: int, placed: tuple[int, ...]) -> float:
        """Rate-weighted throughput of the LLMs of one mesh (5.4)."""
        rates = [self.llms[i].rate_rps for i in placed]
        found = zip(self.served_rps(n, placed), rates, strict=True)
        return sum(rps * rate for rps, rate in found) / sum(rates)

    def served_rps(self, n: int, placed: tuple[int, ...]) -> tuple[float, ...]:
        """Throughput of each LLM of one mesh, where its value is largest."""
        key = n, placed
        if key not in self._served:
            self._served[key] = self._served_rps(n, placed)
        return self._served[key]

    def _served_rps(self, n: int, placed: tuple[int, ...]) -> tuple[float, ...]:
        llms = [self.llms[i] for i in placed]
        sms = [self.candidates[i][n].decode_sm for i in placed]
        kv_gb = 0.98 * GPU_GB * n - sum(
            llm.of.weight_gb + ACTIVATION_GB for llm in llms
        )
        weights = [llm.rate_rps * llm.of.kv_gib_per_token for llm in llms]
        caps = [
            self._cap(llm, n, sm, max(0.0, kv_gb) * weight / sum(weights))
            for llm, sm, weight in zip(llms, sms, weights, strict=True)
        ]
        batches = [
            self._bisect(llm, n, sm, cap)[0]
            for llm, sm, cap in zip(llms, sms, caps, strict=True)
        ]
        best, value = (0.0,) * len(llms), 0.0
        while any(b < cap for b, cap in zip(batches, caps, strict=True)):
            prompts_s = sum(
                self.profile.prefill_s(llm.size, n, b)
                for llm, b in zip(llms, batches, strict=True)
            )
            found = [
                b
                / (
                    OUTPUT_TOKENS * self.profile.decode_s(llm.size, n, sm, b)
                    + prompts_s
                )
                for llm, sm, b in zip(llms, sms, batches, strict=True)
            ]
            pairs = list(zip(found, llms, strict=True))
            weighted = sum(rps * llm.rate_rps for rps, llm in pairs)
            if weighted > value:
                best, value = tuple(found), weighted
            low = [
                (rps / llm.rate_rps, i)
                for i, (rps, llm) in enumerate(pairs)
                if batches[i] < caps[i] and _slack(rps) < llm.rate_rps
            ]
            if not low:
                break
            batches[min(low)[1]] += 1
        return best

    def greedy(self, sizes: Sequence[int], corrected: bool) -> MuxPlacement | None:
        """Fill meshes of these sizes (5.5); None where an LLM fits nowhere."""
        meshes = [_Open(gpus=n, free_gb=FILL * GPU_GB * n) for n in sizes]
        stored = [0.0] * len(meshes)
        for i in self._order:
            meshes.sort(key=lambda mesh: (mesh.tag, mesh.free_gb), reverse=True)
            llm, best, best_gain, best_value = self.llms[i], -1, -math.inf, 0.0
            for at, mesh in enumerate(meshes):
                share = self.candidates[i].get(mesh.gpus)
                if (
                    share is None
                    or mesh.free_gb < llm.of.weight_gb
                    or mesh.sm + 20 < share.decode_sm
                ):
                    continue
                value = self.value_rps(mesh.gpus, (*mesh.llms, i))
                gain = value - (mesh.value_rps if corrected else stored[at])
                fewer = best >= 0 and mesh.gpus < meshes[best].gpus
                if gain > best_gain or (gain == best_gain and fewer):
                    best, best_gain, best_value = at, gain, value
            if best < 0:
                return None
            mesh = meshes[best]
            mesh.value_rps = stored[best] = best_value
            mesh.llms = (*mesh.llms, i)
            mesh.tag -= llm.rate_rps * llm.of.scale / mesh.gpus
            mesh.free_gb -= llm.of.weight_gb + 7.6
            mesh.sm -= self.candidates[i][mesh.gpus].decode_sm
        total = sum(llm.rate_rps for llm in self.llms)
        score = sum(
            mesh.value_rps * sum(self.llms[i].rate_rps for i in mesh.llms)
            for mesh in meshes
        )
        return MuxPlacement(
            meshes=tuple(self._closed(mesh) for mesh in meshes), score_rps=score / total
        )

    @cached_property
    def _order(self) -> list[int]:
        def by(i: int, factor: int) -> tuple[float, int]:
            return self.llms[i].rate_rps * factor, factor

        first = sorted(
            range(len(self.llms)),
            key=lambda i: by(i, self.llms[i].of.base_gpus),
            reverse=True,
        )
        return sorted(first, key=lambda i: by(i, self.llms[i].of.scale), reverse=True)

    def _closed(self, mesh: _Open) -> Mesh:
        return self.mesh(mesh.gpus, mesh.llms)

    def mesh(self, n: int, placed: tuple[int, ...]) -> Mesh:
        """A mesh with these LLMs."""
        return Mesh(
            gpus=n,
            llms=tuple((self.llms[i], self.candidates[i][n]) for i in placed),
            served_rps=self.served_rps(n, placed),
            value_rps=self.value_rps(n, placed) if placed else 0.0,
        )

    def may_share(self, n: int, placed: Sequence[int]) -> bool:
        """Whether the rules of 5.5 let a mesh hold these LLMs, whatever their order: the
        last one needs room for its weights only, and may take 20 % of the SMs more."""
        weights_gb = sum(self.llms[i].of.weight_gb for i in placed)
        return (
            all(n in self.candidates[i] for i in placed)
            and weights_gb + 7.6 * (len(placed) - 1) <= FILL * GPU_GB * n + 1e-9
            and sum(self.candidates[i][n].decode_sm for i in placed) <= 120
        )


def every_mesh(
    llms: Sequence[MuxLlm], profile: SmProfile, *, nodes: int
) -> Iterator[tuple[Mesh, tuple[int, ...]]]:
    """All meshes that a placement may be made of, with the indices of their LLMs."""
    planner = _Planner(llms, profile, nodes)
    for n in sorted({n for split in NODE_SPLITS for n in split}):
        fitting: list[tuple[int, ...]] = [()]
        # The rules only get harder with every LLM, so sets grow from sets that fit.
        while fitting:
            fitting = [
                (*placed, i)
                for placed in fitting
                for i in range(placed[-1] + 1 if placed else 0, len(llms))
                if planner.may_share(n, (*placed, i))
            ]
            for placed in fitting:
                yield planner.mesh(n, placed), placed


def _slack(rps: float) -> float:
    """A throughput that counts as this much."""
    return rps + min(0.5, 0.1 * rps)
