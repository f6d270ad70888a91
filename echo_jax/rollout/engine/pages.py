"""The book of a pool of KV pages: which are free, who holds them, and which prefix of ids a page is of.

In: requests of sessions. Out: numbers of pages. Plain Python: the contents are on the device.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


class Pages:
    """Pages 0 to count - 1, with the number of holders of each. A page without a holder that is of a known prefix stays
    findable until a new page is needed; then the one that was given back first goes first."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(reversed(range(count)))
        self.holders = [0] * count  # of each page
        self._page_of: dict[bytes, int] = {}  # key of a prefix -> page
        self._key_of: dict[int, bytes] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # findable pages without a holder

    @property
    def held(self) -> int:
        """The number of pages that have a holder."""
        return self.count - len(self._free) - len(self._idle)

    @property
    def available(self) -> int:
        """The number of pages that `take` could return."""
        return self.count - self.held

    def take(self) -> int:
        """Returns a page that nobody holds, held once.

        Raises:
          RuntimeError: all pages are held.
        """
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            raise RuntimeError(f"all {self.count} pages are held")
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> int:
        """Returns a page that somebody holds, held once more.

        Raises:
          ValueError: nobody holds it.
        """
        if not self.holders[page]:
            raise ValueError(f"page {page} has no holder yet")
        self.holders[page] += 1
        return page

    def find(self, key: bytes) -> int | None:
        """Returns the page of this prefix, held once more; None if there is none."""
        page = self._page_of.get(key)
        if page is not None:
            self.holders[page] += 1
            self._idle.pop(page, None)
        return page

    def publish(self, page: int, key: bytes) -> None:
        """Lets `find` return a page, whose contents of this prefix are complete."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, page: int) -> None:
        """Ends one hold of a page.

        Raises:
          ValueError: nobody holds it.
        """
        if not self.holders[page]:
            raise ValueError(f"page {page} is released more often than it was taken")
        self.holders[page] -= 1
        if not self.holders[page]:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def forget_prefixes(self) -> None:
        """Makes no page findable any more, as after a change of the weights."""
        self._free += self._idle
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]


def prefix_keys(ids: Sequence[int], page: int) -> list[bytes]:
    """Returns a key for the prefix that ends with each page of the ids, the last partial page included."""
    keys, key = [], hashlib.sha256()
    for start in range(0, len(ids), page):
        key.update(np.asarray(ids[start : start + page], np.int32).tobytes())
        keys.append(key.digest())
    return keys
