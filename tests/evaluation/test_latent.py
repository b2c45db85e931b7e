"""Diagnostics of latents against closed forms, float64 rewrites and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import dctn
from scipy.integrate import quad
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import normalized_mutual_info_score
from sklearn.neighbors import NearestNeighbors

from gae_jax.evaluation import latent, neighbours
from gae_jax.runtime.errors import DataError
from gae_jax.runtime.mesh import make_mesh, put_batch


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last of them ragged."""
    for module in (latent, neighbours):
        monkeypatch.setattr(module, "BLOCK", 37)


def clustered(count=200, *, classes=8, noise=1.0, seed=0, shape=(3, 4, 6)):
    """Latents around the mean of their class, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    means = rng.normal(size=(classes, 1, 1, shape[-1]))
    z = 5 + means[labels] + noise * rng.normal(size=(count, *shape))
    return z.astype(np.float32), labels


def sklearn_neighbours(features, k):
    features = features.astype(np.float64)
    found = NearestNeighbors(n_neighbors=k + 1, metric="cosine", algorithm="brute").fit(features)
    return found.kneighbors(features)[1][:, 1:]  # the first is the row itself


# --- rank


def test_rank_of_a_spectrum():
    np.testing.assert_allclose(latent.spectral_rank([3, 3, 3, 3, 0, -1e-9]), 4, rtol=1e-12)
    np.testing.assert_allclose(latent.spectral_rank([0, 7, 0]), 1, rtol=1e-12)
    np.testing.assert_allclose(latent.spectral_rank([0, 0]), 1, rtol=1e-12)
    assert np.isnan(latent.spectral_rank([1, np.nan]))
    p = np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(latent.spectral_rank(4 * p), 2**1.5, rtol=1e-12)


def test_effective_rank_of_isotropic_and_of_rank_one_latents():
    rng = np.random.default_rng(0)
    d = 6
    q = np.linalg.qr(rng.normal(size=(60, d)))[0].reshape(60, 1, 1, d)
    np.testing.assert_allclose(latent.effective_rank(q), 1, rtol=1e-12)
    line = rng.normal(size=(60, 2, 2, 1)) * rng.normal(size=d)
    np.testing.assert_allclose(latent.effective_rank(line), 1 / d, rtol=1e-9)
    # an offset is a direction
    moved = q[..., :1] * np.eye(d)[0] + 1 / np.sqrt(60) * np.eye(d)[1]
    moved -= q[..., :1].mean() * np.eye(d)[0]
    np.testing.assert_allclose(latent.effective_rank(moved), 2 / d, rtol=1e-2)


def test_effective_rank_is_that_of_the_definition():
    z, _ = clustered()
    s = np.linalg.svd(z.mean((1, 2), dtype=np.float64), compute_uv=False)
    p = s / s.sum()
    expected = np.exp(-np.sum(p * np.log(p))) / 6
    np.testing.assert_allclose(latent.effective_rank(z), expected, rtol=1e-12)


# --- neighbours


def test_nearest_is_scikit_learns():
    x = np.random.default_rng(0).normal(size=(150, 7))
    np.testing.assert_array_equal(neighbours.nearest(x, 5), sklearn_neighbours(x, 5))
    with pytest.raises(DataError, match="5 images have no 5 others"):
        neighbours.nearest(x[:5], 5)


def test_class_neighbourhood_is_scikit_learns():
    z, labels = clustered(noise=2.0)
    features = z.mean((1, 2), dtype=np.float64)
    near = sklearn_neighbours(features - features.mean(0, dtype=np.float64), 4)
    expected = np.mean(labels[near] == labels[:, None])
    assert 0.2 < expected < 0.9
    found = neighbours.class_neighbourhood(z, labels, k=4)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_gsq_is_the_one_nearest_neighbour_of_scikit_learn():
    z, labels = clustered(noise=2.0)
    features = z.mean((1, 2), dtype=np.float64)
    near = sklearn_neighbours(features - features.mean(0), 1)[:, 0]
    found = neighbours.gsq(z, labels)
    assert found == (np.mean(labels[near] == labels), 0.0, 1)  # 8 classes: one repeat of all
    assert 0.3 < found.mean < 0.95
    np.testing.assert_allclose(
        found.mean, neighbours.class_neighbourhood(z, labels, k=1), rtol=1e-12
    )


def test_gsq_draws_classes():
    z, labels = clustered(300, classes=12, noise=2.0)
    found = neighbours.gsq(z, labels, classes=5, repeats=4)
    assert found.repeats == 4
    assert found.std > 0
    assert found == neighbours.gsq(z, labels, classes=5, repeats=4)
    assert found != neighbours.gsq(z, labels, classes=5, repeats=4, seed=1)
    assert found.mean > neighbours.gsq(z, labels, classes=12).mean  # fewer classes are easier


def test_gsq_knows_classes_and_chance():
    z, labels = clustered()
    constant = np.eye(8)[labels].reshape(200, 1, 1, 8)
    assert neighbours.gsq(constant, labels).mean == 1
    shuffled = np.random.default_rng(1).permutation(labels)
    assert neighbours.gsq(z, labels).mean > 0.95
    assert neighbours.gsq(z, shuffled).mean < 0.25
    assert neighbours.class_neighbourhood(z, shuffled) < 0.25
    # neither an offset nor a scale changes it
    moved = 4 * (z + np.array([0.5, -3, 0, 1, 2, -1], np.float32))
    assert neighbours.gsq(moved, labels) == neighbours.gsq(z, labels)


# --- segments


def scene(seed=0, size=8):
    """Four quadrants, as integers [size, size], and colours of them with noise."""
    rng = np.random.default_rng(seed)
    half = np.arange(size) >= size // 2
    segments = half[:, None] * 2 + half
    z = rng.normal(size=(4, 5))[segments] + 0.5 * rng.normal(size=(size, size, 5))
    return z.astype(np.float32), segments


def test_ssc_is_one_for_tokens_that_name_their_segment():
    _, segments = scene()
    one_hot = np.eye(4)[segments][None]
    np.testing.assert_allclose(latent.ssc(one_hot, segments[None]), [1], rtol=1e-9)
    np.testing.assert_allclose(latent.ssc(7 * one_hot, segments[None]), [1], rtol=1e-9)
    # segments that have nothing to do with the tokens
    shuffled = np.random.default_rng(0).permutation(segments.ravel()).reshape(1, 8, 8)
    assert latent.ssc(one_hot, shuffled)[0] < 0.25


def test_ssc_is_that_of_the_definition():
    """Clusters of scikit-learn, compared with I / sqrt(H H) from the table of counts."""
    for seed in range(3):
        z, segments = scene(seed)
        tokens = z.reshape(64, 5).astype(np.float64)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        affinity = np.exp(tokens @ tokens.T / 0.1) * (1 - np.eye(64))
        clusters = SpectralClustering(
            4, affinity="precomputed", n_init=10, random_state=0
        ).fit_predict(affinity)
        y = segments.ravel()
        expected = normalized_mutual_info_score(y, clusters, average_method="geometric")
        found = latent.ssc(z[None], segments[None])[0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        table = np.histogram2d(y, clusters, bins=(range(5), range(5)))[0] / 64
        rows, columns = table.sum(1), table.sum(0)
        inside = table > 0
        mutual = np.sum(table[inside] * np.log((table / np.outer(rows, columns))[inside]))
        entropy = [-np.sum(p[p > 0] * np.log(p[p > 0])) for p in (rows, columns)]
        np.testing.assert_allclose(found, mutual / np.sqrt(np.prod(entropy)), rtol=1e-6)


def test_ssc_clusters_by_the_normalised_laplacian():
    """Its eigenvectors in float64, without scikit-learn's pipeline."""
    z, segments = scene(3)
    tokens = z.reshape(64, 5).astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    affinity = np.exp(tokens @ tokens.T / 0.1) * (1 - np.eye(64))
    two = (segments >= 2).astype(int)
    degree = affinity.sum(1)
    vectors = np.linalg.eigh(affinity / np.sqrt(np.outer(degree, degree)))[1]
    second = vectors[:, -2] / np.sqrt(degree)
    first = np.full(64, 1 / np.sqrt(64))
    clusters = KMeans(2, n_init=10, random_state=0).fit_predict(np.stack([first, second], 1))
    expected = normalized_mutual_info_score(two.ravel(), clusters, average_method="geometric")
    np.testing.assert_allclose(latent.ssc(z[None], two[None])[0], expected, rtol=1e-6)


