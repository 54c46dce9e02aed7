"""What a training loop pays for its data: trainkit's feed beside five other ways to feed, in one run on one machine.

Workloads, both of 32 rows a micro-batch, synthetic and seeded:
    fixed     causal, 512 tokens a row, labels as long
    wikisql   seq2seq, lognormal lengths of mean 20 (source) and 16 (target), cut at 96

Measures in microseconds, each over `--batches` micro-batches after a warm-up, the median of two rounds (the second in reverse order):
    us        per micro-batch when the consumer asks as fast as it can
    p50, p99  how long one ask blocks when the consumer works 3 ms (asleep) between asks

Every way hands over the same three int64 tensors: input_ids, attention_mask, labels, padded to the longest row rounded up to 8. All are
treated kindly: tokens lie ready in the smallest integer type, Ray Data finds its blocks in the object store and does not shuffle, the
actor called once a batch returns arrays. Ours, the DataLoaders and the Trainer's collator shuffle.

Ours reads at most AHEAD_STEPS batches ahead, and a measure holds many times as many, so that few of them are got for free.

    python benchmarks/feed.py [--batches 1024 | --quick]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import re
import statistics
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader

from trainkit.cluster.session import environment, environment_settings, ray_session
from trainkit.cluster.signals import Signals
from trainkit.data.arrays import TokenArrays, Writer, ragged
from trainkit.data.batches import Budget
from trainkit.data.distributor import Feeding, make_distributor
from trainkit.data.feed import CALL_BYTES, Feed, Source
from trainkit.data.padding import Padding
from trainkit.data.wire import WireCall
from trainkit.recipe.reader import read_recipe

ROWS = 32  # of a micro-batch
WARM_UP = 0.5  # of a measure's batches, as fast as can be, so that nothing that was read ahead before is left
QUICK = 16  # batches that show that all ways run, and no more
SETTLING = 64  # batches of the slower pace before its waits count
SPARE = 100  # batches that nobody asks for, so that no reader sees the end and stops reading ahead
WORK_SECONDS = 0.003
STEP_SECONDS = 0.050
ROUNDS = 2
PAD, IGNORED = 0, -100
SEED = 0
Column = tuple[np.ndarray, np.ndarray]  # values of all rows end to end, length of each row
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # input_ids, attention_mask, labels


@dataclass(frozen=True)
class Workload:
    name: str
    task: str
    folder: Path  # token arrays
    batches: int  # that the rows suffice for


def ours(load: Workload) -> Generator[Batch]:
    """trainkit: the DataDistributor actor, and the worker's Feed that asks ahead and pads in a thread. A step is one micro-batch."""
    import ray

    feeding = Feeding(str(load.folder), load.task, SEED, ROWS, world_size=1, budget=Budget(rows=ROWS), shuffle=True)
    actor = make_distributor({"train": feeding})

    last_asked: deque[ray.ObjectRef] = deque(maxlen=8)

    def ask(first: int, count: int) -> Callable[[], WireCall]:
        answer = actor.steps.remote("train", first, count, 0, CALL_BYTES, with_rows=False)
        last_asked.append(answer)
        return lambda: ray.get(answer)

    source = Source(ask, rows=TokenArrays.open(load.folder).by_column)  # the actor is on this node
    feed = Feed(source, Padding(load.task, PAD, eos_id=1), rank=0, last_step=10**9, device=torch.device("cpu"))
    try:
        for step in itertools.count(1):  # epoch after epoch: it reads far ahead, and shall not come to an end
            (micro,) = feed.micro_batches(step).micro_batches
            yield micro.input_ids, micro.attention_mask, micro.labels  # type: ignore[misc]  # the mask is None in packed rows only
    finally:
        feed.close()
        ray.wait(list(last_asked), num_returns=len(last_asked), timeout=10)  # Ray reports every call that a kill interrupts
        ray.kill(actor)


def ray_data(load: Workload) -> Generator[Batch]:
    """Ray Data: streaming_split for one consumer, iter_torch_batches with a collate function over Arrow's flat values."""
    import ray
    from ray.data.collate_fn import ArrowBatchCollateFn

    class Pad(ArrowBatchCollateFn):
        def __call__(self, batch: pa.Table) -> Batch:
            ids, labels = (batch[name].combine_chunks() for name in ("input_ids", "labels"))
            return padded(*((rows.flatten().to_numpy(), np.diff(rows.offsets.to_numpy())) for rows in (ids, labels)))

    table = arrow_table(load)
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = ray.data.from_arrow([table.slice(first, 32 * ROWS) for first in range(0, len(table), 32 * ROWS)])
    (split,) = blocks.streaming_split(1)
    yield from split.iter_torch_batches(batch_size=ROWS, collate_fn=Pad(), prefetch_batches=4, device="cpu")


