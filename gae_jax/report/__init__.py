"""The pages of a run and of a sweep: one HTML file with pictures, curves and tables inside."""

import base64
from pathlib import Path

import jinja2
import numpy as np

from gae_jax.config import flatten
from gae_jax.runtime.errors import number_of
from gae_jax.runtime.files import png


def render(facts: dict, template: str = "page.html.j2") -> bytes:
    """The template filled with ``facts``; what is not marked safe is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(facts).encode(errors="backslashreplace")


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


def samples_page(result: dict, images: np.ndarray, columns: int = 16) -> dict:
    """What ``samples.html.j2`` shows of a result of ``evaluate-samples``.

    Args:
      images: uint8 [n, H, W, 3], the first of the file.
    """
    facts, parts = flatten(result["manifest"]), result["parts"]
    rows = [
        {
            "name": name,
            "value": f"{value:.4f}",
            "parts": ", ".join(
                f"{part.removeprefix(name + '.').replace('_', ' ')} {number:.4g}"
                for part, number in parts.items()
                if part.startswith(f"{name}.")
            ),
        }
        for name, value in result["metrics"].items()
    ]
    lines = [strip(images[at : at + columns]) for at in range(0, len(images), columns)]
    full = [line for line in lines if line.shape == lines[0].shape]
    return {
        "title": f"{facts['kind']}: {Path(facts['samples']).name}",
        "lead": (
            f"{number_of(facts['count'], 'image')}, preset {facts['preset']}, compared with "
            f"{facts['reference']}. A metric of another number of images than 50,000 carries the "
            "number in its name."
        ),
        "metrics": rows,
        "grid": data_uri(np.concatenate(full)),
        "protocol": list(facts.items()),
    }
