import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from blockloom.core.errors import UsageError
from blockloom.core.sampling import item_generator, per_item_randn, sample_codes
from blockloom.core.schedulers import base
from blockloom.core.schedulers.build import UNMASK_PRESETS, build_scheduler
from blockloom.core.schedulers.early_exit import EarlyExit
from blockloom.core.schedulers.flow import FlowEuler, Renoise
from blockloom.core.schedulers.multistep import Multistep
from blockloom.core.schedulers.unmask import UnmaskScheduler

VOCAB, HEIGHT, WIDTH = 11, 4, 6


def streams(*keys):
    return [item_generator(3, key) for key in keys]


def decode(scheduler, is_masked, logits, keys):
    """Run a block with fixed logits; returns codes and the reveal row of every slot."""
    generators = streams(*keys)
    rank = scheduler.make_rank(HEIGHT, WIDTH, generators)
    codes = torch.full(is_masked.shape, -1)
    revealed = torch.full(is_masked.shape, -1)
    for row in scheduler.rows(int(is_masked.sum(dim=-1).max())):
        drawn, stats = sample_codes(logits, generators, row.temperature)
        accepted = scheduler.select(row, is_masked, stats, rank, generators)
        assert not (accepted & ~is_masked).any()
        assert torch.equal(accepted.any(dim=-1), is_masked.any(dim=-1))
        codes = torch.where(accepted, drawn, codes)
        revealed[accepted] = row.index
        is_masked = is_masked & ~accepted
    assert not is_masked.any()
    return codes, revealed


@pytest.mark.parametrize("preset", list(UNMASK_PRESETS))
def test_every_preset_reveals_all_and_items_do_not_depend_on_the_batch(preset):
    scheduler = build_scheduler({"preset": preset})
    logits = 3 * torch.randn(3, HEIGHT * WIDTH, VOCAB, generator=torch.Generator().manual_seed(0))
    masked = torch.ones(3, HEIGHT * WIDTH, dtype=torch.bool)
    codes, revealed = decode(scheduler, masked, logits, "abc")
    assert (codes >= 0).all() and (revealed >= 0).all()
    for i, key in enumerate("abc"):
        alone, alone_rows = decode(scheduler, masked[:1], logits[i : i + 1], key)
        assert torch.equal(alone[0], codes[i])
        assert torch.equal(alone_rows[0], revealed[i])


@pytest.mark.parametrize("preset", ["maskgit", "mar", "halton", "llada", "next_token", "ascending"])
def test_counted_presets_reveal_exactly_their_plan(preset):
    scheduler = build_scheduler({"preset": preset})
    masked = torch.ones(2, 24, dtype=torch.bool)
    _, revealed = decode(scheduler, masked, torch.zeros(2, 24, VOCAB), "ab")
    counts = [row.count for row in scheduler.rows(24)]
    for item in revealed:
        assert torch.bincount(item, minlength=len(counts)).tolist() == counts


def test_items_may_finish_at_different_rows_and_given_slots_are_never_chosen():
    scheduler = UnmaskScheduler(num_steps=24, count="even", accept="threshold", threshold=0.9)
    logits = torch.zeros(2, 24, VOCAB)
    logits[0, :, 3] = 20.0  # the first item is sure everywhere
    masked = torch.ones(2, 24, dtype=torch.bool)
    masked[1, :4] = False
    codes, revealed = decode(scheduler, masked, logits, "ab")
    assert (revealed[0] == 0).all()
    assert sorted(revealed[1, 4:].tolist()) == list(range(20))
    assert (codes[1, :4] == -1).all()


def test_raster_order_reveals_left_to_right_and_halton_its_first_cells():
    masked = torch.ones(1, 24, dtype=torch.bool)
    logits = torch.zeros(1, 24, VOCAB)
    _, revealed = decode(build_scheduler({"preset": "next_token"}), masked, logits, "a")
    assert revealed[0].tolist() == list(range(24))
    halton = build_scheduler({"preset": "halton", "num_steps": 24})
    rank = halton.make_rank(HEIGHT, WIDTH, streams("a"))
    _, revealed = decode(halton, masked, logits, "a")
    assert torch.equal(revealed[0].float(), rank[0])
    assert build_scheduler({"preset": "maskgit"}).make_rank(4, 6, streams(0)) is None


