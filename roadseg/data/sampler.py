"""Which samples a step sees: a function of (seed, step) alone, so a resumed run sees the very next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from roadseg.data.augment import generator


def epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """int64 [samples]: every sample once, in the order of this epoch."""
    return generator(seed, 1, epoch).permutation(samples)


class Batches:
    """Batches of (epoch, sample) for steps first..last-1; epochs follow on one another without a gap.

    Position p of the endless stream is sample `epoch_order(p // n)[p % n]`; step s holds positions
    s * batch_size and on. A batch may span two epochs, so no sample is ever dropped.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.first, self.last = first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.first, self.last):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.samples != epoch:
                    epoch = position // self.samples
                    order = epoch_order(self.seed, epoch, self.samples)
                batch.append((epoch, int(order[position % self.samples])))
            yield batch
