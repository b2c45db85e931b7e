"""Generated sets against references: names, presets, refusals; evaluate-samples and compare."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from gae_jax.commands import cli, compare, evaluate_samples
from gae_jax.config import default_config
from gae_jax.evaluation.archives import write_samples
from gae_jax.evaluation.extractors import (
    Extractor,
    check_fd_dinov2,
    dinov2_extractor,
    each_batch,
    features_of,
)
from gae_jax.evaluation.frechet import Reference, frechet_distance
from gae_jax.evaluation.generation import (
    ReferenceSet,
    Settings,
    check_front_end,
    generation_scores,
)
from gae_jax.evaluation.presets import PRESETS, counted
from gae_jax.evaluation.references import load_reference, moments_of_images
from gae_jax.evaluation.stored_statistics import write_statistics
from gae_jax.nn.network import Network
from gae_jax.nn.pixels import dinov2_preprocess
from gae_jax.pretrained.backbone import VisionBackbone
from gae_jax.runtime.errors import ConfigError, DataError, UserError
from gae_jax.runtime.files import read_json
from gae_jax.runtime.mesh import make_mesh

D = 12  # dimensions of the extractor instead of Inception
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 8, 8, 3), np.uint8)
LABELS = RNG.permutation(np.repeat(np.arange(10), 6)).astype(np.int32)


def mesh_of(devices=1):
    return make_mesh(devices=jax.devices()[:devices])


def small_extractor(front_end="tf", edge=8):
    """Random projections of the pixels, under the names of Inception's outputs."""
    matrix = np.random.default_rng(1).normal(size=(3 * edge**2, 2 * D)).astype(np.float32) / 20

    def run(arrays, images):
        x = images.reshape(len(images), -1).astype(np.float32) / 255 @ arrays[0]["matrix"]
        return {"pool": x[:, :D], "spatial": x[:, D:], "logits_unbiased": x[:, :D]}

    return Extractor("inception", "abc", front_end, run, ({"matrix": matrix}, {}))


def project(images):
    mesh, own = mesh_of(), {"inception": small_extractor()}
    rows = features_of([images], own, mesh, size=len(images))["inception"]
    return {("inception", space): x for space, x in rows.items()}


def reference_of(images, **more):
    features = project(images)
    names = ("pool", "spatial")
    statistics = {("inception", x): Reference(features["inception", x]) for x in names}
    return ReferenceSet("ref.npz", "d", statistics, features, **{"front_end": "tf"} | more)


@pytest.mark.parametrize(
    ("count", "name"),
    [(50_000, "fid"), (5_000, "fid_5k"), (10_000, "fid_10k"), (1_797, "fid_1797")],
)
def test_a_metric_of_fewer_images_says_so_in_its_name(count, name):
    assert counted("fid", count) == name


@pytest.mark.parametrize("devices", [1, 8])
def test_features_come_in_order_whatever_the_batches(devices):
    own = {"inception": small_extractor()}
    whole = features_of([IMAGES], own, mesh_of(), size=60)["inception"]["pool"]
    pieces = (IMAGES[i : i + 16] for i in range(0, 60, 16))
    told = []
    found = features_of(pieces, own, mesh_of(devices), size=16, progress=told.append)
    np.testing.assert_allclose(found["inception"]["pool"], whole, atol=1e-6)
    assert told == [16, 16, 16, 12]
    with pytest.raises(DataError, match="no images"):
        features_of([], own, mesh_of(), size=8)


def test_fd_dinov2_sees_the_class_token_of_images_resized_by_pil():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    network = Network(
        lambda rngs: VisionBackbone(kind="dinov2", input_size=224, **sizes, rngs=rngs)
    )
    arrays = network.init(jax.random.key(0))
    own = {"dinov2": dinov2_extractor(network, arrays, digest="abc")}
    found = features_of([IMAGES[:3]], own, mesh_of(), size=3)["dinov2"]["cls"]
    encode = jax.jit(lambda images: network(*arrays).encoder(images))
    expected = encode(dinov2_preprocess(IMAGES[:3]))[:, 0]
    assert found.shape == (3, 16)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    reference = ReferenceSet("r", "d", {("dinov2", "cls"): Reference(found)}, {})
    figures, _ = generation_scores(
        {("dinov2", "cls"): found},
        reference,
        "adm",
        ("fd_dinov2",),
        settings=Settings(allow_few=True),
    )
    assert abs(figures["fd_dinov2_3"]) < 1e-6


def test_a_batch_is_filled_up_and_what_fills_it_is_marked():
    (images, valid, found), = each_batch(
        [IMAGES[:5]], {"inception": small_extractor()}, mesh_of(8), size=8
    )  # fmt: skip
    assert len(images) == 5
    np.testing.assert_array_equal(valid, [True] * 5 + [False] * 3)
    assert found["inception"]["pool"].shape == (8, D)


