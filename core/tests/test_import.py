"""Free until used: what `import attn_core` loads, and what it does not; each case in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from attn_core.testing import HELLO, fake_distribution


def in_another_process(code, *folders, **environment):
    """What `code` prints as JSON on its last line."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("ATTN_")}
    path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**variables, "PYTHONPATH": os.pathsep.join(path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), ended.stderr


#: One of each way in which a kernel gets its mask.
BIASES = (
    "attn_core.Causal()",
    "attn_core.Window(1, 0)",
    "attn_core.KeyPadding([3])",
    "attn_core.Segments([1, 3])",
    "attn_core.PrefixLM(2)",
    "attn_core.Neighborhood((2, 2), kernel_size=2)",
    "attn_core.ALiBi(2)",
    "attn_core.ALiBi(2) + attn_core.Window(2, 0)",
    "attn_core.mask_mod(lambda b, h, q, k: q >= k)",
    "attn_core.Window(2, 0) & attn_core.Segments([1, 3])",
)


@pytest.fixture(scope="module")
def loaded():
    """Modules that were new after importing torch, the package, and after a first call; and whether CUDA was in use."""
    stages, errors = in_another_process(
        """
        import json, sys
        import torch

        stages, initialized = [], []
        def stage():
            stages.append(sorted(sys.modules))
            initialized.append(torch.cuda.is_initialized())

        stage()
        import attn_core
        stage()
        x = torch.randn(1, 4, 2, 8)
        attn_core.attention(x, x, x, attn_core.Causal())
        attn_core.scaled_dot_product_attention(x, x, x, is_causal=True)
        stage()
        print(json.dumps([stages, initialized]))
    """,
        ATTN_PLUGINS="",
    )
    assert errors == ""
    return stages


def new(loaded, stage):
    """Top-level names of what the stage loaded, the standard library aside."""
    names = set(loaded[0][stage]) - set(loaded[0][stage - 1])
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def under(names, *packages):
    return {name for name in names if any(name == p or name.startswith(f"{p}.") for p in packages)}


def test_importing_loads_the_core_and_pluggy_alone(loaded):
    names = new(loaded, 1)
    assert under(names, "attn_core.bias")
    assert "attn_core.registry" in names
    assert names - under(names, "attn_core", "pluggy", "torch") == set()
    lazy = ("cli", "conformance", "integrations", "testing", "torch_kernels")
    assert under(names, *(f"attn_core.{package}" for package in lazy)) == set()
    assert {name for name in under(names, "attn_core") if name.count(".") > 1} == under(names, "attn_core.bias") - {
        "attn_core.bias"
    }


def test_importing_loads_no_part_of_torch_that_was_not_there(loaded):
    assert under(new(loaded, 1), "torch") == set()


def test_a_first_call_loads_the_built_in_and_neither_command_line_nor_kernel_libraries(loaded):
    names = new(loaded, 2)
    assert "attn_core.torch_kernels" in names
    assert under(names, "click", "rich", "packaging", "numpy", "torch._dynamo", "torch.nn.attention") == set()
    assert (
        under(names, "attn_core.cli", "attn_core.integrations", "attn_core.testing", "attn_core.conformance") == set()
    )


def test_neither_importing_nor_a_call_on_the_cpu_opens_a_cuda_context(loaded):
    assert loaded[1] == [False, False, False]


def test_fifty_plugins_are_found_and_none_is_imported_before_a_kernel_is_asked_for(tmp_path, record_property):
    stub = HELLO.partition("def run")[0] + textwrap.dedent("""
        from attn_core import Unusable


        @hookimpl
        def attn_kernels():
            for kernel in ("forward", "decode"):
                yield Kernel(
                    name=f"NAME/{kernel}",
                    run="a_library_that_is_not_there:run",
                    probe=lambda: Unusable("absent", "a library is not installed"),
                    capabilities=Capabilities(devices={"cuda"}, dtypes={torch.float16}, head_dims={64}),
                )
    """)
    for i in range(50):
        name = f"stub{i:02}"
        source = stub.replace("NAME", name)
        fake_distribution(tmp_path, name=f"attn-{name}", source=source, entry_points={name: f"attn_{name}"})
    result, errors = in_another_process(
        """
        import json, sys, time
        import torch

        start = time.perf_counter()
        import attn_core
        imported = time.perf_counter()
        early = [name for name in sys.modules if name.startswith("attn_stub")]
        x = torch.randn(1, 4, 2, 8)
        attn_core.attention(x, x, x)
        called = time.perf_counter()
        names = [p.name for p in attn_core.plugins() if p.state == "ready"]
        verdicts = [v.state for v in attn_core.explain(x, x, x) if v.kernel.startswith("stub")]
        print(json.dumps([imported - start, called - imported, early, names, verdicts]))
        """,
        tmp_path,
        ATTN_PLUGINS=",".join(f"stub{i:02}" for i in range(50)),
    )
    import_seconds, call_seconds, early, names, states = result
    assert errors == ""
    assert early == []
    assert names == [*(f"stub{i:02}" for i in range(50)), "torch"]
    assert states == ["absent"] * 100
    record_property("import_seconds", import_seconds)
    record_property("first_call_seconds", call_seconds)
    print(f"with 50 plugins: import {1e3 * import_seconds:.0f} ms, first call {1e3 * call_seconds:.0f} ms")  # noqa: T201


