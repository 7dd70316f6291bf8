"""Which source files the result of a script depends on: the script and all that it imports, but for plumbing."""

import ast
import functools
from pathlib import Path

# How results are stored, jobs run and data sets fetched (and verified) has no part in what results hold; if it counted,
# each change there would retrain.
PLUMBING = {"store", "data", "backend", "interruption", "_job", "_stop", "_checkpoints"}


def sources(script: Path, package: Path) -> list[Path]:
    """Lists a script and all that it imports, directly or not, from its folder and from the package.

    Args:
      script: A Python file.
      package: The folder of the package.

    Returns:
      Paths, the script first; what `PLUMBING` names is left out, and so is what only it imports.
    """
    found, waiting = [script], [script]
    while waiting:
        source = waiting.pop().read_text(encoding="utf-8")
        for name in sorted(_imported(source, package.name) - PLUMBING):
            module = (script.parent if name.startswith("_") else package) / f"{name}.py"
            if module.is_file() and module not in found:
                found.append(module)
                waiting.append(module)
    return found


@functools.cache
def _imported(source: str, package: str) -> frozenset[str]:
    """Names what a source imports of the package and of the scripts' helpers anywhere but for its types."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.ImportFrom) and node.module == package:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.removeprefix(f"{package}."))
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix(f"{package}.") for alias in node.names}
    return frozenset(names)
