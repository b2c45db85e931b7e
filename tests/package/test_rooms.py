"""The order of the package's rooms, as docs/architecture.md lists them, and light imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up, by the table of rooms: a room imports only rooms before it, and itself.
TABLE = (ROOT / "docs/architecture.md").read_text().partition("\n## Rooms\n")[2]
ROOMS = (
    *re.findall(r"^\| `(\w+)(?:/|\.py)` \|", TABLE.partition("\n## ")[0], re.MULTILINE),
    "__main__",
)


def rooms_imported(text: str) -> dict[str, int]:
    """Room -> first line that imports it, of a module's text; imports in functions count."""
    rooms: dict[str, int] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if package == "gae_jax" and room not in ("", "__version__"):
                rooms[room] = min(node.lineno, rooms.get(room, node.lineno))
    return rooms


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "gae_jax").parts[0].removesuffix(".py")


def modules() -> list[Path]:
    """All modules of the package but its root, which imports the API for type checkers only."""
    root = ROOT / "gae_jax/__init__.py"
    assert rooms_imported(root.read_text()).keys() <= {"api", "runtime"}
    return [path for path in sorted((ROOT / "gae_jax").rglob("*.py")) if path != root]


def test_every_module_is_in_a_room():
    assert {room_of(path) for path in modules()} == set(ROOMS)


def test_no_room_imports_a_later_one():
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {room_of(path)} imports {room}"
        for path in modules()
        for room, line in rooms_imported(path.read_text()).items()
        if ROOMS.index(room) > ROOMS.index(room_of(path))
    ]
    assert not upward, "\n".join(upward)


def test_imports_are_found_wherever_they_stand():
    text = (
        "import gae_jax.nn.vit, numpy\nfrom gae_jax import __version__, stages\n"
        "def f():\n    from gae_jax.sweep.table import rows\n"
    )
    assert rooms_imported(text) == {"nn": 1, "stages": 2, "sweep": 4}


def modules_after(program: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after a program."""
    report = "import sys; print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{report}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.rpartition("MODULES")[2].split())


HELP = """
import contextlib, runpy, sys
sys.argv = ["gae_jax", {}"--help"]
with contextlib.suppress(SystemExit):
    runpy.run_module("gae_jax", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import gae_jax; dir(gae_jax)", {"jax", "flax", "numpy"}),
        ("import gae_jax.data.worker, gae_jax.data.cached_images", {"jax", "flax", "grain"}),
        ("import gae_jax.data.shards, gae_jax.data.sources", {"jax", "flax", "grain"}),
        ("from gae_jax.config import default_config; default_config()", {"flax"}),
        (HELP.format(""), {"jax", "flax"}),
        (HELP.format('"tokenizer", '), {"jax", "flax"}),
    ],
    ids=["package", "workers", "sources", "config", "help", "help of a command"],
)
def test_light_imports(program, absent):
    assert not modules_after(program) & absent