def test_ssc_leaves_out_what_has_no_segments():
    z, segments = scene()
    part = segments.copy()
    part[:4] = -1  # two quadrants belong to no segment
    single = np.zeros_like(segments)
    found = latent.ssc(np.stack([z, z, z]), np.stack([segments, part, single]))
    assert np.all((found[:2] > 0.3) & (found[:2] <= 1))
    assert np.isnan(found[2])
    with pytest.raises(DataError, match="none of 1 images has two segments"):
        latent.ssc(z[None], single[None])
    with pytest.raises(DataError, match=r"segments \[1, 4, 8\] are not on the grid"):
        latent.ssc(z[None], segments[None, :4])


# --- local perceptual continuity

KEY = jax.random.key(0)
IDS = np.arange(16, dtype=np.uint32)


def changes(z, decode, distance, ids=IDS, **kwargs):
    return latent.perceptual_changes(
        jnp.asarray(z), ids, decode=decode, distance=distance, key=KEY, **kwargs
    )


def length(a, b):
    return jnp.sqrt(jnp.sum(jnp.square(a - b), axis=(1, 2, 3)))


def test_lpc_of_decoders_that_are_known():
    z = np.random.default_rng(0).normal(size=(16, 2, 3, 4)).astype(np.float32)
    norm = np.linalg.norm(z.reshape(16, -1), axis=1)
    # the identity moves by exactly rho |z|
    found = changes(z, lambda z: z, length)
    np.testing.assert_allclose(found, norm[:, None] * latent.RHOS, rtol=1e-5)
    np.testing.assert_allclose(latent.lpc(found), 4 / (10 + 2 + 1 + 0.5) * norm.mean(), rtol=1e-5)
    # a constant decoder does not move
    assert latent.lpc(changes(z, jnp.ones_like, length)) == 0
    # linear in the distance
    thrice = changes(z, lambda z: z, lambda a, b: 3 * length(a, b))
    np.testing.assert_allclose(latent.lpc(thrice), 3 * latent.lpc(found), rtol=1e-6)
    # both signs: what one of them alone would see cancels
    odd = changes(z, lambda z: z, lambda a, b: jnp.sum(a - b, axis=(1, 2, 3)))
    np.testing.assert_allclose(odd, 0, atol=1e-5)
    # one direction for all radii
    seen = changes(z, lambda z: z, lambda a, b: jnp.abs(a - b)[:, 0, 0, 0])
    np.testing.assert_allclose(seen / seen[:, :1], np.tile(latent.RHOS, (16, 1)) / 0.1, rtol=1e-3)


