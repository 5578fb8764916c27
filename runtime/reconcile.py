"""From what is wanted and what is true to the steps that are safe now.

Pure and level-triggered: no plan of steps is kept. Each call looks at the phases and
emits what is safe at this moment; the next call, after something has changed, emits the
rest. What holds for every call:

1. *Memory.* The actions fit beside everything resident, LOADING and DRAINING included,
   all together and in any order: room that this call's own drops and demotes will free
   counts only once it is observed to be free.
2. *Dedicated GPUs.* A replica is activated only where no other one holds KV on any of
   its GPUs, unless both are wanted ACTIVE on the same set; never where one lends memory,
   which it may want back.
3. *Make before break.* A replica is not demoted while the LLM's serving concurrency would
   fall below what is desired, as long as a desired ACTIVE replica of the LLM can become
   ACTIVE, or at least be loaded, beside all that still serves. In particular an LLM with
   a desired ACTIVE replica that fits beside everything resident and everything desired,
   on GPUs where nothing else holds KV, is never without a serving replica (crashes
   apart). Where moves wait for each other in a circle, one replica is demoted, the one
   that is missed least, and the circle is looked at again.
4. *Convergence.* With `desired` within (C1)-(C4) and every phase of finite length,
   repeated calls reach exactly `desired`, from any start, in at most one demote, drop,
   load and activate per replica and crash. Not so where loads take more than what they
   end with (`ReplicaOption.load_extra_bytes`): a WARM replica for whose load there is no
   room beside what is to serve stays absent, and takes nobody's room meanwhile.
5. *Tenure.* What has become ACTIVE stays, and what has served keeps its weights, for as
   long as `models.tenure.kept_until_s` says, whatever is desired meanwhile. All else is
   decided as if it had gone already.
6. *Lost GPUs.* Nothing is asked of them. What is desired there counts as desired to
   serve, so replicas that it was to replace go on serving where they are in nobody's way.
   The same goes for busy replicas, which can take no action for the moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from foreserve.models.observed import HOLDS_KV, Observed, ObservedReplica, Phase
from foreserve.models.placement import Action, Kind, Placement, ReplicaId
from foreserve.models.problem import Fleet
from foreserve.models.tenure import kept_until_s
from foreserve.runtime.ledger import Ledger, phase_bytes


def reconcile(
    desired: Placement, observed: Observed, fleet: Fleet
) -> tuple[Action, ...]:
    """What may be done now to come closer to ``desired``; () where that is nothing.

    Demotes, drops, loads, activates, in this order; loads by urgency, as they share
    links.
    """
    wish, desired = desired, desired.without(observed.lost_gpus)
    present = {replica.id: replica for replica in observed.replicas}
    phases = {key: replica.phase for key, replica in present.items()}
    if phases == {key: replica.state for key, replica in desired.by_id.items()}:
        return ()
    steps: dict[Kind, list[ReplicaId]] = {
        "demote": [],
        "drop": [],
        "load": [],
        "activate": [],
    }
    steps["drop"] = [
        key
        for key, phase in phases.items()
        if phase in ("WARM", "LOADING") and key not in desired.by_id
    ]
    old = [
        replica
        for key, replica in present.items()
        if replica.phase == "ACTIVE"
        and not (key in desired.by_id and desired.by_id[key].state == "ACTIVE")
    ]
    reserved: dict[ReplicaId, int] = {}
    if old:
        ahead = _Ahead(old, wish, observed, fleet)
        ahead.play()
        steps["demote"], reserved = ahead.demotes, ahead.reserved
    ledger = Ledger.of(fleet, observed)
    for key, goal_bytes in _by_urgency(desired, fleet, reserved):
        phase = phases.get(key)
        option = fleet.option_of(key.llm, key.gpus)
        held = phase_bytes(option, phase)
        if phase is None:
            peak = phase_bytes(option, "LOADING")
            if ledger.can_hold(key.gpus, peak):
                steps["load"].append(key)
            elif peak > goal_bytes and not _has_room(key, peak, desired, phases, fleet):
                peak = 0
            goal_bytes = max(goal_bytes, peak)
        elif phase == "WARM" and desired.by_id[key].state == "ACTIVE":
            peak = phase_bytes(option, "ACTIVE")
            if ledger.can_hold(key.gpus, peak - held) and not any(
                (other.phase in HOLDS_KV and _clash(key, other, desired))
                or (other.spare_bytes and not set(key.gpus).isdisjoint(other.gpus))
                for other in observed.replicas
            ):
                steps["activate"].append(key)
        # Whether it could step or not: less urgent ones must not take its room.
        ledger.book(key.gpus, max(0, goal_bytes - held))
    kept = {key for key, _ in kept_for_now(desired, observed, fleet)}
    return tuple(
        Action(kind=kind, llm=key.llm, gpus=key.gpus)
        for kind, keys in steps.items()
        for key in keys
        if key not in observed.busy and key not in kept
    )


def kept_for_now(
    desired: Placement, observed: Observed, fleet: Fleet
) -> Iterator[tuple[ReplicaId, float]]:
    """Replicas that stay as they are, though not desired so, because of their tenure; and
    until when."""
    for replica in observed.replicas:
        if replica.served_since_s is None or replica.phase not in ("ACTIVE", "WARM"):
            continue
        goal = desired.by_id.get(replica.id)
        wanted = None if goal is None else goal.state
        if wanted not in ("ACTIVE", replica.phase):
            until_s = kept_until_s(replica, wanted, fleet)
            if until_s > observed.now_s:
                yield replica.id, until_s


def _has_room(
    key: ReplicaId,
    num_bytes: int,
    desired: Placement,
    phases: Mapping[ReplicaId, Phase],
    fleet: Fleet,
) -> bool:
    """Whether ``num_bytes`` fit on its GPUs beside what is to be ACTIVE there, and what is
    there already and stays."""
    for gpu in key.gpus:
        held = sum(
            fleet.bytes_on_gpu(other)
            for other in desired.by_gpu.get(gpu, ())
            if other.id != key and (other.state == "ACTIVE" or other.id in phases)
        )
        if held + num_bytes > fleet.cluster.usable_bytes(gpu):
            return False
    return True


def _by_urgency(
    desired: Placement, fleet: Fleet, reserved: dict[ReplicaId, int]
) -> Iterable[tuple[ReplicaId, int]]:
    """Desired replicas and the bytes per GPU to keep for them: replacements that a
    serving replica waits for, then other ACTIVE ones, then WARM ones."""
    yield from reserved.items()
    for state in ("ACTIVE", "WARM"):
        for key, replica in desired.by_id.items():
            if replica.state == state and key not in reserved:
                yield key, fleet.bytes_on_gpu(replica)


def _clash(key: ReplicaId, other: ObservedReplica, desired: Placement) -> bool:
    """Whether ``key`` may not be ACTIVE while ``other`` holds KV."""
    if other.id == key or set(key.gpus).isdisjoint(other.gpus):
        return False
    wanted = desired.by_id.get(other.id)
    together = wanted is not None and wanted.state == "ACTIVE"
    return not (together and set(other.gpus) == set(key.gpus))


class _Ahead:
    """Plays the moves ahead: which unwanted ACTIVE replicas go now, which later.

    Works on a ledger where all that is leaving has left. A replacement that fits there
    becomes ACTIVE sooner or later and relieves older replicas of its LLM, which makes
    room for the next one. Only what must go for that to move on is demoted now.
    """

    def __init__(
        self,
        old: list[ObservedReplica],
        desired: Placement,
        observed: Observed,
        fleet: Fleet,
    ) -> None:
        self.fleet = fleet
        self.desired = desired.without(observed.lost_gpus)
        self.demotes: list[ReplicaId] = []
        self.reserved: dict[ReplicaId, int] = {}
        """Replacements that something waits for, by urgency, with bytes per GPU to keep
        for them."""
        self.phases = {replica.id: replica.phase for replica in observed.replicas}
        goal = [r.id for r in desired.replicas if r.state == "ACTIVE"]
        llms = {replica.llm for replica in old}
        if observed.lost_gpus:  # old ones may stay for long, in anybody's way
            llms |= {key.llm for key in goal}
        self.missing = [
            key
            for key in goal
            if key.llm in llms
            and key in self.desired.by_id
            and key not in observed.busy
            and self.phases.get(key) != "ACTIVE"
        ]
        wanted_gpus = {gpu for key in self.missing for gpu in key.gpus}
        # First goes what is in the way, then what is missed least.
        self.old = sorted(
            old,
            key=lambda r: (
                wanted_gpus.isdisjoint(r.gpus),
                r.in_flight + observed.waiting.get(r.llm, 0) > 0,
                r.in_flight,
                r.id,
            ),
        )
        self.goal = dict.fromkeys(llms, 0)
        self.serving = dict.fromkeys(llms, 0)
        for key in goal:
            if key.llm in llms:
                self.goal[key.llm] += self._concurrency(key)
        for key, phase in self.phases.items():
            if phase == "ACTIVE" and key.llm in llms:
                self.serving[key.llm] += self._concurrency(key)
        self.ledger = Ledger(fleet)
        self.ledger.shut(observed.lost_gpus)
        self.held = dict.fromkeys(self.missing, 0)
        staying = {replica.id for replica in old}
        for key, phase in self.phases.items():
            wanted = self.desired.by_id.get(key)
            later: Phase | None = phase
            if key in staying:
                later = "ACTIVE"
            elif wanted is None:
                later = None
            elif wanted.state == "WARM":
                later = "WARM"
            num_bytes = self._bytes(key, later)
            self.ledger.book(key.gpus, num_bytes)
            if key in self.held:
                self.held[key] = num_bytes

    def play(self) -> None:
        """Fill ``demotes`` and ``reserved``."""
        while True:
            self._relieve()
            if not self.old:
                return
            if self._replace():
                continue
            self._load_beside()
            # An LLM whose next replacement is on its way loses less by waiting for it.
            helped = {key.llm for key in self.reserved}
            stuck = [key for key in self.missing if key.llm not in helped]
            in_the_way = {gpu for key in stuck for gpu in key.gpus}
            for replica in self.old:
                if replica.llm not in helped and in_the_way & set(replica.gpus):
                    self.demotes.append(replica.id)
                    self._leave(replica)
                    break
            else:
                return

    def _relieve(self) -> None:
        """Let go what is not needed to serve as much as desired."""
        for replica in list(self.old):
            rest = self.serving[replica.llm] - self._concurrency(replica.id)
            if rest >= self.goal[replica.llm]:
                if not self.reserved:  # nothing has to happen before
                    self.demotes.append(replica.id)
                self._leave(replica)

    def _leave(self, replica: ObservedReplica) -> None:
        self.old.remove(replica)
        self.serving[replica.llm] -= self._concurrency(replica.id)
        after: Phase | None = "WARM" if replica.id in self.desired.by_id else None
        freed = self._bytes(replica.id, "ACTIVE") - self._bytes(replica.id, after)
        self.ledger.book(replica.gpus, -freed)

    def _replace(self) -> bool:
        """Make the first replacement ACTIVE that can be, beside all that serves."""
        for key in self.missing:
            free = self.phases.get(key) == "ACTIVATING" or not any(
                _clash(key, replica, self.desired) for replica in self.old
            )
            if free and self._can_keep(key, "ACTIVE"):
                self._keep(key, "ACTIVE")
                self.missing.remove(key)
                self.serving[key.llm] += self._concurrency(key)
                return True
        return False

    def _load_beside(self) -> None:
        """Where a replacement cannot be ACTIVE yet, its weights may come at least."""
        for key in self.missing:
            absent = self.phases.get(key) in (None, "LOADING")
            if absent and self._can_keep(key, "LOADING"):
                self._keep(key, "LOADING")

    def _can_keep(self, key: ReplicaId, phase: Phase) -> bool:
        return self.ledger.can_hold(key.gpus, self._bytes(key, phase) - self.held[key])

    def _keep(self, key: ReplicaId, phase: Phase) -> None:
        num_bytes = self._bytes(key, phase)
        self.ledger.book(key.gpus, num_bytes - self.held[key])
        self.held[key] = self.reserved[key] = num_bytes

    def _concurrency(self, key: ReplicaId) -> int:
        return self.fleet.option_of(key.llm, key.gpus).concurrency

    def _bytes(self, key: ReplicaId, phase: Phase | None) -> int:
        return phase_bytes(self.fleet.option_of(key.llm, key.gpus), phase)
