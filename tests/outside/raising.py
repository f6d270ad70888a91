"""Parts of a run that fail, as a researcher's first versions do. The package does not know this file."""

import dataclasses

from mine import Count, CountFamily, CountTask, not_the_first

ERRORS = {"OSError": OSError, "ValueError": ValueError, "KeyError": KeyError}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BrokenTask(CountTask):
    raises: str  # a key of ERRORS; "": nothing
    where: str

    def world(self):
        self.check("world")
        return super().world()

    def score(self, episode):
        self.check("score")
        return super().score(episode)

    def demonstrate(self, rng, *, solve):
        self.check("demonstrate")
        if self.where != "silent":
            yield "count oak"
            self.check("script")
        yield f"submit {self.words}"

    def check(self, where):
        if self.raises and where == self.where:
            raise ERRORS[self.raises](f"no {where}")


class BrokenFamily:
    """Its train tasks raise `error` in `where`: those from index `first` on, one in `every`."""

    def __init__(self, most, *, where="", error="ValueError", first=0, every=1):
        self._inner, self._where, self._error, self._first, self._every = CountFamily(most), where, error, first, every

    def make(self, split, index):
        broken = split == "train" and index >= self._first and index % self._every == 0
        if broken and self._where == "make":
            raise ERRORS[self._error]("no task")
        task = self._inner.make(split, index)
        fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)} | {"judged": True}
        return BrokenTask(**fields, raises=self._error if broken else "", where=self._where)


class BrokenCount(Count):
    def __init__(self, *, unit, error="ValueError"):
        super().__init__(unit=unit)
        self._error = error

    def run(self, world, arguments):
        raise ERRORS[self._error]("no count")


class Forgetful(Count):
    """A tool without a return statement."""

    def run(self, world, arguments):
        pass


def observation_filter(trajectory, mask, *, error):
    if trajectory.version.max() >= 1:  # in the second step
        raise ERRORS[error]("no filter")
    return not_the_first(trajectory, mask)


def advantage(rewards, *, error):
    if len(set(rewards)) > 1:
        raise ERRORS[error]("no advantage")
    return rewards


def loss(tokens, *, error):
    raise ERRORS[error]("no loss")