def test_directions_are_uniform_and_independent_of_batches_and_devices():
    z = np.random.default_rng(0).normal(size=(16, 2, 3, 4)).astype(np.float32)
    # E |<u, e>|^2 = 1 / D for every direction e
    ids = np.arange(4000, dtype=np.uint32)
    ones = np.ones((4000, 1, 2, 2), np.float32) / 2  # |z| = 1
    squares = changes(
        ones, lambda z: z, lambda a, b: jnp.square(a - b)[:, 0, 1, 1], ids=ids, rhos=(1.0,)
    )
    np.testing.assert_allclose(np.mean(squares), 1 / 4, rtol=0.05)
    first = lambda a, b: jnp.abs(a - b)[:, 0, 0, 0]  # noqa: E731
    whole = changes(z, lambda z: z, first)
    halves = [changes(z[i], lambda z: z, first, ids=IDS[i]) for i in (slice(5), slice(5, 16))]
    np.testing.assert_allclose(np.concatenate(halves), whole, rtol=1e-5, atol=1e-7)
    mesh = make_mesh(devices=jax.devices())
    run = jax.jit(lambda z, ids: changes(z, lambda z: z, first, ids=ids))
    np.testing.assert_allclose(run(*put_batch((z, IDS), mesh)), whole, rtol=1e-5, atol=1e-7)


def test_weights_of_lpc_are_the_sources():
    weights = [latent.lpc(row[None]) for row in np.eye(4)]
    np.testing.assert_allclose(weights, [0.7407, 0.1481, 0.0741, 0.0370], atol=5e-5)


# --- spectra and covariances


def test_spectral_energy_of_known_maps():
    constant = np.ones((3, 8, 8, 2), np.float32)
    np.testing.assert_allclose(latent.spectral_energy(constant), 0, atol=1e-12)
    checker = (np.indices((8, 8)).sum(0) % 2 * 2.0 - 1)[None, :, :, None]
    assert latent.spectral_energy(checker) > 0.9
    white = np.random.default_rng(0).normal(size=(200, 8, 8, 4))
    high = np.add.outer(np.arange(8), np.arange(8)) > 0.5 * 14  # 28 of 64: above the diagonal
    np.testing.assert_allclose(latent.spectral_energy(white), high.mean(), rtol=0.01)
    np.testing.assert_allclose(latent.spectral_energy(white, rho=1.0), 0, atol=1e-12)


