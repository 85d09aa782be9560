"""Density peaks and recycling, against versions written point by point."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import near
from vla_pruner.baselines.clustering import density_peaks, keep_and_recycle, recycled_counts
from vla_pruner.pruning.hashed_uniform import hashed_uniform


def slow_peaks(points, clusters, noise):
    """Centres and cluster of one set of points, in plain Python."""
    n, width = len(points), len(points[0])
    d = [[math.dist(a, b) / math.sqrt(width) for b in points] for a in points]
    rho = []
    for i in range(n):
        near = sorted(d[i])[:clusters]
        rho.append(math.exp(-sum(x * x for x in near) / len(near)) + noise[i])
    gamma = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if rho[j] > rho[i]]
        gamma.append(rho[i] * (min(denser) if denser else max(map(max, d))))
    centres = sorted(sorted(range(n), key=lambda i: (-gamma[i], i))[:clusters])
    nearest = [min(range(clusters), key=lambda c: (d[i][centres[c]], c)) for i in range(n)]
    return centres, [centres.index(i) if i in centres else nearest[i] for i in range(n)]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 24), data=st.data(), seed=st.integers(0, 99))
def test_density_peaks_equal_the_slow_version(n, data, seed):
    clusters = data.draw(st.integers(1, n))
    points = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(seed))
    noise = 1e-3 * hashed_uniform(torch.arange(2), torch.arange(n))
    centres, cluster = density_peaks(points, clusters, noise=noise)
    for row in range(2):
        expected = slow_peaks(points[row].tolist(), clusters, noise[row].tolist())
        assert (centres[row].tolist(), cluster[row].tolist()) == expected


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 16), data=st.data(), seed=st.integers(0, 99))
def test_order_of_points_does_not_matter(n, data, seed):
    clusters = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    points, order = (
        torch.randn(1, n, 4, generator=generator),
        torch.randperm(n, generator=generator),
    )
    noise = 1e-3 * torch.rand(1, n, generator=generator)
    one, _ = density_peaks(points, clusters, noise=noise)
    two, _ = density_peaks(points[:, order], clusters, noise=noise[:, order])
    assert sorted(order[two[0]].tolist()) == one[0].tolist()


def test_two_heaps_are_found():
    """Noise tells the two nearest points apart, which are each other's neighbour, equally dense."""
    generator = torch.Generator().manual_seed(0)
    heap = torch.randn(10, 4, generator=generator) * 0.1
    points = torch.cat([heap, heap + 3])[None]
    noise = 1e-6 * hashed_uniform(torch.zeros(1).long(), torch.arange(20))
    _, cluster = density_peaks(points, 2, noise=noise)
    assert cluster[0].tolist() == [0] * 10 + [1] * 10


def test_duplicates_leave_no_cluster_empty():
    points = torch.ones(1, 9, 4)
    for noise in (None, hashed_uniform(torch.zeros(1).long(), torch.arange(9)) * 1e-6):
        centres, cluster = density_peaks(points, 3, noise=noise)
        assert sorted(set(cluster[0].tolist())) == [0, 1, 2]
        assert cluster[0, centres[0]].tolist() == [0, 1, 2]


def test_the_largest_noise_is_the_first_of_equals():
    noise = torch.tensor([[1e-6, 3e-6, 2e-6, 0.0]])
    points = torch.tensor([[[0.0], [0.0], [0.0], [0.0]]])
    points[0, 3] = 5.0  # The one that stands apart is a centre, too.
    centres, _ = density_peaks(points, 2, noise=noise)
    assert 1 in centres[0].tolist()


@pytest.mark.parametrize("seed", range(8))
def test_noise_far_below_the_resolution_of_fp32_decides(seed):
    """With one cluster all are equally dense: the centre is where the noise is largest."""
    noise = 1e-6 * hashed_uniform(torch.tensor([seed]), torch.arange(150))
    assert len(set((1 + noise).flatten().tolist())) < 12, "fp32 would do"
    points = torch.randn(1, 150, 16, generator=torch.Generator().manual_seed(seed))
    centres, cluster = density_peaks(points, 1, noise=noise)
    expected, _ = slow_peaks(points[0].tolist(), 1, noise[0].tolist())
    # All but the densest multiply a density of 1 with the distance to a denser one.
    assert centres[0].tolist() == expected and cluster[0].tolist() == [0] * 150
    same = torch.ones(1, 150, 16)
    assert density_peaks(same, 1, noise=noise)[0].tolist() == [[0]]  # no distance, no peak


def test_invalid_points_are_centres_last():
    points = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[True] * 5 + [False] * 3])
    alone, together = density_peaks(points[:, :5], 3), density_peaks(points, 3, valid=valid)
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1][:, :5])
    centres, _ = density_peaks(points, 6, valid=valid)
    assert centres[0, :5].tolist() == [0, 1, 2, 3, 4]