def test_rows_carry_levels_temperatures_and_guidance():
    rows = UnmaskScheduler(num_steps=8, choice_temperature=4.5).rows(256)
    assert [row.count for row in rows] == [5, 15, 24, 31, 39, 45, 48, 49]
    assert rows[0].level == 1.0 and rows[-1].level_next == 0.0
    assert rows[3].level == pytest.approx(1 - 44 / 256) == rows[2].level_next
    assert [row.choice_temperature for row in rows] == pytest.approx(
        [4.5 * (1 - (i + 1) / 8) for i in range(8)]
    )
    maskgil = build_scheduler({"preset": "maskgil"}).rows(256)
    assert [row.count for row in maskgil] == [1, 18, 26, 32, 38, 43, 48, 50]
    assert maskgil[0].choice_temperature == 4.5 and maskgil[-1].choice_temperature == 0.0
    # Theirs is (1 + w_i) c - w_i u with w_i = 3 i / (N - 1)
    assert [row.guidance_scale for row in maskgil] == pytest.approx(
        [1 + 3 * i / 7 for i in range(8)]
    )
    mar = build_scheduler({"preset": "mar", "guidance_scale": 2.9}).rows(256)
    left = [math.floor(256 * math.cos(math.pi / 2 * (i + 1) / 64)) for i in range(63)] + [0]
    assert mar[40].guidance_scale == pytest.approx(1 + 1.9 * (256 - left[40]) / 256)
    warming = UnmaskScheduler(num_steps=5, temperature=1.0, temperature_end=1.2).rows(10)
    assert [round(row.temperature, 3) for row in warming] == [1.0, 1.05, 1.1, 1.15, 1.2]
    assert UnmaskScheduler().rows(0) == []
    assert UnmaskScheduler(accept="threshold").rows(8)[0].count is None
    rar = UnmaskScheduler(guidance_scale=16.0, guidance_ramp="cosine_power").rows(8)
    assert rar[0].guidance_scale == 1.0
    assert dataclasses.is_dataclass(rar[0]) and rar[-1].is_last and not rar[0].is_last


def test_ancestral_counts_are_random_per_item_with_the_right_mean():
    scheduler = UnmaskScheduler(num_steps=4, count="binomial", order="random")
    masked = torch.ones(300, 24, dtype=torch.bool)
    rank = scheduler.make_rank(4, 6, streams(*range(300)))
    row = scheduler.rows(24)[1]
    assert row.count is None and (row.level, row.level_next) == (0.75, 0.5)
    counts = scheduler.select(row, masked, None, rank, streams(*range(300))).sum(dim=-1).float()
    assert counts.mean().item() == pytest.approx(8, abs=0.5)  # 24 * (1 - .5 / .75)
    assert counts.std().item() == pytest.approx(math.sqrt(24 / 3 * 2 / 3), abs=0.4)


def test_first_k_restricts_the_candidates():
    scheduler = UnmaskScheduler(num_steps=8, count="one", first_k=2)
    masked = torch.tensor([[False, True, True, True, True]])
    logits = torch.zeros(1, 5, VOCAB)
    logits[0, 4, 0] = 30.0  # surest, but outside the first two masks
    _, stats = sample_codes(logits, streams("a"), 0.0)
    accepted = scheduler.select(scheduler.rows(4)[0], masked, stats, None, streams("a"))
    assert accepted.tolist() == [[False, True, False, False, False]]


