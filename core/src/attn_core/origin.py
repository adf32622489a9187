"""Where a plugin's code lies, found without running any of it.

The top-level package alone is looked up: finding a module inside a package would import the package.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def file_of(entry_point: str) -> str:
    """The file that an entry point's value names, such as "attn_hello.kernels:plugin"; "" where none is found."""
    top, _, rest = entry_point.partition(":")[0].strip().partition(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError, AttributeError):  # no name, or a module that was put in place by hand
        return ""
    if spec is None:
        return ""
    if not rest:
        return spec.origin or ""
    for folder in spec.submodule_search_locations or ():
        module = Path(folder, *rest.split("."))
        for file in (module / "__init__.py", module.with_name(f"{module.name}.py")):
            if file.is_file():
                return str(file)
        for file in sorted(module.parent.glob(f"{module.name}.*")):  # an extension module
            if file.suffix in (".so", ".pyd"):
                return str(file)
    return ""
