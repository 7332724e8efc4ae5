"""The Video tab as HTML, with its style; `video.js` beside it makes it move.

Invariant: every text is escaped, and nothing comes from another host. The look of buttons and
fields is that of the World tab.
"""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from .videos import MAX_FRAMES
from .world_page import joined

SCRIPT = joined("wire.js", "video.js")

NOTHING = (
    "No model that makes videos is installed. Train one with “blockloom train video/RECIPE --data "
    "FOLDER --out FOLDER” and start the demo with “--model FOLDER”."
)


def markup(offers: Sequence[dict[str, Any]]) -> str:
    """Write the tab.

    Args:
        offers: From `Videos.offers`; at least one.
    """
    told = escape(json.dumps(list(offers)), quote=True)
    return f'<div class="bw bv" data-kind="idle" data-offers="{told}">{_WISH}{_SCREEN}</div>'


_WISH = f"""
<div class="bv-wish">
  <label class="bw-field"><span>What happens</span>
    <input type="text" class="bv-prompt" maxlength="500" placeholder="a fox is running"></label>
  <div class="bw-field"><span>First frame</span><div class="bw-starts bv-firsts"></div>
    <input type="file" class="bv-file" accept="image/*" hidden></div>
  <div class="bv-pair">
    <label class="bw-field"><span>Frames</span>
      <input type="number" class="bv-frames" min="2" max="{MAX_FRAMES}" step="1"></label>
    <label class="bw-field"><span>Seed</span><span class="bw-row">
      <input type="text" class="bv-seed" placeholder="random" maxlength="20" inputmode="numeric">
      <button type="button" class="bw-button bv-dice" aria-label="new seed">↻</button></span>
    </label></div>
  <label class="bw-field"><span>Model and its recipe</span><select class="bv-model"></select>
  </label>
  <div class="bw-buttons">
    <button type="button" class="bw-button bw-main bv-make">Make</button>
    <button type="button" class="bw-button bv-stop" disabled>Stop</button>
    <button type="button" class="bw-button bv-get" disabled>Save as MP4</button>
  </div>
</div>"""

_SCREEN = """
<div class="bv-side">
  <div class="bw-screen bv-screen"><video muted playsinline hidden></video>
    <canvas width="64" height="64" hidden aria-label="the video"></canvas>
    <div class="bw-hint bv-empty">The video appears here while it is made</div></div>
  <div class="bl-bar bv-bar"><div style="width:0%"></div></div>
  <div class="bw-line bv-line" aria-live="polite"></div>
</div>"""

CSS = """
.bv-wish, .bv-side { flex: 1 1 0; min-width: 0; }
.bv-wish { display: flex; flex-direction: column; gap: 18px; }
.bv-screen { min-height: 300px; }
.bv-screen video, .bv-screen canvas { width: 100%; border-radius: 8px; display: block;
  image-rendering: pixelated; }
.bv-line { font-size: 14px; text-align: center; min-height: 1.5em;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.bv[data-kind=failed] .bv-line { color: #a3341f; }
.dark .bv[data-kind=failed] .bv-line { color: #ffb4a2; }
.bv[data-kind=idle] .bv-bar { visibility: hidden; }
.bv[data-kind=done] .bv-bar > div { background: #26547c; }
.bv-pair { display: grid; grid-template-columns: 1fr 1.6fr; gap: 16px; }
.bv-firsts { grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); max-height: 168px; }
.bv-word { border: 1px solid var(--border-color-primary); line-height: 1.2; font-size: 13px;
  min-height: 40px; color: var(--body-text-color); background: var(--input-background-fill); }
.bv-firsts .bw-start { align-self: stretch; }
.bv-firsts .bw-start img { aspect-ratio: 1; object-fit: cover; }
.bv-seed::placeholder, .bv-prompt::placeholder { color: var(--input-placeholder-color);
  opacity: 1; }
@media (max-width: 700px) {
  .bv-wish, .bv-side { flex: none; width: 100%; }
  .bv-screen { min-height: 220px; }
  .bv-firsts .bw-start { flex: 0 0 72px; min-height: 56px; }
}
"""
