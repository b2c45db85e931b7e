"""The evaluator against the published packages themselves, where they are installed.

The other tests compare with what these gave when their fixtures were made. Here the Inception
network runs side by side, with random weights that torch-fidelity and pytorch-fid read from one
file.
"""

import jax
import numpy as np
import pytest
from optional_torch import REASON, declare_operators

torch = pytest.importorskip("torch", reason=REASON)
LIBRARY = declare_operators(torch)
pytest.importorskip("torch_fidelity", reason=REASON)
pytest.importorskip("pytorch_fid", reason=REASON)

import pytorch_fid.inception as pytorch_fid_inception  # noqa: E402
from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import (  # noqa: E402
    FeatureExtractorInceptionV3,
)

from gae_jax.evaluation.frechet import frechet_distance  # noqa: E402
from gae_jax.evaluation.scores import inception_score, kid, precision_recall  # noqa: E402
from gae_jax.interop import metric_tables  # noqa: E402
from gae_jax.interop.convert import export_torch, import_torch  # noqa: E402
from gae_jax.nn.network import Network  # noqa: E402
from gae_jax.pretrained.inception import FIDInception  # noqa: E402


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(file of random weights with published names, our network, its arrays)."""
    network = Network(lambda rngs: FIDInception(rngs=rngs))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        x = rng.standard_normal(leaf.shape, np.float32)
        if "kernel" in name:
            return x * np.sqrt(2 / np.prod(leaf.shape[:-1])).astype(np.float32)
        if "running_var" in name:
            return 0.5 + np.abs(x)
        return 1 + 0.1 * x if name.endswith("['weight']") else 0.1 * x

    params, rest = (jax.tree_util.tree_map_with_path(draw, part) for part in network.abstract)
    tensors = export_torch(metric_tables.INCEPTION, params, rest)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, path)
    arrays = import_torch(metric_tables.INCEPTION, tensors, network)
    return path, network, arrays


IMAGES = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
CHANNELS_FIRST = torch.from_numpy(np.moveaxis(IMAGES, -1, 1).copy())


def check(name, got, want, tolerance):
    difference = np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want))
    print(f"{name}: {difference:.1e}")
    assert difference <= tolerance, f"{name}: {difference:.2e}"


def test_features_are_torch_fidelitys(weights):
    path, network, arrays = weights
    names = ["2048", "logits_unbiased", "logits"]
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", names, str(path))
    with torch.no_grad():
        want = dict(zip(names, theirs(CHANNELS_FIRST), strict=True))
    found = network(*arrays)(IMAGES, "tf")
    for name, ours in (("2048", "pool"), ("logits_unbiased",) * 2, ("logits",) * 2):
        check(ours, found[ours], want[name].numpy(), 5e-6)


def test_features_are_pytorch_fids(weights, monkeypatch):
    path, network, arrays = weights
    monkeypatch.setattr(
        pytorch_fid_inception,
        "load_state_dict_from_url",
        lambda *_, **__: torch.load(path, weights_only=True),
    )
    theirs = pytorch_fid_inception.InceptionV3([3]).eval()
    with torch.no_grad():
        (want,) = theirs(CHANNELS_FIRST.float() / 255)
    found = network(*arrays)(IMAGES, "pytorch_fid")["pool"]
    check("pool", found, want[:, :, 0, 0].numpy(), 5e-6)


def test_figures_are_torch_fidelitys():
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(6, 64))
    a, b = (
        np.maximum(rng.normal(size=(n, 6)) * s @ mix + 0.3 * rng.normal(size=(n, 64)), 0)
        for n, s in ((500, 1.0), (700, 1.2))
    )
    a, b = a.astype(np.float32), b.astype(np.float32)
    one, two = (torch.from_numpy(x) for x in (b, a))  # generated first, as there
    statistics = [metric_fid.fid_features_to_statistics(x.double()) for x in (one, two)]
    want = metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
    np.testing.assert_allclose(frechet_distance(b, a), want, rtol=1e-6)
    isc = list(metric_isc.isc_features_to_metric(one, 10, True, 2020).values())
    score = inception_score(b, "torch_fidelity")
    np.testing.assert_allclose([score.mean, score.std], isc, rtol=1e-5)
    want = metric_kid.kid_features_to_metric(
        one, two, kid_subsets=20, kid_subset_size=100, verbose=False
    )
    np.testing.assert_allclose(kid(a, b, subsets=20, size=100), list(want.values()), rtol=1e-4)
    want = metric_prc.calculate_precision_recall_full(one, two, 3)
    found = precision_recall(a, b)
    # at most one sample of either set on the other side of a radius
    np.testing.assert_allclose(found, [float(x) for x in want], atol=1 / 500 + 1e-6)