def test_diffusers_style_step_fills_the_canvas_and_names_its_fields():
    scheduler = UnmaskScheduler(mask_token_id=VOCAB - 1, choice_temperature=1.0)
    scheduler.set_timesteps(4, length=24)
    assert scheduler.timesteps.tolist() == [0, 1, 2, 3]
    sample = torch.full((2, 24), VOCAB - 1)
    logits = torch.zeros(2, 24, VOCAB)
    logits[..., VOCAB - 1] = 30.0  # a model that would love to predict the mask itself
    generators = streams("a", "b")
    for time in scheduler.timesteps:
        output = scheduler.step(logits, time, sample, generators)
        assert not output.edited_mask.any()
        assert torch.equal(output.committed_mask, (output.prev_sample != sample))
        assert (output.pred_original_sample < VOCAB - 1).all()
        assert torch.allclose(output.sampled_probs, torch.tensor(1 / (VOCAB - 1)))
        sample = output.prev_sample
    assert (sample < VOCAB - 1).all()
    assert list(output.keys()) == [
        "prev_sample",
        "pred_original_sample",
        "sampled_probs",
        "pred_logits",
        "committed_mask",
        "edited_mask",
    ]
    single = torch.full((1, 24), VOCAB - 1)
    as_tuple = scheduler.step(logits[:1], 0, single, streams("a")[0], return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 6


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: UnmaskScheduler(order="confidance"), "confidance.*confidence"),
        (lambda: UnmaskScheduler(accept="topn"), "topn.*top_n"),
        (lambda: UnmaskScheduler(num_steps=0), "num_steps.*0.*1"),
        (lambda: UnmaskScheduler.from_config({"stepz": 3, "num_steps": 2}), "stepz"),
        (lambda: UnmaskScheduler.from_config({}, num_step=2), "num_step'.*num_steps"),
        (lambda: FlowEuler.from_config({"shfit": 2.0}), "shfit.*shift"),
        (lambda: build_scheduler({"preset": "maskgitt"}), "maskgitt.*maskgit"),
        (lambda: build_scheduler({"kind": "flow"}), "flow.*flow_euler"),
        (lambda: FlowEuler(prediction_type="eps"), "eps.*velocity.*Multistep"),
        (lambda: FlowEuler(shift=0.0), r"shift.*0\.0"),
        (lambda: Multistep(solver="ddim"), "ddim"),
        (lambda: Multistep(num_steps=2000).rows(), "2000.*1000"),
        (lambda: FlowEuler().rows(0), "num_steps.*0"),
    ],
)
def test_bad_settings_are_named_with_the_nearest_legal_value(call, match):
    with pytest.raises(UsageError, match=match):
        call()


def test_missing_inputs_are_named():
    masked = torch.ones(1, 4, dtype=torch.bool)
    scheduler = UnmaskScheduler()
    with pytest.raises(UsageError, match=r"stats.*confidence"):
        scheduler.select(scheduler.rows(4)[0], masked, None, None, streams(0))
    scheduler = UnmaskScheduler(order="halton")
    with pytest.raises(UsageError, match=r"rank.*halton"):
        scheduler.select(scheduler.rows(4)[0], masked, None, None, streams(0))
    with pytest.raises(UsageError, match="set_timesteps"):
        UnmaskScheduler().step(torch.zeros(1, 4, 3), 0, torch.zeros(1, 4).long(), streams(0))
    prepared = UnmaskScheduler()
    prepared.set_timesteps(2, length=4)
    with pytest.raises(UsageError, match="generator"):
        prepared.step(torch.zeros(1, 4, 3), 0, torch.zeros(1, 4).long())
    with pytest.raises(UsageError, match=r"timestep.*5"):
        prepared.step(torch.zeros(1, 4, 3), 5, torch.zeros(1, 4).long(), streams(0))


def test_presets_can_be_swapped_through_from_config():
    start = build_scheduler({"preset": "maskgit", "num_steps": 12, "guidance_scale": 3.0})
    for preset, settings in UNMASK_PRESETS.items():
        swapped = UnmaskScheduler.from_config(start.config, **settings)
        assert swapped.config.guidance_scale == settings.get("guidance_scale", 3.0), preset
        for key, value in settings.items():
            assert swapped.config[key] == value


@pytest.mark.parametrize("source", [FlowEuler, Renoise, Multistep])
@pytest.mark.parametrize("target", [FlowEuler, Renoise, Multistep])
def test_level_schedulers_can_be_swapped_through_from_config(source, target):
    other = target.from_config(source(shift=3.0, guidance_scale=2.0).config)
    assert type(other) is target
    assert (other.config.shift, other.config.guidance_scale) == (3.0, 2.0)
    assert other.config.num_steps == target().config.num_steps  # not set, so the new default
    assert target.from_config(source(num_steps=7).config).config.num_steps == 7


