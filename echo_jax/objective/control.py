"""A controller that holds the ratio of the observation term to the policy term.

In: how large both terms are on a batch, before its update. Out: the factor on lambda for that update.
"""

import dataclasses
import math

MEASURES = ("gradients", "terms")


@dataclasses.dataclass(frozen=True)
class Control:
    """lambda does not transfer between tasks, models and normalisers; the ratio of the two gradients may."""

    target: float  # of the observation term's measure over the policy term's
    measure: str = "gradients"  # of MEASURES: norms of their gradients, or their tokens' absolute losses
    gain: float = 0.5  # share of the error, in logarithms, that each update corrects

    def factor(self, factor: float, policy: float, observation: float) -> float:
        """Returns the next factor on lambda: of an error ratio / target the part to the power of `gain` is taken out.
        The factor stays as it is where a measure is 0 or not finite, since the ratio then says nothing.

        Args:
          factor: that of the last update.
          policy, observation: the measures on this batch, with a factor of 1 on lambda.
        """
        if not (0 < policy < math.inf and 0 < observation < math.inf):
            return factor
        return factor * (self.target * policy / (factor * observation)) ** self.gain
