"""What the comments in the source say of the fields of a config, for help. Nothing is imported."""

import ast
import functools
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

from gae_jax.tokenizers import TOKENIZERS, section_of

CONFIG = Path(__file__).parents[1] / "config"
SHARED = ("optim", "train")  # functions of training.py that make a section


class _Module:
    """A module: its functions, and its comments by line."""

    def __init__(self, path: Path):
        text = path.read_text()
        self.tree = ast.parse(text)
        functions = (node for node in self.tree.body if isinstance(node, ast.FunctionDef))
        self.functions = {node.name: node for node in functions}
        self.trailing: dict[int, str] = {}
        self.above: dict[int, str] = {}  # of lines with nothing but a comment
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                alone = not token.line[: token.start[1]].strip()
                lines = self.above if alone else self.trailing
                lines[token.start[0]] = token.string.lstrip("# ")

    def section(self, function: str) -> ast.Call:
        """The ``dict(...)`` that a function returns."""
        return _dicts(self.functions[function])[0]

    def comment(self, keyword: ast.keyword) -> str:
        """The comment above a keyword and behind it, as one text."""
        first = keyword.lineno
        while first - 1 in self.above:
            first -= 1
        lines = [self.above[line] for line in range(first, keyword.lineno)]
        ends = {keyword.lineno, keyword.value.end_lineno or keyword.lineno}
        lines += [self.trailing[line] for line in sorted(ends) if line in self.trailing]
        return " ".join(lines)


_module = functools.cache(_Module)


def _dicts(node: ast.AST) -> list[ast.Call]:
    """The ``dict(...)`` inside of a node, outer ones first."""
    calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
    return [call for call in calls if getattr(call.func, "id", "") == "dict"]


def _notes(module: _Module, call: ast.Call, prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted path, comment) of the keywords of ``dict(...)``, and of those inside of them."""
    for keyword in call.keywords:
        inner = _dicts(keyword.value)
        if keyword.arg is None:
            comment = module.comment(keyword)
            for path, own in (pair for node in inner for pair in _notes(module, node, prefix)):
                yield path, own or comment
            continue
        path, name = f"{prefix}{keyword.arg}", getattr(getattr(keyword.value, "func", 0), "id", "")
        yield path, module.comment(keyword)
        if name in SHARED:
            shared = _module(CONFIG / "training.py")
            yield from _notes(shared, shared.section(name), f"{path}.")
        elif inner:
            yield from _notes(module, inner[0], f"{path}.")


def notes() -> dict[str, str]:
    """Return dotted path of a field or section -> what is said of it; "" for nothing."""
    default = _module(CONFIG / "default.py")
    modules = {
        alias.name: (node.module or "").rpartition(".")[2]
        for node in default.tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found: dict[str, str] = {}
    for keyword in default.section("default_config").keywords:
        function = getattr(getattr(keyword.value, "func", None), "id", "")
        if function in modules:
            module = _module(CONFIG / f"{modules[function]}.py")
            found |= _notes(module, module.section(function), f"{keyword.arg}.")
    for name, kind in TOKENIZERS.items():
        code = kind.sizes.__code__
        module = _module(Path(code.co_filename))
        if code.co_name in module.functions:
            prefix = f"tokenizer.{section_of({'name': name})}."
            found |= _notes(module, module.section(code.co_name), prefix)
    return found