def test_the_figures_are_those_of_the_features():
    own, reference = project(IMAGES[:40]), reference_of(IMAGES[20:])
    metrics = ("fid", "sfid", "precision", "recall")
    figures, more = generation_scores(own, reference, "torch_fidelity", metrics)
    assert set(figures) == {"fid_40", "sfid_40", "precision_40", "recall_40"}
    for metric, space in (("fid", "pool"), ("sfid", "spatial")):
        expected = frechet_distance(own["inception", space], reference.features["inception", space])
        np.testing.assert_allclose(figures[f"{metric}_40"], expected, rtol=1e-9)
        parts = more[f"{metric}_40.mean_part"] + more[f"{metric}_40.covariance_part"]
        np.testing.assert_allclose(parts, expected, rtol=1e-9)
    assert 0 < figures["precision_40"] <= 1
    assert more["reference_images"] == 40


def test_inception_scores_in_both_forms():
    logits = np.random.default_rng(0).normal(size=(10_000, 10)) * 2
    features = {("inception", "logits_unbiased"): logits}
    labels = np.random.default_rng(0).integers(0, 10, 10_000)
    empty = ReferenceSet("ref", "d", {}, {})
    for preset in ("adm", "torch_fidelity"):
        figures, more = generation_scores(
            features, empty, preset, ("inception_score",), labels=labels
        )
        assert set(figures) == {"inception_score_10k"}
        one = more["inception_score_10k.one_split"]
        assert abs(figures["inception_score_10k"] - one) < 0.1 < one
    order = np.argsort(labels, kind="stable")
    with pytest.raises(UserError, match=r"sorted by class.*Permute the images"):
        generation_scores(features, empty, "adm", ("inception_score",), labels=labels[order])
    # torch-fidelity shuffles, so that the order of the file does not count
    generation_scores(features, empty, "torch_fidelity", ("inception_score",), labels=labels[order])
    few = {("inception", "logits_unbiased"): logits[:7_000]}
    with pytest.raises(DataError, match="7000 images do not divide into splits of 5,000"):
        generation_scores(few, empty, "adm", ("inception_score",))


def test_wrong_use_is_refused_with_the_remedy():
    own, reference = project(IMAGES), reference_of(IMAGES)
    with pytest.raises(ConfigError, match="no metric fidd; known are fid, sfid"):
        generation_scores(own, reference, "adm", ("fidd",))
    few = {at: x[: D - 2] for at, x in own.items()}
    with pytest.raises(DataError, match=r"10 images are too few.*--allow-few"):
        generation_scores(few, reference, "adm", ("fid",))
    figures, _ = generation_scores(
        few, reference, "adm", ("fid",), settings=Settings(allow_few=True)
    )
    assert figures["fid_10"] > 0
    alone = ReferenceSet("stats.npz", "d", reference.statistics, {}, "tf")
    with pytest.raises(ConfigError, match=r"stats.npz holds statistics alone.*arr_0"):
        generation_scores(own, alone, "adm", ("precision",))
    with pytest.raises(ConfigError, match="has no statistics of dinov2 cls"):
        generation_scores({("dinov2", "cls"): own["inception", "pool"]}, alone, "adm",
                          ("fd_dinov2",))  # fmt: skip


def test_statistics_of_another_front_end_are_refused():
    reference = reference_of(IMAGES, front_end="pytorch_fid")
    with pytest.raises(ConfigError, match=r"preset 'adm' resizes images for 'tf'.*pytorch_fid"):
        check_front_end(reference, "adm")
    check_front_end(reference, "pytorch_fid")
    check_front_end(reference_of(IMAGES), "adm")


def no_progress(what, count):
    return lambda done: None