def test_nan_and_too_many_clusters_are_refused():
    points = torch.randn(1, 5, 3)
    for clusters in (0, 6):
        with pytest.raises(ValueError, match=r"must lie in 1\.\.5"):
            density_peaks(points, clusters)
    points[0, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        density_peaks(points, 2)


# ---------------------------------------------------------------------- recycling
def test_the_counts_of_the_published_first_cut():
    """576 to 300 and some: 276 pruned, 83 clustered into 9, which the source does not count."""
    assert recycled_counts(576, 309) == (300, 83, 9)
    assert recycled_counts(309, 309) == (309, 0, 0)


@given(m=st.integers(1, 400), data=st.data(), share=st.floats(0.05, 1.0), group=st.integers(1, 20))
def test_places_are_divided_exactly(m, data, share, group):
    k = data.draw(st.integers(1, m))
    stay, pool, clusters = recycled_counts(m, k, share=share, group=group)
    assert stay + clusters == k and stay >= 1
    assert clusters <= pool <= m - stay
    if k == m:
        return

    def wanted(stay):
        best = min(m - stay, int(share * (m - stay)) + 1)
        return min(best, best // group + 1)

    fits = [v for v in range(1, k + 1) if v + wanted(v) == k]
    if fits:
        assert (stay, clusters) == (max(fits), wanted(max(fits)))
    else:
        assert stay == 1


def slow_recycle(score, hidden, k, noise, **options):
    """Kept tokens in order and their new hidden states, one row, in plain Python."""
    m = len(score)
    stay, pool, clusters = recycled_counts(m, k, **options)
    ranked = sorted(range(m), key=lambda i: (-score[i], i))
    best = sorted(ranked[stay : stay + pool])
    result = {i: hidden[i] for i in ranked[:stay]}
    if clusters:
        centres, cluster = slow_peaks([hidden[i] for i in best], clusters, [noise[i] for i in best])
        for number, centre in enumerate(centres):
            members = [hidden[i] for i, c in zip(best, cluster, strict=True) if c == number]
            result[best[centre]] = [sum(x) / len(members) for x in zip(*members, strict=True)]
    return sorted(result), [result[i] for i in sorted(result)]


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 60), data=st.data(), seed=st.integers(0, 99))
def test_recycling_equals_the_slow_version(m, data, seed):
    k = data.draw(st.integers(1, m))
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(2, m, generator=generator)
    hidden = torch.randn(2, m, 3, generator=generator)
    noise = 1e-3 * torch.rand(2, m, generator=generator)
    kept, merge = keep_and_recycle(score, hidden, k, noise=noise)
    assert kept.shape == (2, k) and kept.dtype == torch.int64
    if merge is None:
        merge = torch.nn.functional.one_hot(kept, m).float()
    torch.testing.assert_close(merge.sum(dim=2), torch.ones(2, k))
    for row in range(2):
        tokens, states = slow_recycle(
            score[row].tolist(), hidden[row].tolist(), k, noise[row].tolist()
        )
        assert kept[row].tolist() == tokens
        near(merge[row] @ hidden[row], torch.tensor(states))


def test_tokens_that_stay_are_untouched():
    score, hidden = torch.arange(50.0)[None], torch.randn(1, 50, 4)
    kept, merge = keep_and_recycle(score, hidden, 20)
    best = kept[0] >= 50 - recycled_counts(50, 20)[0]
    assert torch.equal(merge[0, best], torch.eye(50)[kept[0, best]])
    assert (merge[0, ~best] > 0).sum(dim=1).max() > 1


def test_missing_tokens_are_in_no_mean():
    generator = torch.Generator().manual_seed(2)
    score = torch.rand(1, 40, generator=generator)
    hidden = torch.randn(1, 40, 3, generator=generator)
    valid = torch.arange(40)[None] < 20
    kept, merge = keep_and_recycle(score, hidden, 10, valid=valid)
    assert kept.max() < 20 and (merge[..., 20:] == 0).all()
    kept, merge = keep_and_recycle(score, hidden, 30, valid=valid)
    torch.testing.assert_close(merge.sum(dim=2), torch.ones(1, 30))
    mixed = merge[0, kept[0] < 20][:, 20:]
    assert (mixed == 0).all()


@pytest.mark.parametrize("broken", ["score", "hidden"])
def test_nan_is_refused(broken):
    score, hidden = torch.rand(1, 40), torch.randn(1, 40, 3)
    (score if broken == "score" else hidden)[0, 0] = float("nan")
    score[0, 1:] = torch.arange(39.0).flip(0) if broken == "score" else score[0, 1:]
    with pytest.raises(ValueError, match="NaN"):
        keep_and_recycle(score, hidden, 39 if broken == "score" else 2, share=1.0)


def test_lots_depend_on_seed_and_place_alone():
    drawn = hashed_uniform(torch.tensor([3, 4]), torch.arange(1000))
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(float(drawn.mean()) - 0.5) < 0.03
    assert torch.equal(
        hashed_uniform(torch.tensor([4]), torch.tensor([[7, 9]]))[0], drawn[1, [7, 9]]
    )
    assert not torch.equal(hashed_uniform(torch.tensor([3, 4]), torch.arange(1000), seed=1), drawn)
    assert (drawn[0] - drawn[1]).abs().max() > 0.5
