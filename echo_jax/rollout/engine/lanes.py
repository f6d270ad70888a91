"""Sessions over the lanes of a `DenseEngine`: the built-in engine, `rollout.engine = "dense"`."""

from echo_jax.rollout.engine.dense import DenseEngine
from echo_jax.rollout.engine.interface import EngineSetup
from echo_jax.rollout.trajectory import Sampled


class LaneSessions:
    """An `Engine` in which a session is a lane.

    The lane freed last is taken first. So a rollout that starts when another ends gets the other's lane, and the choice
    of lanes does not depend on how long tools take.
    """

    def __init__(self, setup: EngineSetup, *, steps_per_call: int = 8):
        """
        Args:
          steps_per_call: maximum number of tokens that each session decodes in one `step`.
        """
        self._lanes = DenseEngine(
            setup.graphdef,
            setup.model_config,
            lanes=setup.sessions,
            max_tokens=setup.max_tokens,
            temperature=setup.temperature,
            stop_ids=setup.stop_ids,
            seed=setup.seed,
            steps_per_call=steps_per_call,
            mesh=setup.mesh,
        )
        self.sessions = self._lanes.lanes
        self._free = self._all()

    def _all(self) -> list[int]:
        return list(reversed(range(self.sessions)))

    def set_params(self, params: dict, version: int) -> None:
        self._lanes.set_params(params, version)

    def open(self, rollout: int, group: int) -> int:
        del group  # every lane computes its own prompt
        if not self._free:
            raise RuntimeError(f"all {self.sessions} sessions are open")
        lane = self._free.pop()
        self._lanes.open(lane, rollout)
        return lane

    def extend(self, session: int, ids: tuple[int, ...], max_new: int) -> None:
        self._lanes.generate(session, ids, max_new)

    @property
    def busy(self) -> bool:
        return self._lanes.busy

    def step(self) -> dict[int, Sampled]:
        return self._lanes.step()

    def close(self, session: int) -> None:
        if session in self._free:
            raise ValueError(f"session {session} is not open")
        self._lanes.open(session, rollout=0)  # this empties the lane
        self._free.append(session)
        if len(self._free) == self.sessions:  # restore the first order, whatever the order of endings
            self._free = self._all()
