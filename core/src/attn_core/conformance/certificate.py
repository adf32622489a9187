"""The certificate of a kernel: each thing that it declares, and whether the checks have shown it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

from ..capabilities import Backward, Capabilities
from ..kernel import Kernel
from ..registry import registry
from ..versions import core_version
from . import run  # noqa: F401  (makes the checks known)
from .checks import CHECKS
from .results import CheckResult
from .subject import Subject

Verdict = Literal["proven", "failed", "not testable here"]

#: The form of the file; one more where a field changes its meaning.
FORM = 1


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What the checks have shown of one kernel, on one machine, with these versions."""

    kernel: str
    distribution: str
    version: str
    device: str
    machine: dict[str, str]
    when: str  #: date and time, UTC
    claims: dict[str, Verdict]  #: "gqa", "dtypes: bfloat16", "biases: Causal", …
    checks: dict[str, dict[str, int]]  #: check -> how many passed, failed, skipped
    error: float | None  #: the largest, as a part of what the budget allows
    failures: list[dict[str, Any]]

    @property
    def granted(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def as_data(self) -> dict[str, Any]:
        return {"form": FORM, "granted": self.granted, **vars(self)}

    def as_markdown(self) -> str:
        """A short table, for a README or a release note."""
        holds = "holds what it declares" if self.granted else "does NOT hold what it declares"
        who = f"{self.distribution} {self.version}" if self.distribution else "Its author"
        versions = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        error = "" if self.error is None else f" Largest error: {self.error:.2f} of what the budget allows."
        lines = [
            f"# {self.kernel}",
            "",
            f"{who} {holds}, on {self.device}; {self.when[:10]}.{error}",
            "",
            f"With {versions}.",
            "",
            "| declared | verdict |",
            "| --- | --- |",
            *(f"| {claim} | {verdict} |" for claim, verdict in sorted(self.claims.items())),
        ]
        if self.failures:
            lines += ["", "| failed | on | why |", "| --- | --- | --- |"]
            lines += [f"| {f['check']} | {f['case'] or '–'} | {_cell(f['reason'])} |" for f in self.failures[:20]]
            if len(self.failures) > 20:
                lines.append(f"| … | {len(self.failures) - 20} more in the JSON file | |")
        return "\n".join(lines) + "\n"


def certificate(kernel: Kernel, device: str, results: Iterable[CheckResult]) -> Certificate:
    """The certificate that these results make. What its author knows to fail has failed all the same."""
    results = [replace(result, status="failed") if result.status == "xfailed" else result for result in results]
    plugin = next((plugin for plugin in registry.plugins() if kernel.name in plugin.kernels), None)
    counts: dict[str, dict[str, int]] = {}
    for result in results:
        count = counts.setdefault(result.check, {"passed": 0, "failed": 0, "skipped": 0})
        count[result.status] += 1
    errors = [result.error for result in results if result.error is not None]
    return Certificate(
        kernel=kernel.name,
        distribution=plugin.distribution if plugin else "",
        version=plugin.version if plugin else "",
        device=device,
        machine=machine(device),
        when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        claims=verdicts(kernel, device, results),
        checks=counts,
        error=max(errors) if errors else None,
        failures=[result.as_data() for result in results if not result],
    )


def verdicts(kernel: Kernel, device: str, results: list[CheckResult]) -> dict[str, Verdict]:
    """Each declared thing, and what the results say of it."""
    verdicts: dict[str, Verdict] = {}
    subject = Subject(kernel, device)
    for claim in {case.proves for case in subject.claimed if case.proves}:
        verdicts[claim] = _verdict([result for result in results if result.proves == claim])
    for declared in subject.declared.biases:  # one of which no example is known makes no problem
        name = declared.__name__ if isinstance(declared, type) else repr(declared)
        verdicts.setdefault(f"biases: {name}", "not testable here")
    for name in _declared(subject):
        if name not in verdicts:
            checks = {check.name for check in CHECKS.values() if name in check.fields and check.group != "honesty"}
            verdicts[name] = _verdict([result for result in results if result.check in checks])
    return verdicts


def _declared(subject: Subject) -> list[str]:
    """The fields that are switched on; those that list values are taken value by value."""
    names = [field.name for field in fields(Capabilities) if getattr(subject.declared, field.name) is True]
    backward = subject.backward
    if backward is None:
        return names
    on = [field.name for field in fields(Backward) if getattr(backward, field.name) is True]
    alike = {name for name in on if name in {field.name for field in fields(Capabilities)}}
    return [*names, "backward", *(f"backward.{n}" if n in alike or n == "double" else n for n in on)]


def _verdict(results: list[CheckResult]) -> Verdict:
    if any(result.status == "failed" for result in results):
        return "failed"
    return "proven" if any(result.status == "passed" for result in results) else "not testable here"


def machine(device: str) -> dict[str, str]:
    """What the results depend on."""
    told = {
        "attn-core": core_version() or "from a source tree",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        told |= {"GPU": f"{torch.cuda.get_device_name()} (sm_{major}{minor})", "CUDA": str(torch.version.cuda)}
    return told


def write(certificate: Certificate, folder: Path) -> list[Path]:
    """Writes `<kernel>.<device>.json` and `.md` into the folder, both or none. Raises OSError where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{certificate.kernel.replace('/', '-')}.{certificate.device}"
    texts = {
        folder / f"{stem}.json": json.dumps(certificate.as_data(), indent=1) + "\n",
        folder / f"{stem}.md": certificate.as_markdown(),
    }
    made = []
    try:
        for path, text in texts.items():
            made.append(path.with_name(f".{path.name}.{os.getpid()}"))
            made[-1].write_text(text, encoding="utf-8")
        for path, temporary in zip(texts, made):
            temporary.replace(path)
    finally:
        for temporary in made:
            temporary.unlink(missing_ok=True)
    return list(texts)


def read(path: Path) -> Certificate:
    """The certificate in a JSON file. Raises ValueError, which says what it is instead, OSError where there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no certificate: it is no JSON ({error})") from error
    names = [field.name for field in fields(Certificate)]
    if not isinstance(data, dict) or "form" not in data:
        raise ValueError(f"{path} is no certificate: it has no form")
    if data["form"] != FORM:
        raise ValueError(f"{path} is a certificate of form {data['form']!r}; this attn-core reads form {FORM}")
    missing = [name for name in names if name not in data]
    if missing:
        raise ValueError(f"{path} is no whole certificate: it has no {', '.join(missing)}")
    return Certificate(**{name: data[name] for name in names})


def strangeness(certificate: Certificate) -> list[str]:
    """What is another here than where it was made, a line each: it says nothing of these; none where it holds."""
    if certificate.kernel not in {kernel.name for kernel in registry.kernels()}:
        return [f"{certificate.kernel} is not installed here"]
    plugin = next((plugin for plugin in registry.plugins() if certificate.kernel in plugin.kernels), None)
    if certificate.device == "cuda" and not torch.cuda.is_available():
        return ["it is for cuda, and there is no CUDA device here"]
    made = certificate.machine | {certificate.distribution: certificate.version}
    here = machine(certificate.device)
    if plugin is not None:
        here |= {plugin.distribution: plugin.version}
    names = [name for name in {**made, **here} if made.get(name) != here.get(name)]
    return [f"{name}: {made.get(name) or 'none'} there, {here.get(name) or 'none'} here" for name in names if name]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]