def test_statistics_that_do_not_say_their_front_end_ask_for_it(tmp_path):
    own, mesh, features = {"inception": small_extractor()}, mesh_of(), project(IMAGES)
    moments = Reference(features["inception", "pool"])
    path = tmp_path / "fid_stats.npz"
    mean, covariance = moments.mean, np.cov(features["inception", "pool"], rowvar=False)
    np.savez(path, mu=mean, sigma=covariance)
    read = partial(load_reference, path, own, mesh, size=16, say=no_progress)
    says = r"--ref-front-end=NAME .*tf: .*MAR's and JiT's.*; pytorch_fid: torch's bilinear"
    for preset in ("adm", "pytorch_fid"):
        with pytest.raises(ConfigError, match=says):
            check_front_end(read(), preset)
        with pytest.raises(ConfigError, match=says):
            generation_scores(features, read(), preset, ("fid",))
    figures, _ = generation_scores(features, read(front_end="tf"), "adm", ("fid",))
    assert abs(figures["fid_60"]) < 1e-6
    with pytest.raises(ConfigError, match="'tf', but preset 'pytorch_fid' resizes"):
        check_front_end(read(front_end="tf"), "pytorch_fid")
    with pytest.raises(ConfigError, match="no front end 'adm'; use one of tf: "):
        read(front_end="adm")
    # of a file that says it, the flag is not believed; of images it is the samples' own
    spaces = {"pool": (mean, covariance)}
    write_statistics(tmp_path / "own.npz", spaces, count=60, front_end="tf", facts={})
    with pytest.raises(ConfigError, match="says itself that its front end is 'tf'"):
        load_reference(tmp_path / "own.npz", own, mesh, size=16, say=no_progress,
                       front_end="pytorch_fid")  # fmt: skip
    write_samples(tmp_path / "images.npz", [IMAGES], LABELS)
    found = load_reference(tmp_path / "images.npz", own, mesh, size=16, say=no_progress)
    assert found.front_end == "tf"


def test_a_reference_of_other_weights_is_refused(tmp_path):
    own, mesh, x = {"inception": small_extractor()}, mesh_of(), project(IMAGES)["inception", "pool"]
    path, spaces = tmp_path / "ref.npz", {"pool": (x.mean(0), np.cov(x, rowvar=False))}
    for digest in ("abc", "other"):
        made = dataclasses.replace(own["inception"], digest=digest).facts()
        facts = {"extractors": {"inception": made}}
        write_statistics(path, spaces, count=60, front_end="tf", facts=facts)
        if digest == "abc":
            load_reference(path, own, mesh, size=16, say=no_progress)
            continue
        with pytest.raises(DataError, match=r"other weights of inception \(other\) .*now \(abc\)"):
            load_reference(path, own, mesh, size=16, say=no_progress)


def test_fd_dinov2_is_of_one_network_only():
    sizes = default_config().backbone.dinov2.to_dict()
    check_fd_dinov2(sizes, "run")
    for change in (dict(hidden_size=384, num_attention_heads=6), dict(num_register_tokens=4)):
        with pytest.raises(ConfigError, match=r"ViT-L/14 .*dgm-eval.*run has .*not (1024|0)\)"):
            check_fd_dinov2(sizes | change, "run")


def test_a_reference_is_made_of_images_that_are_never_all_in_memory(tmp_path):
    own, mesh = {"inception": small_extractor()}, mesh_of(8)
    batches = (IMAGES[i : i + 16] for i in range(0, 60, 16))
    moments, features, kept = moments_of_images(batches, 60, own, mesh, size=16, keep=7)
    whole = project(IMAGES)
    chosen = np.linspace(0, 59, 7).round().astype(int)
    np.testing.assert_array_equal(kept, IMAGES[chosen])
    for at in (("inception", "pool"), ("inception", "spatial")):
        np.testing.assert_allclose(features[at], whole[at][chosen], atol=1e-6)
        np.testing.assert_allclose(moments[at].mean, whole[at].mean(0), atol=1e-6)
        np.testing.assert_allclose(
            moments[at].covariance, np.cov(whole[at], rowvar=False), atol=1e-5
        )
    spaces = {at[1]: (m.mean, m.covariance) for at, m in moments.items()}
    path = tmp_path / "ref.npz"
    write_statistics(path, spaces, count=60, front_end="tf", facts={}, images=kept)
    found = load_reference(path, own, mesh, size=16, say=lambda what, count: lambda n: None)
    assert found.front_end == "tf"
    assert len(found.features["inception", "pool"]) == 7
    figures, _ = generation_scores(whole, found, "adm", ("fid",))
    assert abs(figures["fid_60"]) < 1e-6


@pytest.fixture
def cut_down(monkeypatch):
    """evaluate-samples with the small extractor instead of Inception."""

    def small(options, metrics, mesh):
        return {"inception": small_extractor(PRESETS[options.preset].front_end)}

    monkeypatch.setattr(evaluate_samples, "extractors_of", small)


def run(*arguments):
    return cli.main(["gae_jax", *map(str, arguments)])


