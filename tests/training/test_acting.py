"""Training on frames and actions in one stream, and what an episode that is acted is worth."""

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError, ModelError, UsageError
from blockloom.core.layout import Copy, Role
from blockloom.core.plan import build_plan
from blockloom.core.recipe import load_recipe
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.acting import ModelPlayer, Played, RandomPlayer, play, rate, wilson
from blockloom.training.acting_learning import acting_learning_check, begin_room, place_loss
from blockloom.training.clip_stage import ClipTokens, with_actions
from blockloom.training.clips import ClipDataset
from blockloom.training.gridworld import MAX_STEPS, SIDE, GridWorld, grid_episodes
from blockloom.training.objective import ModelStage
from blockloom.training.objective_rows import predicted_part
from blockloom.training.run import initial_model

NAME = "video/par"


def test_wilson_intervals_are_those_of_the_tables():
    # Newcombe, Stat. Med. 17 (1998) 857, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


# -- data -------------------------------------------------------------------------------------


def two_clips(actions):
    """A clip of three frames and one of five."""
    frames = np.zeros((8, 4, 4, 3), np.uint8)
    offsets = np.array([0, 3, 8])
    return ClipDataset(frames, offsets, ["", ""], ["train"] * 2, actions=actions)


def test_actions_stand_behind_the_tokens_of_their_frame():
    clips = two_clips(np.array([1, 0, -1, 3, 2, 1, 0, -1]))
    acting = load_recipe(NAME).acting
    rows = with_actions(torch.arange(32).view(8, 2, 2) + 10, clips, acting)
    assert rows.shape == (8, 3, 2)
    assert rows[:, 2].tolist() == [
        [1, 0],
        [0, 0],
        [-1, -1],
        [3, 0],
        [2, 0],
        [1, 0],
        [0, 0],
        [-1] * 2,
    ]
    assert torch.equal(rows[:, :2], torch.arange(32).view(8, 2, 2) + 10)
    with pytest.raises(DataError, match="have no actions"):
        with_actions(torch.zeros(8, 2, 2), two_clips(None), acting)
    with pytest.raises(DataError, match=r"are 5 codes; set acting\.codes to 5"):
        with_actions(
            torch.zeros(8, 2, 2).long(), two_clips(np.array([4, 0, -1] + [0] * 4 + [-1])), acting
        )
    with pytest.raises(DataError, match="temporal stride must be 1"):
        with_actions(torch.zeros(4, 2, 2), clips, acting)


def test_numbers_are_kept_as_they_are_and_unknown_ones_are_none():
    numbers = ("acting.codes=0", "acting.numbers=2", "acting.head.kind=gmm", "head.kind=gmm")
    acting = load_recipe(NAME, list(numbers)).acting
    done = np.arange(16, dtype=np.float32).reshape(8, 2)
    rows = with_actions(torch.zeros(8, 2, 3), two_clips(done), acting)
    assert rows[0, 2].tolist() == [0.0, 1.0, 0.0] and rows[4, 2].tolist() == [8.0, 9.0, 0.0]
    assert rows[:, 2].isnan().all(-1).nonzero()[:, 0].tolist() == [2, 7]
    done[4] = np.nan  # not recorded
    rows = with_actions(torch.zeros(8, 2, 3), two_clips(done), acting)
    assert rows[:, 2].isnan().all(-1).nonzero()[:, 0].tolist() == [2, 4, 7]
    done[5, 0] = np.nan
    with pytest.raises(DataError, match=r"the action of frame 5 is \[nan, 11\.0\]; needed finite"):
        two_clips(done)


def test_windows_go_on_behind_the_end_of_a_clip_where_nothing_is_known():
    frames = torch.arange(8).view(8, 1, 1)
    tokens = ClipTokens(frames, torch.tensor([0, 3, 8]), 4, stride=2, pad=True)
    got = tokens[torch.arange(len(tokens))][..., 0]
    assert got.tolist() == [[0, 1, 2, -1], [3, 4, 5, 6], [5, 6, 7, -1]]
    plain = ClipTokens(frames, torch.tensor([0, 3, 8]), 4, stride=2)
    assert plain[torch.arange(len(plain))][..., 0].tolist() == [[3, 4, 5, 6]]


# -- losses -----------------------------------------------------------------------------------