@pytest.mark.parametrize(
    "scheduler",
    [UnmaskScheduler(order="halton", count=[2, 3]), Renoise(shift=2.0), Multistep(solver="unipc")],
)
def test_save_and_load(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    public = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert {k: v for k, v in loaded.config.items() if not k.startswith("_")} == public


def test_build_by_kind():
    unmask = build_scheduler({"num_steps": 5, "order": "halton", "top_k": 3})
    assert (unmask.config.num_steps, unmask.config.order, unmask.config.top_k) == (5, "halton", 3)
    flow = build_scheduler({"kind": "flow_euler", "shift": 2.0})
    assert type(flow) is FlowEuler and flow.config.shift == 2.0
    solver = build_scheduler({"kind": "multistep", "solver": "unipc", "prediction_type": "eps"})
    assert (solver.config.solver, solver.config.prediction_type) == ("unipc", "eps")
    assert build_scheduler({"preset": "halton", "num_steps": 7}).config.num_steps == 7


# --- continuous blocks -------------------------------------------------------------------------

MEAN, STD = 2.0, 0.5  # data ~ N(2, 0.5^2): the exact sampler maps noise z to 2 + 0.5 z


def flow_velocity(x, s):
    """E[noise - clean | x] for the Gaussian above on the straight path."""
    centred = x - (1 - s) * MEAN
    variance = (1 - s) ** 2 * STD**2 + s**2
    return centred * s / variance - (MEAN + (1 - s) * STD**2 / variance * centred)


def run(scheduler, sample, predict, keys, num_steps=None):
    generators = streams(*keys)
    scheduler.begin()
    for row in scheduler.rows(num_steps):
        sample = scheduler.step(predict(sample, row.level), row, sample, generators)
    return sample


@pytest.mark.parametrize("kind", [FlowEuler, Renoise, Multistep])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_fall_from_one_to_zero(kind, shift):
    rows = kind(shift=shift).rows(6)
    levels = [row.level for row in rows] + [rows[-1].level_next]
    assert levels[0] == 1.0 and levels[-1] == 0.0 and len(rows) == 6
    assert all(a > b for a, b in pairwise(levels))
    assert [row.level_next for row in rows[:-1]] == levels[1:-1]
    if kind is not Multistep:
        expected = [shift * s / (1 + (shift - 1) * s) for s in (1 - i / 6 for i in range(7))]
        assert levels == pytest.approx(expected)


def test_euler_is_exact_for_straight_lines_and_converges_otherwise():
    noise = per_item_randn((5, 3), streams("a", "b"))
    clean = torch.full_like(noise, 0.3)
    out = run(FlowEuler(), noise, lambda x, s: (x - clean) / s, "ab", num_steps=1)
    assert torch.allclose(out, clean, atol=1e-6)
    exact = MEAN + STD * noise
    errors = [
        (run(FlowEuler(), noise, flow_velocity, "ab", num_steps=n) - exact).abs().max().item()
        for n in (10, 20, 40)
    ]
    # First order: halving the step halves the error.
    assert 1.6 < errors[0] / errors[1] < 2.4 and 1.6 < errors[1] / errors[2] < 2.4


def test_clean_and_velocity_predictions_give_the_same_path():
    noise = per_item_randn((5, 3), streams("a"))
    as_clean = lambda x, s: x - s * flow_velocity(x, s)  # noqa: E731
    for kind in (FlowEuler, Renoise):
        one = run(kind(num_steps=4), noise, flow_velocity, "a")
        two = run(kind(num_steps=4, prediction_type="clean"), noise, as_clean, "a")
        assert torch.allclose(one, two, atol=1e-5)


def test_renoise_mixes_fresh_noise_and_ends_on_the_prediction():
    scheduler = Renoise(num_steps=2)
    sample = torch.zeros(2, 4, 3)
    row, last = scheduler.rows()
    velocity = torch.ones_like(sample)
    out = scheduler.step(velocity, row, sample, streams("a", "b"))
    fresh = per_item_randn((4, 3), streams("a", "b"))
    assert torch.allclose(out, 0.5 * -velocity + 0.5 * fresh)
    assert torch.equal(scheduler.step(velocity, last, sample, []), -0.5 * velocity)


def eps_oracle(scheduler):
    def predict(x, level):
        share = scheduler._signal_share[round(level * 1000)].double()
        variance = share * STD**2 + 1 - share
        return ((1 - share).sqrt() / variance * (x.double() - share.sqrt() * MEAN)).float()

    return predict


@pytest.mark.parametrize("solver", ["dpm", "unipc"])
def test_multistep_solves_the_gaussian_in_25_steps(solver):
    noise = per_item_randn((8, 3), streams("a"))
    flow = run(Multistep(solver=solver), noise, flow_velocity, "a")
    assert torch.allclose(flow, MEAN + STD * noise, atol=0.02)
    scheduler = Multistep(solver=solver, prediction_type="eps")
    share = scheduler._signal_share[1000]
    start_std = (share * STD**2 + 1 - share).sqrt()
    exact = MEAN + STD * (noise - share.sqrt() * MEAN) / start_std
    out = run(scheduler, noise, eps_oracle(scheduler), "a")
    assert torch.allclose(out, exact, atol=0.05)  # 0.030 measured; 0.0006 at 50 steps


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_multistep_equals_the_diffusers_scheduler_it_wraps():
    ours = Multistep(prediction_type="eps")
    theirs = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", prediction_type="epsilon"
    )
    theirs.set_timesteps(25)
    assert torch.allclose(ours._signal_share[1:], theirs.alphas_cumprod, rtol=1e-4)
    noise = per_item_randn((4, 3), streams("a"))
    predict, sample = eps_oracle(ours), noise
    for time in theirs.timesteps:
        eps = predict(sample, (int(time) + 1) / 1000)
        sample = theirs.step(eps, time, sample).prev_sample
    assert torch.equal(run(ours, noise, predict, "a"), sample)