@pytest.mark.parametrize("rho", [0.25, 0.5])
def test_spectral_energy_is_scipys(rho):
    z = np.random.default_rng(0).normal(size=(50, 5, 8, 3)).cumsum(1).cumsum(2)
    energy = dctn(z, axes=(1, 2), norm="ortho") ** 2
    high = np.add.outer(np.arange(5), np.arange(8)) > rho * 11
    expected = np.mean((energy * high[..., None]).sum((1, 2, 3)) / energy.sum((1, 2, 3)))
    np.testing.assert_allclose(latent.spectral_energy(z, rho=rho), expected, rtol=1e-5)


def test_viv_is_the_unpredictable_variance_of_the_velocity():
    """Against the integral over t of Var(z - eps | x_t), from the joint covariance by hand."""

    def left(t, variance):
        cross = t * variance - (1 - t)
        return variance + 1 - cross**2 / (t**2 * variance + (1 - t) ** 2)

    rng = np.random.default_rng(0)
    # one position, one channel: the variance is known exactly
    z = rng.normal(size=(50, 1, 1, 1))
    for scale in (0.3, 1.0, 4.0):
        variance = np.var(scale * z, ddof=1)
        expected = quad(left, 0, 1, args=(variance,), epsabs=1e-12)[0]
        found = latent.viv(scale * z, np.zeros(50, int))
        np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_viv_of_a_covariance_that_is_a_product():
    """Classes' own means do not count; the factors are found; classes weigh the same."""
    rng = np.random.default_rng(0)
    positions = np.linalg.cholesky(np.array([[2, 0.8], [0.8, 1]]))
    channels = np.linalg.cholesky(np.diag([4, 1, 0.25]) + 0.2)

    def draw(count, scale, offset):
        z = np.einsum("ts,nsd,ed->nte", positions, rng.normal(size=(count, 2, 3)), channels)
        return scale * z.reshape(count, 1, 2, 3) + offset

    z = np.concatenate([draw(20_000, 1, 7), draw(10_000, 2, -3), draw(1, 50, 90)])
    labels = np.repeat([3, 5, 8], [20_000, 10_000, 1])
    full = np.kron(positions @ positions.T, channels @ channels.T)
    one = np.pi / 2 * np.sqrt(np.linalg.eigvalsh(full)).mean()
    np.testing.assert_allclose(latent.viv(z, labels), 1.5 * one, rtol=0.01)
    with pytest.raises(DataError, match="no class has two of the 3 images"):
        latent.viv(z[:3], np.arange(3))


def test_spatial_coherence_is_that_of_the_definition():
    z = np.random.default_rng(0).normal(size=(40, 4, 5, 3)).cumsum(1)
    tokens = z.reshape(40, 20, 3)
    tokens = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    cosines = np.einsum("ntd,nsd->nts", tokens, tokens)
    at = [(i, j) for i in range(4) for j in range(5)]
    steps = np.array([[abs(a - c) + abs(b - d) for c, d in at] for a, b in at])
    found = latent.spatial_coherence(z, near=1, far=4)
    np.testing.assert_allclose(found.near, cosines[:, steps == 1].mean(), atol=1e-6)
    np.testing.assert_allclose(found.far, cosines[:, steps >= 4].mean(), atol=1e-6)
    assert found.difference == found.near - found.far
    assert latent.spatial_coherence(z) == found  # half of 4 + 5 - 2, rounded up


def test_spatial_coherence_of_constant_smooth_and_shuffled_maps():
    angle = np.linspace(0, np.pi, 8)
    smooth = np.stack([np.cos(angle), np.sin(angle)], -1)[None, :, None].repeat(8, 2)
    np.testing.assert_allclose(latent.spatial_coherence(np.ones((1, 8, 8, 3))), (1, 1), rtol=1e-6)
    found = latent.spatial_coherence(smooth)
    assert found.near > 0.9
    assert found.difference > 0.5
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(smooth.reshape(64, 2)) for _ in range(300)])
    assert abs(latent.spatial_coherence(shuffled.reshape(300, 8, 8, 2)).difference) < 0.02
    with pytest.raises(DataError, match="latents of 1 x 1 positions have no pairs"):
        latent.spatial_coherence(np.ones((2, 1, 1, 3)))
