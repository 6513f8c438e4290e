"""The batch sampler against properties that do not look inside it."""

from __future__ import annotations

import functools
import json
import pickle
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from programs import run_python
from torch.utils.data import DataLoader

from st_clusterns.training.sampler import ClusterBatchSampler

Batches = list[list[int]]


def batches_of(ids: Any, batch_size: int, epoch: int = 0, **settings: Any) -> Batches:
    sampler = ClusterBatchSampler(range(len(ids)), batch_size, ids=np.asarray(ids), **settings)
    sampler.set_epoch(epoch)
    return list(sampler)


def clusters_a_batch(ids: np.ndarray, batches: Batches) -> float:
    return float(np.mean([len(set(ids[batch])) for batch in batches]))


def skewed_ids(n_rows: int, n_clusters: int) -> np.ndarray:
    """Clusters of very different sizes, numbered neither from 0 nor without gaps."""
    return (n_clusters * np.random.default_rng(0).random(n_rows) ** 2).astype(int) * 7 - 20


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    batch_size = draw(st.integers(1, 12))
    return {
        "ids": draw(st.lists(st.integers(-2, draw(st.integers(-2, 6))), min_size=1, max_size=120)),
        "batch_size": batch_size,
        "group_size": draw(st.integers(1, batch_size)),
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 3)),
    }


# Every row once, exact sizes


@given(plans(), st.booleans())
def test_each_row_once_in_batches_of_exact_size(plan: dict[str, Any], drop_last: bool) -> None:
    batches = batches_of(**plan, drop_last=drop_last)
    n_rows, size = len(plan["ids"]), plan["batch_size"]
    rest = [n_rows % size] if n_rows % size and not drop_last else []
    assert [len(batch) for batch in batches] == [size] * (n_rows // size) + rest
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(n_rows))


@given(plans(), st.booleans(), st.booleans())
def test_len_is_the_number_of_batches(plan: dict[str, Any], drop_last: bool, with_ids: bool) -> None:
    ids = np.asarray(plan["ids"]) if with_ids else None
    sampler = ClusterBatchSampler(
        range(len(plan["ids"])), plan["batch_size"], drop_last, ids=ids, group_size=plan["group_size"]
    )
    assert len(sampler) == len(list(sampler))


def test_drop_last_leaves_out_the_short_batch_only() -> None:
    ids = skewed_ids(1_003, 9)
    assert batches_of(ids, 16, drop_last=True) == batches_of(ids, 16)[:-1]


def test_batches_are_lists_of_int_made_one_at_a_time() -> None:
    batches = iter(ClusterBatchSampler(range(100), 8, ids=skewed_ids(100, 5)))
    assert isinstance(batches, Iterator)
    assert not isinstance(batches, list)
    batch = next(batches)
    assert type(batch) is list
    assert {type(row) for row in batch} == {int}


def test_a_data_loader_takes_it() -> None:
    sampler = ClusterBatchSampler(range(100), 8, ids=skewed_ids(100, 5))
    assert [batch.tolist() for batch in DataLoader(range(100), batch_sampler=sampler)] == list(sampler)


# Which rows meet


@given(plans(), st.integers(1, 4))
def test_whole_groups_are_never_cut(plan: dict[str, Any], groups_a_batch: int) -> None:
    """A cluster of n rows has n // group_size whole groups; as many must be found again inside the batches."""
    size = plan["group_size"]
    plan["batch_size"] = size * groups_a_batch
    found = Counter[int]()
    for batch in batches_of(**plan):
        members = Counter(plan["ids"][row] for row in batch)
        found.update({cluster: count // size for cluster, count in members.items()})
    for cluster, count in Counter(plan["ids"]).items():
        assert found[cluster] == count // size


@given(plans())
def test_leftovers_of_a_cluster_stay_side_by_side(plan: dict[str, Any]) -> None:
    """In pure batches, a cluster's leftovers meet one batch border at most."""
    plan["group_size"] = size = plan["batch_size"]
    met = Counter[int]()
    for batch in batches_of(**plan):
        clusters = [plan["ids"][row] for row in batch]
        assert sum(a != b for a, b in pairwise(clusters)) == len(set(clusters)) - 1
        met.update(set(clusters))
    for cluster, count in Counter(plan["ids"]).items():
        assert met[cluster] <= count // size + 2


@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 16])
def test_stratified_batches_hold_groups_of_that_size(group_size: int) -> None:
    ids = np.repeat(np.arange(20), 16 * np.arange(1, 21))  # no leftovers
    for batch in batches_of(ids, 16, group_size=group_size):
        groups = ids[batch].reshape(-1, group_size)
        assert (groups == groups[:, :1]).all()


