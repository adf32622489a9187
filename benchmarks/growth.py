"""What do imports, plugins, kernels, problems and threads cost?

What happens once per process is measured in fresh processes, with and without in turns; the rest in this one. Limits
are in milliseconds of the machine on which they were set; by what a large import of torch's takes they are carried
over to this one.

    nox -s bench -- growth [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import attn_core
import torch
from attn_core import Capabilities, Cost, Kernel, attention, plan, register
from attn_core.scope import TABLE_SIZE, current
from attn_core.testing.distributions import HELLO, fake_distribution
from timing import SEED, Finding, Yardstick, environment, report

PLUGINS, KERNELS, PROBLEMS, THREADS = 50, 500, 10_000, 8
#: Milliseconds, at most, where this import after torch's takes so many.
HEAVY, HEAVY_THERE = "torch.nn.attention.bias", 917.0
LIMIT_IMPORT, LIMIT_PLUGINS_IMPORT, LIMIT_PLUGINS_CALL, LIMIT_FIRST_CHOICE = 60.0, 5.0, 150.0, 20.0

# torch leaves so many objects behind that a collection of garbage takes 70 ms, which would come at a random place.
FRESH = """\
import gc, json, time
import torch
gc.collect()
start = time.perf_counter()
import attn_core
imported = time.perf_counter()
cuda = torch.cuda.is_initialized()
x = torch.ones(1, 4, 1, 8)
called = time.perf_counter()
attn_core.attention(x, x, x)
done = time.perf_counter()
plugins = len(attn_core.plugins())
print(json.dumps({"import": imported - start, "call": done - called, "cuda": cuda, "plugins": plugins}))
"""

FRESH_HEAVY = f"""\
import gc, time
import torch
gc.collect()
start = time.perf_counter()
import {HEAVY}
print(time.perf_counter() - start)
"""

FRESH_THREADS = """\
import sys, threading
import torch, attn_core
x = torch.ones(1, 4, 1, 8)
barrier, kernels = threading.Barrier(int(sys.argv[1])), []
def choose():
    barrier.wait()
    kernels.append(attn_core.plan(x, x, x).kernel)
threads = [threading.Thread(target=choose) for _ in range(int(sys.argv[1]))]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*kernels)
"""


def fresh(script: str, *arguments: str, path: str | None = None) -> str:
    """What a fresh process prints that runs `script`, with `path` on its PYTHONPATH."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("ATTN_")}
    # pip compiles what it installs; an environment that writes no bytecode would have each run compile it anew.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    variables["PYTHONPYCACHEPREFIX"] = os.path.join(tempfile.gettempdir(), "attn-bench-bytecode")
    variables.pop("PYTHONPATH", None)
    if path is not None:
        variables["PYTHONPATH"] = path
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def heavy_import(repeats: int) -> Yardstick:
    """What limits are scaled by."""
    taken = [1e3 * float(fresh(FRESH_HEAVY)) for _ in range(repeats)]
    return Yardstick(name=f"import {HEAVY}", there=HEAVY_THERE, here=statistics.median(taken), unit="ms")


