"""The Python snippets of the pages run, one after another, on a small run."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def snippets(page):
    """The Python blocks of a page that use the API, in their order."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return blocks if any("gae_jax.load(" in block for block in blocks) else []


def pages_with_snippets():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    return sorted(name for page in pages if snippets(name := str(page.relative_to(ROOT))))


def executed(page, run):
    """What the names in a page's snippets are after they ran."""
    names: dict = {}
    for snippet in snippets(page):
        exec(compile(snippet.replace("runs/demo", str(run)), page, "exec"), names)
    return names


def test_pages_of_the_api_have_snippets():
    assert {"README.md", "docs/api.md"} <= set(pages_with_snippets())


@pytest.mark.parametrize("page", pages_with_snippets())
def test_snippets_run(page, small_run, capsys):
    names = executed(page, small_run)
    assert names["run"].path == small_run
    if page == "docs/api.md":
        assert names["z"].shape == names["v"].shape == (16, 4, 4, 4)
        assert names["images"].shape == (40, 16, 16, 3)
        assert np.isfinite(names["nats"]).all()
        assert names["distance"] >= 0
        said = capsys.readouterr().out
        assert "40 of 40" in said
        assert "class_id=sevn: there is no class of that name" in said
