"""The documents say what the code does: each is compared with the code that it describes.

Rules for whoever writes a document:

- A ```toml block is a whole run's file; a ```python block compiles; a line of a ```sh or unmarked
  block that begins with `splitfrozen` is a command that parses. What is none goes into ```text.
- A file that stands in backticks exists.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

import splitfrozen
from splitfrozen import cli, config, errors, records
from splitfrozen.errors import SplitFrozenError
from splitfrozen.server.answers import status_of
from splitfrozen.server.app import ENDPOINTS
from splitfrozen.wire import entropy
from splitfrozen.wire.codec import CODECS, codec

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(splitfrozen.__file__).parent
NOT_OURS = {"build", "dist", "runs", "node_modules"}

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")


def documents() -> list[Path]:
    def ours(path: Path) -> bool:
        parts = path.relative_to(ROOT).parts
        return not any(part in NOT_OURS or part.startswith(".") for part in parts)

    return sorted(filter(ours, ROOT.rglob("*.md")))


@cache
def text(name: str) -> str:
    return (ROOT / name).read_text()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_document = pytest.mark.parametrize("path", documents(), ids=name_of)


def blocks(content: str, language: str | None = None) -> list[str]:
    """Fenced blocks; `language` None for all of them."""
    return [body for _, found, body in FENCE.findall(content) if language in (None, found)]


def spans(content: str) -> list[str]:
    """What stands in backticks outside of fenced blocks."""
    return SPAN.findall(FENCE.sub("", content))


def section(name: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or a higher one."""
    level = heading.count("#", 0, 4)
    pattern = rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)"
    found = re.search(pattern, text(name), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{name} has no `{heading}`"
    return found[1]


def rows(content: str) -> list[list[str]]:
    """Cells of the tables' rows, without heads, backticks stripped from a cell that is one span."""
    body = re.sub(r"^\|.*\n\|-.*\n", "", content, flags=re.MULTILINE)
    lines = [line for line in body.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line[1:].removesuffix("|").split("|")] for line in lines]
    return [[cell.strip("`") if cell.count("`") == 2 else cell for cell in row] for row in cells]


# --- all documents -------------------------------------------------------------------------------


def test_the_documents_are_found() -> None:
    names = {name_of(path) for path in documents()}
    assert {"README.md", "CONTRIBUTING.md", "docs/threat-model.md"} <= names


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), f"{target} is not there"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in map(_slug, headings), f"no heading for {target}"


@every_document
def test_files_that_are_named_exist(path: Path) -> None:
    """A span that ends in .py or begins with a folder of the repository is a path, from the root
    or from the package."""
    for span in spans(path.read_text()):
        if re.fullmatch(r"[\w./-]+\.py|(docs|tests|src|benchmarks|scripts)/[\w./-]*", span):
            assert (ROOT / span).exists() or (SOURCE / span).exists(), f"{span} is not there"


def test_python_blocks_compile() -> None:
    found = [block for path in documents() for block in blocks(path.read_text(), "python")]
    assert found
    for block in found:
        ast.parse(block)


def _toml_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{name_of(path)}-{number}")
        for path in documents()
        for number, block in enumerate(blocks(path.read_text(), "toml"))
    ]


@pytest.mark.parametrize("block", _toml_blocks())
def test_toml_blocks_are_runs(block: str, tmp_path: Path) -> None:
    assert len(_toml_blocks()) >= 3
    path = tmp_path / "run.toml"
    path.write_text(block)
    assert config.load(path).devices.count >= 1


def _command_lines() -> Iterator[tuple[str, str]]:
    for path in documents():
        for block in [*blocks(path.read_text(), "sh"), *blocks(path.read_text(), "")]:
            for line in block.splitlines():
                if re.match(r"\s*(\$ )?splitfrozen ", line):
                    yield name_of(path), line.strip().removeprefix("$ ")


def test_command_lines_parse() -> None:
    lines = list(_command_lines())
    assert sum(name == "README.md" for name, _ in lines) >= 7
    for name, line in lines:
        try:
            cli.parser().parse_args(shlex.split(line, comments=True)[1:])
        except (SplitFrozenError, SystemExit) as error:
            pytest.fail(f"{name}: {line}\n{error}")


@every_document
def test_commands_that_are_named_exist(path: Path) -> None:
    known = {command.name for command in cli.COMMANDS}
    for span in spans(path.read_text()):
        word = re.match(r"splitfrozen ([a-z]\S*)", span)
        assert word is None or word[1] in known, f"there is no `{span}`"