def test_evaluate_samples_from_the_command_line(cut_down, tmp_path, capsys):
    samples, reference = tmp_path / "samples.npz", tmp_path / "ref.npz"
    write_samples(samples, [IMAGES[:40]], LABELS[:40])
    write_samples(reference, [IMAGES[20:]], LABELS[20:])
    arguments = (f"--samples={samples}", f"--ref={reference}", "--metrics=fid,sfid,recall")
    assert run("evaluate-samples", *arguments, "--batch-size=16", f"--out={tmp_path / 'a'}") == 0
    text = capsys.readouterr().out
    result = read_json(tmp_path / "a" / "result.json")
    assert set(result["metrics"]) == {"fid_40", "sfid_40", "recall_40"}
    assert f"fid_40     {result['metrics']['fid_40']:.4f}" in text
    facts = result["manifest"]
    assert facts["preset"] == "adm"
    assert facts["count"] == 40
    assert facts["extractors"]["inception"]["front_end"] == "tf"
    assert facts["precision_recall"] == "f16_adm"
    for name in ("samples_digest", "reference_digest"):
        assert len(facts[name]) == 64
    page = (tmp_path / "a" / "result.html").read_text()
    assert "fid_40" in page
    assert "data:image/png" in page
    # another protocol: compare says so first, and ends with a status of its own
    more = ("--preset=torch_fidelity", f"--out={tmp_path / 'b'}")
    assert run("evaluate-samples", *arguments, *more) == 0
    capsys.readouterr()
    assert run("compare", tmp_path / "a", tmp_path / "b" / "result.json") == compare.OTHER_PROTOCOL
    text = capsys.readouterr().out
    assert text.index("manifest.preset") < text.index("metrics.fid_40")
    assert "protocols differ in 3 fields" in text
    assert run("compare", tmp_path / "a", tmp_path / "a") == 0
    assert "protocols are the same" in capsys.readouterr().out


def test_reconstructions_are_compared_with_the_images_themselves(cut_down, tmp_path, capsys):
    originals, samples = tmp_path / "originals.npz", tmp_path / "found.npz"
    found = np.clip(IMAGES.astype(int) + 3, 0, 255).astype(np.uint8)
    write_samples(originals, [IMAGES], LABELS)
    write_samples(samples, [found], LABELS)
    arguments = (f"--samples={samples}", f"--ref={originals}", "--preset=rae_recon")
    assert run("evaluate-samples", *arguments, f"--out={tmp_path / 'a'}") == 0
    figures = read_json(tmp_path / "a" / "result.json")["metrics"]
    assert set(figures) == {"psnr", "ssim", "rfid_60"}
    error = np.mean((found.astype(float) - IMAGES) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(figures["psnr"], np.mean(10 * np.log10(255**2 / error)), atol=0.1)
    capsys.readouterr()
    fewer, statistics = tmp_path / "fewer.npz", tmp_path / "stats.npz"
    write_samples(fewer, [IMAGES[:50]], LABELS[:50])
    np.savez(statistics, mu=np.zeros(3), sigma=np.eye(3), arr_0=IMAGES)
    for reference, says in (
        (fewer, "reconstructions and originals must be the same images"),
        (statistics, "is a reference for generated images: statistics of a training set"),
    ):
        assert run("evaluate-samples", f"--samples={samples}", f"--ref={reference}",
                   "--preset=rae_recon", f"--out={tmp_path / 'b'}") == 1  # fmt: skip
        assert says in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset=fid",), "there is no preset 'fid'; use one of adm, torch_fidelity"),
        ((), "no weights of the Inception network given; pt_inception-2015-12-05-6726825d.pth"),
        (("--inception=none.pth",), "there is no file none.pth; pt_inception"),
        (("--metrics=fd_dinov2",), "fd_dinov2 needs DINOv2-L: dinov2_vitl14_pretrain.pth"),
        (("--metrics=fidd",), "there is no metric fidd"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_written(arguments, says, tmp_path, capsys):
    write_samples(tmp_path / "x.npz", [IMAGES], LABELS)
    where = (f"--samples={tmp_path / 'x.npz'}", f"--ref={tmp_path / 'x.npz'}")
    assert run("evaluate-samples", *where, *arguments) == 1
    assert says in capsys.readouterr().err.replace("\n  ", " ")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_compare_says_what_it_cannot_read(tmp_path):
    with pytest.raises(UserError, match="there is no result"):
        compare.compare(tmp_path / "a.json", tmp_path)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no result"):
        compare.read_result(tmp_path / "a.json")


def test_protocol_comes_before_figures():
    a = {"metrics.fid": 3.0, "manifest.seed": 0, "generation.sde.sampling.steps": 250}
    b = {"metrics.fid": 2.5, "manifest.seed": 1, "metrics.recall": 0.6}
    protocol, figures = compare.differences(a, b)
    assert protocol == [("generation.sde.sampling.steps", 250, None), ("manifest.seed", 0, 1)]
    assert figures == [("metrics.fid", 3.0, 2.5), ("metrics.recall", None, 0.6)]
