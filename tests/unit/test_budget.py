"""How small micro-batches are made where padding costs more than their number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import t5_large
from test_planner import gpu, plan_of

from trainkit.data.arrays import Writer, ragged
from trainkit.data.batches import Budget, Part, Shape, compose, deal
from trainkit.data.budget import least_time, split_for_padding
from trainkit.data.catalogue import Catalogues
from trainkit.data.order import samples_of_step
from trainkit.planning.facts import Matrices
from trainkit.planning.plan import Plan
from trainkit.planning.speed import micro_batch_seconds

COUNTED = replace(t5_large(), matrices=Matrices(352_321_536, 385_220_608, 352_321_536, 385_220_608, 24, 1024))


def skewed(rows: int, seed: int, targets: bool) -> tuple[np.ndarray, np.ndarray]:
    """Many short rows and a few long ones, as texts are."""
    lengths = np.random.default_rng(seed).lognormal(3.0, 0.8, (2, rows)).astype(np.int64).clip(4, 256)
    return lengths[0], lengths[1] if targets else np.zeros(rows, np.int64)


def slowest(parts: list[Part], workers: int, fixed: float) -> float:
    return max(sum(fixed + parts[i].shape.cost for i in share) for share in deal([part.shape.cost for part in parts], workers))


@given(st.integers(0, 10**6), st.sampled_from([8, 48]), st.sampled_from([1, 2, 3]), st.floats(0, 1500), st.booleans())
@settings(max_examples=12)
def test_a_split_takes_less_time_than_the_largest_micro_batches(seed: int, samples: int, workers: int, fixed: float, targets: bool) -> None:
    """By what each micro-batch and each padded token cost, on steps that are composed with the budget that it names."""
    source, target = skewed(16 * samples, seed, targets)
    most = -(-samples // workers) * int(source.max() + target.max())
    split = least_time(source, target, samples, workers, most, lambda shape: fixed + shape.cost)
    if split is None:
        return
    taken, usual = {}, {}
    for budget in (Budget(tokens=most), Budget(tokens=split.tokens)):
        catalogues = Catalogues(source, target, samples, budget)
        ids = [samples_of_step(1, len(source), samples, step) for step in range(1, 17)]  # not the steps that it looked at
        cuts = [compose(source[own], target[own], workers, budget, catalogues) for own in ids]
        taken[budget.tokens] = fmean(slowest(cut, workers, fixed) for cut in cuts)
        usual[budget.tokens] = sorted(map(len, cuts))[8]
    assert split.tokens < most and 0.02 < split.saves < 1 and usual[most] < usual[split.tokens]
    assert taken[split.tokens] <= (1.08 - split.saves) * taken[most]


def test_no_split_where_nothing_is_saved() -> None:
    even, no_targets = np.full(600, 40), np.zeros(600, np.int64)
    assert least_time(even, no_targets, 64, 2, 10**6, lambda shape: float(shape.cost)) is None, "rows of one length have no padding"
    source, target = skewed(600, 3, targets=True)
    assert least_time(source, target, 64, 2, 10**6, lambda shape: 10**6 + shape.cost) is None, (
        "each micro-batch costs more than any padding"
    )
    assert least_time(source, target, 64, 64, 10**6, lambda shape: float(shape.cost)) is None, "a row for each worker"


def test_a_few_samples_of_few_workers_are_not_split_for_rows_that_are_rare() -> None:
    """A budget below the longest rows that leaves the number of micro-batches as it is would save nothing."""
    source, target = skewed(1500, 4, targets=False)
    source[::150] = 600
    split = least_time(source, target, 5, 2, 10**6, lambda shape: float(shape.cost))
    assert split is None or split.micro_batches > 1


def test_what_fits_is_where_the_split_begins() -> None:
    source, target = skewed(2000, 5, targets=False)
    few = least_time(source, target, 200, 1, 10**6, lambda shape: 300 + shape.cost)
    assert few is not None and few.micro_batches >= 3
    again = least_time(source, target, 200, 1, few.tokens, lambda shape: 300 + shape.cost)
    assert again is None or again.saves < 0.08, "the budget that it names is about the best"


def write_skewed(folder: Path) -> str:
    """1,500 tokenized pairs of such lengths; returns the folder."""
    source, target = skewed(1500, 9, targets=True)
    with Writer(folder) as writer:
        columns = {name: ragged([[5] * length for length in lengths]) for name, lengths in (("input_ids", source), ("labels", target))}
        writer.append(columns, target)
        writer.finish(truncated={})
    return str(folder)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_skewed(tmp_path / "rows")


def planned(zero: str = "zero1", workers: int = 1, link: bool = False, **batch: object) -> Plan:
    hardware = replace(gpu(600), has_nvlink=link)
    return plan_of(zero, hardware, COUNTED, scaling={"num_workers": workers, "use_gpu": True}, batch={"samples": 512} | batch)


def test_a_plan_with_short_and_long_rows_is_split_and_says_so(rows: str) -> None:
    plan = planned()
    split = split_for_padding(plan, "seq2seq", rows)
    assert plan.tokens_per_device is not None and split.tokens_per_device is not None
    assert "fewer if the rows' lengths say" in " ".join(repr(plan).split())
    assert split.tokens_per_device < plan.tokens_per_device / 2
    assert f"tokens_per_device: {split.tokens_per_device:,}" in split.notes[-1] and "less of them is padding" in repr(split)
    assert replace(split, tokens_per_device=plan.tokens_per_device, notes=plan.notes) == plan
    assert split_for_padding(plan, "seq2seq", rows) == split, (
        "the same each time, so that a run that is resumed trains the same micro-batches"
    )


@pytest.mark.parametrize(
    ("zero", "workers", "link", "batch", "splits"),
    [
        ("zero0", 2, False, {}, True),
        ("zero1", 2, False, {}, True),
        ("zero2", 1, False, {}, True),
        ("zero2", 2, False, {}, False),
        ("zero2", 2, True, {}, True),
        ("zero3", 2, False, {}, False),
        ("zero3", 2, True, {}, True),
        ("zero2_offload", 1, True, {}, False),
        ("zero3_offload", 2, True, {}, False),
        ("zero1", 2, True, {"tokens_per_device": 98_304}, False),
        ("zero1", 2, True, {"samples_per_device": 256}, False),
    ],
)
def test_what_is_split(rows: str, zero: str, workers: int, link: bool, batch: dict[str, object], splits: bool) -> None:
    """Only what the recipe leaves to the plan, and not where each micro-batch is sent over slow links."""
    plan = planned(zero, workers, link, **batch)
    assert (split_for_padding(plan, "seq2seq", rows) != plan) == splits


def test_a_budget_that_was_found_out_before_is_not_split(rows: str) -> None:
    """After want of memory, or of a run that is resumed."""
    plan = plan_of("zero1", gpu(139), COUNTED, most=20_000, scaling={"num_workers": 1}, batch={"samples": 512})
    assert split_for_padding(plan, "seq2seq", rows) == plan and plan.tokens_per_device == 20_000


MEASURED = [  # on an H200: layers, rows × source × target, model FLOPs a token, milliseconds by CUDA graphs and as Python launches them
    ("t5-small", 12, (8, 32, 16), 1.67e8, 4.6, 34.9),
    ("t5-small", 12, (1024, 32, 16), 1.66e8, 67.1, 71.8),
    ("t5-base", 24, (32, 32, 16), 6.48e8, 14.2, 66.4),
    ("t5-base", 24, (512, 32, 16), 6.48e8, 86.8, 93.6),
    ("t5-large", 48, (8, 32, 16), 2.19e9, 22.5, 170.0),
    ("t5-large", 48, (64, 32, 16), 2.19e9, 41.8, 132.2),
    ("t5-large", 48, (256, 32, 16), 2.19e9, 114.7, 138.5),
    ("t5-3b", 48, (8, 32, 16), 8.57e9, 33.0, 190.7),
    ("t5-3b", 48, (256, 32, 16), 8.57e9, 290.6, 299.6),
    ("llama-136m", 12, (4, 64, 0), 6.65e8, 4.9, 27.6),
    ("llama-136m", 12, (64, 128, 0), 6.71e8, 34.0, 38.6),
    ("llama-1b", 16, (8, 128, 0), 6.28e9, 21.1, 33.8),
    ("llama-1b", 16, (16, 512, 0), 6.43e9, 139.3, 136.1),
]


@pytest.mark.parametrize(("model", "layers", "shape", "flops", "graphs", "launched"), MEASURED)
def test_the_estimate_of_time_is_near_what_was_measured(
    model: str, layers: int, shape: tuple[int, int, int], flops: float, graphs: float, launched: float
) -> None:
    tokens = Shape(*shape).cost
    assert 1000 * micro_batch_seconds(flops * tokens, tokens, layers, graphs=True) == pytest.approx(graphs, rel=0.21)
    assert 1000 * micro_batch_seconds(flops * tokens, tokens, layers, graphs=False) == pytest.approx(launched, rel=0.45)
    slower = micro_batch_seconds(flops * tokens, tokens, layers, graphs=True, peak=300e12)
    assert slower > micro_batch_seconds(flops * tokens, tokens, layers, graphs=True)
