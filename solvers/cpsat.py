"""The same problem for OR-Tools CP-SAT, in integers.

Letters and labels as in `foreserve.solvers.milp`, with one change of form. An LLM's
requests fill its fastest ACTIVE replicas first, so (C5), (O1) and (O3) need no rate per
replica: with the LLM's options in order of their delay c_1 <= c_2 <= ... and the penalty
of a refusal as the last, over[m,j,t] is the rate that the first j of them cannot take,

    over[m,j,t] >= lambda - sum over replicas of these options of min(mu, lambda) a,
    (O1) + (O3) = sum of D omega (c_{j+1} - c_j) over[m,j,t] + D omega c_1 lambda.

Groups that share GPUs are not in it: the best split over them is no longer LLM by LLM, and
rates by replica and level as integers are what CP-SAT is worst at. Rows (C6) to (C9) are
in `foreserve.solvers.cpsat_rules`.

Rates are whole millionths per second; costs are rounded down to multiples of 1 / K, with
K so large that this stays far below the tolerance, and the bound stays a bound.
"""

from __future__ import annotations

from math import floor, log2
from time import perf_counter
from typing import Any

from ortools.sat.python import cp_model

from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.solvers.cpsat_rules import (
    MICRO,
    Terms,
    c6_host_ram,
    c7_load_bandwidth,
    c8_reachability,
    c9_failure_domains,
)
from foreserve.solvers.index import Index, Key, decode, encode, index
from foreserve.solvers.result import (
    Progress,
    Schedule,
    Solved,
    SolveOptions,
    SolveReport,
)

LARGEST_COST = 2**58
"""CP-SAT wants every sum of costs inside 64 bits."""

STATUS = {
    cp_model.OPTIMAL: Status.OPTIMAL,
    cp_model.FEASIBLE: Status.FEASIBLE,
    cp_model.INFEASIBLE: Status.INFEASIBLE,
    cp_model.UNKNOWN: Status.TIME_LIMIT,
    cp_model.MODEL_INVALID: Status.ERROR,
}