def test_fewer_clusters_a_batch_the_larger_the_groups() -> None:
    ids = skewed_ids(5_000, 30)
    counts = [clusters_a_batch(ids, batches_of(ids, 32, group_size=size)) for size in (1, 2, 4, 8, 16, 32)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)
    assert counts[-1] < 1.5  # nearly pure
    random_order = np.random.default_rng(1).permutation(len(ids))[:4_992].reshape(-1, 32)
    assert counts[0] == pytest.approx(clusters_a_batch(ids, random_order.tolist()), rel=0.02)


def test_groups_of_one_are_the_order_without_clusters() -> None:
    plain = ClusterBatchSampler(range(500), 8, seed=3)
    assert list(plain) == batches_of(skewed_ids(500, 5), 8, seed=3, group_size=1)
    assert list(plain) != sorted(plain)


def test_batches_of_leftovers_are_spread_over_the_epoch() -> None:
    ids = np.r_[np.zeros(800, dtype=int), np.arange(1, 801)]  # one large cluster, 800 single rows
    pure = [len(set(ids[batch])) == 1 for batch in batches_of(ids, 8, group_size=8)]
    assert sum(pure) == 100
    assert 30 < sum(pure[:100]) < 70


def test_leftovers_of_other_clusters_meet_in_every_epoch() -> None:
    """Laid in the order of the clusters' numbers, the same few clusters would share a batch all training long."""
    ids = np.arange(20).repeat(2)
    met = {frozenset(ids[batch]) for epoch in range(10) for batch in batches_of(ids, 4, epoch)}
    assert len(met) > 60  # of 100 batches and 190 pairs; in the order of the numbers 10


def test_every_row_is_as_likely_to_be_left_over() -> None:
    left = Counter(batches_of([0] * 5, 4, epoch, group_size=4)[-1][0] for epoch in range(1_000))
    assert all(150 < left[row] < 250 for row in range(5))


# Deterministic from seed and epoch


@given(plans())
def test_the_same_seed_and_epoch_give_the_same_batches(plan: dict[str, Any]) -> None:
    assert batches_of(**plan) == batches_of(**plan)


def test_set_epoch_is_idempotent_and_iterating_changes_nothing() -> None:
    sampler = ClusterBatchSampler(range(300), 8, ids=skewed_ids(300, 6))
    sampler.set_epoch(2)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(2)
    sampler.set_epoch(2)
    assert list(sampler) == first
    sampler.set_epoch(3)
    assert list(sampler) != first
    sampler.set_epoch(2)
    assert list(sampler) == first


@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_epochs_and_seeds_differ_in_which_rows_meet(group_size: int) -> None:
    """Not merely in the order; and not by seed + epoch, where epoch 1 of seed 0 would be epoch 0 of seed 1."""
    met = [
        frozenset(map(frozenset, batches_of(skewed_ids(400, 3), 8, epoch, seed=seed, group_size=group_size)))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(met)) == len(met)


def test_random_states_are_neither_read_nor_advanced() -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore[index]

    generator = torch.Generator().manual_seed(1)
    sampler = ClusterBatchSampler(range(300), 8, generator=generator, ids=skewed_ids(300, 6))
    before, generator_before = states(), generator.get_state().tolist()
    first = list(sampler)
    assert states() == before
    assert generator.get_state().tolist() == generator_before

    generator.manual_seed(2)
    with torch.random.fork_rng(devices=[]):
        torch.rand(1), np.random.rand(), random.random()
        assert states() != before
        assert list(sampler) == first


# Where the clusters come from


def test_ids_rewritten_in_place_take_effect_in_the_next_epoch() -> None:
    ids, later = np.arange(160) % 10, np.arange(160) // 16
    sampler = ClusterBatchSampler(range(160), 8, ids=ids, group_size=8)
    assert clusters_a_batch(ids, list(sampler)) == 1
    running = iter(sampler)
    first = next(running)
    before, expected = ids.copy(), list(sampler)
    ids[:] = later
    assert [first, *running] == expected  # the epoch goes on as planned
    sampler.set_epoch(1)
    rewritten = list(sampler)
    assert clusters_a_batch(later, rewritten) == 1
    assert clusters_a_batch(before, rewritten) > 1


