"""Large data tokenized by a joined cluster: Ray Data tasks encode chunks, the driver writes them in order."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from trainkit.data import chunks
from trainkit.data.chunks import Chunk, Encoder, Spread

CLUSTER_ROWS = 5_000_000  # from here on, other nodes are worth the start of Ray Data's workers there


def on_cluster(session: Callable[[], AbstractContextManager[Any]]) -> Spread:
    """Chunks encoded within `session`, a joined Ray, when there are many rows; in this machine's processes otherwise.

    The nodes read the rows where the driver does: files, and the cache in run.storage_path, lie on storage that all of them see.
    """

    def spread(encoder: Encoder, firsts: range) -> Iterator[Chunk]:
        if len(encoder.part) < CLUSTER_ROWS:
            yield from chunks.here(encoder, firsts)
            return
        with session():
            yield from by_ray_data(encoder, firsts)

    return spread


def by_ray_data(encoder: Encoder, firsts: range) -> Iterator[Chunk]:
    """One Ray Data worker per CPU of the cluster, each with a tokenizer of its own; chunks come back in order.

    Raises what encoding raises.
    """
    import ray

    class Encode:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"chunk": [pickle.dumps(_encoded(encoder, first, firsts.step)) for first in batch["first"].tolist()]}

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    starts = ray.data.from_items([{"first": first} for first in firsts], override_num_blocks=min(len(firsts), 4 * workers))
    for row in starts.map_batches(Encode, batch_size=1, concurrency=(1, workers), num_cpus=1).iter_rows():
        chunk = pickle.loads(row["chunk"])  # our own worker's
        if isinstance(chunk, Exception):
            raise chunk
        yield chunk


def _encoded(encoder: Encoder, first: int, count: int) -> Chunk | Exception:
    """A fault of the data comes back as it is: Ray Data would wrap it, after retries."""
    try:
        return encoder.chunk(first, count)
    except Exception as error:
        return error