@pytest.mark.parametrize(
    "scheduler",
    [FlowEuler(), Renoise(), Multistep(), Multistep(solver="unipc"), Multistep(solver_order=3)],
)
def test_a_block_is_bit_equal_alone_in_a_batch_and_on_a_used_scheduler(scheduler):
    noise = per_item_randn((9, 5), streams(*range(4)))
    together = run(scheduler, noise, flow_velocity, range(4))
    again = run(scheduler, noise, flow_velocity, range(4))
    assert torch.equal(together, again)
    for i in range(4):
        alone = run(scheduler, noise[i : i + 1], flow_velocity, [i])
        assert torch.equal(alone[0], together[i])


def test_multistep_rejects_rows_out_of_order():
    scheduler = Multistep(num_steps=3)
    rows, x = scheduler.rows(), torch.zeros(1, 2, 2)
    with pytest.raises(UsageError, match=r"got 1.*next is 0"):
        scheduler.step(x, rows[1], x, [])
    scheduler.step(x, rows[0], x, [])
    with pytest.raises(UsageError, match=r"got 2.*next is 1"):
        scheduler.step(x, rows[2], x, [])
    scheduler.step(x, rows[1], x, [])
    scheduler.begin()
    with pytest.raises(UsageError, match="got 2"):
        scheduler.step(x, rows[2], x, [])


def test_noise_and_targets_round_trip_through_predict_clean():
    clean, noise = per_item_randn((4, 3), streams("c")), per_item_randn((4, 3), streams("n"))
    for scheduler in (FlowEuler(), FlowEuler(prediction_type="clean"), Multistep()):
        row = scheduler.rows(4)[2]
        x = scheduler.add_noise(clean, noise, row.level)
        assert torch.allclose(x, (1 - row.level) * clean + row.level * noise)
        back = scheduler.predict_clean(scheduler.target(clean, noise), row, x)
        assert torch.allclose(back, clean, atol=1e-5)
    ddpm = Multistep(prediction_type="eps")
    row = ddpm.rows(4)[2]
    x = ddpm.add_noise(clean, noise, torch.tensor(row.level))
    assert torch.equal(ddpm.target(clean, noise), noise)
    assert torch.allclose(ddpm.predict_clean(noise, row, x), clean, atol=1e-4)
    assert torch.equal(ddpm.add_noise(clean, noise, 0.0), clean)


def test_conversions_invert_each_other():
    clean, noise = per_item_randn((4, 3), streams("c")), per_item_randn((4, 3), streams("n"))
    x, velocity = base.flow_noise(clean, noise, 0.4), noise - clean
    assert torch.allclose(base.velocity_from_clean(x, clean, 0.4), velocity, atol=1e-5)
    assert torch.allclose(base.velocity_from_noise(x, noise, 0.4), velocity, atol=1e-5)
    assert torch.allclose(base.clean_from_velocity(x, velocity, 0.4), clean, atol=1e-5)
    assert torch.allclose(base.noise_from_velocity(x, velocity, 0.4), noise, atol=1e-5)


def test_blocks_may_start_below_noise_where_the_update_allows():
    rows = FlowEuler(num_steps=4).rows(start=0.5)
    assert [row.level for row in rows] == [0.5, 0.375, 0.25, 0.125] and rows[-1].level_next == 0.0
    with pytest.raises(UsageError, match=r"start level of a multistep solver .*0\.5.*try 1"):
        Multistep(num_steps=4).rows(start=0.5)


def test_an_early_exit_ends_at_the_clean_prediction_of_its_row():
    whole = FlowEuler(num_steps=3)
    cut = EarlyExit(whole, 1).rows()
    assert [row.level for row in cut] == [1.0, pytest.approx(2 / 3)]
    assert cut[-1].level_next == 0.0 and cut[-1].is_last and not cut[0].is_last
    assert EarlyExit(whole, 2).rows() == EarlyExit(whole, 9).rows() == whole.rows()
    with pytest.raises(UsageError, match="exit_row"):
        EarlyExit(whole, -1)
