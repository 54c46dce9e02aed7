"""How well a step's samples become micro-batches: trainkit's cut beside random batches, group_by_length and batch_rebalance.

Lengths: WikiSQL (T5 tokens, source and target) and huanhuan (Llama tokens, one sequence) from ../shared, left out where that is absent,
and a seeded lognormal mix of 16 to 2,048 tokens, one sequence. Every method cuts the whole steps of one epoch into k micro-batches.

Measures:
    real      share of real tokens in the padded ones, rows × (longest source + longest target)
    ÷ best    real relative to that of the best cut known, on at most 40 steps: any lengths and row counts; runs of many orders, cut by
              dynamic programming; not for group_by_length, which picks the samples of a step by length
    shapes    distinct (rows, source, target); in brackets with lengths rounded up to 8, as pad_to_multiple_of does (ours stay as they are)
    2 ranks   padded tokens of the most loaded rank over the mean, mean and worst of the steps, for 16 micro-batches or more
    made      seconds to choose the shapes, once in a run
    ms        to compose a step, median; for group_by_length, which sorts once an epoch, the mean

Methods, the others padded to the exact longest row, to their credit in `real`:
    random           the samples as drawn, in equal groups; ranks take micro-batches in turn
    group_by_length  transformers' get_length_grouped_indices, called as the Trainer does on min(k, 8) ranks; in turn
    batch_rebalance  transformers' BatchRebalanceSampler on the same samples as ours, by its own order; like the above it knows input_ids
    … of all tokens  kinder: lengths are source + target, and no weight for attention, which `real` does not count
    trainkit         Catalogues; compose for k ranks, with the least budget of tokens, in steps of 5 %, that gives every step k; deal
    trainkit pack    pack, with samples ÷ k rows a micro-batch; one-sequence sets only

The second table: order and batching (512 / 16) of 10^6, 10^8 and 10^9 rows whose lengths are computed from their ids.

    python benchmarks/batches.py [--quick]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import trainer_pt_utils

from trainkit.data import order
from trainkit.data.arrays import TokenArrays
from trainkit.data.batches import Budget, Part, Shape, compose, deal, round_up
from trainkit.data.catalogue import Catalogues
from trainkit.data.packing import pack
from trainkit.data.tokens import prepare
from trainkit.recipe.reader import read_recipe

ROOT = Path(__file__).resolve().parents[1]
PREPARED = {"wikisql": ("t5_large_zero1", "t5-large"), "huanhuan": ("llama_lora_zero2", "llama-1b")}  # recipe, tokenizer
SETTINGS = {"wikisql": ((64, 2), (512, 8), (512, 16), (4096, 64)), "huanhuan": ((512, 16),), "lognormal": ((512, 16),)}
PACK_LENGTH = {"huanhuan": 512, "lognormal": 2048}
RANKS = (2, 4, 8)
SEED = 42  # of the order; the catalogue's trials have another
LONGEST = 96  # generated length
CATALOGUE_ROWS = 65_536  # the DataDistributor chooses shapes by the lengths of so many
Micro = tuple[np.ndarray, Shape]  # row ids, and what they are padded to
Cuts = tuple[list[list[Micro]], float]  # micro-batches of every step as they are dealt; milliseconds a step
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    source: np.ndarray  # lengths of all rows
    target: np.ndarray
    samples: int
    k: int
    ids: list[np.ndarray]  # rows of each step
    longest: tuple[int, int] | None = None  # lengths that rows beyond these have

    def padded(self, ids: np.ndarray) -> Micro:
        return ids, Shape(len(ids), int(self.source[ids].max()), int(self.target[ids].max()))


def each(steps: list[T], cut: Callable[[T], R]) -> tuple[list[R], float]:
    """What `cut` makes of each step, and the median of the milliseconds."""
    cuts, seconds = [], []
    for step in steps:
        start = time.perf_counter()
        cuts.append(cut(step))
        seconds.append(time.perf_counter() - start)
    return cuts, 1e3 * statistics.median(seconds)


def in_groups(case: Case, steps: list[np.ndarray]) -> Cuts:
    return each(steps, lambda ids: [case.padded(part) for part in np.split(ids, case.k)])


def group_by_length(case: Case) -> Cuts:
    generator, start = torch.Generator().manual_seed(SEED), time.perf_counter()
    of_a_rank = case.samples // min(case.k, RANKS[-1])  # batch size × accumulation
    ids = np.array(trainer_pt_utils.get_length_grouped_indices(case.source.tolist(), of_a_rank, generator=generator))
    steps = [ids[first : first + case.samples] for first in range(0, len(case.ids) * case.samples, case.samples)]
    milliseconds = 1e3 * (time.perf_counter() - start) / (len(ids) // case.samples)
    return in_groups(case, steps)[0], milliseconds


def batch_rebalance(case: Case, all_tokens: bool = False) -> Cuts:
    """`_assign` is the sampler's work on one step. Told of k ranks it lists the micro-batches in the order in which W ranks take turns."""
    lengths = case.source + case.target if all_tokens else case.source
    sampler: Any = trainer_pt_utils.BatchRebalanceSampler(lengths.tolist(), case.samples, dp_size=case.k, grad_accum=1)
    if all_tokens:
        sampler.QUADRATIC_COST_COEF = 0.0
    return each(case.ids, lambda ids: [case.padded(np.array(part)) for (part,) in sampler._assign(ids.tolist(), lengths[ids].tolist())])