def once_per_process(repeats: int, yardstick: Yardstick) -> list[Finding]:
    """Import and first call, alone and beside stub plugins."""
    with tempfile.TemporaryDirectory() as folder:
        for n in range(PLUGINS):
            source = HELLO.replace("hello/sdpa", f"stub{n}/sdpa")
            fake_distribution(folder, f"attn-stub{n}", source=source, entry_points={f"stub{n}": f"attn_stub{n}"})
        fresh(FRESH, path=folder)  # writes the bytecode, as pip would have
        alone, beside = [], []
        for _ in range(repeats):
            alone.append(json.loads(fresh(FRESH)))
            beside.append(json.loads(fresh(FRESH, path=folder)))
    found = {each["plugins"] for each in beside}
    if found != {alone[0]["plugins"] + PLUGINS}:
        raise RuntimeError(f"the stub plugins were not found: {found} plugins")

    def milliseconds(of: str) -> tuple[float, float]:
        differences = [1e3 * (b[of] - a[of]) for a, b in zip(alone, beside)]
        return statistics.median(differences), spread(differences)

    imports = [1e3 * each["import"] for each in alone]
    calls = [1e3 * each["call"] for each in alone]
    (import_more, import_spread), (call_more, call_spread) = milliseconds("import"), milliseconds("call")
    cuda = "CUDA untouched" if not any(each["cuda"] for each in alone + beside) else "CUDA WAS INITIALIZED"
    return [
        Finding(
            name="import attn_core, after import torch",
            value=statistics.median(imports),
            spread=spread(imports),
            unit="ms",
            limit=yardstick.limit(LIMIT_IMPORT),
            note=f"{LIMIT_IMPORT:g} there; {cuda}",
        ),
        Finding(name="first call", value=statistics.median(calls), spread=spread(calls), unit="ms"),
        Finding(
            name=f"import beside {PLUGINS} plugins: more",
            value=import_more,
            spread=import_spread,
            unit="ms",
            limit=yardstick.limit(LIMIT_PLUGINS_IMPORT),
            note=f"{LIMIT_PLUGINS_IMPORT:g} there",
        ),
        Finding(
            name=f"first call beside {PLUGINS} plugins: more",
            value=call_more,
            spread=call_spread,
            unit="ms",
            limit=yardstick.limit(LIMIT_PLUGINS_CALL),
            note=f"{LIMIT_PLUGINS_CALL:g} there",
        ),
    ]


def many_kernels(yardstick: Yardstick) -> list[Finding]:
    """The first choice among 500 kernels, and calls that are found in the table."""
    run = attn_core.kernel("torch/math").run
    query = torch.randn(1, 4, 1, 8)

    def first_choices() -> list[float]:
        taken = []
        for seqlen in range(1000, 1009):
            x = query[:, :1].expand(1, seqlen, 1, 8).contiguous()
            start = time.perf_counter()
            plan(x, x, x)
            taken.append(1e3 * (time.perf_counter() - start))
        return taken

    def cached() -> list[float]:
        attention(query, query, query)
        taken = []
        for _ in range(21):
            start = time.perf_counter()
            for _ in range(2000):
                attention(query, query, query)
            taken.append(1e6 * (time.perf_counter() - start) / 2000)
        return taken

    first_before, cached_before = first_choices(), cached()
    registered = [
        register(
            Kernel(
                name=f"many/kernel{n}",
                run=run,
                layout="heads-first",
                capabilities=Capabilities(
                    devices={"cpu"},
                    dtypes={torch.float32, torch.bfloat16},
                    # Every other one refuses: reasons are gathered too.
                    head_dims=range(8, 257, 8) if n % 2 else range(64, 257, 64),
                    biases=attn_core.kernel("torch/math").declarations[0].biases,
                    dropout=True,
                ),
                costs={"cpu": Cost(call=1.0 + n, source="far behind, so that the choice stays")},
            )
        )
        for n in range(KERNELS)
    ]
    try:
        first_after, cached_after = first_choices(), cached()
    finally:
        for registration in registered:
            registration.unregister()
    more = min(cached_after) - min(cached_before)
    return [
        Finding(name="choice among torch's kernels", value=statistics.median(first_before), unit="ms"),
        Finding(
            name=f"choice among {KERNELS} more, the first",
            value=first_after[0],
            unit="ms",
            limit=yardstick.limit(LIMIT_FIRST_CHOICE),
            note=f"{LIMIT_FIRST_CHOICE:g} there; their probes included",
        ),
        Finding(
            name=f"choice among {KERNELS} more, later ones",
            value=statistics.median(first_after),
            unit="ms",
            limit=yardstick.limit(LIMIT_FIRST_CHOICE),
            note=f"{LIMIT_FIRST_CHOICE:g} there",
        ),
        Finding(name="cached call", value=min(cached_before), spread=spread(cached_before), unit="µs"),
        Finding(
            name=f"cached call among {KERNELS} more: more",
            value=more,
            spread=spread(cached_after),
            unit="µs",
            note="no more than what the same call varies by",
        ),
    ]