def test_rewriting_after_iter_leaves_that_epoch_alone() -> None:
    """`iter` plans at once: a plan made at the first `next` would mix the clusters of two epochs."""
    ids = np.arange(160) % 10
    sampler = ClusterBatchSampler(range(160), 8, ids=ids)
    expected, running = list(sampler), iter(sampler)
    ids[:] = 0
    sampler.set_epoch(1)
    assert list(running) == expected


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_any_integers_are_clusters(dtype: type) -> None:
    """Only their order counts: differences of them, or a narrower dtype, would overflow."""
    limits = np.iinfo(dtype)
    ids = np.array([limits.min, limits.max - 1, limits.max, 3], dtype=dtype).repeat(15)
    ranks = np.unique(ids, return_inverse=True)[1]
    assert batches_of(ids, 8) == batches_of(ranks, 8)
    assert batches_of(ids, 8) != batches_of(ids[::-1], 8)


def labelled(**columns: Any) -> Dataset:
    return Dataset.from_dict({"text": [str(row) for row in range(160)], **columns})


def test_the_first_label_column_found_is_used() -> None:
    ids = np.arange(160) % 10
    dataset = labelled(score=[0.5] * 160, cluster=ids.tolist(), other=[0] * 160)
    sampler = ClusterBatchSampler(dataset, 8, valid_label_columns=["missing", "cluster", "score"], group_size=8)
    assert list(sampler) == batches_of(ids, 8, group_size=8)


def test_label_columns_of_a_shuffled_selection_follow_its_rows() -> None:
    ids = np.arange(160) % 10
    dataset = labelled(label=ids.tolist()).shuffle(seed=0).select(range(3, 83))
    sampler = ClusterBatchSampler(dataset, 8, valid_label_columns=["label"])
    assert list(sampler) == batches_of([row["label"] for row in dataset], 8)


def test_labels_of_a_large_shuffled_data_set_are_read_at_once() -> None:
    """`dataset[:]` goes through Python integers there: 10 s for these rows, and 8 GB for ten times as many."""
    dataset = Dataset.from_dict({"label": np.arange(1_000_000) % 10}).shuffle(seed=0)
    start = time.perf_counter()
    ClusterBatchSampler(dataset, 8, valid_label_columns=["label"])
    assert time.perf_counter() - start < 2


def test_label_columns_in_several_chunks_with_missing_values_elsewhere() -> None:
    parts = [labelled(label=[part, None] * 80) for part in range(3)]
    dataset = concatenate_datasets(parts).filter(lambda row: row["label"] is not None)
    sampler = ClusterBatchSampler(dataset, 8, valid_label_columns=["label"])
    assert list(sampler) == batches_of(np.arange(3).repeat(80), 8)


def test_class_labels_are_integers() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    dataset = labelled(label=[row % 2 for row in range(160)]).cast(features)
    sampler = ClusterBatchSampler(dataset, 8, valid_label_columns=["label"], group_size=8)
    assert clusters_a_batch(np.arange(160) % 2, list(sampler)) == 1


def test_ids_come_before_label_columns() -> None:
    ids = np.arange(160) % 10
    sampler = ClusterBatchSampler(labelled(label=[0.5] * 160), 8, valid_label_columns=["label"], ids=ids)
    assert list(sampler) == batches_of(ids, 8)
    assert sampler.ids is ids


@pytest.mark.parametrize("columns", [None, [], ["label"]])
def test_without_clusters_the_order_is_random(columns: list[str] | None) -> None:
    sampler = ClusterBatchSampler(labelled(), 8, valid_label_columns=columns)
    rows = [row for batch in sampler for row in batch]
    assert sorted(rows) == list(range(160))
    assert abs(np.corrcoef(rows, range(160))[0, 1]) < 0.3


# Handed to the trainer


def as_the_trainer_calls(factory: Any, dataset: Dataset) -> ClusterBatchSampler:
    keywords = {"drop_last": False, "valid_label_columns": ["label"], "generator": torch.Generator(), "seed": 42}
    sampler = factory(dataset, batch_size=8, **keywords)
    assert isinstance(sampler, ClusterBatchSampler)
    return sampler