def trainkit(case: Case) -> Cuts:
    catalogues, budget, _ = made(case)
    return each(case.ids, lambda ids: own(ids, compose(case.source[ids], case.target[ids], case.k, budget, catalogues)))


@functools.cache
def made(case: Case) -> tuple[Catalogues, Budget, float]:
    """The shapes, the least budget, in steps of 5 %, with which k micro-batches hold every step, and the seconds to choose the shapes."""
    tokens = float((case.source + case.target).mean()) * case.samples / case.k
    while True:
        tokens *= 1.05
        budget, start = Budget(tokens=round(tokens)), time.perf_counter()
        catalogues = chosen(case, budget)
        seconds = time.perf_counter() - start
        if all(len(compose(case.source[ids], case.target[ids], case.k, budget, catalogues)) == case.k for ids in case.ids):
            return catalogues, budget, seconds


def chosen(case: Case, budget: Budget) -> Catalogues:
    catalogues = Catalogues(case.source, case.target, case.samples, budget, case.longest or (0, 0))
    catalogues(case.samples, case.k)
    return catalogues


def packed(case: Case) -> Cuts:
    budget = Budget(rows=case.samples // case.k)
    return each(case.ids, lambda ids: own(ids, pack(case.source[ids], case.k, budget, PACK_LENGTH[case.name])))


def own(ids: np.ndarray, parts: list[Part]) -> list[Micro]:
    return [(ids[part.samples], part.shape) for part in parts]


METHODS: dict[str, Callable[[Case], Cuts]] = {
    "random": lambda case: in_groups(case, case.ids),
    "group_by_length": group_by_length,
    "batch_rebalance": batch_rebalance,
    "… of all tokens": lambda case: batch_rebalance(case, all_tokens=True),
    "trainkit": trainkit,
    "trainkit pack": packed,
}


def measure(method: str, case: Case, best: dict[int, int]) -> dict[str, Any]:
    """A line of the table. `best`: padded tokens of the best cut known of some steps."""
    steps, milliseconds = METHODS[method](case)
    check(steps, case, method == "trainkit pack")
    costs = [[shape.cost for _, shape in step] for step in steps]
    padded, ours = np.array(costs).sum(1), method.startswith("trainkit")
    shapes = {shape for step in steps for _, shape in step}
    of_8 = {(it.rows, *round_up(np.array(it[1:])).tolist()) for it in shapes}
    real = sum(int((case.source + case.target)[ids].sum()) for step in steps for ids, _ in step) / padded.sum()
    per_best = "–" if method == "group_by_length" else f"{sum(best.values()) / padded[list(best)].sum():.3f}"
    found = {"data": case.name, "samples / k": f"{case.samples} / {case.k}", "method": method, "steps": len(steps), "real": f"{real:.1%}"}
    found |= {"÷ best": per_best, "shapes": f"{len(shapes)}" if ours else f"{len(shapes)} ({len(of_8)})"}
    for ranks in RANKS:
        turns = [list(range(rank, case.k, ranks)) for rank in range(ranks)]
        shares = [deal(step, ranks) if ours else turns for step in costs] if case.k >= 16 else []
        loads = [[sum(step[index] for index in mine) for mine in share] for step, share in zip(costs, shares, strict=False)]
        uneven = [max(load) * ranks / sum(load) for load in loads]
        found[f"{ranks} ranks"] = f"{statistics.mean(uneven):.3f} / {max(uneven):.3f}" if uneven else "–"
    return found | {"made s": round(made(case)[2], 2) if method == "trainkit" else "–", "ms": round(milliseconds, 2)}


def check(steps: list[list[Micro]], case: Case, several_a_row: bool) -> None:
    """A cut that is not what it should be must not count as good."""
    seen = np.concatenate([ids for step in steps for ids, _ in step])
    assert len(np.unique(seen)) == len(seen) == len(case.ids) * case.samples, "every sample once"
    assert all(len(step) == case.k for step in steps)
    for ids, shape in (micro for step in steps for micro in step if len(micro[0])):
        enough = case.source[ids].sum() <= shape.rows * shape.source if several_a_row else len(ids) <= shape.rows
        assert enough and case.source[ids].max() <= shape.source and case.target[ids].max() <= shape.target, "a sample does not fit"


def best_cuts(case: Case, most: int) -> dict[int, int]:
    """Padded tokens of the best cut known into k micro-batches, of steps spread over the epoch."""
    found = {}
    for step in np.unique(np.linspace(0, len(case.ids) - 1, most).astype(int)).tolist():
        source, target = (lengths[case.ids[step]].astype(np.int32) for lengths in (case.source, case.target))
        found[step] = min(cheapest(source[line], target[line], case.k) for line in lines(source, target, case.k))
    return found


def lines(source: np.ndarray, target: np.ndarray, k: int) -> Iterator[np.ndarray]:
    """Orders in which neighbours are alike: by source + target, by either first, and by target within strips of source."""
    yield np.lexsort((-source, -(source + target)))
    if not target.any():
        return
    yield from ((falling := np.lexsort((-target, -source))), np.lexsort((-source, -target)))
    tokens = (source + target)[falling]
    for strips in sorted({round(math.sqrt(k) * factor) for factor in (0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3)} - {0, 1}):
        for before in (np.arange(len(source)) / len(source), (np.cumsum(tokens) - tokens) / tokens.sum()):
            strip = np.empty(len(source), int)
            strip[falling] = (before * strips).astype(int)
            yield from (np.lexsort((-target, strip)), np.lexsort((np.where(strip % 2 == 0, -target, target), strip)))


def cheapest(source: np.ndarray, target: np.ndarray, k: int) -> int:
    """Least padded tokens of a line in at most k runs, by dynamic programming. Of many samples, runs of 8 times the mean at most."""
    count = len(source)
    longest_source, longest_target, costs = source, target, [source + target]  # costs[rows - 1][first sample] of a run
    for rows in range(2, (count if count <= 512 else 8 * count // k) + 1):
        longest_source = np.maximum(longest_source[:-1], source[rows - 1 :])
        longest_target = np.maximum(longest_target[:-1], target[rows - 1 :])
        costs.append(rows * (longest_source + longest_target))
    best = np.full(count + 1, 1 << 30, np.int32)
    best[count] = 0
    for _ in range(k):
        longer = best.copy()
        for rows, cost in enumerate(costs, 1):
            np.minimum(longer[: len(cost)], cost + best[rows:], out=longer[: len(cost)])
        best = longer
    return int(best[0])


def growth(rows: int, repeats: int) -> dict[str, Any]:
    """Milliseconds and peak MiB of order and batching of so many rows, whose lengths are computed from their ids."""
    samples, k, last = 512, 16, order.steps_per_epoch(rows, 512)
    everywhere, some = (np.linspace(1, last - 1, count).astype(int).tolist() for count in (200, repeats))

    def ids(step: int) -> np.ndarray:
        return order.samples_of_step(SEED, rows, samples, step)

    def cold(step: int) -> np.ndarray:
        order._block.cache_clear()  # the blocks of the order that steps share
        return ids(step)

    found: dict[str, Any] = {"rows": rows, "permuted": 4 ** -(-(rows - 1).bit_length() // 2)}
    for place, step in {"first": 1, "middle": last // 2, "last": last}.items():
        found[f"{place} ms"] = round(each([step] * repeats, cold)[1], 2)
    trials = [order.samples_of_step(SEED, CATALOGUE_ROWS, samples, step) for step in range(1, 65)]
    case = Case("", *generated(order.samples_of_step(0, rows, CATALOGUE_ROWS, 1)), samples, k, trials, (LONGEST, LONGEST))
    catalogues, budget, seconds = made(case)
    drawn = [generated(ids(step)) for step in some]

    def cut(lengths: tuple[np.ndarray, np.ndarray]) -> list[Part]:
        return compose(*lengths, k, budget, catalogues)

    found |= {"made s": round(seconds, 2), "compose ms": round(each(drawn, cut)[1], 2)}
    work: list[tuple[str, Callable[[], object]]] = [("order", lambda: [len(ids(step)) for step in everywhere])]
    for part, call in [*work, ("compose", lambda: [len(cut(it)) for it in drawn]), ("make", lambda: chosen(case, budget))]:
        order._block.cache_clear()
        tracemalloc.start()
        call()
        found[f"{part} MiB"] = round(tracemalloc.get_traced_memory()[1] / 2**20, 1)
        tracemalloc.stop()
    return found


def generated(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lognormal source and target lengths of WikiSQL's means, about 20 and 16, to LONGEST (Box and Muller's transform of hashed ids)."""
    one, two = ((order.mix64(ids * 2 + part) >> np.uint64(11)).astype(float) / 2**53 for part in (0, 1))
    radius = np.sqrt(-2 * np.log1p(-one))
    normal = radius * np.cos(2 * np.pi * two), radius * np.sin(2 * np.pi * two)
    source, target = (
        np.clip(mean * np.exp(0.4 * it - 0.08), 1, LONGEST).round().astype(int) for mean, it in zip((20, 16), normal, strict=True)
    )
    return source, target


def data_sets() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, source lengths, target lengths)"""
    for name, (recipe, model) in PREPARED.items():
        data, tokenizer = ROOT.parent / "shared/data" / name, ROOT.parent / "shared/models" / model
        if not (data.exists() and tokenizer.exists()):
            print(json.dumps({"data": name, "note": f"left out: no {data} or no {tokenizer}"}))
            continue
        with tempfile.TemporaryDirectory(prefix="trainkit-batches-") as folder:
            paths = [f"data.path={data}", f"model.path={tokenizer}", f"run.storage_path={folder}"]
            arrays = TokenArrays.open(prepare(read_recipe(ROOT / "recipes" / f"{recipe}.yaml", paths)).train)
            source, labels = (np.array(arrays.by_column[column].lengths(np.arange(arrays.rows))) for column in ("input_ids", "labels"))
        yield name, source, labels if name == "wikisql" else np.zeros_like(source)
    mix = np.clip(np.rint(np.exp(np.random.default_rng(0).normal(np.log(150), 1.0, 40_000))), 16, 2048).astype(np.int64)
    yield "lognormal", mix, np.zeros_like(mix)


def table(lines: list[dict[str, Any]]) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 8 steps of each setting, 3 of them with a best cut; fewer repeats")
    quick, results = parser.parse_args().quick, []
    if not hasattr(trainer_pt_utils, "BatchRebalanceSampler"):
        print(json.dumps({"note": f"transformers {version('transformers')} has no batch_rebalance"}))
        del METHODS["batch_rebalance"], METHODS["… of all tokens"]
    for name, source, target in data_sets():
        for samples, k in SETTINGS[name]:
            count = min(len(source) // samples, 8) if quick else len(source) // samples
            ids = [order.samples_of_step(SEED, len(source), samples, step) for step in range(1, count + 1)]
            case = Case(name, source, target, samples, k, ids)
            best = best_cuts(case, (3 if quick else 40) if samples < 4096 else (1 if quick else 6))
            for method in METHODS:
                if method != "trainkit pack" or name in PACK_LENGTH:
                    results.append(measure(method, case, best))
                    print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    large = []
    for rows in (10**6, 10**8, 10**9):
        large.append(growth(rows, 5 if quick else 40))
        print(json.dumps(large[-1]), flush=True)
    models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE) or ["unknown processor"]
    versions = ", ".join(f"{package} {version(package)}" for package in ("transformers", "numpy"))
    print(f"\n{models[0]}, {len(os.sched_getaffinity(0))} cores; {versions}\n\n{table(results)}\n")
    few, many = large[0], large[-1]
    ratios = ", ".join(f"{name} × {many[name] / few[name]:.2f}" for name in list(many)[2:])
    print(f"{table(large)}\n\nFrom {few['rows']:,} to {many['rows']:,} rows: {ratios}.")
    print(f"A list of the ids would take {many['rows'] / 2**27:.1f} GiB. The order permutes the next power of 4 and walks until it is")
    print("inside, hence its time; its memory is that of 200 steps all over the epoch, with the 64 blocks of 64 KiB that stay.")


if __name__ == "__main__":
    main()
