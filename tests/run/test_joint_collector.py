"""Laws of collecting with other processes, which are simulated here; `tests/system/test_peers.py` has real ones."""

import threading

import pytest
from synthetic import make_trajectory

from echo_jax.rollout.collector import Interrupted, RolloutError, Seconds
from echo_jax.run.joint_collector import JointCollector
from echo_jax.system.peers import Peers
from echo_jax.system.user_code import UserCodeError


class WithAnother(Peers):
    """Two processes; the other one gives fixed answers."""

    def __init__(self, answer):
        super().__init__()
        self._answer = answer

    def gather(self, value, what="result"):
        return [value, self._answer[what]]


class Made:
    """A collector whose collections always end in the same way."""

    def __init__(self, *trajectories, fault="", raised=(), interrupted=False):
        self.stop, self.retried, self.fault, self.raised = threading.Event(), 0, fault, dict(raised)
        self.seconds, self.counts = Seconds(), {}
        self._trajectories, self._interrupted = list(trajectories), interrupted

    def rollouts(self):
        if self._interrupted:
            raise Interrupted(self._trajectories)
        return self._trajectories

    scripted = rollouts


GOOD, LOST = make_trajectory([1, 2]), make_trajectory([1, 2], scored=False, outcome="infra")
BROKEN = make_trajectory([1, 2], outcome="broken")
UNSCORED = make_trajectory([1, 2], scored=False, outcome="unscored")


def test_run_stops_with_the_cause_if_the_machine_fails_every_rollout():
    with pytest.raises(RolloutError, match="all 2 rollouts failed on this machine.*injected"):
        JointCollector(Made(LOST, LOST, fault="injected"), Peers()).rollouts()
    assert JointCollector(Made(LOST, GOOD, fault="injected"), Peers()).rollouts() == [LOST, GOOD]
    assert JointCollector(Made(), Peers()).rollouts() == []


def test_no_agent_stops_a_run_by_breaking_every_sandbox():
    assert JointCollector(Made(BROKEN, BROKEN, fault="theirs"), Peers()).rollouts() == [BROKEN] * 2
    assert JointCollector(Made(LOST, BROKEN, fault="theirs"), Peers()).rollouts() == [LOST, BROKEN]


def test_run_continues_if_its_tasks_cannot_say_how_it_went():
    assert JointCollector(Made(UNSCORED, UNSCORED, fault="the judge is out"), Peers()).rollouts() == [UNSCORED] * 2


def test_run_continues_if_one_host_fails_all_its_rollouts():
    well, ill = {"rollouts": False, "faults": [3, 0, "", 0]}, {"rollouts": False, "faults": [3, 3, "theirs", 0]}
    made = Made(LOST, LOST, fault="ours")
    assert JointCollector(made, WithAnother(well)).rollouts() == [LOST, LOST]
    with pytest.raises(RolloutError, match="all 5 rollouts failed.*ours; theirs"):
        JointCollector(made, WithAnother(ill)).rollouts()


@pytest.mark.parametrize("kind", ["rollouts", "scripted"])
def test_all_are_interrupted_when_another_process_is(kind):
    joint = JointCollector(Made(GOOD, GOOD), WithAnother({"rollouts": True, "a step": True}))
    with pytest.raises(Interrupted) as interrupted:
        getattr(joint, kind)()
    assert interrupted.value.finished == [GOOD, GOOD]
    with pytest.raises(Interrupted):
        joint.check_stop()


@pytest.mark.parametrize("kind", ["rollouts", "scripted"])
def test_finished_rollouts_of_an_interrupted_collection_are_passed_on(kind):
    joint = JointCollector(Made(GOOD, interrupted=True), Peers())
    with pytest.raises(Interrupted) as interrupted:
        getattr(joint, kind)()
    assert interrupted.value.finished == [GOOD]


def test_a_collection_that_adds_to_another_goes_on_counting_and_may_fail():
    class Varied(Made):
        def rollouts(self, found, retried, raised, seconds, decode):
            self.retried, self.raised, self.seconds, self.counts = retried, raised, seconds, {"decode": decode}
            return found

    joint = JointCollector(Varied(), Peers())
    joint.rollouts([GOOD, GOOD], 1, {0: "ours"}, Seconds(1.0, 2.0, 3.0), 5)
    failed = [LOST, LOST], 2, {7: "theirs", 8: "too"}, Seconds(0.5, 0.0, 0.0), 7
    assert joint.rollouts(*failed, adds=True) == [LOST, LOST]
    assert (joint.retried, joint.raised, joint.first_raised) == (3, 3, "ours")
    assert joint.seconds() == Seconds(1.5, 2.0, 3.0)
    assert joint.counts() == [{"decode": 5}, {"decode": 7}]
    assert list(joint.raised_here()) == [0, 7, 8]
    with pytest.raises(UserCodeError, match="in all 2 rollouts"):
        joint.rollouts(*failed)
    assert (joint.retried, joint.raised, joint.seconds()) == (2, 2, Seconds(0.5, 0.0, 0.0))


def test_all_processes_stop_only_when_one_is_asked_to():
    made = Made()
    JointCollector(made, Peers()).check_stop()
    made.stop.set()
    with pytest.raises(Interrupted):
        JointCollector(made, Peers()).check_stop()


def test_seconds_are_the_mean_over_all_processes():
    made = Made()
    made.seconds = Seconds(engine=1.0, tools=4.0, host=0.5)
    joint = JointCollector(made, WithAnother({"seconds": [3.0, 0.0, 1.5]}))
    assert joint.seconds() == Seconds(engine=2.0, tools=2.0, host=1.0)


def test_exceptions_count_over_all_processes_and_stop_the_run_if_no_rollout_is_without():
    made = Made(GOOD, GOOD, raised={0: "ours", 1: "another"})
    some = {"rollouts": False, "faults": [2, 0, "", 1, "theirs"], "an error": None}
    joint = JointCollector(made, WithAnother(some))
    assert joint.rollouts() == [GOOD, GOOD]
    assert (joint.raised, joint.first_raised, set(joint.raised_here())) == (3, "ours", {0, 1})
    joint = JointCollector(Made(GOOD, GOOD), WithAnother(some))
    joint.rollouts()
    assert (joint.raised, joint.first_raised) == (1, "theirs")
    every = some | {"faults": [2, 0, "", 2, "theirs"]}
    with pytest.raises(UserCodeError, match="in all 4 rollouts the task or a tool raised an exception.*ours"):
        JointCollector(made, WithAnother(every)).rollouts()