def test_every_command_is_in_the_readme() -> None:
    named = " ".join(line for name, line in _command_lines() if name == "README.md")
    named += " ".join(spans(text("README.md")))
    for command in cli.COMMANDS:
        assert re.search(rf"\b{command.name}\b", named), f"README.md does not name {command.name}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    named = [
        (name_of(path), word)
        for path in documents()
        for code in [*blocks(path.read_text()), *spans(path.read_text())]
        for word in re.findall(r"(?:^|&& )make ([a-z]+)", code, re.MULTILINE)
    ]
    assert {"demo", "test", "check"} <= {word for _, word in named}
    assert [(name, word) for name, word in named if word not in targets] == []


# --- docs/architecture.md ------------------------------------------------------------------------

TREE = "src/splitfrozen/\n"


def _tree() -> str:
    [tree] = [
        block for block in blocks(text("docs/architecture.md"), "text") if block.startswith(TREE)
    ]
    return tree


def test_the_house_is_as_it_is_drawn() -> None:
    """Every file but the packages' `__init__.py` and the parts of the demo's model."""
    drawn, package = set(), ""
    for line in _tree().removeprefix(TREE).splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        assert indent in (2, 4), f"indented by {indent}: {line}"
        assert len(line.split()) > 2 or name.endswith("/"), f"nothing is said of {name}"
        if indent == 2:
            package = name if name.endswith("/") else ""
        if not name.endswith("/"):
            drawn.add(package + name)
    there = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "__init__.py"
    }
    assert drawn == {name for name in there if not name.startswith("assets/")}


def test_the_ranks_are_those_that_the_test_holds() -> None:
    held = re.search(r"^RANKS = (\{.*?^\})", text("tests/test_architecture.py"), re.M | re.S)
    assert held is not None
    ranks = ast.literal_eval(held[1])
    [line] = [
        block for block in blocks(text("docs/architecture.md"), "text") if block.count(" < ") > 5
    ]
    said = {
        name.strip(): rank
        for rank, names in enumerate(line.strip().split("<"))
        for name in names.split(",")
    }
    assert said == ranks


# --- docs/configuration.md -----------------------------------------------------------------------


def _options() -> list[tuple[str, str, object]]:
    """Section, key and value of every line of the file's block, those in comments too."""
    found, where = [], ""
    for line in blocks(text("docs/configuration.md"), "toml")[0].splitlines():
        header = re.fullmatch(r"\[(\w+)\](?: +#.*)?", line.strip())
        where = header[1] if header else where
        if re.match(r"(# )?\w+ = ", line):
            [(key, value)] = tomllib.loads(line.removeprefix("# ")).items()
            found.append((where, key, value))
    return found


def _sections() -> list[tuple[Any, Any]]:
    """Each section with the spec of its keys, also where it may be `None`."""
    parts = msgspec.structs.fields(config.Config)
    return [(part, next(iter(get_args(part.type)), part.type)) for part in parts]


def _defaults() -> dict[tuple[str, str], object]:
    return {
        (part.name, key.name): msgspec.to_builtins(key.default)
        if key.default is not msgspec.NODEFAULT
        else key.default_factory()
        if key.default_factory is not msgspec.NODEFAULT
        else None
        for part, kind in _sections()
        for key in msgspec.structs.fields(kind)
    }


def test_every_option_is_documented_with_its_default() -> None:
    defaults = _defaults()
    assert {(where, key) for where, key, _ in _options()} == defaults.keys()
    shown = 0
    for where, key, value in _options():
        default = defaults[where, key]
        # Where there is no default, or an empty one, the block shows an example.
        if default not in (None, {}, [], ()):
            assert value == default, f"{where}.{key} is {default!r} by default"
            shown += 1
    assert shown > 20


def test_what_an_option_may_be_is_said_beside_it() -> None:
    file = "\n" + blocks(text("docs/configuration.md"), "toml")[0]
    checked = 0
    for part, kind in _sections():
        schema = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
        said = file.partition(f"\n[{part.name}]")[2].partition("\n[")[0]
        for key, value in schema.items():
            [line] = re.findall(rf"^(?:# )?{key} = .*$", said, re.MULTILINE)[:1]
            for choice in value.get("enum", []):
                assert re.search(rf"\b{choice}\b", line), f"{part.name}.{key} may be {choice}"
                checked += 1
    assert checked > 10


# --- docs/wire-format.md -------------------------------------------------------------------------

WIRE = "docs/wire-format.md"


