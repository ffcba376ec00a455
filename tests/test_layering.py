"""Who may import whom: pure cores, and layers that only look down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.repository import Source, imported, imports, python_sources

# Lowest first. Modules of one layer may import each other; no module imports from a higher one.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("p2pmesh", "p2pmesh.errors"),
    (
        "p2pmesh.config",
        "p2pmesh.home",
        "p2pmesh.log",
        "p2pmesh.metrics",
        "p2pmesh.sharing",
        "p2pmesh.watchable",
        "p2pmesh.web_policy",
    ),
    ("p2pmesh.identity", "p2pmesh.wire"),
    ("p2pmesh.transport",),
    ("p2pmesh.models",),
    ("p2pmesh.state",),
    ("p2pmesh.gossip",),
    ("p2pmesh.discovery",),
    ("p2pmesh.placement",),
    ("p2pmesh.engine",),
    ("p2pmesh.gateway",),
    ("p2pmesh.console",),
    ("p2pmesh.agents",),
    ("p2pmesh.node", "p2pmesh.service"),
    ("p2pmesh.control", "p2pmesh.commands", "p2pmesh.cli", "p2pmesh.__main__"),
)

PURE = (
    "p2pmesh.errors",
    "p2pmesh.identity*",
    "p2pmesh.wire*",
    "p2pmesh.gossip*",
    "p2pmesh.state*",
    "p2pmesh.placement*",
    "p2pmesh.models.gguf",
    "p2pmesh.models.cards",
    "p2pmesh.models.catalogue",
    "p2pmesh.engine.argv",
    "p2pmesh.engine.devices",
    "p2pmesh.gateway.openai",
    "p2pmesh.gateway.route",
)
"""Beside these, every module whose docstring has a paragraph that begins with `Pure`."""

IMPURE = frozenset(
    [
        "asyncio",
        "logging",
        "multiprocessing",
        "os",
        "pathlib",
        "psutil",
        "random",
        "secrets",
        "select",
        "shutil",
        "socket",
        "ssl",
        "structlog",
        "subprocess",
        "tempfile",
        "threading",
        "time",
        "trio",
        "uuid",
    ]
)
"""What a pure module cannot import."""

VALUES: Mapping[str, frozenset[str]] = {
    "random": frozenset({"Random"}),
    "pathlib": frozenset({"PurePath", "PurePosixPath", "PureWindowsPath"}),
    "p2pmesh.config": frozenset({"Address", "SLOTS_MAX", "parse_address"}),
}
"""Names of modules that are not pure which stand for mere values, so that anybody may use them."""

DECLARED_PURE = re.compile(r"^Pure\b", re.MULTILINE)


def is_pure(source: Source) -> bool:
    declared = DECLARED_PURE.search(ast.get_docstring(source.tree) or "")
    return bool(declared) or any(fnmatch(source.module, pattern) for pattern in PURE)


def impurities(sources: Iterable[Source]) -> list[str]:
    """What pure modules import and must not: the system, or a module that is not pure."""
    files = {source.module: source for source in sources}
    impure = IMPURE | {module for module, source in files.items() if not is_pure(source)}
    found = []
    for source in files.values():
        for module, name in sorted(imported(source)) if is_pure(source) else ():
            whole = module if module.startswith("p2pmesh") else module.partition(".")[0]
            is_value = name in VALUES.get(module, ())
            if (whole in impure - {"p2pmesh"} and not is_value) or f"{module}.{name}" in impure:
                found.append(f"{source.module} imports {module} {name}".rstrip())
    return found


def layer(module: str) -> int | None:
    """How high a module stands; None when no layer names it or its package."""
    for height, names in enumerate(LAYERS):
        for name in names:
            if module == name or (name != "p2pmesh" and module.startswith(f"{name}.")):
                return height
    return None


def layering_faults(sources: Iterable[Source]) -> list[str]:
    """Modules without a layer, and imports from a higher one."""
    files = {source.module: source for source in sources}
    found = []
    for module, source in files.items():
        height = layer(module)
        if height is None:
            found.append(f"{module} has no layer")
            continue
        found += [
            f"{module} imports {name}, which is above it"
            for name in sorted(imports(source, files))
            if name.partition(".")[0] == "p2pmesh" and (layer(name) or 0) > height
        ]
    return found


def cycle(sources: Iterable[Source]) -> list[str]:
    """A circle of imports, if there is one; importing a package counts as its `__init__`."""
    files = {source.module: source for source in sources}
    graph: Mapping[str, set[str]] = {
        module: (imports(source, files) & files.keys()) - {module}
        for module, source in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        return list(exc.args[1])
    return []


def inexact(source: Source) -> list[str]:
    """Where a module leaves the integers, or asks `hash()`, whose answers differ by process."""
    found = []
    for item in ast.walk(source.tree):
        is_float = isinstance(item, ast.Constant) and isinstance(item.value, float)
        is_quotient = isinstance(item, ast.BinOp | ast.AugAssign) and isinstance(item.op, ast.Div)
        is_call = isinstance(item, ast.Name) and item.id in {"float", "hash", "round", "id"}
        if is_float or is_quotient or is_call:
            found.append(f"{source.path}:{getattr(item, 'lineno', 0)}")
    return found


def uses_anyio(source: Source) -> bool:
    """It comes with other libraries; here everything is trio."""
    return any(module.partition(".")[0] == "anyio" for module in imports(source))


# The repository


PACKAGE = python_sources("p2pmesh")


def test_pure_modules_touch_nothing_outside() -> None:
    assert sum(is_pure(source) for source in PACKAGE) > len(PURE)
    faults = impurities(PACKAGE)
    assert not faults, "\n".join(faults)


def test_lower_layers_never_import_higher_ones() -> None:
    faults = layering_faults(PACKAGE)
    assert not faults, "\n".join(faults)


def test_no_imports_go_in_circles() -> None:
    assert cycle(PACKAGE) == []


def test_placement_is_made_of_integers() -> None:
    """But for a node's own budget, which it alone works out and publishes as an integer."""
    placement = [
        source
        for source in PACKAGE
        if source.module.startswith("p2pmesh.placement.")
        and source.module != "p2pmesh.placement.resources"
    ]
    assert len(placement) > 1
    faults = [place for source in placement for place in inexact(source)]
    assert not faults, "\n".join(faults)


