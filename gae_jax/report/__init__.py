"""Pages of a run, a sweep and a set of samples: each one HTML file with everything inside."""

import base64
from pathlib import Path

import jinja2
import numpy as np

from gae_jax.config import flatten
from gae_jax.runtime.errors import number_of
from gae_jax.runtime.files import png


def render(facts: dict, template: str = "page.html.j2") -> bytes:
    """Fill a template with ``facts``; text that is not marked safe is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(facts).encode(errors="backslashreplace")


def data_uri(pixels: np.ndarray) -> str:
    """Encode a uint8 image [H, W, 3] as a PNG inside the page."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def strip(images: np.ndarray, gap: int = 2) -> np.ndarray:
    """Place images [n, H, W, 3] side by side on white: [H, W', 3]."""
    padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)[:, :-gap]


def enlarge(images: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel of images [..., H, W, 3] ``factor`` times in both directions."""
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def samples_page(result: dict, images: np.ndarray, columns: int = 16) -> dict:
    """Collect what ``samples.html.j2`` shows of a result of ``evaluate-samples``.

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
            f"{facts['reference']}. The number of images is in a metric's name unless it "
            "is 50,000."
        ),
        "metrics": rows,
        "grid": data_uri(np.concatenate(full)),
        "protocol": list(facts.items()),
    }
