"""Every published visibility rule as a named mask table.

`rule(name, **params)` is the vocabulary of the recipe field `mask`. The module knows systems only
by name; what a rule does is written in the relation language of core/masks.py and nowhere else.

Conventions: C = clean, N = noisy, D = draft. Prompt rows are clean with `block = -1`, so every
`LE(block)` or `LT(block)` column shows them to all and they see only themselves.
Not expressible: iLLaMA (its mask multiplies after the softmax, so it is not a visibility).
"""

from collections.abc import Callable, Mapping

from .layout import Copy
from .masks import AHEAD, ALL, EQ, IN, LE, LT, NEAR, NONE, POSE, ROUTE, K, MaskTable, Q, Relation

Rule = Callable[..., MaskTable]
RULES: dict[str, Rule] = {}


def rule(name: str, **params: object) -> MaskTable:
    """Build a named mask table.

    Args:
        name: A key of `RULES`.
        **params: Parameters of that rule, for example `window=3, sink=True`.

    Returns:
        The visibility table.

    Raises:
        ValueError: Unknown rule, or a parameter the rule does not take.
    """
    if name not in RULES:
        raise ValueError(f"mask rule must be one of {sorted(RULES)}, got {name!r}")
    try:
        return RULES[name](**params)
    except TypeError as error:
        raise ValueError(f"mask rule {name!r}: {error}") from error


