"""Every benchmark runs at tiny sizes and its two sides agree; no test looks at a clock."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.tiny_motion_pipe import tiny_motion_pipe

from blockloom.motion.procedural import procedural_motions

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
TINY = {"dim": 32, "layers": 2, "heads": 2, "codes": 11, "repeats": 1}

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the wheel does not ship the benchmarks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The modules of the benchmarks folder, as its script imports them."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("run")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("run", "common"):
            if name not in before:
                sys.modules.pop(name, None)


def test_block_rollout_agrees_with_its_recompute(bench: ModuleType) -> None:
    row, fused = bench.b1_blocks.run(CPU, **TINY, tokens=4, blocks=3, steps=2)
    assert row.shape["blocks"] == 3 and row.ratio > 0 and row.pass_line == 5.1
    assert fused.name == "B1-fused" and fused.ratio > 0 and fused.pass_line is None


def test_frames_of_a_world_agree_with_their_recompute(bench: ModuleType) -> None:
    row, flat = bench.b2_world.run(CPU, frames=9, long=28, repeats=1)
    assert row.ratio > 0 and flat.notes["frames"] == 28
    assert bench.b2_world.log_slope([2.0] * 24) == 0.0
    assert abs(bench.b2_world.log_slope([i + 1.0 for i in range(600)]) - 1.0) < 0.05


def test_the_cache_holds_exactly_the_bytes_of_its_formula(bench: ModuleType) -> None:
    full, window, sink = bench.b12_memory.run(CPU)
    one = 2 * 4 * 64 * 64 * 4  # keys and values, heads, width, tokens of a block, bytes
    assert full.ours == 4 * 16 * one and window.ours == sink.ours == 4 * 9 * one
    assert all(row.passed for row in (full, window, sink))
    assert window.theirs > 7 * window.ours


def test_growth_is_compared_with_the_closed_form(bench: ModuleType) -> None:
    rows = bench.scaling.run(CPU, repeats=1, counts=(1, 2))
    assert [row.notes["side"] for row in rows] == ["cached", "recomputed"]
    weights = 4 * (4 * 256**2 + 3 * 256 * 768)
    doubled = bench.scaling.cost(2, weights, is_cached=True)
    assert (
        doubled / bench.scaling.cost(1, weights, is_cached=True)
        == 2 ** rows[0].notes["predicted_slope"]
    )


def test_autoregressive_decode_has_two_peers(bench: ModuleType) -> None:
    rows = bench.b4_autoregressive.run(CPU, **TINY, height=2, width=3)
    plain = ["B4-recompute", "B4-step", "B4-transformers"]
    assert [row.name for row in rows] == [*plain, *(f"{name}-unguided" for name in plain)]
    assert [row.shape["batch"] for row in rows] == [2, 2, 2, 1, 1, 1]
    assert [row.pass_line for row in rows] == [8.0, 8.0, 1.2, None, None, None]


def test_masked_decode_is_repeatable(bench: ModuleType) -> None:
    (row,) = bench.b5_masked.run(CPU, **TINY, height=2, width=3, steps=2)
    assert row.shape["steps"] == 2 and row.pass_line == 8.0


def test_cache_growth_states_slope_and_closed_form(bench: ModuleType) -> None:
    rows = bench.p4_cache.run(CPU, **TINY, tokens=4, blocks=(2, 4), steps=2)
    assert rows[0].notes == {
        "closed_form_linear": pytest.approx(1.0),
        "closed_form_attention": pytest.approx(10 / 9),
    }
    assert rows[1].pass_line == pytest.approx(0.75 * 2 * 5 / 6)
    assert 1.0 < rows[1].notes["slope_predicted"] < 2.0


def test_closed_form_of_the_video_chunk(bench: ModuleType) -> None:
    assert bench.p4_cache.closed_form(7, 4) == pytest.approx((3.2, 4.0))


def test_slices_agree_with_the_mask_forward_and_backward(bench: ModuleType) -> None:
    rows = bench.p5_slices.run(
        CPU, heads=2, head_dim=8, shapes=((24, 4),), training=(16, 4), repeats=1
    )
    assert rows[0].notes["ideal_ratio"] == pytest.approx(12 / 7)
    assert rows[1].name == "B3" and rows[1].notes["density"] == pytest.approx(20 / 64)


def test_streamed_motion_agrees_with_the_loop_that_remembers_nothing(bench: ModuleType) -> None:
    tiny = {"dim": 32, "layers": 1, "heads": 2, "width": 8, "seconds": 1.2, "long_seconds": 2.4}
    names = ("motion/t2m_gpt", "motion/block_flow")
    rows = bench.motion_stream.run(CPU, **tiny, repeats=1, recipes=names)
    endings = ["", "-first", "", "-first", "-flat"]
    assert [row.name.removeprefix("M-").lstrip("abcdefghijklmnopqrstuvwxyz0123456789_") for row in
            rows] == endings  # fmt: skip
    assert [row.pass_line for row in rows] == [5.0, None, None, None, None]
    assert all(row.notes["largest_difference_m"] < 1e-2 for row in (rows[0], rows[2]))
    assert rows[1].notes["value"] > 0 and rows[-1].notes["chunks"] == 12


@pytest.mark.parametrize("in_order", [True, False])
def test_seams_are_held_against_real_motion(bench: ModuleType, in_order: bool) -> None:
    motion_seams = importlib.import_module("motion_seams")
    generator = torch.Generator().manual_seed(0)
    motions = procedural_motions(2, generator, frames=50) + procedural_motions(
        1, generator, frames=30
    )
    pipe = tiny_motion_pipe(in_order=in_order)
    pipe.set_progress_bar_config(disable=True)
    told = motion_seams.measured(pipe, motions, ["walk", "jump", "too short"])
    assert told["redraws"] is not in_order and told["motions"] == 2
    assert told["seams"] == (2 if in_order else 4) == len(told["largest"])
    assert told["largest"][0]["jump"] == pytest.approx(
        told["largest_over_usual"] * told["usual_jump_m_s"]
    )
    assert {seam["frame"] for seam in told["largest"]} == ({24} if in_order else {16, 32})
    share = sum(seam["jump"] <= 1.5 * told["usual_jump_m_s"] for seam in told["largest"])
    assert told["within_line"] == share / told["seams"]


def test_a_wrong_answer_is_not_timed(bench: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="disagree on 1 of 3"):
        bench.common.require_equal(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3]), "x")


def test_the_script_writes_a_report(bench: ModuleType, tmp_path: Path) -> None:
    bench.BENCHES["tiny"] = lambda device, repeats: bench.p5_slices.run(
        device, heads=1, head_dim=8, shapes=((8, 4),), training=None, repeats=repeats
    )
    threads = torch.get_num_threads()
    bench.main(["--only", "tiny", "--repeats", "2", "--out", str(tmp_path / "report.json")])
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"][0]["repeats"] == 2 and report["rows"][0]["threads"] == 1
    assert "torch" in report["versions"]
