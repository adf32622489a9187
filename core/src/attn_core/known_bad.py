"""The table of known-bad kernels: what is publicly known to be wrong, with which library, on which device, where.

The rows are data, `known_bad.json`, read when a kernel is first weighed. Those that concern a kernel on a device, with
the libraries that are installed, are picked once; only these are asked at a choice. A row that holds is a reason of the
kernel not to take the problem, also where the caller insists on that kernel; who knows better says so (`overruled`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .capabilities import Refusal
from .errors import DeclarationError
from .problem import Problem

if TYPE_CHECKING:
    from .scope import Settings

PATH = Path(__file__).with_name("known_bad.json")

#: Numbers of a problem that a row may speak of. `bias_elements` is seqlen_q times seqlen_kv rounded up to 16, as rows
#: of a dense bias are laid out for the kernels that read it in vectors.
LENGTHS = ("seqlen_q", "seqlen_kv", "batch", "bias_elements")
SIZES = ("head_dim", "head_dim_v", "num_heads", "num_kv_heads")
WAYS = ("is", "from", "to", "multiple_of", "plus", "not_multiple_of")
FLAGS = ("backward", "dropout", "return_lse")
KEYS = ("kernel", "device", "compute_capability", "versions", "problem", "what", "link")
#: Libraries that plugins bring, by the names of their distributions.
OF_PLUGINS = ("natten", "flash-attn", "flash-attn-3", "flash-attn-4")
LIBRARIES = ("torch", "cuda", "cudnn", *OF_PLUGINS)
#: Some of PEP 440's specifiers, checked here because `packaging` is not loaded before a row may apply.
SPECIFIERS = re.compile(r"(?:==|!=|>=|<=|>|<)\d[\w.]*(?:,(?:==|!=|>=|<=|>|<)\d[\w.]*)*")


@dataclass(frozen=True, kw_only=True)
class KnownBad:
    """One row."""

    kernel: str  #: a name, or a pattern of names
    device: str  #: type
    compute_capability: tuple[tuple[int, int], tuple[int, int]] | None  #: lowest and highest; None: every device
    versions: Mapping[str, str]  #: library -> version specifiers, such as ">=9.19,<9.26"; all must hold
    problem: Mapping[str, Any]  #: conditions, all of which must hold
    what: str
    link: str

    def concerns(self, kernel: str, device: str, capability: tuple[int, int] | None) -> bool:
        """Whether it speaks of this kernel on this device, with the libraries that are installed."""
        if device != self.device or not fnmatchcase(kernel, self.kernel):
            return False
        if self.compute_capability is not None:
            low, high = self.compute_capability
            if capability is None or not low <= capability <= high:
                return False
        return all(_version_is(library, wanted) for library, wanted in self.versions.items())

    def holds(self, problem: Problem, *, lengths: bool = True) -> bool:
        """Whether the problem is one of those that it names.

        `lengths` False: they are symbolic, so what it says of them counts as met.
        """
        for name, condition in self.problem.items():
            if name in LENGTHS:
                if lengths and not _fits(_length(problem, name), condition):
                    return False
            elif name in SIZES:
                if not _fits(getattr(problem, name), condition):
                    return False
            elif name == "dtype":
                if str(problem.dtype).removeprefix("torch.") not in condition:
                    return False
            elif name == "bias":
                if kinds_of(problem).isdisjoint(condition):
                    return False
            elif _flag(problem, name) is not condition:
                return False
        return True

    def refusal(self) -> Refusal:
        text = 'to overrule: `with allow("known-bad")`, or ATTN_ALLOW_KNOWN_BAD with the name of the kernel'
        return Refusal("known_bad", f"{self.what}; {self.link}; {text}")

    def conditions(self) -> str:
        """For people: with which libraries and problems."""
        devices = ""
        if self.compute_capability is not None:
            low, high = ("sm_" + "".join(map(str, each)) for each in self.compute_capability)
            devices = f" on {low}" if low == high else f" on {low} to {high}"
        libraries = " and ".join(f"{library} {wanted}" for library, wanted in self.versions.items())
        return f"{libraries}{devices}: {', '.join(_told(*each) for each in self.problem.items()) or 'every problem'}"


def refusals(kernel: str, problem: Problem, *, lengths: bool = True) -> list[Refusal]:
    """A reason for each row that holds for this kernel and problem; `lengths` as in `KnownBad.holds`."""
    rows = rows_for(kernel, problem.device, problem.compute_capability)
    return [row.refusal() for row in rows if row.holds(problem, lengths=lengths)]


def overruled(kernel: str, settings: Settings) -> bool:
    """Whether the caller takes this kernel, known-bad or not."""
    return "known-bad" in settings.allow or any(fnmatchcase(kernel, pattern) for pattern in settings.allow_known_bad)


@functools.lru_cache(maxsize=1024)
def rows_for(kernel: str, device: str, capability: tuple[int, int] | None) -> tuple[KnownBad, ...]:
    """The rows that concern this kernel on this device; picked once."""
    return tuple(row for row in table() if row.concerns(kernel, device, capability))


@functools.cache
def table() -> tuple[KnownBad, ...]:
    """All rows."""
    return parse(PATH.read_text(encoding="utf-8"))


def parse(text: str) -> tuple[KnownBad, ...]:
    """The rows that a JSON list holds. Raises DeclarationError that names the row and what is wrong with it."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise DeclarationError(f"known-bad table: no JSON: {error}") from error
    if not isinstance(data, list):
        raise DeclarationError(f"known-bad table: must be a list of rows, got {type(data).__name__}")
    return tuple(_row(index, row) for index, row in enumerate(data))


