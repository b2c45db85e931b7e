"""The pages of a run and of a sweep: one HTML file with pictures, curves and tables inside."""

import base64
from pathlib import Path

import jinja2
import numpy as np

from gae_jax.files import png


def render(facts: dict, template: str = "page.html.j2") -> bytes:
    """The template filled with ``facts``; what is not marked safe is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(facts).encode()


def data_uri(pixels: np.ndarray) -> str:
    """A uint8 image as a PNG inside the page."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def strip(images: np.ndarray, gap: int = 2) -> np.ndarray:
    """Images [n, H, W, 3] side by side on white."""
    padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)[:, :-gap]


def enlarge(images: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel repeated ``factor`` times both ways."""
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)
