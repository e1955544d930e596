"""Which picture comes when: a pure function of the seed, the stream and the index, so that a run can be resumed, and
shared by processes, without a word between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["Order", "bucket_sizes", "nearest_bucket"]

WIDEST = 2.0  # aspects of buckets lie between 1:2 and 2:1


class Order:
    """Epochs over items that are cut into buckets; every `group` consecutive indices are of one bucket.

    In each epoch every item comes at least once: each bucket is permuted, its last group filled from its beginning, and
    the groups of all buckets are permuted. One bucket and a group of 1 is a plain permutation.

    Args:
        buckets: the items of each, none empty.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], group: int, seed: int) -> None:
        self.buckets, self.group, self.seed = [np.asarray(bucket) for bucket in buckets], group, seed
        self.groups = [-(-len(bucket) // group) for bucket in self.buckets]
        self._epoch: tuple[tuple[str, int], list[np.ndarray], list[tuple[int, int]]] | None = None

    def candidates(self, stream: str, index: int) -> Iterator[int]:
        """The item at an index, and then those that take its place if it cannot be used, each item of its bucket
        once."""
        epoch, place = divmod(index, sum(self.groups) * self.group)
        permuted, groups = self._of(stream, epoch)
        bucket, first = groups[place // self.group]
        items = permuted[bucket]
        start = first * self.group + place % self.group
        for step in range(len(items)):
            yield int(items[(start + step) % len(items)])

    def _of(self, stream: str, epoch: int) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
        if self._epoch is None or self._epoch[0] != (stream, epoch):
            rng = np.random.default_rng([self.seed, *stream.encode(), epoch])
            permuted = [rng.permutation(bucket) for bucket in self.buckets]
            groups = [(bucket, first) for bucket, count in enumerate(self.groups) for first in range(count)]
            self._epoch = ((stream, epoch), permuted, [groups[k] for k in rng.permutation(len(groups))])
        return self._epoch[1], self._epoch[2]


def bucket_sizes(size: int, multiple: int) -> list[tuple[int, int]]:
    """Heights and widths of about `size * size` pixels, sides multiples of `multiple`, from 1:2 to 2:1."""
    found = {(size, size)}
    for height in range(multiple, 2 * size + 1, multiple):
        width = round(size * size / height / multiple) * multiple
        if width and 1 / WIDEST <= width / height <= WIDEST:
            found.add((height, width))
    return sorted(found)


def nearest_bucket(sizes: Sequence[tuple[int, int]], width: int, height: int) -> int:
    """The size whose aspect is nearest to a picture's, in the logarithm."""
    return int(np.argmin([abs(np.log(w / h) - np.log(width / height)) for h, w in sizes]))
