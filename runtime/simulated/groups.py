"""GPU groups that serve several LLMs at once, each group by one `SharedEngine`.

Their requests are routed one by one, by the same rule as all others: `Members` stand beside
the compiled engines of their LLMs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption
from foreserve.models.serving import ServingRules
from foreserve.models.specs import GpuId
from foreserve.runtime.scheduler import POLICIES, Profile
from foreserve.runtime.simulated.engine import Taken
from foreserve.runtime.simulated.shared import Hosted, Pool, SharedEngine, SharedJob
from foreserve.runtime.turns import Rules

Gpus = tuple[GpuId, ...]


@dataclass(slots=True, eq=False, kw_only=True)
class Member:
    """One ACTIVE or DRAINING replica of a group."""

    id: ReplicaId
    llm: int
    """The fleet's index of its LLM."""
    life: int
    option: ReplicaOption
    service: int
    """Its index in the group's engine."""
    room_tokens: int
    """Most of one request that it takes: what its own part of the pool holds, so that the
    others may leave."""
    idle_since_s: float
    in_flight: int = 0
    takes: bool = True
    """Requests; not while it drains."""


@dataclass(slots=True, eq=False)
class Group:
    """The replicas that serve on one set of GPUs, and what works for them."""

    engine: SharedEngine
    members: dict[int, Member] = field(default_factory=dict)
    """By service."""
    scheduled_s: float = math.nan
    """When its next event was last said to be."""


class Groups:
    """All of them. Mutable, for one owner, who calls `SharedEngine.advance` in time."""

    def __init__(self, rules: ServingRules, link_bytes_per_s: float) -> None:
        self._rules, self._link_bytes_per_s = rules, link_bytes_per_s
        self._groups: dict[Gpus, Group] = {}

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def on(self, gpus: Gpus) -> Group | None:
        """The group of these GPUs, if they are shared."""
        return self._groups.get(gpus)

    def member(self, key: ReplicaId) -> Member | None:
        group = self._groups.get(key.gpus)
        members = group.members.values() if group else ()
        return next((m for m in members if m.id == key), None)

    def members(self, llm: int) -> Iterator[Member]:
        """All that are of the LLM."""
        for group in self._groups.values():
            yield from (m for m in group.members.values() if m.llm == llm)

    def join(
        self, key: ReplicaId, llm: int, life: int, option: ReplicaOption, now_s: float
    ) -> Member:
        """A replica begins to serve on GPUs that it shares from now on."""
        group = self._groups.get(key.gpus)
        hosted = _hosted(option)
        if group is None:
            engine = SharedEngine(
                [hosted],
                self._pool([option]),
                POLICIES[self._rules.scheduler].make(),
                Rules(
                    max_num_seqs=self._rules.max_num_seqs,
                    near=self._rules.near,
                    patience=self._rules.patience or math.inf,
                ),
            )
            group, service = self._groups.setdefault(key.gpus, Group(engine)), 0
        else:
            options = [m.option for m in group.members.values()]
            service = group.engine.add(hosted, self._pool([*options, option]), now_s)
        member = Member(
            id=key,
            llm=llm,
            life=life,
            option=option,
            service=service,
            room_tokens=self._pool([option]).room_tokens(option.kv_token_bytes),
            idle_since_s=now_s,
        )
        group.members[service] = member
        return member

    def leave(self, member: Member, now_s: float) -> tuple[SharedJob, ...]:
        """The replica serves no more; the jobs that it had."""
        group = self._groups[member.id.gpus]
        del group.members[member.service]
        if not group.members:
            del self._groups[member.id.gpus]
            return tuple(group.engine.jobs())
        pool = self._pool(m.option for m in group.members.values())
        return group.engine.remove(member.service, pool, now_s)

    def adopt(self, member: Member, job: Taken, now_s: float) -> None:
        """Go on with a request that the replica had while its GPUs were its own."""
        member.in_flight += 1
        self._groups[member.id.gpus].engine.adopt(
            SharedJob(
                request=job.request,
                service=member.service,
                arrival_s=job.arrival_s,
                input_tokens=job.input_tokens,
                output_tokens=job.output_tokens,
                given=job.given,
                computed=job.computed,
                first_token_s=job.first_token_s,
                last_token_s=job.last_token_s,
                preemptions=job.preemptions,
            ),
            now_s,
        )

    def _pool(self, options: Iterable[ReplicaOption]) -> Pool:
        return Pool(
            num_bytes=sum(option.kv_bytes for option in options),
            page_bytes=self._rules.page_bytes,
            link_bytes_per_s=self._link_bytes_per_s if self._rules.swapping else 0.0,
        )


def _hosted(option: ReplicaOption) -> Hosted:
    """What the group's scheduler knows of an LLM: what the plan assumed."""
    decode_s = max(option.exec_s - option.time.prefill_base_s, 1e-6)
    return Hosted(
        time=option.time,
        kv_bytes_per_token=option.kv_token_bytes,
        profile=Profile(
            reference_s=option.exec_s, decode_s=decode_s, rate_rps=option.rate_rps
        ),
        input_tokens=option.input_tokens,
        output_tokens=option.output_tokens,
        usual_output_tokens=max(1, math.ceil(option.output_tokens)),
    )