def test_a_host_with_good_and_bad_plugins_answers_and_warns_once_of_each_bad_one(tmp_path):
    fake_distribution(tmp_path)
    fake_distribution(
        tmp_path, name="attn-old", source=HELLO, entry_points={"old": "attn_old"}, requires=("attn-core>=9",)
    )
    fake_distribution(
        tmp_path, name="attn-stale", source="raise OSError('undefined symbol')", entry_points={"stale": "attn_stale"}
    )
    fake_distribution(tmp_path, name="attn-off", source="1 / 0", entry_points={"off": "attn_off"})
    result, errors = in_another_process(
        """
        import json, sys
        import torch
        import attn_core

        x = torch.randn(1, 6, 2, 16)
        with attn_core.record() as calls:
            for _ in range(3):
                out = attn_core.attention(x, x, x, attn_core.Causal())
        expected, _ = attn_core.reference_attention(x, x, x, attn_core.Causal())
        print(json.dumps({
            "error": float((out - expected).abs().max()),
            "served": calls.kernels,
            "states": {p.name: p.state for p in attn_core.plugins()},
            "imported": sorted(name for name in sys.modules if name.startswith("attn_") and "core" not in name),
        }))
        """,
        tmp_path,
        ATTN_PLUGINS="hello,off,old,stale",
        ATTN_BLOCK="off",
        ATTN_PREFER="hello/*",
    )
    assert result["error"] < 1e-5
    assert result["served"] == {"hello/sdpa": 3}
    states = {"hello": "ready", "off": "unavailable", "old": "broken", "stale": "broken", "torch": "ready"}
    assert {name: result["states"][name] for name in states} == states
    assert result["imported"] == ["attn_hello"]  # one was not asked, one did not fit, one did not survive its import
    warned = [line for line in errors.splitlines() if "PluginWarning" in line]
    assert len(warned) == 2
    assert "'old' is left out: attn-old 1.0 needs attn-core>=9, found " in warned[0]
    assert "'stale' is left out: OSError: undefined symbol" in warned[1]


def test_a_first_call_with_fake_tensors_leaves_none_behind(tmp_path):
    result, _ = in_another_process(
        """
        import json
        import torch
        import attn_core
        from torch._subclasses.fake_tensor import FakeTensorMode

        x, mask = torch.randn(1, 4, 2, 8), torch.ones(4, 4, dtype=torch.bool).tril()
        biases = [mask, mask.float(), *map(eval, BIASES)]
        def every():
            return [attn_core.attention(x, x, x, bias) for bias in biases]
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = every()
        right = [attn_core.reference_attention(x, x, x, bias)[0] for bias in biases]
        print(json.dumps([
            {type(out).__name__ for out in fake} == {"FakeTensor"},
            [type(out).__name__ for out in every()],
            max(float((out - want).abs().max()) for out, want in zip(every(), right)),
        ]))
        """.replace("BIASES", repr(BIASES)),
        tmp_path,
        ATTN_PLUGINS="",
    )
    assert result[0]
    assert result[1] == ["Tensor"] * (2 + len(BIASES))
    assert result[2] < 1e-5


def test_without_metadata_of_its_own_the_core_still_has_its_kernels(tmp_path):
    """As in a source tree on PYTHONPATH."""
    result, _ = in_another_process(
        """
        import json
        import importlib_metadata

        found = importlib_metadata.entry_points
        importlib_metadata.entry_points = lambda **given: [e for e in found(**given) if "attn_core" not in e.value]
        import attn_core
        print(json.dumps([k.name for k in attn_core.kernels()]))
        """,
        tmp_path,
    )
    assert "torch/math" in result