def stage(tiny, *overrides, items=6, seed=0):
    model = tiny.model(NAME, *overrides)
    frames, cells = model.recipe.layout.frames, 16
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(7, (items, frames, cells + 1, 1), generator=rng)
    values[:, :, -1] %= 4
    prompts = model.text_encoder.tokenize(["go"] * items)
    return ModelStage(model, values.flatten(1, 2), prompts, ["go"] * items)


def loss_of(stage, seed=1):
    indices = torch.arange(stage.num_items)
    total, means = stage.loss(indices, torch.Generator().manual_seed(seed), 0)
    return total.detach(), means


def test_the_loss_is_the_weighted_sum_of_both_heads(tiny):
    total, both = loss_of(stage(tiny))
    assert float(total) == pytest.approx(both["frame_loss"] + both["action_loss"])
    # At random weights both heads are near a guess among their own codes.
    assert both["frame_loss"] == pytest.approx(np.log(7), abs=0.4)
    assert both["action_loss"] == pytest.approx(np.log(4), abs=0.4)
    heavy, same = loss_of(stage(tiny, "acting.weight=3", "acting.frame_weight=0.5"))
    assert same == both
    assert float(heavy) == pytest.approx(0.5 * both["frame_loss"] + 3 * both["action_loss"])


def test_rows_of_which_nothing_is_known_carry_no_loss(tiny):
    whole, holes = stage(tiny, "corruption.share=1"), stage(tiny, "corruption.share=1")
    holes.values = holes.values.clone()
    holes.values[:, 34:] = -1  # frame 2 and its action
    holes.values[:, 33] = -1  # what was done in frame 1
    plan, layout, _ = holes.plan(torch.Generator())
    batch = holes.corrupt(holes.values, plan, layout, torch.Generator().manual_seed(1))
    counted = layout.source[batch.loss_rows][(batch.weight > 0).any(0)]
    assert counted.max() == 32 and 16 in counted.tolist()
    # Known rows compute what they did: nothing before the holes looks at them.
    other = whole.corrupt(whole.values, plan, layout, torch.Generator().manual_seed(1))
    never = torch.zeros(6, dtype=torch.bool)
    with torch.no_grad():
        lowered = whole.plan(torch.Generator())[2]
        states = [
            s.hidden_states(torch.arange(6), never, b, layout, lowered)
            for s, b in ((whole, other), (holes, batch))
        ]
    known = layout.source[batch.loss_rows] < 33
    assert torch.equal(states[0][:, known], states[1][:, known])
    assert int(batch.values.min()) >= 0


def test_without_a_frame_loss_only_actions_are_predicted(tiny):
    twin = stage(tiny, "acting.frame_weight=0")
    _, layout, _ = twin.plan(torch.Generator())
    noisy = layout.take((layout.copy == Copy.NOISY).nonzero()[:, 0])
    assert noisy.source.tolist() == [16, 33, 50]
    total, parts = loss_of(twin)
    assert parts["frame_loss"] == 0.0 and float(total) == pytest.approx(parts["action_loss"])
    assert loss_of(stage(tiny))[1]["action_loss"] == pytest.approx(parts["action_loss"], abs=1e-5)


def test_a_share_of_frames_is_predicted_and_computes_what_all_would():
    recipe = load_recipe(NAME, ["corruption.share=0.25"])
    layout = build_plan(recipe, 2, 2, frames=8).training_layout()
    part = predicted_part(layout, 0.25, torch.Generator().manual_seed(0))
    noisy = part.take((part.copy == Copy.NOISY).nonzero()[:, 0])
    acts = (noisy.role & int(Role.ACTION)) != 0
    assert noisy.block[acts].tolist() == list(range(1, 16, 2))
    assert len(noisy.block[~acts].unique()) == 2 and int((~acts).sum()) == 8
    assert int((part.copy == Copy.CLEAN).sum()) == int((layout.copy == Copy.CLEAN).sum())
    table = build_plan(recipe, 2, 2, frames=8).table
    row = int((part.copy == Copy.NOISY).nonzero()[-1, 0])
    everything = torch.isin(layout.order, part.order[row]) & (layout.copy == Copy.NOISY)
    before = table.visible(layout, layout)[everything.nonzero()[0, 0]]
    assert int(table.visible(part, part)[row].sum()) == int(before.sum())
    for change in ("layout.copies=1", "corruption.weight=segment"):
        with pytest.raises(ModelError, match=r"corruption\.share = 0\.25 needs"):
            load_recipe(NAME, ["corruption.share=0.25", change])