def test_routes_are_those_of_the_server() -> None:
    assert f"protocol version is **{records.PROTOCOL}**" in text(WIRE)
    said = [tuple(row[:4]) for row in rows(section(WIRE, "## Routes"))]
    assert said == [(one.method, one.path, one.policy, one.body) for one in ENDPOINTS]


def _messages() -> list[type[records.Message]]:
    """All that travel; what the model gave the run (`Prepared`) stays on the server."""
    own = [k for k in records.Message.__subclasses__() if k.__module__ == records.__name__]
    return [kind for kind in own if kind is not records.Prepared]


@pytest.mark.parametrize("kind", _messages(), ids=lambda kind: str(kind.__name__))
def test_messages_have_the_fields_that_are_said(kind: type[records.Message]) -> None:
    said = rows(section(WIRE, f"### {kind.__name__}"))
    assert [row[0] for row in said] == list(kind.__struct_fields__)
    fields = msgspec.structs.fields(kind)
    optional = [one.name for one in fields if one.default is not msgspec.NODEFAULT]
    assert [row[0] for row in said if "default" in row[1]] == optional


def test_every_message_that_is_said_travels() -> None:
    said = re.findall(r"^### (\w+)$", section(WIRE, "## Messages"), re.MULTILINE)
    assert set(said) == {kind.__name__ for kind in _messages()}


def test_codecs_are_those_of_the_table() -> None:
    said = rows(section(WIRE, "## Codecs"))
    formats = [row for row in said if not row[0].startswith("+")]
    methods = [row for row in said if row[0].startswith("+")]
    assert [row[0] for row in formats] == list(dict.fromkeys(n.split("+")[0] for n in CODECS))
    assert [row[0] for row in methods] == [f"+{name}" for name in entropy.METHODS]
    # Columns of a format: its bytes as a formula of T and D, and what keeps a lifted activation.
    for name, _, size, _, lifted in formats:
        for tokens, width in ((1, 1), (5, 7)):
            value = eval(size, {"T": tokens, "D": width})  # noqa: S307
            assert value == codec(name).most_bytes(tokens, width)
        assert codec(name).lifted == lifted


def test_limits_are_those_of_the_code() -> None:
    said = rows(section(WIRE, "## Limits"))
    assert len(said) > 12
    for _, value, where in said:
        module, _, name = where.partition(":")
        found: Any = importlib.import_module(f"splitfrozen.{module}")
        for part in name.split("."):
            found = getattr(found, part)
        assert found == float(value.replace(",", "").split()[0]), f"{where} is {found}"


def test_the_example_frame_is_the_golden_one() -> None:
    golden = (ROOT / "tests/golden/frame-v1.bin").read_bytes()
    end = 0
    for at, size, shown, _ in rows(section(WIRE, "### An example")):
        assert int(at) == end
        end += int(size)
        start = bytes.fromhex(shown.removesuffix(" ...").replace(" ", ""))
        assert golden[int(at) : end].startswith(start)
        assert shown.endswith(" ...") or len(start) == int(size)
    assert end == len(golden)


# --- docs/errors.md ------------------------------------------------------------------------------


@cache
def _error_classes() -> dict[str, type[SplitFrozenError]]:
    """All public classes of the tree, found in the source, so that none is forgotten."""
    found: dict[str, type[SplitFrozenError]] = {}
    known = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    files = sorted(SOURCE.rglob("*.py"))
    nodes = [(file, node) for file in files for node in ast.parse(file.read_text()).body]
    for file, node in nodes:
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        below = {ast.unparse(base) for base in node.bases} & known
        if below or file.name == "errors.py":
            module = ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts)
            found[node.name] = getattr(importlib.import_module(module), node.name)
    return found


def test_every_error_has_a_heading() -> None:
    said = re.findall(r"^### (\w+)$", text("docs/errors.md"), re.MULTILINE)
    assert sorted(said) == sorted(_error_classes())
    assert {"DiskFullError", "NotFiniteError"} < set(said)


@pytest.mark.parametrize("name", sorted(_error_classes()))
def test_exit_codes_are_those_of_the_classes(name: str) -> None:
    code = _error_classes()[name].exit_code
    assert re.findall(r"Exit code (\d)", section("docs/errors.md", f"### {name}")) == [str(code)]


def test_statuses_are_those_of_the_server() -> None:
    classes = _error_classes()
    said = {
        row[1]: int(row[0])
        for row in rows(section("docs/errors.md", "## Over HTTP"))
        if row[1] in classes
    }
    assert len(said) >= 7
    for name, status in said.items():
        assert status_of(classes[name]("it", got=1, allowed="2", remedy="do")) == status, name