def solve(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Build the model, search from the hint ``start``, read the best answer."""
    began_s = perf_counter()
    p = index(problem)
    m = Model(p)
    for row in (c1_gpu_memory, c2_nesting, c3_equal_groups, c4_one_copy, c5_demand):
        row(m, p)
    terms, constant = c6_host_ram(m, p)
    for row in (c7_load_bandwidth, c8_reachability, c9_failure_domains, c10_rules):
        row(m, p)
    for term in (o1_unserved, o2_cold_starts, o3_slowdown, o4_switching, o5_gpu_hours):
        added, offset = term(m, p)
        terms += added
        constant += offset
    scale = minimise(m, terms, constant)
    chosen = None if start is None else encode(p, start)
    if chosen is not None:
        hint(m, p, *chosen)

    seen = Seen(began_s, scale)
    solver = cp_model.CpSolver()
    solver.best_bound_callback = seen.on_bound
    solver.parameters.relative_gap_limit = options.gap
    solver.parameters.random_seed = options.seed % 2**31
    solver.parameters.num_workers = options.threads
    solver.parameters.linearization_level = 2  # without all rows in the LP, no bound
    left_s = options.time_limit_s - (perf_counter() - began_s)
    solver.parameters.max_time_in_seconds = max(0.0, left_s)
    if options.work_limit is not None:
        solver.parameters.max_deterministic_time = options.work_limit
    ending = solver.solve(m, seen)
    status = STATUS[ending]
    schedule = claimed = None
    if status.has_plan:
        # Not CP-SAT's own sum, whose costs are rounded down.
        claimed = constant + sum(c * solver.value(variable) for c, variable in terms)
        active = {key for key, a in m.a.items() if solver.boolean_value(a)}
        warm = {key for key, y in m.y.items() if solver.boolean_value(y)}
        hosted = {key for key, h in m.h.items() if solver.boolean_value(h)}
        schedule = decode(p, active, warm, hosted=hosted)
    firsts = (point.elapsed_s for point in seen.points if point.objective is not None)
    report = SolveReport(
        status=status,
        solver="cpsat",
        objective=claimed,
        bound=solver.best_objective_bound / scale if status.has_plan else 0.0,
        time_to_first_s=next(firsts, None),
        progress=tuple(seen.points),
        message=f"CP-SAT: {ending.name.lower()}",
    )
    return Solved(schedule=schedule, report=report)


def hint(m: Model, p: Index, active: set[Key], warm: set[Key]) -> None:
    """Hint at a schedule and at a good activation of its WARM replicas; the other
    variables follow."""
    for key, a in m.a.items():
        m.add_hint(a, key in active)
    for key, y in m.y.items():
        m.add_hint(y, key in warm)
    gpus_of: dict[int, list[int]] = {r: [] for r in p.R}
    for g in p.G:
        for r in p.on[g]:
            gpus_of[r].append(g)
    for (g, t), used in m.used.items():
        m.add_hint(used, any((r, t) in active or (r, t) in warm for r in p.on[g]))
    for t in p.T:
        serving = {g for r, epoch in active if epoch == t for g in gpus_of[r]}
        spare = [r for r, epoch in warm if epoch == t and (r, t) in m.y]
        spare.sort(key=lambda r: (-p.miss_cost[p.llm[r]] / len(gpus_of[r]), r))
        for s, (_, need) in enumerate(p.need[t]):
            left, taken = list(need), set(serving)
            for r, epoch in active:
                if epoch == t:
                    left[p.llm[r]] -= p.instances[r]
            started = set()
            for r in spare:
                if left[p.llm[r]] > 0 and taken.isdisjoint(gpus_of[r]):
                    left[p.llm[r]] -= p.instances[r]
                    taken.update(gpus_of[r])
                    started.add(r)
            for r in p.R:
                if (s, r, t) in m.z:
                    m.add_hint(m.z[s, r, t], r in started)


class Seen(cp_model.CpSolverSolutionCallback):
    """Notes each new answer and each new bound."""

    def __init__(self, began_s: float, scale: float) -> None:
        super().__init__()
        self.began_s, self.scale = began_s, scale
        self.points: list[Progress] = []

    def on_solution_callback(self) -> None:
        self._note(self.objective_value / self.scale, self.best_objective_bound)

    def on_bound(self, bound: float) -> None:
        self._note(self.points[-1].objective if self.points else None, bound)

    def _note(self, objective: float | None, bound: float) -> None:
        elapsed_s = perf_counter() - self.began_s
        self.points.append(Progress(elapsed_s, objective, bound / self.scale))


def minimise(m: cp_model.CpModel, terms: Terms, constant: float) -> float:
    """Set the objective in whole multiples of 1 / K, rounded down; returns K."""
    cost: dict[int, float] = {}
    variables = {variable.index: variable for _, variable in terms}
    for coefficient, variable in terms:
        cost[variable.index] = cost.get(variable.index, 0.0) + coefficient
    largest = abs(constant) + sum(
        abs(coefficient) * m.proto.variables[i].domain[1]
        for i, coefficient in cost.items()
    )
    scale = 2.0 ** floor(log2(LARGEST_COST / max(largest, 1.0)))
    m.minimize(
        cp_model.LinearExpr.weighted_sum(
            [variables[i] for i in cost], [floor(c * scale) for c in cost.values()]
        )
        + floor(constant * scale)
    )
    return scale


class Model(cp_model.CpModel):
    """A CP-SAT model with our variables as attributes, keyed as in milp."""

    def __init__(self, p: Index) -> None:
        super().__init__()
        every = [(r, t) for t in p.T for r in p.R]
        exposed = p.exposed()
        self.a = {key: self.new_bool_var(f"a{key}") for key in every}
        self.y = {key: self.new_bool_var(f"y{key}") for key in p.prewarmable()}
        self.x = {
            key: [self.a[key], self.y[key]] if key in self.y else [self.a[key]]
            for key in every
        }
        self.used = {(g, t): self.new_bool_var(f"used{g, t}") for t in p.T for g in p.G}
        self.z = {
            (s, r, t): self.new_bool_var(f"z{s, r, t}")
            for s, k, t in exposed
            for r in p.of[k]
        }
        self.miss = {
            (s, k, t): self.new_int_var(0, p.need[t][s][1][k], f"miss{s, k, t}")
            for s, k, t in exposed
        }
        later = [key for key in every if key[1] > 0]
        self.came = {key: self.new_bool_var(f"came{key}") for key in later}
        self.over: dict[tuple[int, int, int], Any] = {}
        self.h: dict[tuple[str, int, int], Any] = {}


def c1_gpu_memory(m: Model, p: Index) -> None:
    """(C1) sum over R_g of w (a + y) + v a <= M used   for all g, t"""
    for (g, t), used in m.used.items():
        held = sum(p.resident[r] * x for r in p.on[g] for x in m.x[r, t])
        kv = sum(p.kv[r] * m.a[r, t] for r in p.on[g])
        m.add(held + kv <= p.usable[g] * used)


def c2_nesting(m: Model, p: Index) -> None:
    """(C2) holds by construction: every candidate is on an aligned block of a node."""


def c3_equal_groups(m: Model, p: Index) -> None:
    """(C3) sum over R_g of a <= used   for all g, t: ACTIVE replicas share no GPU"""
    for (g, t), used in m.used.items():
        m.add_at_most_one([m.a[r, t] for r in p.on[g]] + [~used])


def c4_one_copy(m: Model, p: Index) -> None:
    """(C4) sum over R_g of m's a + y <= used   for all g, m, t"""
    for (g, t), used in m.used.items():
        for k in p.M:
            copies = [x for r in p.on[g] if p.llm[r] == k for x in m.x[r, t]]
            m.add_at_most_one([*copies, ~used])


def c5_demand(m: Model, p: Index) -> None:
    """(C5) over >= lambda - sum of min(mu, lambda) a over the first j options"""
    for t in p.T:
        for k in p.M:
            demand = round(p.demand[k][t] * MICRO)
            for j, delay in enumerate(_levels(p, k)):
                m.over[k, j, t] = over = m.new_int_var(0, demand, f"over{k, j, t}")
                taken = sum(
                    min(round(p.rate[r] * MICRO), demand) * m.a[r, t]
                    for r in p.of[k]
                    if p.slow_cost[r] <= delay
                )
                m.add(over + taken >= demand)


def c10_rules(m: Model, p: Index) -> None:
    """(C10) sum over R_m of a >= min_active, of a + y <= max_replicas   for all m, t;
    sum over R_g of a + y <= max_llms_per_gpu, <= 1 for LLMs apart; pins are there"""
    for k, llm in enumerate(p.problem.fleet.llms):
        for t in p.T:
            m.add(sum(m.a[r, t] for r in p.of[k]) >= llm.min_active)
            if llm.max_replicas is not None:
                m.add(sum(x for r in p.of[k] for x in m.x[r, t]) <= llm.max_replicas)
    rules = p.problem.fleet.rules
    for t in p.T:
        for g in p.G:
            if rules.max_llms_per_gpu is not None:
                there = [x for r in p.on[g] for x in m.x[r, t]]
                m.add(sum(there) <= rules.max_llms_per_gpu)
            for pair in rules.apart:
                mine = [r for r in p.on[g] if p.replicas[r][0].llm in pair]
                m.add_at_most_one([x for r in mine for x in m.x[r, t]])
        for pin in rules.held:
            m.add_bool_or(
                [
                    chosen[r, t]
                    for r in p.R
                    for state, chosen in (("ACTIVE", m.a), ("WARM", m.y))
                    if (p.replicas[r][0].llm, p.replicas[r][1]) == (pin.llm, pin.gpus)
                    and pin.state in (None, state)
                ]
            )


def o1_unserved(m: Model, p: Index) -> tuple[Terms, float]:
    """(O1) what even the last option cannot take, at omega D unserved_s"""
    terms: Terms = []
    constant = 0.0
    for k in p.M:
        last = len(_levels(p, k)) - 1
        for t in p.T:
            if last < 0:
                constant += p.lost_cost[k] * p.demand[k][t]
            else:
                terms.append((p.lost_cost[k] / MICRO, m.over[k, last, t]))
    return terms, constant


def o2_cold_starts(m: Model, p: Index) -> tuple[Terms, float]:
    """(O2) sum of pi omega loss miss, after the best activation of each scenario"""
    for (_, r, t), z in m.z.items():
        m.add_implication(z, m.y[r, t])
    for t in p.T:
        for s in range(len(p.need[t])):
            for g in p.G:
                ready = [m.z[s, r, t] for r in p.on[g] if (s, r, t) in m.z]
                serving = [m.a[r, t] for r in p.on[g]]
                if ready:
                    m.add_at_most_one([*ready, *serving, ~m.used[g, t]])
    for (s, k, t), miss in m.miss.items():
        need = p.need[t][s][1][k]
        covered = sum(
            min(p.instances[r], need) * (m.a[r, t] + m.z[s, r, t]) for r in p.of[k]
        )
        m.add(miss + covered >= need)
    return [
        (p.need[t][s][0] * p.miss_cost[k], miss) for (s, k, t), miss in m.miss.items()
    ], 0.0


def o3_slowdown(m: Model, p: Index) -> tuple[Terms, float]:
    """(O3) all requests at the first option's delay, what it cannot take at the second's
    on top, and so on; a request that no option takes has no delay"""
    terms: Terms = []
    constant = 0.0
    for k in p.M:
        delays = _levels(p, k)
        for t in p.T:
            if delays:
                constant += delays[0] * p.demand[k][t]
            for j, delay in enumerate(delays):
                after = delays[j + 1] if j + 1 < len(delays) else 0.0
                terms.append(((after - delay) / MICRO, m.over[k, j, t]))
    return terms, constant


def o4_switching(m: Model, p: Index) -> tuple[Terms, float]:
    """(O4) price of what loads and of what stops being ACTIVE, with x = a + y:
    x where not resident before and 1 - a where ACTIVE before, in the first epoch;
    came >= x - x' and left >= a' - a after it; and that of any change
    """
    terms = _replans(m, p)
    constant = p.stopped * p.demote_cost
    for (r, t), held in m.x.items():
        if t > 0:
            came, left = m.came[r, t], m.new_bool_var(f"left{r, t}")
            m.add_bool_or([came, *m.x[r, t - 1], ~m.a[r, t]])
            if (r, t) in m.y:
                m.add_bool_or([came, *m.x[r, t - 1], ~m.y[r, t]])
            m.add_bool_or([left, m.a[r, t], ~m.a[r, t - 1]])
            terms += [(p.load_cost[r], came), (p.demote_cost, left)]
            continue
        if not p.resident_before[r]:
            terms += [(p.load_cost[r], x) for x in held]
        if p.active_before[r]:
            terms.append((-p.demote_cost, m.a[r, t]))
            constant += p.demote_cost
    return terms, constant


def _replans(m: Model, p: Index) -> Terms:
    """change where x or a differs from the epoch before, if that as such has a price"""
    price, terms = p.problem.prices.replan_s, Terms()
    for t in p.T if price > 0 else ():
        change = m.new_bool_var(f"change{t}")
        terms.append((price, change))
        if t == 0 and p.gone:
            m.add(change == 1)
        for r in p.R:
            now, a = sum(m.x[r, t]), m.a[r, t]
            was = int(p.resident_before[r]) if t == 0 else sum(m.x[r, t - 1])
            served = int(p.active_before[r]) if t == 0 else m.a[r, t - 1]
            for difference in (now - was, was - now, a - served, served - a):
                m.add(difference <= change)
    return terms


def o5_gpu_hours(m: Model, p: Index) -> tuple[Terms, float]:
    """(O5) sum of rent used; (C1), (C3) and (C4) tie used to what a GPU holds"""
    return [(p.rent[g], used) for (g, _), used in m.used.items()], 0.0


def _levels(p: Index, k: int) -> list[float]:
    """c_1 < c_2 < ...: delays of the options of an LLM that beat refusing (O3)."""
    return sorted({p.slow_cost[r] for r in p.of[k] if p.slow_cost[r] <= p.lost_cost[k]})
