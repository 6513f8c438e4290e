#!/usr/bin/env bash
# scikit-learn: the k-means++ start is slower on float32 rows than on float64 rows, and takes longer than the rest.
#
# Versions: scikit-learn 1.9.1, Python 3.11.
#
# A good engineer would guess:
#   KMeans works in float32 if it is given float32, at half the memory and about twice the speed, and its time is
#   that of the iterations.
#
# What happens:
#   The iterations are faster in float32. The start is not: it measures distances to each new centroid's candidates
#   by a function that, for float32, converts ALL rows to float64 in blocks and takes their norms anew, once for each
#   centroid. float64 rows are used as they are, with the norms computed once. With the default n_init of one
#   k-means++ start, this is most of the time of a fit on embeddings. kmeans_plusplus(rows.astype(float64)) and
#   KMeans(init=...) on float32 rows avoid it.
#
# Output seen (one thread; seconds depend on the machine, conversions do not):
#   float32: 64 conversions of 20,000 rows, start 0.75 s, 20 iterations 0.36 s
#   float64:  0 conversions of 20,000 rows, start 0.45 s, 20 iterations 0.70 s
#
# By hand, no CI: installs the packages into a temporary environment, or runs in PYTHON where that is set.
# Exits with 1 when the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/environment"
    PYTHON=$folder/environment/bin/python
    "$PYTHON" -m pip install --quiet scikit-learn==1.9.1
fi
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
"$PYTHON" - <<'PY'
import time

import numpy as np
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.metrics import pairwise

ROWS, CLUSTERS = 20_000, 64
convert, calls = pairwise._euclidean_distances_upcast, []


def counted(X, *others, **settings):
    calls.append(len(X))
    return convert(X, *others, **settings)


pairwise._euclidean_distances_upcast = counted
rows = np.random.default_rng(0).normal(size=(ROWS, 384))
conversions, starts = {}, {}
for dtype in (np.float32, np.float64):
    own = rows.astype(dtype)
    times = []
    for _ in range(3):
        calls.clear()
        begin = time.process_time()
        centroids, _ = kmeans_plusplus(own, CLUSTERS, random_state=0)
        times.append(time.process_time() - begin)
    begin = time.process_time()
    KMeans(CLUSTERS, init=centroids, n_init=1, max_iter=20, tol=0).fit(own)
    rest = time.process_time() - begin
    conversions[dtype], starts[dtype] = len(calls), min(times)
    print(f"{dtype.__name__}: {len(calls):2d} conversions of {ROWS:,} rows, start {min(times):.2f} s, 20 iterations {rest:.2f} s")
assert conversions == {np.float32: CLUSTERS, np.float64: 0}, "the behaviour changed"
assert starts[np.float32] > starts[np.float64], "the behaviour changed"
PY
