"""A placement under construction: what fits where, and what one more replica brings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from math import inf

from foreserve.models import referee
from foreserve.models.llm import TP_SIZES
from foreserve.models.placement import Placement, Replica, ReplicaId, State
from foreserve.models.problem import Problem, ReplicaOption, ServedLlm, held_bytes
from foreserve.models.specs import GpuId, Node
from foreserve.solvers.prewarm import Wanted, place
from foreserve.solvers.shares import with_shares

Block = tuple[GpuId, ...]
Choice = tuple[ReplicaOption, Block]


class Board:
    """One epoch's placement that only ever holds what the rows allow.

    Rows (C1)-(C4), one ACTIVE replica per GPU, and the upper limits of (C10) hold at all
    times; min_active, min_after_loss and pins hold after `floors` succeeded. Mutable;
    `copy` is cheap.
    """

    def __init__(self, problem: Problem, epoch: int, before: Placement) -> None:
        self.problem, self.epoch, self.before = problem, epoch, before
        fleet = problem.fleet
        self.choices: dict[str, list[Choice]] = {llm.name: [] for llm in fleet.llms}
        for option, block in fleet.candidates():
            self.choices[option.llm].append((option, block))
        self.least_tp = {
            name: min((option.tp for option, _ in choices), default=0)
            for name, choices in self.choices.items()
        }
        self.around = {
            block: _around(fleet.cluster.node_by_name[block[0].node], block)
            for choices in self.choices.values()
            for _, block in choices
        }
        self.rent_s = {
            gpu: fleet.cluster.type_of(gpu).price_usd_per_h
            * problem.epoch_s
            / 3600
            * problem.prices.usd_s
            for gpu in fleet.cluster.gpus
        }
        self.free = {gpu: fleet.cluster.usable_bytes(gpu) for gpu in fleet.cluster.gpus}
        self.on: dict[GpuId, list[Replica]] = {gpu: [] for gpu in self.free}
        self.of: dict[str, list[Replica]] = {llm.name: [] for llm in fleet.llms}
        self.serving: set[GpuId] = set()
        self.joining = False
        """Whether ACTIVE replicas may come where others are, if `Sharing` allows it."""
        self.pinned = {(held.llm, held.gpus) for held in fleet.rules.held}
        self.apart: dict[str, set[str]] = {}
        for one, other in fleet.rules.apart:
            self.apart.setdefault(one, set()).add(other)
            self.apart.setdefault(other, set()).add(one)

    def copy(self) -> Board:
        other = object.__new__(Board)
        other.__dict__ = dict(self.__dict__)
        other.free = dict(self.free)
        other.on = {gpu: list(replicas) for gpu, replicas in self.on.items()}
        other.serving = set(self.serving)
        other.of = {llm: list(replicas) for llm, replicas in self.of.items()}
        return other

    def placement(self) -> Placement:
        replicas = tuple(r for replicas in self.of.values() for r in replicas)
        placement = Placement(replicas=replicas)
        return with_shares(self.problem, self.epoch, placement)

    def cost(self) -> float:
        """The referee's cost of this epoch."""
        placement = self.placement()
        return sum(
            term(self.problem, self.epoch, self.before, placement)
            for term in referee.TERMS.values()
        )

    def fits(self, option: ReplicaOption, block: Block, state: State) -> bool:
        llm = self.problem.fleet.llm_by_name[option.llm]
        if llm.max_replicas is not None and len(self.of[llm.name]) >= llm.max_replicas:
            return False
        needed = held_bytes(option, state)
        most = self.problem.fleet.rules.max_llms_per_gpu
        apart = self.apart.get(option.llm, ())
        for gpu in block:
            if self.free[gpu] < needed:
                return False
            if (
                state == "ACTIVE"
                and gpu in self.serving
                and not self._joins(gpu, block)
            ):
                return False
            if most is not None and len(self.on[gpu]) >= most:
                return False
            for other in self.on[gpu]:
                if other.llm == option.llm or other.llm in apart:
                    return False
                if not (set(block) <= set(other.gpus) or set(other.gpus) <= set(block)):
                    return False
        return True

    def _joins(self, gpu: GpuId, block: Block) -> bool:
        """Whether one more replica may be ACTIVE with those that are on ``gpu``."""
        sharing = self.problem.fleet.sharing
        if sharing is None or not self.joining:
            return False
        group = [r for r in self.on[gpu] if r.state == "ACTIVE"]
        return len(group) < sharing.most and all(r.gpus == block for r in group)

    def add(self, option: ReplicaOption, block: Block, state: State) -> None:
        replica = Replica(llm=option.llm, gpus=block, state=state)
        self.of[option.llm].append(replica)
        if state == "ACTIVE":
            self.serving.update(block)
        for gpu in block:
            self.on[gpu].append(replica)
            self.free[gpu] -= held_bytes(option, state)

    def remove(self, replica: Replica) -> None:
        num_bytes = self.problem.fleet.bytes_on_gpu(replica)
        self.of[replica.llm].remove(replica)
        for gpu in replica.gpus:
            self.on[gpu].remove(replica)
            self.free[gpu] += num_bytes
            if not any(r.state == "ACTIVE" for r in self.on[gpu]):
                self.serving.discard(gpu)

    def active(self, llm: str) -> list[Replica]:
        return [r for r in self.of[llm] if r.state == "ACTIVE"]

    def keep_active(self) -> None:
        """Take over what is ACTIVE before, as far as it fits."""
        for replica in self.before.replicas:
            if replica.state == "ACTIVE":
                self._take(replica, "ACTIVE")

    def trim(self) -> None:
        """Stop ACTIVE replicas as long as that saves more rent than it costs (O1, O3)."""
        for index, llm in enumerate(self.problem.fleet.llms):
            while len(replicas := self.active(llm.name)) > llm.min_active:
                now_s = self._delay_s(index, map(self._option, replicas))
                worst, most_s = None, self.problem.prices.demote_s
                for replica in replicas:
                    if not self._may_stop(llm, replica):
                        continue
                    rest = [self._option(r) for r in replicas if r is not replica]
                    delay_s = self._delay_s(index, rest) - now_s
                    saved_s = sum(self.rent_s[g] for g in replica.gpus) - delay_s
                    if saved_s > most_s:
                        worst, most_s = replica, saved_s
                if worst is None:
                    break
                self.remove(worst)

    def _may_stop(self, llm: ServedLlm, replica: Replica) -> bool:
        """Whether pins and failure domains (C9) allow it; min_active apart."""
        if (replica.llm, replica.gpus) in self.pinned:
            return False
        if not llm.min_after_loss:
            return True
        return self._left([r for r in self.active(llm.name) if r is not replica]) >= (
            llm.min_after_loss
        )

    def _left(self, replicas: Sequence[Replica]) -> int:
        """Replicas left after the worst loss of a failure domain."""
        domain_of = self.problem.fleet.cluster.domain_of
        lost = Counter(domain_of[r.gpus[0].node] for r in replicas)
        return len(replicas) - max(lost.values(), default=0)

    def pins(self) -> bool:
        """Place what is held; False where it does not fit."""
        demand = {
            llm.name: self.problem.demand_rps[index][self.epoch]
            for index, llm in enumerate(self.problem.fleet.llms)
        }
        for held in self.problem.fleet.rules.held:
            option = self.problem.fleet.option_on(held.llm, held.gpus)
            state = held.state or ("ACTIVE" if demand[held.llm] > 0 else "WARM")
            if option is None or (option, held.gpus) not in self.choices[held.llm]:
                return False
            if not self.fits(option, held.gpus, state):
                return False
            self.add(option, held.gpus, state)
        return True

    def floors(self) -> bool:
        """Add ACTIVE replicas up to min_active, first of LLMs that need most GPUs, then
        of those with least choice, and up to min_after_loss; False where one does not
        fit."""

        def rank(llm: ServedLlm) -> tuple[int, int]:
            return -self.least_tp[llm.name], len(self.choices[llm.name])

        domain_of = self.problem.fleet.cluster.domain_of
        for llm in sorted(self.problem.fleet.llms, key=rank):
            while (
                len(active := self.active(llm.name)) < llm.min_active
                or self._left(active) < llm.min_after_loss
            ):
                here = Counter(domain_of[r.gpus[0].node] for r in active)
                spread = llm.min_after_loss > 0
                fitting = [
                    (
                        here[domain_of[block[0].node]] if spread else 0,
                        option.tp,
                        self._load_s(option, block),
                        self._idle(block),
                        i,
                    )
                    for i, (option, block) in enumerate(self.choices[llm.name])
                    if self.fits(option, block, "ACTIVE")
                ]
                if not fitting:
                    return False
                self.add(*self.choices[llm.name][min(fitting)[-1]], "ACTIVE")
        return True

    def cover(self, *, frugal: bool = False, per_gpu: bool = True) -> None:
        """Add the ACTIVE replica that saves most (per GPU), until none saves anything;
        ``frugal``: each LLM at its least TP only."""
        while True:
            best, chosen = (0.0, -inf), None
            for index, llm in enumerate(self.problem.fleet.llms):
                held = [self._option(replica) for replica in self.active(llm.name)]
                now_s, gain_s, last = self._delay_s(index, held), 0.0, None
                for option, block in self.choices[llm.name]:
                    if frugal and option.tp > self.least_tp[llm.name]:
                        continue
                    if option is not last:
                        gain_s = now_s - self._delay_s(index, [*held, option])
                        last = option
                    net_s = gain_s - self._load_s(option, block) - self._rent_s(block)
                    saved_s = net_s / option.tp if per_gpu else net_s
                    if saved_s <= 0 or saved_s < best[0]:
                        continue
                    if not self.fits(option, block, "ACTIVE"):
                        continue
                    # Ties leave large blocks whole for LLMs that need them.
                    key = (saved_s, -self._idle(block))
                    if key > best:
                        best, chosen = key, (option, block)
            if chosen is None:
                return
            self.add(*chosen, "ACTIVE")

    def prewarm(self, gpus: Collection[GpuId]) -> None:
        """Add WARM replicas on ``gpus`` without ACTIVE ones: those resident before that
        cover a loss, then new copies, then whatever else can stay for nothing."""
        wanted = {
            llm.name: self._wanted(index, gpus)
            for index, llm in enumerate(self.problem.fleet.llms)
        }
        kept: list[ReplicaId] = []
        for replica in self.before.replicas:
            room = len(wanted[replica.llm].scores) if replica.llm in wanted else 0
            useful = sum(r.llm == replica.llm for r in kept) < room
            idle = self.serving.isdisjoint(replica.gpus)
            if useful and idle and self._take(replica, "WARM"):
                kept.append(replica.id)
        free = {
            gpu: num_bytes
            for gpu, num_bytes in self.free.items()
            if gpu in gpus and gpu not in self.serving
        }
        for copy in place(list(wanted.values()), free, kept):
            option = self.problem.fleet.option_of(copy.llm, copy.gpus)
            if self.fits(option, copy.gpus, "WARM"):
                self.add(option, copy.gpus, "WARM")
        for replica in self.before.replicas:
            if all(self.on.get(gpu) for gpu in replica.gpus):
                self._take(replica, "WARM")

    def prune(self) -> None:
        """Empty GPUs, one at a time, whose WARM replicas do not pay for their rent."""
        total_s = self.cost()
        for gpu in self.free:
            if not self.on[gpu] or gpu in self.serving:
                continue
            if any((r.llm, r.gpus) in self.pinned for r in self.on[gpu]):
                continue
            without = self.copy()
            for replica in list(self.on[gpu]):
                without.remove(replica)
            cost_s = without.cost()
            if cost_s < total_s:
                self.__dict__, total_s = without.__dict__, cost_s

    def polish(self, trials: int) -> None:
        """Move WARM replicas, one at a time, where the referee likes them better; the
        scores of `prewarm` do not see which bursts come together. At most ``trials``
        placements are tried."""
        total_s = self.cost()
        moved = True
        while moved:
            moved = False
            warm = [r for held in self.of.values() for r in held if r.state == "WARM"]
            for replica in warm:
                if (replica.llm, replica.gpus) in self.pinned:
                    continue
                for option, block in self.choices[replica.llm]:
                    if block == replica.gpus or not self.serving.isdisjoint(block):
                        continue
                    other = self.copy()
                    other.remove(replica)
                    if not other.fits(option, block, "WARM"):
                        continue
                    if trials == 0:
                        return
                    trials -= 1
                    other.add(option, block, "WARM")
                    cost_s = other.cost()
                    if cost_s < total_s:
                        self.__dict__, total_s, moved = other.__dict__, cost_s, True
                        break

    def regroup(self, trials: int) -> None:
        """Move ACTIVE replicas, one at a time, to GPUs on which others serve, where the
        referee likes that better; WARM ones make room. At most ``trials`` moves."""
        self.joining = True
        total_s, moved = self.cost(), True
        while moved:
            moved = False
            for replica in [r for held in self.of.values() for r in held]:
                llm = self.problem.fleet.llm_by_name[replica.llm]
                if replica.state == "WARM" or not self._may_stop(llm, replica):
                    continue
                for option, block in self.choices[replica.llm]:
                    if block == replica.gpus or self.serving.isdisjoint(block):
                        continue
                    other = self._moved(replica, option, block)
                    if other is None:
                        continue
                    if trials == 0:
                        return
                    trials -= 1
                    if (cost_s := other.cost()) < total_s:
                        self.__dict__, total_s, moved = other.__dict__, cost_s, True
                        break

    def _moved(
        self, replica: Replica, option: ReplicaOption, block: Block
    ) -> Board | None:
        """A copy in which ``replica`` serves on ``block``; None where that cannot be."""
        other = self.copy()
        other.remove(replica)
        warm = {r for gpu in block for r in other.on[gpu] if r.state == "WARM"}
        for beside in sorted(warm, key=lambda r: (r.llm != replica.llm, r.id)):
            if other.fits(option, block, "ACTIVE"):
                break
            if (beside.llm, beside.gpus) not in self.pinned:
                other.remove(beside)
        if not other.fits(option, block, "ACTIVE"):
            return None
        other.add(option, block, "ACTIVE")
        return other

    def _take(self, replica: Replica, state: State) -> bool:
        """Hold a replica of the placement before; False if it may not be held."""
        if not self.problem.fleet.is_candidate(replica.id):
            return False
        option = self._option(replica)
        if not self.fits(option, replica.gpus, state):
            return False
        self.add(option, replica.gpus, state)
        return True

    def _wanted(self, index: int, gpus: Collection[GpuId]) -> Wanted:
        """Copies of one LLM that cover more expected loss than they take to load."""
        problem, llm = self.problem, self.problem.fleet.llms[index]
        unit = llm.instance_concurrency
        choices = [c for c in self.choices[llm.name] if all(g in gpus for g in c[1])]
        if not choices:
            return Wanted(llm=llm.name, resident_bytes=0, blocks=(), scores=())
        option, _ = max(
            choices, key=lambda c: (c[0].instances(unit) / c[0].tp, -c[0].tp)
        )
        count = option.instances(unit)
        blocks = [block for o, block in choices if o is option]
        ready = sum(self._option(r).instances(unit) for r in self.active(llm.name))
        scores: list[float] = []
        for j in range(len(blocks)):
            covered = sum(
                probability
                * min(
                    max(problem.need(s, index, self.epoch) - ready - j * count, 0),
                    count,
                )
                for s, probability in enumerate(problem.scenario_probability)
            )
            score = llm.weight * llm.cold_loss_s * covered
            if score <= problem.prices.load_s * option.load_s:
                break
            scores.append(score)
        return Wanted(
            llm=llm.name,
            resident_bytes=option.resident_bytes,
            blocks=blocks,
            scores=scores,
        )

    def _option(self, replica: Replica) -> ReplicaOption:
        return self.problem.fleet.option_of(replica.llm, replica.gpus)

    def _load_s(self, option: ReplicaOption, block: Block) -> float:
        if ReplicaId(llm=option.llm, gpus=block) in self.before.by_id:
            return 0.0
        return self.problem.prices.load_s * option.load_s

    def _rent_s(self, block: Block) -> float:
        """Rent of the GPUs of a block that hold nothing yet."""
        return sum(self.rent_s[gpu] for gpu in block if not self.on[gpu])

    def _idle(self, block: Block) -> int:
        """GPUs without an ACTIVE replica in the larger blocks around this one."""
        return sum(len(larger - self.serving) for larger in self.around[block])

    def _delay_s(self, index: int, options: Iterable[ReplicaOption]) -> float:
        """(O1) and (O3) of one LLM served by these options as well as can be."""
        problem, llm = self.problem, self.problem.fleet.llms[index]
        left_rps = problem.demand_rps[index][self.epoch]
        total = 0.0
        for option in sorted(options, key=lambda o: o.exec_s):
            slower_s = problem.slower_s(option)
            if slower_s > llm.unserved_s:
                break
            served_rps = min(left_rps, option.rate_rps)
            left_rps -= served_rps
            total += served_rps * slower_s
        return (total + left_rps * llm.unserved_s) * llm.weight * problem.epoch_s


def _around(node: Node, block: Block) -> tuple[frozenset[GpuId], ...]:
    return tuple(
        frozenset(larger)
        for tp in TP_SIZES
        if tp > len(block)
        for larger in node.blocks(tp)
        if block[0] in larger
    )