def many_problems() -> list[Finding]:
    """10,000 distinct problems: choosing each, and what the table keeps."""
    key = torch.randn(1, 1, 1, 8)
    largest, start = 0, time.perf_counter()
    for seqlen in range(1, PROBLEMS + 1):
        attention(key, key.expand(1, seqlen, 1, 8), key.expand(1, seqlen, 1, 8))
        largest = max(largest, len(current.get()))
    seconds = time.perf_counter() - start
    return [
        Finding(
            name=f"{PROBLEMS} distinct problems: entries kept", value=largest, unit="entries", limit=float(TABLE_SIZE)
        ),
        Finding(name="a new problem: choice, binding and call", value=1e6 * seconds / PROBLEMS, unit="µs"),
    ]


def many_threads() -> list[Finding]:
    """Eight threads: first call of the process at once, then choosing, then calling what is in the table."""
    first = fresh(FRESH_THREADS, str(THREADS)).split()
    lengths = range(1, 301)
    operands = [torch.randn(1, seqlen, 1, 8) for seqlen in lengths]

    def choose() -> list[str]:
        return [plan(x, x, x).kernel for x in operands]

    def call() -> list[float]:
        return [float(attention(x, x, x).sum()) for x in operands for _ in range(3)]

    findings = [
        Finding(
            name=f"first call in {THREADS} threads at once: different answers",
            value=float(len(set(first)) - 1 + THREADS - len(first)),
            unit="answers",
            limit=0.0,
            note=", ".join(sorted(set(first))),
        )
    ]
    for what, work in (("choices", choose), ("cached calls", call)):
        work()
        alone, answers_alone = in_threads(1, work)
        together, answers = in_threads(THREADS, work)
        differing = sum(answer != answers_alone[0] for answer in answers)
        count = len(answers_alone[0])
        findings += [
            Finding(
                name=f"{what} in {THREADS} threads: threads that disagree",
                value=float(differing),
                unit="threads",
                limit=0.0,
            ),
            Finding(name=f"{what}, 1 thread", value=count / alone / 1e3, unit="thousand/s"),
            Finding(
                name=f"{what}, {THREADS} threads",
                value=THREADS * count / together / 1e3,
                unit="thousand/s",
                note="Python runs one thread at a time: the same is the best there is",
            ),
        ]
    return findings


def in_threads(number: int, work: Callable[[], list[str] | list[float]]) -> tuple[float, list[list[str] | list[float]]]:
    """`(seconds, what each thread returned)`; the threads start together, the seconds are a median of five."""
    taken, answers = [], []
    for _ in range(5):
        barrier = threading.Barrier(number + 1)
        answers = []

        def one(barrier: threading.Barrier = barrier, answers: list[list[str] | list[float]] = answers) -> None:
            barrier.wait()
            answers.append(work())

        threads = [threading.Thread(target=one) for _ in range(number)]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        taken.append(time.perf_counter() - start)
        if len(answers) != number:
            raise RuntimeError(f"{number - len(answers)} threads failed")
    return statistics.median(taken), answers


def spread(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def sections(repeats: int = 9) -> tuple[dict[str, list[Finding]], dict[str, Yardstick]]:
    """All of it, and what limits were scaled by, by headings."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    yardstick = heavy_import(3)
    process, kernels = "once per process", "many kernels"
    found = {
        process: once_per_process(repeats, yardstick),
        kernels: many_kernels(yardstick),
        "many problems": many_problems(),
        "many threads": many_threads(),
    }
    return found, {process: yardstick, kernels: yardstick}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="of what needs fresh processes")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    for name, text in environment().items():
        print(f"{name}: {text}")
    found, yardsticks = sections(options.repeats)
    report(found, options.json, yardsticks)


if __name__ == "__main__":
    main()
