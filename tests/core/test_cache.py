"""The cache verbs: contents, counts, rollback, eviction, forks, snapshots, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockloom.core.cache import CacheFull, KVCache
from blockloom.core.layout import Copy, Layout, Role

LAYERS, BATCH, CAPACITY, HEADS, DIM = 2, 3, 10, 2, 4


def make(**how):
    sizes = {"num_layers": LAYERS, "batch": BATCH, "capacity": CAPACITY}
    return KVCache(**(sizes | {"num_kv_heads": HEADS, "head_dim": DIM} | how))


def rows(count, first=0, **attributes):
    rank = torch.arange(first, first + count)
    return Layout.make(count, **({"order": rank, "block": rank, "source": rank} | attributes))


def keys(count, seed, batch=BATCH):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, HEADS, count, DIM, generator=rng)


@torch.no_grad()
def append(cache, layout, seed, *, keep=True, commit=True):
    """Run one pass: returns what each layer saw."""
    count = layout.num_tokens
    view = cache.view(layout, keep=torch.arange(count) if keep else None)
    seen = []
    for layer in range(LAYERS):
        key = keys(count, 10 * seed + layer, view.cache.batch)
        seen.append(tuple(t.clone() for t in view.extend(layer, key, -key)))
    cache.write(view)
    if keep and commit:
        cache.commit()
    return seen


def content(cache, row=0):
    length = int(cache.written[row])
    return torch.stack([k[row, :, :length] for k in cache.keys])


def test_write_then_commit_moves_two_explicit_counts():
    cache = make()
    append(cache, rows(3), 1, commit=False)
    assert cache.written.tolist() == [3, 3, 3] and cache.committed.tolist() == [0, 0, 0]
    cache.commit(2)
    assert cache.committed.tolist() == [2, 2, 2]
    cache.commit(0)
    cache.commit()
    assert cache.committed.tolist() == [3, 3, 3]
    assert [entry["op"] for entry in cache.log] == ["write", "commit", "commit", "commit"]
    assert cache.log[0]["source"] == [0, 1, 2] and cache.log[1]["tokens"] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"commit count = \[1, 1, 1\]; legal 0..\[0, 0, 0\]"):
        cache.commit(1)


def test_a_pass_sees_the_past_then_itself_and_contents_are_what_was_written():
    cache = make()
    append(cache, rows(3), 1)
    seen = append(cache, rows(2, 3), 2)
    for layer in range(LAYERS):
        expected = torch.cat((keys(3, 10 + layer), keys(2, 20 + layer)), 2)
        assert torch.equal(seen[layer][0], expected) and torch.equal(seen[layer][1], -expected)
        assert torch.equal(cache.keys[layer][:, :, :5], expected)
    view = cache.view(rows(2, 5))
    assert view.layout.order.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_peek_stores_nothing_and_leaves_no_readable_trace():
    cache = make(poison=True)
    append(cache, rows(3), 1)
    before = content(cache).clone()
    append(cache, rows(4, 3), 9, keep=False)
    assert cache.written.tolist() == [3, 3, 3] and torch.equal(content(cache), before)
    other = make(poison=True)
    append(other, rows(3), 1)
    first, second = append(cache, rows(2, 3), 2), append(other, rows(2, 3), 2)
    for (a, b), (c, d) in zip(first, second, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_only_some_active_rows_may_be_kept():
    cache = make()
    with torch.no_grad():
        view = cache.view(rows(4), keep=torch.tensor([0, 2]))
        for layer in range(LAYERS):
            key, _ = view.extend(layer, keys(4, layer), keys(4, layer))
            assert key.shape[2] == 4
        cache.write(view)
    assert torch.equal(cache.keys[1][:, :, :2], keys(4, 1)[:, :, [0, 2]])
    assert cache.layout.order[:, :2].tolist() == [[0, 2]] * BATCH


def test_overflow_is_refused_before_anything_changes():
    cache = make()
    append(cache, rows(8), 1)
    with pytest.raises(
        CacheFull, match="capacity = 10 tokens, 8 written, 3 more asked; try capaci"
    ):
        cache.view(rows(3, 8), keep=torch.arange(3))
    assert cache.written.tolist() == [8, 8, 8]
    # A peek needs no slots, and an exact fit is fine.
    assert append(cache, rows(3, 8), 2, keep=False)[0][0].shape[2] == 11
    append(cache, rows(2, 8), 3)
    assert cache.written.tolist() == [10, 10, 10]


def test_rollback_then_other_equals_other_bit_for_bit():
    cache, straight = make(poison=True), make(poison=True)
    for each in (cache, straight):
        append(each, rows(3), 1)
    append(cache, rows(4, 3), 5, commit=False)
    cache.rollback()
    assert cache.written.tolist() == [3, 3, 3]
    seen, expected = append(cache, rows(2, 3), 2), append(straight, rows(2, 3), 2)
    for (a, b), (c, d) in zip(seen, expected, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert torch.equal(content(cache), content(straight))
    cache.rollback(1)
    assert cache.written.tolist() == cache.committed.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"rollback to = \[4, 4, 4\]; legal 0..\[1, 1, 1\]"):
        cache.rollback(4)


def test_rows_may_commit_and_roll_back_by_different_amounts():
    cache = make()
    append(cache, rows(4), 1, commit=False)
    cache.commit(torch.tensor([1, 4, 0]))
    assert cache.committed.tolist() == [1, 4, 0]
    cache.rollback(torch.tensor([2, 4, 0]))
    assert cache.written.tolist() == [2, 4, 0] and cache.committed.tolist() == [1, 4, 0]
    assert not cache.aligned
    seen = append(cache, rows(2, 50), 2, commit=False)
    assert cache.written.tolist() == [4, 6, 2]
    key = keys(2, 20)
    for row, start in enumerate([2, 4, 0]):  # left-aligned behind each row's own end
        assert torch.equal(cache.keys[0][row, :, start : start + 2], key[row])
        assert cache.layout.order[row, start : start + 2].tolist() == [50, 51]
        assert torch.equal(seen[0][0][row, :, 4:], key[row])
    view = cache.view(rows(1, 60))
    assert (view.past.document >= 0).sum(1).tolist() == [4, 6, 2]
    with pytest.raises(ValueError, match="evict needs aligned, fully"):
        cache.evict(window=1, next_block=3)


def test_noise_is_not_committed_by_accident():
    cache = make()
    append(cache, rows(2, copy=int(Copy.NOISY), level=0.5), 1, commit=False)
    with pytest.raises(ValueError, match=r"level 0\.5; only level 0 is final"):
        cache.commit()
    assert cache.committed.tolist() == [0, 0, 0]
    cache.commit(context_level=0.5, copy=int(Copy.CLEAN))
    assert cache.layout.copy[:, :2].unique().tolist() == [int(Copy.CLEAN)]


@pytest.mark.parametrize(("window", "sink", "left"), [(3, 0, [4, 5]), (2, 1, [0, 5]), (1, 0, [])])
def test_evict_keeps_the_window_own_counted_and_the_sinks(window, sink, left):
    cache = make(poison=True)
    append(cache, rows(1, -1, block=-1, source=-1), 7)  # a prompt row
    append(cache, rows(6), 1)
    before = content(cache)
    dropped = cache.evict(window=window, sink=sink, next_block=6)
    assert dropped == 6 - len(left) and cache.written.tolist() == [1 + len(left)] * 3
    assert cache.layout.block[0, : 1 + len(left)].tolist() == [-1, *left]
    assert torch.equal(content(cache), before[:, :, [0, *[1 + b for b in left]]])
    assert bool(cache.keys[0][:, :, 1 + len(left) :].isnan().all())
    assert cache.log[-1]["op"] == "evict" and cache.log[-1]["tokens"] == dropped


def test_evicting_again_looks_only_when_something_came():
    cache = make()
    append(cache, rows(6), 1)
    assert cache.evict(window=3, next_block=6) == 4
    count = len(cache.log)
    assert cache.evict(window=3, next_block=6) == 0 and len(cache.log) == count
    assert cache.evict(window=3, next_block=7) == 1
    saved = cache.snapshot()
    assert cache.evict(window=3, next_block=8) == 1
    cache.restore(saved)
    assert cache.evict(window=3, next_block=8) == 1


def test_sink_role_is_never_evicted_and_windows_are_checked():
    cache = make()
    role = torch.tensor([0, int(Role.SINK), 0, 0])
    append(cache, rows(4, role=role), 1)
    cache.evict(window=1, next_block=4)
    assert cache.layout.block[0, :1].tolist() == [1] and cache.written.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="window = 0 blocks; legal >= 1"):
        cache.evict(window=0, next_block=4)


def test_fork_and_select_are_independent_copies():
    cache = make()
    append(cache, rows(3), 1)
    double = cache.fork(2)
    assert double.batch == 6 and torch.equal(double.keys[0][0], double.keys[0][3])
    assert torch.equal(double.keys[1][:3], cache.keys[1])
    double.rollback(0)
    double.keys[0].zero_()
    assert cache.written.tolist() == [3, 3, 3] and bool(cache.keys[0][:, :, :3].any())
    best = cache.select(torch.tensor([2]))
    assert torch.equal(best.keys[0][0], cache.keys[0][2]) and best.written.tolist() == [3]
    with pytest.raises(ValueError, match="copies = 0; legal >= 1"):
        cache.fork(0)


def test_snapshot_survives_safetensors_and_continues_bit_for_bit(tmp_path):
    cache = make()
    append(cache, rows(3), 1)
    append(cache, rows(2, 3), 2, commit=False)
    save_file(cache.snapshot(), tmp_path / "cache.safetensors")
    expected = append(cache, rows(2, 5), 3)
    other = make()
    other.restore(load_file(tmp_path / "cache.safetensors"))
    assert other.written.tolist() == [5, 5, 5] and other.committed.tolist() == [3, 3, 3]
    for (a, b), (c, d) in zip(append(other, rows(2, 5), 3), expected, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    with pytest.raises(ValueError, match="this cache needs"):
        make(capacity=11).restore(cache.snapshot())
    with pytest.raises(ValueError, match="missing or extra"):
        make(num_layers=1).restore(cache.snapshot())


def test_reset_forgets_and_estimates_are_exact():
    cache = make(dtype=torch.float64)
    append(cache, rows(3), 1)
    cache.reset()
    assert cache.written.tolist() == cache.committed.tolist() == [0, 0, 0]
    held = sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))
    sizes = {"num_layers": LAYERS, "batch": BATCH, "capacity": CAPACITY, "num_kv_heads": HEADS}
    assert KVCache.estimate_bytes(**sizes, head_dim=DIM, bytes_per_value=8) == held
    with pytest.raises(ValueError, match=r"batch = 0 .* must be >= 1"):
        make(batch=0)


def test_guidance_branches_share_a_past_without_a_copy_of_their_own():
    cache = make()
    append(cache, rows(3), 1)
    view = cache.view(rows(2, 3), keep=torch.arange(2))
    key = keys(2, 4, 2 * BATCH)
    with torch.no_grad():
        seen, _ = view.extend(0, key, key)
    assert torch.equal(seen[:BATCH, :, :3], seen[BATCH:, :, :3])
    assert torch.equal(seen[:, :, 3:], key)
    assert torch.equal(cache.keys[0][:, :, 3:5], key[:BATCH])  # the conditional branch is staged


def test_gradients_flow_to_active_keys_but_never_into_the_buffers():
    cache = make()
    append(cache, rows(3), 1)
    view = cache.view(rows(2, 3), keep=torch.arange(2))
    key = keys(2, 4).requires_grad_()
    seen, _ = view.extend(0, key, key)
    seen.square().sum().backward()
    assert torch.equal(key.grad, 2 * key.detach())
    assert not cache.keys[0].requires_grad
