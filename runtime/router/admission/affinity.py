"""Which replica has read a prompt's beginning already, as far as this router knows. Pure.

Requests carry keys of longer and longer beginnings of their prompts, or one of their session, which
is below zero (prompt.py). Two rules, the first that applies counts; where its replica has too much
to do, or none applies, the request goes to the least loaded, as if it had no keys.

1. *Remembered*. The longest beginning that this router has sent before is at least a quarter of the
   prompt: the least loaded of the replicas that got it, if its load is at most (1 + SLACK) x mean.
   A session is where its last request went, which has all of it.
2. *Home*. The first beginning that was never sent is what sets this prompt apart from all others,
   whatever they have in common. Its home is the replica of the highest hash (rendezvous hashing,
   Thaler and Ravishankar 1998), if its load is at most the mean. Routers that never speak to each
   other agree on it, so it is what makes several routers, or workers of one, find one cache.

Load is in outstanding tokens, and mean is that of the replicas that may be chosen, with the new
request: (sum of loads + its tokens) / replicas. That is consistent hashing with bounded loads
(Mirrokni, Thorup and Zadimoghaddam 2016), whose bound is (1 + e) x m / n. Example: loads of 900,
300, 0 and 0, and a request of 800: the mean is 2,000 / 4 = 500, so whoever remembers it must not
have more than 625, its home not more than 500.

Rules this file keeps:
- a beginning that more than half of the replicas have got is everybody's (a system prompt) and
  binds nobody to a replica;
- a replica that joins or leaves is home to its share of the keys, and no other key moves (no ring
  has to be kept for that, and a table of any size costs nothing until a key needs its home);
- at most MEMORY keys are remembered, those that were sent longest ago are forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Set
from hashlib import blake2b

SLACK = 0.25  # bench/affinity.py: 0.5 finds up to a tenth more, but the slowest wait longer
MEMORY = 65_536  # keys, of all models together
_MOST_READERS = 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2 ** 64 / the golden ratio, odd
_64_BITS = 2**64 - 1


class Affinity:
    """What one router remembers. Keys of different models differ."""

    def __init__(self) -> None:
        self._readers: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._salt: dict[str, int] = {}

    def pick(self, keys: tuple[int, ...], loads: Mapping[str, int], tokens: int) -> str | None:
        """The replica for a request of `tokens` with these keys (not empty, the shortest
        beginning's first); `loads`: outstanding tokens of each that may be chosen (not empty)."""
        mean = (sum(loads.values()) + tokens) / len(loads)
        last = len(keys) - 1
        known = last
        while known >= 0 and keys[known] not in self._readers:
            known -= 1
        if known >= 0:
            readers = [r for r in self._readers[keys[known]] if r in loads]
            if 2 * len(readers) > len(loads):
                if known == last:
                    return None
            elif readers and known >= last - 1:
                best = min(readers, key=loads.__getitem__)
                return best if loads[best] <= (1 + SLACK) * mean else None
        home = self.home(keys[min(known + 1, last)], loads)
        return home if loads[home] <= mean else None

    def home(self, key: int, replica_ids: Iterable[str]) -> str:
        """The replica of the highest hash: the same in every router."""
        best, highest = "", -1
        for replica_id in replica_ids:
            # Knuth's multiplicative hash; Python's own, of a pair of integers, is far from even.
            spot = ((key ^ self._salted(replica_id)) * _GOLDEN) & _64_BITS
            if spot > highest:
                best, highest = replica_id, spot
        return best

    def sent(self, keys: tuple[int, ...], replica_id: str) -> None:
        """A request with these keys goes to this replica."""
        known = self._readers
        for key in keys:
            readers = known.get(key)
            if readers is None or key < 0:
                known[key] = (replica_id,)
            elif replica_id not in readers:
                known[key] = (*readers, replica_id)[-_MOST_READERS:]
            known.move_to_end(key)
        while len(known) > MEMORY:
            known.popitem(last=False)

    def keep_only(self, listed: Set[str]) -> None:
        """Other replicas are gone for good. What they got is forgotten as it ages."""
        for replica_id in [r for r in self._salt if r not in listed]:
            del self._salt[replica_id]

    def _salted(self, replica_id: str) -> int:
        salt = self._salt.get(replica_id)
        if salt is None:
            digest = blake2b(replica_id.encode(), digest_size=8).digest()
            salt = self._salt[replica_id] = int.from_bytes(digest)
        return salt
