"""`settle`, and the whole life of durable runs over workers that die: a state machine."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from aftertask.journal.settle import DEAD, Settled, Unsettled, settle

RUNS = st.builds(
    Unsettled,
    st.uuids().map(str),
    st.sampled_from(["scheduled", "accepted", "ready", "started"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)


@given(RUNS, st.integers(0, 5))
def test_each_run_is_settled_for_a_reason(run: Unsettled, most: int) -> None:
    """A dead letter has a known reason; what is not durable is lost."""
    verdict = settle(run, max_recoveries=most)
    assert verdict.run.id == run.id
    assert (verdict.action == "lost") == (not run.durable)
    assert (verdict.dead in DEAD) == (verdict.action == "dead_lettered")
    if verdict.action == "rerun":
        assert verdict.run.state == "ready" and run.state in ("ready", "started")
        assert verdict.run.recoveries <= max(most, run.recoveries)


@given(RUNS)
def test_what_is_not_ready_or_idempotent_is_never_run_again(run: Unsettled) -> None:
    """A run that started, or whose request may not have committed, runs again only if it is idempotent and started."""
    verdict = settle(run)
    may = run.durable and (run.state == "ready" or (run.state == "started" and run.idempotent))
    assert (verdict.action == "rerun") <= may


class Machine(RuleBasedStateMachine):
    """Workers accept, confirm, start and finish runs; die at any moment; the others settle what they leave."""

    runs = Bundle("runs")

    @initialize()
    def begin(self) -> None:
        """Nobody has done anything."""
        self.rows: dict[str, Unsettled] = {}
        self.owner: dict[str, int | None] = {}
        self.confirmed: set[str] = set()
        self.starts: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        self.count = 0

    @rule(target=runs, worker=st.integers(1, 3), durable=st.booleans(), idempotent=st.booleans())
    def schedule(self, worker: int, durable: bool, idempotent: bool) -> str:
        """A run comes into being; a durable one as an intent."""
        self.count += 1
        id = f"run-{self.count}"
        self.rows[id] = Unsettled(id, "accepted" if durable else "scheduled", durable, idempotent, 0)
        self.owner[id] = worker
        return id

    @rule(id=runs)
    def confirm(self, id: str) -> None:
        """The request has ended well."""
        row = self.rows.get(id)
        if row is not None and row.state == "accepted":
            self.rows[id] = replace(row, state="ready")
            self.confirmed.add(id)

    @rule(id=runs, worker=st.integers(1, 3))
    def start(self, id: str, worker: int) -> None:
        """The owner, or any worker where there is none, starts a run that is ready."""
        row = self.rows.get(id)
        if row is None or self.owner[id] not in (None, worker) or row.state not in ("ready", "scheduled"):
            return
        self.rows[id], self.owner[id] = replace(row, state="started"), worker
        self.starts[id] = self.starts.get(id, 0) + 1

    @rule(target=runs, id=consumes(runs))
    def finish(self, id: str) -> object:
        """A run that has started ends."""
        row = self.rows.get(id)
        if row is None or row.state != "started":
            return id
        self.end(id, "finished")
        return multiple()

    @rule(worker=st.integers(1, 3))
    def die(self, worker: int) -> None:
        """A worker is killed, and another settles its runs."""
        left = [row for id, row in self.rows.items() if self.owner[id] == worker]
        for row in left:
            self.apply(settle(row))

    def apply(self, verdict: Settled) -> None:
        """What the store does with a verdict."""
        if verdict.action == "rerun":
            self.rows[verdict.run.id], self.owner[verdict.run.id] = verdict.run, None
        else:
            self.end(verdict.run.id, verdict.dead or "lost")

    def end(self, id: str, how: str) -> None:
        """A run is settled."""
        assert id not in self.ended, "settled twice"
        self.ended[id] = how
        del self.rows[id]

    @invariant()
    def nothing_is_lost_and_nothing_runs_that_should_not(self) -> None:
        """Every run is either on its way or has one end; starts are bounded; an unconfirmed intent never starts."""
        for number in range(1, self.count + 1):
            id = f"run-{number}"
            assert (id in self.rows) != (id in self.ended)
        for row in self.rows.values():
            assert row.idempotent or self.starts.get(row.id, 0) <= 1
            assert self.starts.get(row.id, 0) <= 1 + 3
            assert not (row.durable and self.starts.get(row.id)) or row.id in self.confirmed


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