@pytest.mark.parametrize(
    ("factory", "group_size"),
    [(ClusterBatchSampler, 4), (functools.partial(ClusterBatchSampler, group_size=8), 8)],
    ids=["class", "partial"],
)
def test_class_and_partial_survive_pickling(factory: Any, group_size: int) -> None:
    ids = [row % 10 for row in range(160)]
    sampler = as_the_trainer_calls(pickle.loads(pickle.dumps(factory)), labelled(label=ids))
    assert list(sampler) == batches_of(ids, 8, seed=42, group_size=group_size)


def test_a_sampler_survives_pickling() -> None:
    sampler = ClusterBatchSampler(range(160), 8, ids=np.arange(160) % 10)
    sampler.set_epoch(3)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 .*1 or more"),
        ({"batch_size": -4}, r"batch_size=-4 .*1 or more"),
        ({"batch_size": 8.0}, r"batch_size=8\.0 .*whole number"),
        ({"batch_size": 8, "group_size": 0}, r"group_size=0 .*batch_size=8: choose .*1 to 8"),
        ({"batch_size": 8, "group_size": 9}, r"group_size=9 .*per_device_eval_batch_size"),
        ({"batch_size": 8, "group_size": 2.5}, r"group_size=2\.5 .*whole number"),
        ({"batch_size": 8, "seed": -1}, r"seed=-1 .*0 or more"),
        ({"batch_size": 8, "seed": None}, r"seed=None .*0 or more"),
        ({"batch_size": 8, "ids": np.zeros(19, dtype=int)}, r"19 entries.* 20 rows.*label column"),
        ({"batch_size": 8, "ids": np.zeros(20)}, r"ids must hold one integer a row.*float64"),
        ({"batch_size": 8, "ids": np.zeros((20, 1), dtype=int)}, r"ids must hold .*\(20, 1\)"),
    ],
)
def test_errors_name_argument_value_and_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterBatchSampler(range(20), **settings)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset has 0 rows"):
        ClusterBatchSampler([], 8)


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ([1.0] * 160, "float"),
        (["a"] * 160, "object"),
        ([True] * 160, "bool"),
        ([None] + [1] * 159, "float"),
        ([[1, 2]] * 160, "object"),
    ],
    ids=["float", "string", "bool", "missing", "nested"],
)
def test_labels_that_are_no_integers_are_refused(labels: list[Any], dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"the label column 'score' must hold one integer a row.*{dtype}"):
        ClusterBatchSampler(labelled(score=labels), 8, valid_label_columns=["score"])


def test_scores_of_pairs_are_no_clusters() -> None:
    """They may stand beside topics in one training: their rows come as those of a data set without labels."""
    scores = [(row % 7) / 3 for row in range(160)]
    sampler = ClusterBatchSampler(labelled(score=scores), 8, valid_label_columns=["score"], group_size=8)
    assert list(sampler) == list(ClusterBatchSampler(labelled(), 8, group_size=8))


def test_ids_that_change_their_length_are_refused() -> None:
    sampler = ClusterBatchSampler(range(20), 8, ids=np.zeros(20, dtype=int))
    sampler.ids = np.zeros(21, dtype=int)
    with pytest.raises(ValueError, match="21 entries"):
        iter(sampler)


# Ten million rows

MEASURE = """
import json, time
import numpy as np
from programs import peak_mib
from st_clusterns.training.sampler import ClusterBatchSampler

ids = np.random.default_rng(0).integers(1_000, size=10_000_000)
sampler = ClusterBatchSampler(range(len(ids)), 256, ids=ids, group_size=8)
imported, start = peak_mib(), time.perf_counter()
rows = sum(map(len, sampler))
seconds, peak = time.perf_counter() - start, peak_mib()
print(json.dumps({"rows": rows, "seconds": seconds, "added": peak - imported, "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_ten_million_rows_in_ten_seconds_and_a_gigabyte() -> None:
    measured = json.loads(run_python(MEASURE, check=True).stdout)
    print(measured)
    assert measured["rows"] == 10_000_000
    assert measured["seconds"] < 10
    assert 80 < measured["added"] < 1_000, "the order of the rows alone takes 8 bytes a row"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_is_that_of_the_program_alone() -> None:
    ballast = np.ones(50_000_000)  # 400 MB
    done = run_python("from programs import peak_mib; print(peak_mib())", check=True)
    assert float(done.stdout) < ballast.nbytes / 2**20 / 2