def _row(index: int, data: Any) -> KnownBad:
    def wrong(text: str) -> DeclarationError:
        return DeclarationError(f"known-bad table: row {index}: {text}")

    if not isinstance(data, dict) or sorted(data) != sorted(KEYS):
        raise wrong(f"must have just {', '.join(KEYS)}, got {data!r}")
    for key in ("kernel", "device", "what", "link"):
        if not isinstance(data[key], str) or not data[key].strip():
            raise wrong(f"{key} must be text, got {data[key]!r}")
    if not data["link"].startswith("https://"):
        raise wrong(f"link must begin with https://, got {data['link']!r}")
    capability = data["compute_capability"]
    if capability is not None:
        capability = _range(capability)
        if capability is None:
            text = "compute_capability must be null or [[major, minor], [major, minor]], the lower one first"
            raise wrong(f"{text}, got {data['compute_capability']!r}")
    for reason in (*_wrong_versions(data["versions"]), *_wrong_conditions(data["problem"])):
        raise wrong(reason)
    return KnownBad(**{**data, "compute_capability": capability})


def _range(given: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(lowest, highest) where that is what is given."""
    if not isinstance(given, list) or len(given) != 2:
        return None
    if not all(isinstance(each, list) and [type(n) for n in each] == [int, int] for each in given):
        return None
    low, high = (tuple(each) for each in given)
    return (low, high) if low <= high else None


def _wrong_versions(given: Any) -> list[str]:
    if not isinstance(given, dict) or not given:
        return [f"versions must name a library, got {given!r}"]
    wrong = [f"versions: knows {', '.join(LIBRARIES)}, got {name!r}" for name in given if name not in LIBRARIES]
    for name, text in given.items():
        if not (isinstance(text, str) and SPECIFIERS.fullmatch(text)):
            wrong.append(f'versions: {name} must be specifiers, such as ">=9.19,<9.26", got {text!r}')
    return wrong


def _wrong_conditions(given: Any) -> list[str]:
    if not isinstance(given, dict):
        return [f"problem must be conditions by field, got {given!r}"]
    wrong = []
    for name, condition in given.items():
        if name in LENGTHS or name in SIZES:
            ways = condition if isinstance(condition, dict) else {}
            numbers = all(type(n) is int and n >= ("multiple_of" in way) for way, n in ways.items())
            alone = "plus" in ways and "multiple_of" not in ways
            if not ways or not numbers or alone or not set(ways) <= set(WAYS):
                wrong.append(f"problem: {name} takes {', '.join(WAYS)} with whole numbers, got {condition!r}")
        elif name in ("bias", "dtype"):
            if not isinstance(condition, list) or not condition or not all(isinstance(each, str) for each in condition):
                wrong.append(f"problem: {name} takes a list of names, got {condition!r}")
        elif name in FLAGS:
            if not isinstance(condition, bool):
                wrong.append(f"problem: {name} takes true or false, got {condition!r}")
        else:
            known = (*LENGTHS, *SIZES, "dtype", "bias", *FLAGS)
            wrong.append(f"problem: knows {', '.join(known)}, got {name!r}")
    return wrong


def _version_is(library: str, wanted: str) -> bool:
    """Whether the installed version of a library is among those; false where it is not installed."""
    from packaging.specifiers import SpecifierSet  # only where a row may concern this device

    version = installed(library)
    return version is not None and SpecifierSet(wanted).contains(version, prereleases=True)


def installed(library: str) -> str | None:
    """The version of a library that this torch uses, or of one that a plugin brings; None where there is none."""
    if library == "torch":
        return str(torch.__version__)
    if library in OF_PLUGINS:
        return version_of(library)
    if torch.version.hip:  # names its devices "cuda", and its own libraries after NVIDIA's
        return None
    if library == "cuda":
        return torch.version.cuda
    number = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return None if number is None else version_of_cudnn(number)


def version_of(distribution: str) -> str | None:
    """Of an installed distribution; its library is not imported for this."""
    import importlib_metadata

    try:
        return importlib_metadata.version(distribution)
    except importlib_metadata.PackageNotFoundError:
        return None


def version_of_cudnn(number: int) -> str:
    """As torch gives it: 91002 is 9.10.2, and before 9, 8902 was 8.9.2."""
    if number >= 90000:
        return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"
    return f"{number // 1000}.{number % 1000 // 100}.{number % 100}"


def kinds_of(problem: Problem) -> frozenset[str]:
    """The names of the kinds that its bias is made of; "none" where there is none."""
    bias = problem.bias
    if bias is None:
        return frozenset({"none"})
    parts = (bias, *bias.scores, *(() if bias.mask is None else (bias.mask,)))
    return frozenset(type(part).__name__ for part in parts)


def _flag(problem: Problem, name: str) -> bool:
    if name == "backward":
        return problem.needs_backward
    return bool(problem.dropout_p) if name == "dropout" else problem.return_lse


def _length(problem: Problem, name: str) -> int:
    if name == "bias_elements":
        return problem.seqlen_q * -(-problem.seqlen_kv // 16) * 16
    length: int = getattr(problem, name)
    return length


def _fits(number: int, condition: Mapping[str, int]) -> bool:
    if "multiple_of" in condition and number % condition["multiple_of"] != condition.get("plus", 0):
        return False
    if "not_multiple_of" in condition and number % condition["not_multiple_of"] == 0:
        return False
    if "is" in condition and number != condition["is"]:
        return False
    return condition.get("from", number) <= number <= condition.get("to", number)


def _told(name: str, condition: Any) -> str:
    """One condition, for people."""
    if isinstance(condition, bool):
        return name if condition else f"no {name}"
    if isinstance(condition, list):
        return f"{name} {' or '.join(condition)}"
    words = []
    if "is" in condition:
        words.append(str(condition["is"]))
    if "from" in condition:
        words.append(f"from {condition['from']}")
    if "to" in condition:
        words.append(f"to {condition['to']}")
    if "multiple_of" in condition:
        plus = f" plus {condition['plus']}" if "plus" in condition else ""
        words.append(f"a multiple of {condition['multiple_of']}{plus}")
    if "not_multiple_of" in condition:
        words.append(f"not a multiple of {condition['not_multiple_of']}")
    return f"{name} {' '.join(words)}"