# -- episodes ---------------------------------------------------------------------------------


class Expert:
    """Knows the rooms it plays in."""

    def __init__(self):
        self.rooms, self.kept = [], []

    def begin(self, instructions, numbers):
        self.rooms = [begin_room(number)[0] for number in numbers]
        for room, number in zip(self.rooms, numbers, strict=True):
            room.reset(number)

    def act(self, frames):
        actions = [room.expert() for room in self.rooms]
        for room, action in zip(self.rooms, actions, strict=True):
            room.step(action)
        return actions

    def keep(self, places):
        self.kept.append(len(places))
        self.rooms = [self.rooms[place] for place in places]


def test_the_expert_of_the_grid_world_follows_every_instruction():
    expert = Expert()
    ended = play(range(100), begin_room, expert)
    assert ended.success.all() and 1 <= ended.steps.min() and ended.steps.max() <= 4
    report = rate(ended)
    assert (report["successes"], report["success_rate"]) == (100, 1.0)
    assert report["mean_steps_when_successful"] == pytest.approx(ended.steps.mean(), abs=0.005)
    assert expert.kept[0] < 64 and expert.kept[1] < expert.kept[0]  # who is done leaves
    lazy = play(range(100), begin_room, RandomPlayer([1, 0, 0, 0], 0))
    assert 0 < lazy.success.mean() < 0.4
    assert (lazy.steps[~lazy.success] == MAX_STEPS).all()
    assert rate(Played(np.zeros(4, bool), np.ones(4, int)))["mean_steps_when_successful"] is None


def test_random_players_depend_on_seed_and_episode_only():
    chances = [1.0, 2.0, 3.0, 4.0]
    both = play(range(20), begin_room, RandomPlayer(chances, 3))
    half = play(range(10, 20), begin_room, RandomPlayer(chances, 3))
    assert np.array_equal(both.steps[10:], half.steps)
    other = play(range(20), begin_room, RandomPlayer(chances, 4))
    assert not np.array_equal(both.steps, other.steps)


def test_grid_episodes_are_seeded_and_hold_goals_out():
    clips, seeds = grid_episodes(30, 10, seed=2)
    again, _ = grid_episodes(30, 10, seed=2)
    assert np.array_equal(clips.frames, again.frames) and clips.captions == again.captions
    assert clips.split.count("train") == 30 and clips.split.count("held_out") == 10
    for number, split, clip in zip(seeds, clips.split, range(40), strict=True):
        room = GridWorld()
        assert np.array_equal(room.reset(number), clips.clip(clip)[0])
        assert room.is_held_out == (split == "held_out")
        assert clips.captions[clip] == room.instruction
    assert place_loss(clips) > 0.5


def test_a_model_plays_and_its_imagined_frames_are_counted():
    sizes = ["backbone.dim=32", "backbone.layers=1", "text.dim=16", "text.buckets=32"]
    recipe = load_recipe(NAME, sizes)
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    model = initial_model(recipe, tokenizer, 0).eval()
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=rng)

    def imagining():
        return ModelPlayer(model, tokenizer, 0, imagines=True)

    player = imagining()
    ended = play(range(5), begin_room, player)
    alone = [int(play([number], begin_room, imagining()).steps[0]) for number in range(5)]
    assert ended.steps.tolist() == alone
    frames = int((ended.steps - 1).sum())
    assert player.imagined[1, 0] == frames and player.imagined[0, 0] == frames * SIDE**2
    assert (player.imagined[:, 1:] <= player.imagined[:, :1]).all()
    plain = play(range(5), begin_room, ModelPlayer(model, tokenizer, 0, temperature=0.0))
    assert plain.steps.min() >= 1


@pytest.mark.slow
def test_a_short_run_already_knows_more_than_the_place():
    report = acting_learning_check(load_recipe(NAME), 150, held_out=32)
    assert report.value < 0.8 * report.baseline


def test_the_check_refuses_recipes_that_do_not_act():
    with pytest.raises(UsageError, match=r"acting\.codes = 0; the grid world takes 4"):
        acting_learning_check(load_recipe("video/teacher_forcing"))
