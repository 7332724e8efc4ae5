"""The reaching arm: its mechanics, its expert, and what is recorded of it."""

import numpy as np
import pytest

from blockloom.training.clip_stage import dataset_unknown, leading_actions
from blockloom.training.reaching import (
    CHUNK,
    CHUNK_NOISE,
    NUM_OBSERVED,
    NUM_STEPS,
    TOLERANCE,
    Arms,
    ExpertMover,
    LinearMover,
    RandomMover,
    chunked_clips,
    joints_of,
    mass_matrix,
    own_forces,
    reach,
    reaching_clips,
    record,
    seeds_of,
    tip_of,
)


def test_the_tip_is_where_the_rods_end_and_joints_bring_it_there():
    straight, bent = np.array([0.0, 0.0]), np.array([0.0, np.pi / 2])
    assert tip_of(straight) == pytest.approx([1.0, 0.0])
    assert tip_of(bent) == pytest.approx([0.5, 0.5])
    angles = np.stack(np.meshgrid([-1.0, 0.2, 1.1], [0.3, 1.0, 2.4]), -1)
    assert np.allclose(joints_of(tip_of(angles)), angles, atol=1e-9)


def test_the_mass_matrix_is_that_of_two_rods():
    # Straight: the shoulder turns one rod of 1 m and 2 kg, m l^2 / 3.
    assert mass_matrix(np.zeros(1))[0, 0, 0] == pytest.approx(2 / 3)
    assert mass_matrix(np.zeros(1))[0, 1, 1] == pytest.approx(0.25 / 3)  # the forearm alone
    matrix = mass_matrix(np.linspace(-3, 3, 7))
    assert np.allclose(matrix, matrix.transpose(0, 2, 1))
    assert (np.linalg.eigvalsh(matrix) > 0).all()


def test_motors_add_energy_and_friction_takes_it():
    arms = Arms(range(8))
    arms.push(np.full((8, 2), 2.0))
    before, forces = arms.energies(), own_forces(arms._angles[:, 1], arms._speeds)
    assert (before > 0).all() and np.abs(forces).max() > 0
    for _ in range(20):
        arms.step(np.zeros((8, 2)))
    assert (arms.energies() < before).all()
    resting = Arms(range(8))
    seen = resting.observe()
    resting.step(np.zeros((8, 2)))
    assert np.array_equal(resting.observe(), seen)  # nothing moves by itself
    resting.step(np.tile([1.0, 0.0], (8, 1)))
    assert (resting.energies() > 0).all()


def test_inertia_without_friction_keeps_energy_while_shrinking_steps(monkeypatch):
    from blockloom.training import reaching

    monkeypatch.setattr(reaching, "DAMPING", 0.0)
    drift = []
    for substeps in (5, 50):
        monkeypatch.setattr(reaching, "SUBSTEPS", substeps)
        arms = Arms(range(4))
        arms.push(np.full((4, 2), 1.5))
        before = arms.energies()
        for _ in range(10):
            arms.step(np.zeros((4, 2)))
        drift.append(float(np.abs(arms.energies() / before - 1).max()))
    assert drift[1] < 0.2 * drift[0] and drift[1] < 0.02


def test_the_expert_reaches_every_target_and_nobody_else_does():
    seeds = range(64)
    expert = reach(seeds, ExpertMover())
    assert expert.max() < TOLERANCE
    assert (reach(seeds, RandomMover(0)) < TOLERANCE).mean() < 0.1
    assert (reach(seeds, RandomMover(0, 0.0)) < TOLERANCE).mean() < 0.1
    linear = LinearMover(record(range(100, 400)))
    share = (reach(seeds, linear) < TOLERANCE).mean()
    assert share < 0.5 < (reach(seeds, linear) < 0.3).mean()  # it goes there, and not quite
    episodes = record(seeds)
    assert linear.loss(episodes).mean() < 0.5 * np.log(2 * np.pi) * 2


def test_a_seed_gives_the_same_episode_whatever_else_is_recorded():
    together, alone = record([3, 4, 5]), record([4])
    assert np.allclose(together.observed[1], alone.observed[0], atol=1e-6)
    assert np.allclose(together.torques[1], alone.torques[0], atol=1e-6)
    assert together.instructions[1] == alone.instructions[0]
    assert not np.allclose(together.observed[0], together.observed[1], atol=0.1)
    assert {*record(range(30)).instructions} == {"reach the red target", "reach the blue target"}


def test_clips_hold_observations_and_torques_some_of_which_nobody_recorded():
    clips = reaching_clips(8, 3, seed=1)
    assert clips.frames.shape == (11 * (NUM_STEPS + 1), NUM_OBSERVED) and clips.fps == 20
    assert clips.split == ["train"] * 8 + ["held_out"] * 3
    lost = dataset_unknown(clips).numpy().reshape(11, -1)
    assert lost[:2].all() and not lost[2:, :-1].any() and lost[:, -1].all()
    train, ends = seeds_of(8, 3, 1)
    episodes = record([*train, *ends])
    assert clips.captions == episodes.instructions and not set(train) & set(ends)
    assert np.array_equal(clips.clip(5), episodes.observed[5])
    assert np.array_equal(clips.clip_actions(5)[:-1], episodes.torques[5])


class Chunks:
    """Stands in for a tokenizer whose latent frames hold a chunk each."""

    temporal_stride = step_frames = first_frames = CHUNK


def test_chunks_are_told_what_is_observed_before_they_begin():
    clips = chunked_clips(4, 2, seed=1)
    episodes = record([s for part in seeds_of(4, 2, 1) for s in part], CHUNK_NOISE)
    assert clips.frames.shape == (6 * (NUM_STEPS + CHUNK), 2)
    assert (clips.clip(0)[:CHUNK] == 0).all()
    assert np.array_equal(clips.clip(0)[CHUNK:], episodes.torques[0])
    told = leading_actions(clips, NUM_OBSERVED, Chunks()).reshape(6, -1, NUM_OBSERVED).numpy()
    assert told.shape[1] == NUM_STEPS // CHUNK + 1 and (told[:, 0] == 0).all()
    assert np.array_equal(told[:, 1:], episodes.observed[:, :-1:CHUNK])
