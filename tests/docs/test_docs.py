"""The documents: links and anchors lead somewhere, commands parse, pages that code names exist."""

import re
import shlex
from pathlib import Path

import pytest

from gae_jax import __version__
from gae_jax.commands import cli
from gae_jax.config import default_config
from gae_jax.config.precision import fields_of
from gae_jax.sweep import command_line

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# a page named in code or messages, relative to the repository
MENTION = re.compile(r"(?<![\w/.-])((?:docs/)[\w/-]+\.md|README\.md|CONTRIBUTING\.md)(#[\w-]+)?")


def prose(text):
    """A page's text without its fenced code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    made = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = 0
        while anchor in made:
            count += 1
            anchor = f"{name}-{count}"
        made.add(anchor)
    return made


def broken(page, target):
    """Why a link of a page leads nowhere; None if it leads somewhere."""
    if re.match(r"[a-z]+:", target):
        return None
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return f"{target}: no such file"
    if anchor and anchor not in anchors(file):
        return f"{target}: no such heading; there are {sorted(anchors(file))}"
    return None


def test_versions_agree():
    """Version of the package, and of ruff before a commit and in the tests."""
    requirement = (ROOT / "tests/requirements.txt").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    ruff = re.search(r"^ruff==(\S+)$", requirement, re.MULTILINE)[1]
    assert re.search(r"ruff-pre-commit\n\s+rev: v(\S+)", hooks)[1] == ruff
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    wrong = [broken(page, target) for target in LINK.findall(prose(page.read_text()))]
    assert [why for why in wrong if why] == []


def test_broken_links_are_found():
    page = ROOT / "README.md"
    assert "no such file" in broken(page, "docs/nothing.md")
    assert "no such heading" in broken(page, "docs/results.md#nothing")
    assert broken(page, "https://example.org/x#y") is None


def test_pages_that_code_names_exist():
    files = [*ROOT.glob("gae_jax/**/*"), *ROOT.glob("configs/**/*.py"), *ROOT.glob("launch/*")]
    wrong = []
    for file in files:
        if not file.is_file() or file.suffix not in (".py", ".sh", ".j2"):
            continue
        for path, anchor in MENTION.findall(file.read_text()):
            if path.startswith("docs/") and (why := broken(ROOT / "README.md", path + anchor)):
                wrong.append(f"{file.relative_to(ROOT)}: {why}")
    assert wrong == []


def test_every_page_is_reached_from_the_index():
    """From docs/index.md, directly or through another page, a reader comes to every page."""
    reached, waiting = set(), [ROOT / "docs/index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(prose(page.read_text())))
        links = (page.parent / target for target in targets if target.endswith(".md"))
        waiting += [link.resolve() for link in links if link.exists()]
    assert set(PAGES) - reached == set()


def commands_of(page):
    """The command lines of a page's bash blocks that run something of this repository."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        text = ""
        for line in block.replace("\\\n", " ").splitlines():
            text += line
            try:
                words = shlex.split(text, comments=True)
            except ValueError:  # a quoted string goes on in the next line
                text += " "
                continue
            text = ""
            while words and re.fullmatch(r"\w+=.*", words[0]):  # variables before a command
                words.pop(0)
            if words and words[0].startswith("--config."):  # flags shown without a command
                words = ["python", "-m", "gae_jax", "demo", "--config=configs/demo.py", *words]
            if words:
                yield [re.sub("=NUMBER.*", "=10", word) for word in words]
        assert not text, f"{page}: a quotation is not closed"


@pytest.mark.parametrize("name", NAMES)
def test_fields_exist(name):
    """Fields that a page names as --config.KEY, in commands and in the text, are in the config."""
    wrong, networks = [], fields_of(default_config())
    for path in set(re.findall(r"--config\.([\w.]+\w)=", (ROOT / name).read_text())):
        section = default_config()
        for key in () if path in networks else path.split("."):
            if "KEY" in key or "STAGE" in key:
                break
            if key not in section:
                wrong.append(path)
                break
            section = section[key]
    assert wrong == []


def gae_jax_command(words):
    """The arguments of ``python -m gae_jax`` or of ``launch/*.sh -- COMMAND``; None of others."""
    if "gae_jax" in words[:3] and words[1:2] == ["-m"]:
        return words[3:]
    if words[0] == "bash" and "--" in words:
        command = words[words.index("--") + 1 :]
        return command if command and not command[0].endswith(".py") else None
    return None


def is_general(words):
    """Whether a command has a placeholder (capitals, variables) where a value must stand."""
    return any(
        re.search(r"(?<![A-Za-z/])(?:RUN|FILE|COMMAND|WORK|MACHINE|NAME)\b|\.KEY=|\$|\.\.\.$", word)
        for word in words
    )


def parse(words, monkeypatch):
    """Parse the arguments of one command as the command line does, but compute nothing."""
    argv = ["gae_jax", *words]
    if "--help" in words:
        return
    if (own := cli.own_command(argv)) is not None:
        flags = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
        missing = [flag for flag in flags if flag not in own.USAGE]
        assert missing == [], f"{words[0]} has no {missing}"
        return
    if len(words) > 1 and not words[1].startswith("-"):  # the config of a run that is not here
        argv = ["gae_jax", words[0], "--config=configs/demo.py", *words[2:]]
    monkeypatch.setattr("gae_jax.runtime.distributed.start", lambda **_: None)
    command, _, _, _ = cli.parse(argv)
    assert command == words[0]


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(ROOT / name):
        for word in words:
            if re.fullmatch(r"(?:launch|tests|configs)/[\w/-]+\.(?:py|sh)", word):
                assert (ROOT / word).exists(), f"{name}: {word} does not exist"
        if words[1:2] == ["launch/sweep.py"] and not is_general(words):
            command_line.parse(words[2:])
        arguments = gae_jax_command(words)
        if arguments and not is_general(arguments):
            parse(arguments, monkeypatch)
