"""The decode loop: what runs, what is kept, and what items may not do to one another."""

import pytest
import torch

from blockloom.core.cache import KVCache
from blockloom.core.errors import UsageError
from blockloom.core.plan import build_plan
from blockloom.core.rollout import Rollout, run
from blockloom.core.sampling import item_generator
from blockloom.core.schedule import scheduler_of
from blockloom.models.generate import Request, start

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def open_rollout(tiny, name, *overrides, items=2, decoder=None, known=None, **how):
    model = tiny.model(name, *overrides, std=0.3)
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    values = tiny.contents(model, plan, items).values
    if known is None:
        known = torch.zeros(items, plan.num_slots, dtype=torch.bool)
    return Rollout(
        plan,
        decoder or tiny.decoder(model, ["a red cat", "blue dog"][:items]),
        scheduler_of(model.recipe),
        values=values,
        is_known=known,
        generators=[item_generator(0, k) for k in range(items)],
        **how,
    )


def ops(rollout):
    return [entry["op"] for entry in rollout.cache.log]


def test_events_come_row_by_row_then_a_commit_per_block_then_done(tiny):
    rollout = open_rollout(tiny, "image/block_masked", num_steps=2)
    events = list(rollout.events())
    assert [e.kind for e in events] == ["row", "row", "commit"] * 4 + ["done"]
    assert [e.path for e in events[:3]] == ["block_0/row_0", "block_0/row_1", "block_0"]
    assert all(e.of_blocks == 4 for e in events) and not events[-1].data["interrupted"]
    for block in range(4):
        first, last = events[3 * block].data, events[3 * block + 1].data
        assert first["sources"].tolist() == [4 * block + i for i in range(4)]
        assert bool((first["accepted"] <= first["predicted"]).all())
        # Together the rows take every predicted slot exactly once.
        assert torch.equal(first["accepted"] ^ last["accepted"], torch.ones(2, 4).bool())
        assert first["level"] == 1.0 and last["level_next"] == 0.0


def test_passes_and_forwarded_rows_are_counted_as_the_policy_says(tiny):
    separate = open_rollout(tiny, "image/block_masked", num_steps=2)
    run(separate)
    # 4 blocks of 2 rows, and a commit pass after all but the last block.
    assert separate.num_passes == 11 and separate.num_forwarded == 11 * 4
    assert ops(separate) == ["write", "commit"] * 3
    fused = open_rollout(tiny, "image/block_masked", "cache.write=fused", num_steps=2)
    run(fused)
    assert fused.num_passes == 8 and fused.num_forwarded == 11 * 4
    token = open_rollout(tiny, "image/llamagen")
    run(token)
    assert token.num_passes == 16 and token.num_forwarded == 4 + 15
    slow = open_rollout(tiny, "image/llamagen", use_cache=False)
    run(slow)
    assert slow.cache is None and slow.num_forwarded == sum(range(4, 20))


@pytest.mark.parametrize(
    "setup",
    [
        ("image/block_masked",),
        ("image/acdit",),
        ("image/acdit", "cache.window=2", "cache.sink=1"),
        ("image/acdit", "cache.window=1", "cache.write=separate"),
        ("image/causalfusion", "cache.window=2"),
        ("image/llamagen",),
        ("image/llamagen", "cache.window=3"),
        ("image/maskgil",),
        ("image/cm3",),
    ],
)
def test_nothing_unwritten_uncommitted_or_evicted_is_ever_read(tiny, setup):
    """Free slots hold NaN: one wrong read would spread to every value after it."""
    model = tiny.model(*setup, std=0.3)
    for guided in (False, True):
        decoder = tiny.decoder(model, ["a red cat", "blue dog"], guided)
        plain = open_rollout(tiny, *setup, decoder=decoder, num_steps=3)
        expected, _ = run(plain)
        poisoned = open_rollout(tiny, *setup, decoder=decoder, num_steps=3)
        old = poisoned.cache
        poisoned.cache = KVCache(
            num_layers=len(old.keys), batch=old.batch, capacity=old.capacity, poison=True,
            num_kv_heads=old.keys[0].shape[1], head_dim=old.keys[0].shape[3],
            num_axes=old.layout.num_axes, rotated=old.rotated,
        )  # fmt: skip
        poisoned.record = lambda rows, hidden: not hidden.isnan().any() or pytest.fail("NaN read")
        values, known = run(poisoned)
        assert bool(known.all()) and torch.equal(values, expected)
        if model.recipe.cache.window:
            assert "evict" in ops(poisoned)
            assert int(poisoned.cache.written.max()) < poisoned.plan.num_slots


def test_windowed_caches_hold_many_given_blocks_in_a_row(tiny):
    for setup in [
        ("image/acdit", "cache.window=1"),
        ("image/acdit", "cache.window=1", "cache.write=separate"),
        ("image/llamagen", "cache.window=2"),
    ]:
        known = (torch.arange(16) < 12).expand(2, -1).clone()
        rollout = open_rollout(tiny, *setup, known=known)
        given = rollout.values.clone()
        values, done = run(rollout)
        assert bool(done.all()) and torch.equal(values[known], given[known])
        slow = open_rollout(tiny, *setup, known=known, use_cache=False)
        assert (run(slow)[0].float() - values.float()).abs().max() < 1e-3