class Rows:
    """A torch data set over the token arrays."""

    def __init__(self, folder: Path):
        arrays = TokenArrays.open(folder)
        self.ids, self.labels, self.rows = arrays.by_column["input_ids"], arrays.by_column["labels"], arrays.rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ids.row(index), self.labels.row(index)


def loader(load: Workload, workers: int) -> Generator[Batch]:
    """torch DataLoader over the same memory-mapped arrays."""
    yield from DataLoader(Rows(load.folder), ROWS, shuffle=True, num_workers=workers, collate_fn=pad_rows)  # type: ignore[arg-type]


def trainer_collator(load: Workload) -> Generator[Batch]:
    """What transformers' Trainer does by default: `datasets` rows as Python lists, DataCollatorForSeq2Seq, DataLoader without workers."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": PAD}, "<pad>")), pad_token="<pad>")
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    for batch in DataLoader(Dataset(arrow_table(load)), ROWS, shuffle=True, collate_fn=collate):
        yield batch["input_ids"], batch["attention_mask"], batch["labels"]


class OneBatchACall:
    """The reference's actor: it keeps a position and returns one padded batch a call."""

    def __init__(self, folder: Path):
        self.rows = Rows(folder)
        self.order = iter(np.random.default_rng(SEED).permutation(len(self.rows)).reshape(-1, ROWS))

    def next_batch(self) -> tuple[np.ndarray, ...]:
        return tuple(tensor.numpy() for tensor in pad_rows([self.rows[row] for row in next(self.order)]))


def reference(load: Workload) -> Generator[Batch]:
    """An actor called once a batch; the loop blocks for it."""
    import ray

    actor = ray.remote(num_cpus=0)(OneBatchACall).remote(load.folder)
    try:
        for _ in range(load.batches):
            yield tuple(map(torch.from_numpy, ray.get(actor.next_batch.remote())))  # type: ignore[misc]
    finally:
        ray.kill(actor)


WAYS: dict[str, Callable[[Workload], Generator[Batch]]] = {
    "trainkit": ours,
    "Ray Data streaming_split": ray_data,
    "DataLoader, 0 workers": lambda load: loader(load, 0),
    "DataLoader, 2 workers": lambda load: loader(load, 2),
    "Hugging Face Trainer's collator": trainer_collator,
    "actor, one call a batch": reference,
}


def write(folder: Path, name: str, batches: int) -> Workload:
    """Token arrays of `batches` × 32 random rows."""
    random, count, sigma = np.random.default_rng(SEED), batches * ROWS, 0.4  # sigma: of the logarithm of a length

    def lengths(mean: float) -> np.ndarray:
        return np.clip(random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count).round(), 1, 96).astype(int)

    def rows(sizes: np.ndarray) -> list[list[int]]:
        return [row.tolist() for row in np.split(random.integers(2, 32_000, sizes.sum()), np.cumsum(sizes)[:-1])]

    causal = name == "fixed"
    sources = rows(np.full(count, 512) if causal else lengths(20))
    targets = [[IGNORED] * 256 + row[256:] for row in sources] if causal else rows(lengths(16))
    with Writer(folder / name) as writer:
        counted = np.array([256 if causal else len(row) for row in targets])
        writer.append({"input_ids": ragged(sources), "labels": ragged(targets)}, counted)
        writer.finish()
    return Workload(name, "causal" if causal else "seq2seq", folder / name, batches)


def arrow_table(load: Workload) -> pa.Table:
    """The same rows as an Arrow table of lists, in the same narrow integers."""
    arrays = TokenArrays.open(load.folder)
    columns = {name: arrays.by_column[name] for name in arrays.columns}
    return pa.table({name: pa.ListArray.from_arrays(column.offsets.astype(np.int32), column.values) for name, column in columns.items()})