def _register(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return add


def _table(entries: Mapping[str, Relation]) -> MaskTable:
    letters = {"C": Copy.CLEAN, "N": Copy.NOISY, "D": Copy.DRAFT}
    return MaskTable.of({(letters[name[0]], letters[name[-1]]): r for name, r in entries.items()})


def _windowed(
    relation: Relation, attribute: str, window: int | None, sink: bool, route: str | None = None,
    nearest: int | None = None,
) -> Relation:  # fmt: skip
    """Restrict a column to the last `window` values, or the `nearest`, and if asked the sinks."""
    if route is not None:
        relation = relation & ROUTE(route)
    near: Relation
    if window is not None:
        near = NEAR(attribute, window)
    elif nearest is not None:
        near = POSE(nearest)
    else:
        return relation
    return relation & (near | K("SINK") if sink else near)


def _with_far(
    entries: Mapping[str, Relation], window: int | None, attribute: str, far: int | None
) -> MaskTable:
    """Let rows read coarse rows of blocks older than their window.

    Args:
        entries: The table without coarse rows, its window in it.
        window: Blocks a query sees token by token, its own counted.
        attribute: What noisy rows count their window in.
        far: Blocks older than the window that are seen; 0 = all, None = there are no coarse rows.

    Raises:
        TypeError: no window that anything could be older than.
    """
    if far is None:
        return _table(entries)
    if window is None:
        raise TypeError("far history needs a window")

    def old(past: Relation, name: str) -> Relation:
        seen = past & ~NEAR(name, window)
        return seen & NEAR(name, window + far) if far else seen

    coarse, earlier = K("COARSE"), LE("block")
    known = earlier & NEAR("block", window + far) if far else earlier
    to_fine = {name: relation & ~coarse for name, relation in entries.items()}
    among_clean = to_fine["C->C"] | (old(earlier, "block") & coarse)
    among_coarse = (known & coarse) | (earlier & K("PROMPT"))
    return _table(
        {
            "C->C": (~Q("COARSE") & among_clean) | (Q("COARSE") & among_coarse),
            "N->C": to_fine["N->C"] | (old(LT(attribute), attribute) & coarse),
            "N->N": entries["N->N"],
        }
    )


@_register("causal", "striped", "rearranged_spans")
def causal(window: int | None = None, sink: bool = False) -> MaskTable:
    """Each row sees the rows before it and itself (AR, CARD, FastCoT, CM3, D-AR, VoiceCraft).

    Rearranged spans and striped storage use the same table: only the attributes travel.

    Args:
        window: Rows a query may see, its own counted; None = all.
        sink: Whether SINK rows stay visible outside the window.
    """
    return _table({"C->C": _windowed(LE("order"), "order", window, sink)})


@_register("bidirectional")
def bidirectional() -> MaskTable:
    """Every token sees every token (LLaDA, Dream, MaskGIT, Halton); prompts see prompts only."""
    return _table({"C->C": ALL, "N->C": ALL, "N->N": ALL})


@_register("block_prefix", "prefix_lm", "segments", "scales", "turns")
def block_prefix(left_blocks: int | None = None) -> MaskTable:
    """Rows see their whole block and all earlier ones (prefix-LM, MAS, VAR, TIMAR, streaming ASR).

    Args:
        left_blocks: Earlier blocks a query may see (U2/WeNet left chunks); None = all.
    """
    window = None if left_blocks is None else left_blocks + 1
    return _table({"C->C": _windowed(LE("block"), "block", window, sink=False)})


@_register("block_diffusion", "causal_fusion")
def block_diffusion(
    window: int | None = None, sink: bool = False, route: str | None = None,
    nearest: int | None = None, far: int | None = None,
) -> MaskTable:  # fmt: skip
    """Noisy blocks read the clean past and themselves (BD3-LM, ACDiT, MAGI-CTF, CausalFusion).

    Args:
        window: Blocks a query may see, its own counted and sinks not; None = all.
        sink: Whether SINK rows stay visible outside the window.
        route: Name of a routing table that picks past blocks for the noisy rows.
        nearest: Past blocks a query may see, those nearest by pose; not beside a window.
        far: Blocks older than the window that are seen as coarse rows; 0 = all, None = no such
            rows.

    Source: BD3-LM (arXiv:2503.09573), ACDiT (arXiv:2412.07720).
    """
    entries = {
        "C->C": _windowed(LE("block"), "block", window, sink, nearest=nearest),
        "N->C": _windowed(LT("block"), "block", window, sink, route, nearest),
        "N->N": EQ("block"),
    }
    return _with_far(entries, window, "block", far)


@_register("routed_block_diffusion")
def routed_block_diffusion(route: str = "past") -> MaskTable:
    """Block diffusion whose noisy rows read only routed past blocks (Resampling Forcing)."""
    return block_diffusion(route=route)


@_register("nbdiff")
def nbdiff() -> MaskTable:
    """Causal clean stream, bidirectional noisy block (NBDiff, arXiv:2512.06776)."""
    return _table({"C->C": LE("order"), "N->C": LT("block"), "N->N": EQ("block")})


@_register("wedlm", "wedlm_window")
def wedlm() -> MaskTable:
    """Causal inside the noisy block, observed slots first in `order` (WeDLM, arXiv:2512.22737).

    Decoding evaluates the same table with the whole window as one noisy block.
    """
    return _table({"C->C": LE("order"), "N->C": LT("block"), "N->N": EQ("block") & LE("order")})


@_register("jacobi")
def jacobi(variant: str = "block", draft: str = "D") -> MaskTable:
    """Jacobi Forcing (arXiv:2512.14681): drafts beside their clean fixed points.

    Args:
        variant: `"block"` (a: clean past), `"multi"` (b: earlier drafts, never clean) or
            `"window"` (c: clean rows of earlier windows, drafts of the own window; `group`).
        draft: Copy letter of the drafts, `"D"` or `"N"`.
    """
    seen = {
        "block": (LT("block"), EQ("block") & LE("order")),
        "multi": (NONE | K("COND"), LE("order")),
        "window": (LT("group") | K("COND"), EQ("group") & LE("order")),
    }
    if variant not in seen or draft not in ("D", "N"):
        raise ValueError(
            f"jacobi variant must be one of {sorted(seen)} with draft 'D' or 'N', "
            f"got {variant!r}, {draft!r}"
        )
    to_clean, to_draft = seen[variant]
    return _table({"C->C": LE("order"), f"{draft}->C": to_clean, f"{draft}->{draft}": to_draft})


@_register("block_causal")
def block_causal(
    window: int | None = None, sink: bool = False, nearest: int | None = None
) -> MaskTable:
    """One copy with per-token noise level (CDLM, CausVid, diffusion forcing, NFD, CausNVS).

    The clean columns show prompt rows, and committed blocks when a cache relabels them.

    Args:
        window: Blocks a query may see, its own counted and sinks not; None = all.
        sink: Whether SINK rows stay visible outside the window.
        nearest: Past blocks a query may see, those nearest by pose; not beside a window.
    """
    seen = _windowed(LE("block"), "block", window, sink, nearest=nearest)
    return _table({"C->C": seen, "N->C": seen, "N->N": seen})


@_register("level_stages")
def level_stages(
    window: int | None = None, sink: bool = False, nearest: int | None = None, own: bool = False
) -> MaskTable:  # fmt: skip
    """Levels of a frame read themselves and lower levels, never higher ones (MoMask, Mogo).

    `group` is the level, a token's place in its frame. With one copy all rows are noisy and see all
    blocks; with two the noisy rows of a block see the clean past and their own block.

    Args:
        window: Blocks a query may see, its own counted and sinks not; None = all.
        sink: Whether SINK rows stay visible outside the window.
        nearest: Past blocks a query may see, those nearest by pose; not beside a window.
        own: Noisy rows of a block see their own level only, so that all levels are drawn at once.
    """
    below = LE("group")
    past = _windowed(LT("block"), "block", window, sink, nearest=nearest)
    return _table(
        {
            "C->C": _windowed(LE("block"), "block", window, sink, nearest=nearest) & below,
            "N->C": past & below,
            "N->N": EQ("block") & (EQ("group") if own else below),
        }
    )


@_register("level_stacks")
def level_stacks(
    window: int | None = None, sink: bool = False, nearest: int | None = None
) -> MaskTable:
    """Levels of a frame are drawn at once, each from its own and lower levels of the past (Mogo).

    Args:
        window: As in `level_stages`.
        sink: As in `level_stages`.
        nearest: As in `level_stages`.

    Source: Mogo (arXiv:2412.07797), where level r of a frame reads the sum of the codes of levels
        up to r of all frames before. Differs: attention reads them one by one.
    """
    return level_stages(window, sink, nearest, own=True)


@_register("rolling_window")
def rolling_window(
    window: int | None = None, sink: bool = False, far: int | None = None
) -> MaskTable:
    """Blocks in flight together see each other and the clean past (Rolling Forcing).

    `group` of a clean row is its block, of a noisy row the first block in flight with its own.

    Args:
        window: Blocks a query may see, counted from the first one in flight, which counts; sinks
            do not; None = all.
        sink: Whether SINK rows stay visible outside the window.
        far: As in `block_diffusion`.
    """
    entries = {
        "C->C": _windowed(LE("block"), "block", window, sink),
        "N->C": _windowed(LT("group"), "group", window, sink),
        "N->N": EQ("group"),
    }
    return _with_far(entries, window, "group", far)


@_register("staged_window")
def staged_window() -> MaskTable:
    """Each denoise stage has its own reach in blocks, the own one counted (SandAI MAGI-1)."""
    return _table(
        {
            "C->C": EQ("block"),
            "N->C": LT("block") & NEAR("block", "reach"),
            "N->N": NEAR("block", "reach"),
        }
    )


@_register("draft_tree")
def draft_tree() -> MaskTable:
    """Tree drafts see the committed text and their ancestors (MCSD, multi-candidate)."""
    return _table({"C->C": LE("order"), "D->C": ALL, "D->D": IN})


@_register("merged_latents")
def merged_latents() -> MaskTable:
    """Rows see themselves and the last token of every earlier merge chunk (MTLA)."""
    return _table({"C->C": EQ("order") | (LE("order") & K("LAST"))})


@_register("block_window_causal")
def block_window_causal(window: int = 2) -> MaskTable:
    """Causal, restricted to the own and the previous blocks (LeX / xPos blockwise causal)."""
    return _table({"C->C": LE("order") & NEAR("block", window)})


@_register("sliding_window")
def sliding_window(window: int, sink: bool = True) -> MaskTable:
    """Causal language model with a sliding window of rows and attention sinks."""
    return causal(window=window, sink=sink)


@_register("sparse_drop")
def sparse_drop() -> MaskTable:
    """Causal among kept rows only (sparse flash attention, dropping)."""
    return _table({"C->C": LE("order") & Q("KEEP") & K("KEEP")})


@_register("sparse_hash")
def sparse_hash() -> MaskTable:
    """Causal inside a hash bucket, `group` (sparse flash attention, hashing)."""
    return _table({"C->C": LE("order") & EQ("group")})


@_register("hybrid_lm")
def hybrid_lm(mode: str = "causal") -> MaskTable:
    """Per sample causal or bidirectional (GPT-BERT, AntLM).

    Args:
        mode: `"causal"` or `"all"`.
    """
    if mode not in ("causal", "all"):
        raise ValueError(f"hybrid_lm mode must be 'causal' or 'all', got {mode!r}")
    return _table({"C->C": LE("order") if mode == "causal" else ALL})


@_register("window_attention")
def window_attention(copy: str = "N") -> MaskTable:
    """Attention inside a spatial or space-time window, `group` (SeedVR, W.A.L.T)."""
    return _table({f"{copy}->{copy}": EQ("group")})


@_register("temporal_axis")
def temporal_axis(copy: str = "N") -> MaskTable:
    """Factorised temporal attention: same spatial site `group`, past and own frame `block`."""
    return _table({f"{copy}->{copy}": EQ("group") & LE("block")})


@_register("condition_star")
def condition_star() -> MaskTable:
    """Conditions see only themselves, the picture sees all (EasyControl, static reference)."""
    return _table({"C->C": EQ("group"), "N->C": ALL, "N->N": ALL})


@_register("hybrid_permuted")
def hybrid_permuted(known_see_masked: bool = True) -> MaskTable:
    """Known tokens see all, masked ones the known and the later-decoded (BAD; order = -perm).

    Args:
        known_see_masked: Whether known rows read masked rows.
    """
    return _table(
        {"C->C": ALL, "C->N": ALL if known_see_masked else NONE, "N->C": ALL, "N->N": LE("order")}
    )


@_register("band")
def band(attribute: str = "order", width: int = 6, copy: str = "N") -> MaskTable:
    """Rows within a distance below `width` on both sides (MAGNeT stages 1+; VidLaDA)."""
    seen = NEAR(attribute, width) | AHEAD(attribute, width)
    return _table({f"{copy}->{copy}": seen})


@_register("text_tower")
def text_tower(base: str = "causal", **params: object) -> MaskTable:
    """Any rule, with TEXT rows kept from reading media rows (VoiceCraft's text half)."""
    inner = rule(base, **params)
    shut = ~(Q("TEXT") & ~K("TEXT"))
    return MaskTable.of({copies: relation & shut for copies, relation in inner.items})


@_register("local_causal")
def local_causal() -> MaskTable:
    """Causal inside a patch, `group` (local stage of MEGABYTE and MBLM)."""
    return _table({"C->C": EQ("group") & LE("order")})


@_register("lookahead")
def lookahead() -> MaskTable:
    """Causal plus a per-query look ahead; `reach` = extra rows + 1 (ANCAT, thresholded spans)."""
    return _table({"C->C": LE("order") | AHEAD("order", "reach")})


@_register("packed")
def packed() -> MaskTable:
    """Everything inside one document sees everything (packing alone)."""
    return _table({f"{q}->{k}": ALL for q in "CND" for k in "CND"})