def test_interrupt_stops_within_one_row_and_keeps_what_is_done(tiny):
    for name, whole in (("image/block_masked", 5), ("image/acdit", 5), ("image/llamagen", 5)):
        stop = []
        rollout = open_rollout(tiny, name, should_stop=lambda stop=stop: bool(stop), num_steps=2)
        rows = 0
        for event in rollout.events():
            rows += event.kind == "row"
            if rows == whole:
                stop.append(True)
        assert rows == whole and event.kind == "done" and event.data["interrupted"]
        full = open_rollout(tiny, name, num_steps=2)
        values, _ = run(full)
        known = rollout.is_known
        assert 0 < int(known.sum()) < known.numel()
        assert torch.equal(rollout.values[known], values[known])
        committed = rollout.cache.committed
        assert bool((committed > 0).all()) and bool((committed == rollout.cache.written).all())


def test_given_slots_are_not_predicted_and_given_blocks_run_no_rows(tiny):
    known = torch.zeros(2, 16, dtype=torch.bool)
    known[:, :4] = True  # all of block 0
    known[:, 5] = True
    rollout = open_rollout(tiny, "image/block_masked", known=known)
    before = rollout.values.clone()
    rows = [e for e in rollout.events() if e.kind == "row"]
    assert {e.block for e in rows} == {1, 2, 3}
    assert not any(bool(e.data["accepted"][:, 1].any()) for e in rows if e.block == 1)
    assert torch.equal(rollout.values[known], before[known])
    assert [e.data["of_rows"] for e in rows if e.block == 1] == [3, 3, 3]


def test_items_with_different_numbers_of_given_slots_are_refused(tiny):
    known = torch.zeros(2, 16, dtype=torch.bool)
    known[0, 9] = True
    with pytest.raises(UsageError, match=r"given slots of block 2: \[1, 0\] per item"):
        open_rollout(tiny, "image/block_masked", known=known)
    known[1, 10] = True  # as many, elsewhere
    assert bool(run(open_rollout(tiny, "image/block_masked", known=known))[1].all())


def test_wrong_shapes_are_refused(tiny):
    with pytest.raises(ValueError, match="must cover 16 slots"):
        open_rollout(tiny, "image/maskgit", known=torch.zeros(2, 15, dtype=torch.bool))
    rollout = open_rollout(tiny, "image/maskgit")
    with pytest.raises(ValueError, match="1 generators for 2 items"):
        Rollout(
            rollout.plan, rollout.decoder, None, values=rollout.values,
            is_known=rollout.is_known, generators=[item_generator(0, 0)],
        )  # fmt: skip


def test_rules_that_decide_their_own_count_end_a_block_early(tiny):
    bold = ["schedule.accept=threshold", "schedule.threshold=0.01", "schedule.steps=4"]
    rollout = open_rollout(tiny, "image/block_masked", *bold)
    rows = [e for e in rollout.events() if e.kind == "row"]
    assert len(rows) == 4 and bool(rollout.is_known.all())  # one row per block is enough
    shy = [*bold[:1], "schedule.threshold=1.0", "schedule.steps=4"]
    rows = [e for e in open_rollout(tiny, "image/block_masked", *shy).events() if e.kind == "row"]
    assert len(rows) == 16


def test_every_block_takes_one_number_of_an_items_generator(tiny):
    for name in ("image/block_masked", "image/acdit", "image/mar"):
        rollout = open_rollout(tiny, name, num_steps=2, items=1)
        run(rollout)
        expected = item_generator(0, 0)
        for _ in range(rollout.plan.num_blocks):
            torch.randint(2**62, (), generator=expected)
        assert torch.equal(rollout.generators[0].get_state(), expected.get_state())


def test_blocks_of_single_copy_recipes_see_each_other(tiny):
    """Without clean copies, the context of a block is the other noisy rows."""
    seen = []
    setup = ("image/maskgit", "layout.block=row")
    rollout = open_rollout(tiny, *setup, record=lambda rows, hidden: seen.append(rows.num_tokens))
    run(rollout)
    assert set(seen) == {16}
    known = torch.zeros(2, 16, dtype=torch.bool)
    known[:, :4] = True
    states = []
    for shift in (0, 1):
        other = open_rollout(tiny, *setup, known=known)
        other.values = (other.values + shift) % tiny.codes
        states.append(other.predict_rows(2))
    assert states[0].shape[1] == 4 and (states[0] - states[1]).abs().max() > 1e-3


def test_a_request_is_deterministic_and_its_inputs_are_not_modified(tiny):
    model = tiny.model("image/block_masked", std=0.3)
    values = torch.zeros(1, 16, 1, dtype=torch.long)
    known = torch.zeros(1, 16, dtype=torch.bool)
    drawn = [
        run(start(model, Request(["x"], [item_generator(s, 0)], values=values, is_known=known)))[0]
        for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not bool(values.any()) and not bool(known.any())
