"""Model and requests: guidance branches, negative prompts, captions, saved folders."""

import pytest
import torch

from blockloom.core.layout import Layout
from blockloom.core.plan import build_plan
from blockloom.core.rollout import run
from blockloom.core.sampling import item_generator
from blockloom.models.generate import (
    Request,
    caption,
    caption_codes,
    picture_values,
    prompt_vectors,
    spell_back,
    start,
)
from blockloom.models.generator import (
    TEXT_CODES,
    GenerativeModel,
    allowed_codes,
    frame_actions,
)

SHARING = {"image/acdit", "image/block_masked"}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def draw(model, prompts=("a red cat",), seed=0, **settings):
    generators = [item_generator(seed, k) for k in range(len(prompts))]
    rollout = start(model, Request(list(prompts), generators, num_steps=2, **settings))
    values, known = run(rollout)
    assert bool(known.all())
    return picture_values(model, values), rollout


@pytest.mark.parametrize(
    "name", ["image/acdit", "image/block_masked", "image/causalfusion", "image/llamagen"]
)
def test_guidance_branches_share_a_cache_only_where_clean_rows_see_no_prompt(tiny, name):
    model = tiny.model(name)
    plan = build_plan(model.recipe, 4, 4)
    decoder = tiny.decoder(model, ["a", "b"], guided=True)
    assert decoder.shares_cache == (name in SHARING)
    assert decoder.new_cache(plan, 2).batch == (2 if name in SHARING else 4)


def test_guidance_scale_one_is_off_and_other_scales_change_the_picture(tiny):
    model = tiny.model("image/acdit", std=0.3)
    plain, rollout = draw(model, guidance_scale=1.0)
    assert rollout.decoder.branches == 1
    ignored, _ = draw(model, guidance_scale=1.0, negative_prompts=["blue dog"])
    assert torch.equal(plain, ignored)
    guided, rollout = draw(model, guidance_scale=3.0)
    assert rollout.decoder.branches == 2 and (plain - guided).abs().max() > 1e-3
    negative, _ = draw(model, guidance_scale=3.0, negative_prompts=["blue dog"])
    assert (negative - guided).abs().max() > 1e-3
    # Steering away from the prompt itself cancels: cond + (s - 1)(cond - cond).
    same, _ = draw(model, guidance_scale=3.0, negative_prompts=["a red cat"])
    assert (same - plain).abs().max() < 1e-4 * float(plain.abs().max())


def test_settings_of_a_request_reach_the_sampler(tiny):
    model = tiny.model("image/maskgit", std=0.3)
    greedy = [draw(model, seed=s, temperature=0.0)[0] for s in (0, 1)]
    # The codes are greedy; only the order is random, and top_k = 1 is the same thing.
    first = [draw(model, seed=s, temperature=0.0, top_k=1)[0] for s in (0, 1)]
    assert torch.equal(greedy[0], first[0]) and torch.equal(greedy[1], first[1])
    assert not torch.equal(draw(model, seed=0)[0], draw(model, seed=1)[0])


def test_a_saved_model_draws_the_same_bits(tiny, tmp_path):
    model = tiny.model("image/block_masked", std=0.3)
    model.save_pretrained(tmp_path)
    again = GenerativeModel.from_pretrained(tmp_path, local_files_only=True).eval()
    assert torch.equal(draw(model)[0], draw(again)[0])
    assert [f.suffix for f in sorted(tmp_path.iterdir())] == [".json", ".safetensors"]


def test_captions_are_spelled_and_read_back():
    codes = caption_codes(["Cat", "näh", "long caption"], 6, 10)
    assert codes[0].tolist() == [10 + ord(c) for c in "Cat"] + [10] * 3
    assert spell_back(codes, 10) == ["Cat", "n?h", "long c"]


def test_streams_only_draw_what_a_slot_may_hold(tiny):
    recipe = tiny.recipe("image/cm3")
    allowed = allowed_codes(recipe, 16, 7)
    assert allowed.shape == (5 + 16 + 3, 7 + TEXT_CODES + 3)
    assert allowed[:5].sum(1).tolist() == [TEXT_CODES] * 5
    assert bool(allowed[5:21, :7].all()) and not bool(allowed[5:21, 7:].any())
    assert allowed[21:].sum(1).tolist() == [1, 1, 1]
    model = tiny.model("image/cm3", std=0.3)
    cells, _ = draw(model, ("cat", "dog"))
    assert int(cells.max()) < tiny.codes and not torch.equal(cells[0], cells[1])


def test_captioning_moves_the_text_to_the_end_and_keeps_the_picture(tiny):
    model = tiny.model("image/cm3", std=0.3)
    cells = torch.randint(tiny.codes, (2, 16, 1), generator=torch.Generator().manual_seed(0))
    before = cells.clone()
    words = caption(model, cells, [item_generator(0, k) for k in range(2)])
    assert torch.equal(cells, before) and len(words) == 2 and all(len(w) <= 5 for w in words)
    for item in range(2):
        alone = caption(model, cells[item : item + 1], [item_generator(0, item)])
        assert alone == words[item : item + 1]
    other = caption(model, (cells + 1) % tiny.codes, [item_generator(0, k) for k in range(2)])
    assert other != words
    with pytest.raises(ValueError, match="has no caption tokens; try image/cm3"):
        caption(tiny.model("image/maskgit"), cells, [item_generator(0, 0)])


def test_infilling_moves_the_open_span_to_the_end_and_sees_what_follows(tiny):
    model = tiny.model("image/cm3", std=0.3)
    cells = torch.randint(tiny.codes, (1, 16, 1), generator=torch.Generator().manual_seed(0))
    known = torch.ones(1, 16, dtype=torch.bool)
    known[:, 4:8] = False
    drawn, rollout = draw(model, values=cells, is_known=known)
    assert torch.equal(drawn[known], cells[known])
    order = rollout.plan.content.source.tolist()
    assert order[-6:] == [22, 9, 10, 11, 12, 23]  # mark, the span, end of span
    changed = cells.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % tiny.codes
    states = []
    for values in (cells, changed):
        request = Request(["cat"], [item_generator(0, 0)], values=values, is_known=known)
        record = []
        rollout = start(model, request)
        rollout.record = lambda rows, hidden, record=record: record.append(hidden)
        run(rollout)
        states.append(record[-1])
    assert (states[0] - states[1]).abs().max() > 1e-3


def test_prompts_need_no_gradient_mode_of_the_caller(tiny):
    model = tiny.model("image/acdit")
    with torch.enable_grad():
        prompt = prompt_vectors(model, ["a red cat"])
        assert not prompt.pooled.requires_grad


def test_rows_are_told_the_action_of_the_frame_they_predict():
    actions = torch.tensor([[[1.0], [2.0], [3.0]]])
    rows = Layout.make(7, source=torch.arange(-1, 6))  # a start row, then three frames of two
    assert frame_actions(actions, rows, 2).flatten().tolist() == [1, 1, 1, 2, 2, 3, 3]
    # Shifted: the last row of a frame predicts the first token of the next; the very last nothing.
    assert frame_actions(actions, rows, 2, 1).flatten().tolist() == [1, 1, 2, 2, 3, 3, 3]