def pad_rows(rows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    return padded(*((np.concatenate(column), np.array([*map(len, column)])) for column in zip(*rows, strict=True)))


def padded(ids: Column, labels: Column) -> Batch:
    """Ragged columns as int64 rectangles [rows, longest rounded up to 8]."""

    def rectangle(column: Column, fill: int) -> np.ndarray:
        values, lengths = column
        out = np.full((len(lengths), -(-lengths.max() // 8) * 8), fill, dtype=np.int64)
        out[np.arange(out.shape[1]) < lengths[:, None]] = values
        return out

    input_ids = rectangle(ids, PAD)
    mask = np.arange(input_ids.shape[1]) < ids[1][:, None]
    return torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(rectangle(labels, IGNORED))


def measure(way: Callable[[Workload], Generator[Batch]], load: Workload, batches: int) -> dict[str, float]:
    """Microseconds: `us` a batch at full speed, p50 and p99 of the wait beside 3 ms of work."""
    with closing(way(load)) as feed:
        for _ in range(int(WARM_UP * batches)):
            check(next(feed), load)
        start = time.perf_counter()
        for _ in range(batches):
            next(feed)
        us = (time.perf_counter() - start) / batches
        waits = []
        for _ in range(SETTLING + batches):
            time.sleep(WORK_SECONDS)  # as the loop of a GPU does while kernels run; Python's lock is free meanwhile
            start = time.perf_counter()
            next(feed)
            waits.append(time.perf_counter() - start)
    p50, p99 = np.percentile(waits[SETTLING:], [50, 99])
    return {name: round(seconds * 1e6, 1) for name, seconds in {"us": us, "p50": p50, "p99": p99}.items()}


def check(batch: Batch, load: Workload) -> None:
    """A batch that is not what it should be must not count as fast."""
    ids, mask, labels = batch
    assert all(tensor.dtype == torch.int64 and len(tensor) == ROWS and tensor.shape[1] % 8 == 0 for tensor in batch)
    assert ids.shape == mask.shape and torch.equal(ids != PAD, mask.bool()), "padding and mask differ"
    assert (load.name != "fixed") or (ids.shape == labels.shape == (ROWS, 512) and int((labels != IGNORED).sum()) == ROWS * 256)


def table(results: dict[tuple[str, str], dict[str, float]]) -> str:
    """Markdown: a line per workload and way, and the ratios that are aimed at."""
    lines = ["| workload | feed | us a batch | ours ÷ it | wait p50 us | wait p99 us | p50, p99 of a 50 ms step |", "|" + "---|" * 7]
    for (load, way), it in results.items():
        ratio = results[load, "trainkit"]["us"] / it["us"]
        share = f"{it['p50'] / STEP_SECONDS / 1e6:.2%}, {it['p99'] / STEP_SECONDS / 1e6:.2%}"
        lines.append(f"| {load} | {way} | {it['us']:,.0f} | {ratio:.3f} | {it['p50']:,.0f} | {it['p99']:,.0f} | {share} |")
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores and versions, in a line."""
    models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE) or ["unknown processor"]
    versions = [f"{name} {version(name)}" for name in ("ray", "torch", "transformers", "datasets", "numpy", "pyarrow")]
    return f"{models[0]}, {len(os.sched_getaffinity(0))} cores; {', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1024, help="micro-batches per measure; best several times AHEAD_STEPS")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} micro-batches, once: whether all of it runs")
    given = parser.parse_args()
    batches, count = (QUICK, 1) if given.quick else (given.batches, ROUNDS)
    warnings.filterwarnings("ignore")  # the arrays are read-only, and nobody writes
    rounds: dict[tuple[str, str], list[dict[str, float]]] = {}
    settings = environment_settings(read_recipe(Path(__file__).parents[1] / "recipes/quickstart.yaml"), local=True)
    with (
        tempfile.TemporaryDirectory(prefix="trainkit-feed-") as folder,
        environment(settings),
        Signals() as signals,
        ray_session(None, settings, False, signals),
    ):
        loads = [write(Path(folder), name, int(WARM_UP * batches) + SETTLING + 2 * batches + SPARE) for name in ("fixed", "wikisql")]
        for number in range(count):
            for load in loads:
                for way in list(WAYS) if number % 2 == 0 else reversed(WAYS):
                    it = measure(WAYS[way], load, batches)
                    rounds.setdefault((load.name, way), []).append(it)
                    print(json.dumps({"round": number + 1, "workload": load.name, "feed": way} | it), flush=True)
                    gc.collect()
    medians = {case: {name: statistics.median(it[name] for it in them) for name in them[0]} for case, them in rounds.items()}
    print(f"\n{machine()}; {batches} batches a measure\n\n{table(medians)}")


if __name__ == "__main__":
    main()
