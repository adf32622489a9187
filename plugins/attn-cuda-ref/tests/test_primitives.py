"""Each primitive of the emulator against its definition, in all schedules; the definitions are written in torch."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests without their folder on it
from emu.emulator import SCHEDULES, EmulatedLauncher
from emu.toolchain import missing_tool

WARP = 32
PROBES = (Path(__file__).parent / "gpu" / "probes.cu").read_text()
#: The types of 16 bits as the kernels' text names them.
NARROW = {"f16": torch.float16, "bf16": torch.bfloat16}
#: What there is of bfloat16 before sm_80.
CONVERSIONS = ("widen", "narrow", "pairs")
EVERY_PATTERN = torch.arange(-(2**15), 2**15, dtype=torch.int16)
EMULATED = [f"{build} {schedule}" for build in ("plain", "checked") for schedule in SCHEDULES]


class Machine:
    """What probes run on: the emulator, built and scheduled as its name says, or the GPU."""

    def __init__(self, name: str) -> None:
        if name == "gpu":
            from attn_cuda_ref import gpu

            self.device, self.launcher = "cuda", gpu.launcher(torch.cuda.current_device())
        else:
            build, schedule = name.split()
            self.device, self.launcher = "cpu", EmulatedLauncher(build, schedule=schedule, seed=1)

    def run(self, entry, *arguments, grid=(1, 1, 1), block=(WARP, 1, 1), shared=0, **constants):
        """Launches a probe; tensors are where they were, with what the probe wrote."""
        is_new = entry == "copy" or (constants.get("TYPE") == "bf16" and entry not in CONVERSIONS)
        if self.device == "cuda" and is_new and torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("from sm_80 on")
        there = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in arguments]
        self.launcher.compile(PROBES, entry, constants).launch(grid, block, shared, there)
        for own, written in zip(arguments, there):
            if isinstance(own, torch.Tensor):
                own.copy_(written)


def machines(names):
    without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    without_tools = pytest.mark.skipif(missing_tool() is not None, reason=f"the emulator: {missing_tool()}")
    return [*(pytest.param(name, marks=without_tools) for name in names), pytest.param("gpu", marks=without_gpu)]


@pytest.fixture(params=machines(EMULATED))
def machine(request):
    return Machine(request.param)


@pytest.fixture(params=machines(EMULATED[:1]))
def any_machine(request):
    """Where neither threads nor memory matter: one run is enough."""
    return Machine(request.param)


def halves(numbers):
    """Numbers of 16 bits in registers of 32: the low half first."""
    return numbers.view(torch.int16).view(torch.int32)


# ---- numbers of 16 bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NARROW)
def test_every_number_of_16_bits_widens_to_what_torch_makes_of_it(name, any_machine):
    numbers = EVERY_PATTERN.view(NARROW[name])
    wide = torch.empty(2**16)
    any_machine.run("widen", numbers, wide, grid=(256, 1, 1), block=(256, 1, 1), TYPE=name)
    torch.testing.assert_close(wide, numbers.float(), rtol=0, atol=0, equal_nan=True)


def around_every_tie(dtype):
    """Floats at, next to, and between neighbouring numbers of a type: where rounding is decided."""
    finite = EVERY_PATTERN.view(dtype).float()
    finite = finite[finite.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()) / 2
    ties = ties.float()
    beside = [torch.nextafter(ties, torch.full_like(ties, to)) for to in (-torch.inf, torch.inf)]
    largest = finite.abs().max()
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest * 1.001, largest * 1.01, 1e-45, 3.4e38])
    return torch.cat([finite, ties, *beside, edges])


@pytest.mark.parametrize("name", NARROW)
def test_floats_are_rounded_to_the_nearest_and_ties_to_even(name, any_machine):
    wide = around_every_tie(NARROW[name])
    narrow = torch.empty(len(wide), dtype=NARROW[name])
    blocks = ((len(wide) + 255) // 256, 1, 1)
    any_machine.run("narrow", wide, narrow, len(wide), grid=blocks, block=(256, 1, 1), TYPE=name)
    expected = wide.to(NARROW[name])
    assert torch.equal(narrow.isnan(), wide.isnan())
    assert torch.equal(narrow.view(torch.int16)[~wide.isnan()], expected.view(torch.int16)[~wide.isnan()])


@pytest.mark.parametrize("name", NARROW)
def test_two_numbers_share_a_register_the_first_in_the_low_half(name, any_machine):
    wide, packed = torch.randn(512), torch.empty(256, dtype=torch.int32)
    any_machine.run("pairs", wide, packed, block=(256, 1, 1), TYPE=name)
    assert torch.equal(packed, halves(wide.to(NARROW[name])))


def rounded_exactly(values, dtype):
    """Fractions, each rounded once: by comparing it with the two numbers of the type beside it."""
    finite = EVERY_PATTERN.view(dtype).double()
    finite = finite[finite.isfinite()].unique()
    near = torch.tensor([float(value) for value in values], dtype=torch.float64)
    at = torch.searchsorted(finite, near).clamp(1, len(finite) - 1)
    rounded = []
    for value, i in zip(values, at.tolist()):
        beside = finite[max(i - 2, 0) : i + 2].tolist()
        distances = [abs(Fraction(x) - value) for x in beside]
        nearest = [x for x, away in zip(beside, distances) if away == min(distances)]
        even = [x for x in nearest if torch.tensor(x, dtype=dtype).view(torch.int16).item() % 2 == 0]
        rounded.append((nearest if len(nearest) == 1 else even)[0])
    return torch.tensor(rounded, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", NARROW)
def test_arithmetic_of_16_bits_rounds_once(name, any_machine):
    generator = torch.Generator().manual_seed(20)
    dtype, count = NARROW[name], 2048
    # Products have all sizes that the types share; half of the c are near what decides their rounding.
    a, b, c = (
        (torch.randn(count, generator=generator) * 2.0 ** torch.randint(-9, 5, (count,), generator=generator)).to(dtype)
        for _ in range(3)
    )
    c[: count // 2] = (2.0 ** torch.randint(-20, -14, (count // 2,), generator=generator)).to(dtype)
    sums, products, fused = (torch.empty(count, dtype=dtype) for _ in range(3))
    blocks = (count // 256, 1, 1)
    any_machine.run("arithmetic", a, b, c, sums, products, fused, grid=blocks, block=(256, 1, 1), TYPE=name)
    exact = [[Fraction(x) for x in values.double().tolist()] for values in (a, b, c)]
    assert torch.equal(sums, rounded_exactly([x + y for x, y, _ in zip(*exact)], dtype))
    assert torch.equal(products, rounded_exactly([x * y for x, y, _ in zip(*exact)], dtype))
    assert torch.equal(fused, rounded_exactly([x * y + z for x, y, z in zip(*exact)], dtype))


def test_a_fused_sum_is_not_rounded_twice(any_machine):
    # Between 256 and 512 every second integer is a bfloat16. 7 x 37 = 259 and 9 x 29 = 261 lie in the middle, and what
    # a double cannot hold beside them decides.
    a, b = torch.tensor([7.0, 9.0] * 16).bfloat16(), torch.tensor([37.0, 29.0] * 16).bfloat16()
    c = torch.tensor([-(2.0**-60), 2.0**-60] * 16).bfloat16()
    sums, products, fused = (torch.empty(WARP, dtype=torch.bfloat16) for _ in range(3))
    any_machine.run("arithmetic", a, b, c, sums, products, fused, TYPE="bf16")
    assert products.tolist() == [260.0, 260.0] * 16
    assert fused.tolist() == [258.0, 262.0] * 16


# ---- what lanes exchange ------------------------------------------------------------------------------------------


def test_shuffles_read_the_lane_that_ptx_says(machine):
    threads = 2 * WARP
    given, wide = torch.randn(threads), torch.randn(threads, dtype=torch.float64)
    out, wide_out = torch.empty(9, threads), torch.empty(threads, dtype=torch.float64)
    machine.run("shuffles", given, wide, out, wide_out, block=(threads, 1, 1))
    warp, lane = torch.arange(threads) // WARP * WARP, torch.arange(threads) % WARP
    segment, within = lane // 8 * 8, lane % 8
    sources = [
        (lane * 7 + 3) % 32,
        lane ^ 5,
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane < 26, lane + 6, lane),
        segment + 13 % 8,
        torch.where(within >= 3, lane - 3, lane),
        torch.where(within < 5, lane + 3, lane),
        torch.where((lane ^ 4) <= (lane | 3), lane ^ 4, lane),
        lane ^ 8,
    ]
    for row, source in zip(out, sources):
        assert torch.equal(row, given[warp + source])
    assert torch.equal(wide_out, wide[torch.arange(threads) ^ 1])


def test_votes_count_the_lanes_of_the_mask(machine):
    given = torch.tensor([1] * 8 + [0] * 8 + [0, 1] * 8 + [1, 1, 0, 0] * 8, dtype=torch.int32)
    threads = len(given)
    out = torch.empty(4, threads, dtype=torch.int32)
    machine.run("votes", given, out, block=(threads, 1, 1))
    for t in range(threads):
        first, quarter = t // WARP * WARP, t // 8 * 8
        lanes = {i: int(given[first + i]) for i in range(WARP)}
        ballot = sum(bit << i for i, bit in lanes.items())
        own = [given[quarter + i].item() for i in range(8)]
        bits = sum(bit << (quarter % WARP + i) for i, bit in enumerate(own))
        expected = [ballot, bits, int(all(own)), int(any(own))]
        assert [value % 2**32 for value in out[:, t].tolist()] == expected


# ---- barriers -----------------------------------------------------------------------------------------------------


def test_a_barrier_makes_every_write_before_it_seen_after_it(machine):
    out = torch.empty(128, dtype=torch.int32)
    machine.run("rotate", out, 5, block=(128, 1, 1), shared=1024)
    assert torch.equal(out, ((torch.arange(128) ^ 1) + 5).int() % 128)


def test_named_barriers_pass_data_from_one_warp_to_others(machine):
    out, rounds = torch.empty(128, dtype=torch.int32), 7
    machine.run("pass_on", out, rounds, block=(128, 1, 1), shared=256)
    lanes = torch.arange(128) % 32
    taken = sum(i * 32 + (lanes + 1) % 32 for i in range(rounds))
    taken[:32] = 0
    assert torch.equal(out, taken.int())


# ---- matrices -----------------------------------------------------------------------------------------------------


def test_ldmatrix_gives_each_lane_two_neighbours_of_its_row_or_column(machine):
    matrices = torch.randn(4, 8, 8).half()
    out, two, one = (torch.empty(n, WARP, dtype=torch.int32) for n in (8, 2, 1))
    machine.run("load_matrices", matrices, out, two, one, shared=512)
    straight, across = halves(matrices.reshape(4, 64)), halves(matrices.mT.reshape(4, 64))
    assert torch.equal(out, torch.cat([straight, across]))
    assert torch.equal(two, straight[:2])
    assert torch.equal(one, across[:1])


@pytest.mark.parametrize("name", NARROW)
def test_mma_adds_the_product_of_16_x_16_and_16_x_8(name, machine):
    a, b, sums = torch.randn(16, 16).to(NARROW[name]), torch.randn(16, 8).to(NARROW[name]), torch.randn(16, 8)
    expected = sums.double() + a.double() @ b.double()
    machine.run("multiply_matrices", a, b, sums, TYPE=name)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=2e-6)


# ---- copies in the background, approximations ----------------------------------------------------------------------


def test_copies_in_the_background_arrive_with_zeros_behind_the_end(machine):
    given, early, late = torch.randn(128), torch.empty(WARP), torch.zeros(2, 128)
    machine.run("copy", given, early, late, 80, shared=1024)
    ended = torch.where(torch.arange(128) < 80, given, 0.0)
    assert torch.equal(early, ended[::4])
    assert torch.equal(late[0], ended)
    assert torch.equal(late[1, :96], torch.cat([given[:64], ended[64:96]]))


def test_approximations_are_off_by_two_units_of_the_last_place_at_most(any_machine):
    given = torch.cat([torch.linspace(-125, 127, 253), torch.tensor([-torch.inf, torch.inf, 0.7])])
    powers, logarithms = torch.empty(256), torch.empty(256)
    any_machine.run("approximations", given, powers, logarithms, block=(256, 1, 1))
    torch.testing.assert_close(powers.double(), torch.exp2(given.double()), rtol=2 * 2**-23, atol=0)
    positive = given > 0
    expected = torch.log2(given[positive].double())
    torch.testing.assert_close(logarithms[positive].double(), expected, rtol=2 * 2**-23, atol=2**-22)


# ---- who and where a thread is --------------------------------------------------------------------------------------


def check_places(run):
    grid, block, stride = (3, 2, 5), (8, 4, 3), 2
    out = torch.zeros(30 * 96 * stride, dtype=torch.int64)
    run(out, stride, 2.0, 7, grid, block)
    expected = 2 * (torch.arange(30)[:, None] * 1000 + torch.arange(96)) + 7
    assert torch.equal(out[::2], expected.flatten())
    assert not out[1::2].any()


def test_every_thread_of_every_block_runs_once(machine):
    check_places(lambda *given: machine.run("places", *given[:4], grid=given[4], block=given[5]))


@pytest.mark.skipif(missing_tool() is not None, reason=f"the emulator: {missing_tool()}")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_several_workers_run_every_block_once(schedule):
    function = EmulatedLauncher(schedule=schedule, workers=3, seed=3).compile(PROBES, "places", {})
    check_places(lambda *given: function.launch(given[4], given[5], 0, given[:4]))