def test_nothing_imports_anyio() -> None:
    assert [source.path for source in python_sources() if uses_anyio(source)] == []


def test_a_node_loads_numpy_only_when_it_cuts_thin_shards() -> None:
    source = "import sys, p2pmesh.node.run; sys.exit('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], check=False, timeout=60)
    assert done.returncode == 0, "it takes 12 MB and a tenth of a second"


# The checks themselves


@pytest.mark.parametrize(
    "text",
    [
        "import trio",
        "import os.path",
        "from pathlib import Path",
        "def late():\n    import time",
        "import random",
        "from random import Random, choice",
        "from random import choice",
        "import random as chance",
        "from pathlib import PurePath, Path",
        "from p2pmesh.home import Home",
        "from p2pmesh import home",
    ],
)
def test_an_impure_import_is_found(text: str) -> None:
    home = Source("p2pmesh/home.py", '"""Files."""')
    assert impurities([home, Source("p2pmesh/wire/codec.py", text)])
    declared = Source("p2pmesh/engine/exit_reason.py", f'"""Words.\n\nPure: no files.\n"""\n{text}')
    assert impurities([home, declared])
    assert impurities([home, Source("p2pmesh/engine/other.py", text)]) == []


def test_a_pure_import_is_let_through() -> None:
    texts = [
        "from random import Random",
        "from pathlib import PurePath",
        "from p2pmesh.config import Address",
        "from p2pmesh import errors, __version__",
        "import osmosis",
    ]
    sources = [Source(f"p2pmesh/wire/n{n}.py", text) for n, text in enumerate(texts)]
    below = [Source(f"p2pmesh/{name}.py", "") for name in ("__init__", "errors", "config")]
    assert impurities([*sources, *below]) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("p2pmesh/state/views.py", "from p2pmesh.gossip.probe import Probe"),
        ("p2pmesh/wire/codec.py", "from p2pmesh import node"),
        ("p2pmesh/gateway/serve.py", "import p2pmesh.console.api"),
        ("p2pmesh/errors.py", "def late():\n    from p2pmesh.config import SETTINGS"),
        ("p2pmesh/wires/codec.py", ""),
        ("p2pmesh/extra.py", ""),
    ],
)
def test_a_look_upwards_is_found(path: str, text: str) -> None:
    others = [Source("p2pmesh/node.py", ""), Source("p2pmesh/gossip/probe.py", "")]
    assert layering_faults([*others, Source(path, text)])
    assert layering_faults(others) == []


def test_a_look_down_or_aside_is_let_through() -> None:
    text = "from p2pmesh.identity.keys import NodeId\nfrom p2pmesh import __version__\nimport trio"
    assert layering_faults([Source("p2pmesh/wire/codec.py", text)]) == []
    assert layering_faults([Source("p2pmesh/console/api.py", text)]) == []


def test_a_circle_is_found() -> None:
    one = Source("p2pmesh/wire/one.py", "from p2pmesh.wire.two import x")
    two = Source("p2pmesh/wire/two.py", "def late():\n    from p2pmesh.wire import one")
    assert cycle([one, two])
    assert cycle([one, Source("p2pmesh/wire/two.py", "x = 1")]) == []


@pytest.mark.parametrize("text", ["x = 0.5", "x = 1 / 2", "x /= 2", "hash(x)", "sorted(x, key=id)"])
def test_what_is_no_integer_is_found(text: str) -> None:
    assert inexact(Source("p2pmesh/placement/cost.py", text))
    assert inexact(Source("p2pmesh/placement/cost.py", "x = 1 // 2 + int.from_bytes(b'')")) == []


@pytest.mark.parametrize("text", ["import anyio", "from anyio.abc import TaskGroup"])
def test_anyio_is_found(text: str) -> None:
    assert uses_anyio(Source("p2pmesh/node.py", text))
    assert not uses_anyio(Source("p2pmesh/node.py", "import trio"))
