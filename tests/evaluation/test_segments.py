"""Label maps: read, cropped as their image is, brought to the latents' grid; SSC of a run's."""

import jax
import numpy as np
import pytest
from PIL import Image

from gae_jax.data.images import CROPS
from gae_jax.evaluation import segments
from gae_jax.run.run import Run
from gae_jax.run.session import Session
from gae_jax.runtime.errors import ConfigError, DataError
from gae_jax.stages.evaluate import check_segments, segment_coherence


def test_cells_vote():
    labels = np.zeros((8, 8), int)
    labels[:4, :4] = 7
    labels[0, 5:8] = 3  # 3 of 16 pixels; the others are no segment
    labels[4:, :4] = np.repeat([[5, 5, 9, 9]], 4, axis=0)  # as many of each
    labels[4:, 4:] = 2
    labels[4, 4:] = 70_000
    np.testing.assert_array_equal(segments.to_grid(labels, (2, 2)), [[7, -1], [5, 2]])
    with pytest.raises(DataError, match=r"\[8, 8\] pixels does not divide into .* 3 x 2"):
        segments.to_grid(labels, (3, 2))


@pytest.mark.parametrize("how", CROPS)
@pytest.mark.parametrize("shape", [(90, 41), (37, 64), (32, 32), (150, 150)])
def test_a_map_is_cropped_as_its_image(how, shape):
    """A step at 40 % of either edge: the map has it where the image has it, to a pixel."""
    rows, columns = (np.arange(edge) > 0.4 * edge for edge in shape)
    labels = 1 + rows[:, None] * 2 + columns
    image = Image.fromarray(np.stack([50 * labels] * 3, axis=-1).astype(np.uint8))
    pixels = CROPS[how](image, 16).pixels[..., 0]
    found = segments.crop(labels, 16, how)
    assert found.shape == (16, 16)
    assert set(np.unique(found)) <= {1, 2, 3, 4}
    for axis in (0, 1):
        step, edge = (
            np.abs(np.diff(x.astype(int), axis=axis)).sum(1 - axis) for x in (found, pixels)
        )
        assert abs(int(step.argmax()) - int(edge.argmax())) <= 1


def test_reading(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "panoptic.png")
    wide = colours.astype(int)
    want = wide[..., 0] + 256 * wide[..., 1] + 256**2 * wide[..., 2]
    np.testing.assert_array_equal(segments.read(tmp_path / "panoptic.png"), want)
    Image.fromarray(colours[..., 0]).save(tmp_path / "plain.png")
    np.testing.assert_array_equal(segments.read(tmp_path / "plain.png"), wide[..., 0])
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(tmp_path / "alpha.png")
    with pytest.raises(DataError, match=r"alpha.png is \[4, 4, 4\]; a label map has one channel"):
        segments.read(tmp_path / "alpha.png")
    with pytest.raises(DataError, match=r"there is no label map .*none.png"):
        segments.read(tmp_path / "none.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"cut.png is truncated or damaged .*make this label map"):
        segments.read(tmp_path / "cut.png")


@pytest.fixture
def session(config, tmp_path):
    """Six images in a folder of one class, one of them no image, and maps of two segments."""
    rng, corner = np.random.default_rng(0), np.add.outer(np.arange(16) // 4, np.arange(16) // 4)
    for kind in ("images", "maps"):
        (tmp_path / kind / "all").mkdir(parents=True)
    for number in range(6):
        image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        image.save(tmp_path / "images" / "all" / f"{number}.jpg")
        labels = 1 + (corner > number).astype(np.uint8) * 8
        Image.fromarray(labels).save(tmp_path / "maps" / "all" / f"{number}.png")
    (tmp_path / "images" / "all" / "1.jpg").write_bytes(b"no image")
    config.data.update(
        name="folder", root=str(tmp_path / "images"), holdout=0.99, on_corrupt="skip"
    )
    config.evaluate.update(segments=str(tmp_path / "maps"), segment_images=4)
    return Session(config, Run(tmp_path / "run"), devices=tuple(jax.devices()[:1]))


def test_ssc_of_a_run(session):
    """Latents that name their segment have 1; the image that cannot be read is passed over."""
    grid = np.add.outer(np.arange(4), np.arange(4))
    latents = np.stack([np.eye(2)[(grid > number).astype(int)] for number in (0, 2, 3, 4, 5)])
    readable = np.array([0, 2, 3, 4, 5])
    assert segment_coherence(session, latents, readable) == {"ssc": 1.0, "ssc_images": 4}
    shifted = segment_coherence(session, latents[[1, 0, 3, 4, 2]], readable)
    assert shifted["ssc"] < 0.9


def test_what_cannot_be_served_is_refused(session):
    session.config.data.name = "digits"
    with pytest.raises(ConfigError, match=r"data\.name 'digits' does not keep"):
        check_segments(session)
    session.config.data.name, session.config.evaluate.segments = "folder", "/nowhere"
    with pytest.raises(ConfigError, match="'/nowhere', which is no folder"):
        check_segments(session)
    session.config.evaluate.segments = ""
    check_segments(session)
