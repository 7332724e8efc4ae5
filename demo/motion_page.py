"""The Motion tab as HTML, with its style; the scripts beside it make it move.

Invariant: every text is escaped, and nothing comes from another host. The look of buttons and
fields is that of the World tab.
"""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from .motion_files import FORMS
from .motion_plan import MAX_SECONDS
from .world_page import joined

SCRIPT = joined("wire.js", "motion_view.js", "motion_paint.js", "motion_player.js", "motion.js")

NOTHING = (
    "No model that makes motions is installed. Train one with “blockloom train motion/RECIPE "
    "--data FILE --out FOLDER” and start the demo with “--model FOLDER”."
)


def markup(offers: Sequence[dict[str, Any]]) -> str:
    """Write the tab.

    Args:
        offers: From `Motions.offers`; at least one.
    """
    told = escape(json.dumps(list(offers)), quote=True)
    return f'<div class="bw bm" data-kind="idle" data-offers="{told}">{_WISH}{_SIDE}</div>'


_WISH = f"""
<div class="bm-wish">
  <div class="bw-field"><span>What happens, part after part</span><div class="bm-parts"></div>
    <template class="bm-row"><div class="bm-part">
      <input type="text" class="bm-text" maxlength="500" placeholder="a person walks forward">
      <input type="number" class="bm-seconds" min="0.2" max="{MAX_SECONDS}" step="0.2">
      <span class="bm-unit">s</span>
      <button type="button" class="bw-button bm-drop" aria-label="remove this part">×</button>
    </div></template>
    <div class="bm-below"><button type="button" class="bm-add">+ Add a part</button>
      <span class="bm-total"></span></div></div>
  <div class="bw-buttons">
    <button type="button" class="bw-button bw-main bm-make">Make</button>
    <button type="button" class="bw-button bm-stop" disabled>Stop</button>
    <button type="button" class="bw-button bm-open">Open a BVH</button>
    <input type="file" class="bm-file" accept=".bvh" hidden></div>
  <div class="bm-examples"></div>
  <details class="bm-details"><summary>More settings</summary><div class="bm-settings">
    <label class="bw-field"><span>Seed</span><span class="bw-row">
      <input type="text" class="bm-seed" placeholder="random" maxlength="20" inputmode="numeric">
      <button type="button" class="bw-button bm-dice" aria-label="new seed">↻</button></span>
    </label>
    <div class="bm-pair">
      <label class="bw-field"><span>Guidance; 1 is off</span>
        <input type="text" class="bm-guidance" maxlength="8" inputmode="decimal"></label>
      <label class="bw-field"><span>Temperature</span>
        <input type="text" class="bm-temperature" maxlength="8" inputmode="decimal"></label></div>
    <label class="bw-field"><span>Model and its recipe</span><select class="bm-model"></select>
    </label></div></details>
</div>"""

_SAVES = "".join(
    f'<button type="button" class="bw-button" data-form="{form}" disabled>{form.upper()}</button>'
    for form in FORMS
)

_SIDE = f"""
<div class="bm-side">
  <div class="bm-screen"><canvas class="bm-canvas" tabindex="0" role="img"
      aria-label="the moving figure; arrow keys turn the view"></canvas>
    <div class="bm-views">
      <button type="button" class="bm-near" aria-label="nearer">+</button>
      <button type="button" class="bm-far" aria-label="farther">−</button>
      <button type="button" class="bm-home" aria-label="first view">⌂</button></div>
    <div class="bm-legend"><span class="bm-l">left</span><span class="bm-r">right</span></div>
    <div class="bm-empty">The motion appears here while it is made</div></div>
  <canvas class="bm-time" tabindex="0" role="slider" aria-label="moment" aria-valuemin="0"></canvas>
  <div class="bm-hands">
    <button type="button" class="bw-button bm-play" aria-label="Play">▶</button>
    <span class="bm-clock"></span>
    <select class="bm-speed" aria-label="speed"><option value="0.25">¼ ×</option>
      <option value="0.5">½ ×</option><option value="1" selected>1 ×</option>
      <option value="2">2 ×</option></select>
    <button type="button" class="bw-button bm-loop" aria-pressed="true">Loop</button></div>
  <div class="bl-bar bm-bar"><div style="width:0%"></div></div>
  <div class="bw-line bm-line" aria-live="polite"></div>
  <div class="bm-row2"><span>Change</span><div class="bm-modes">
      <button type="button" class="bw-button" data-mode="span" disabled>Redraw a span</button>
      <button type="button" class="bw-button" data-mode="on" disabled>Go on from a moment</button>
      <button type="button" class="bw-button bm-back" hidden>Undo</button></div></div>
  <div class="bm-task" hidden>
    <p class="bm-what"></p>
    <label class="bw-field bm-again"><span>What happens there</span>
      <input type="text" class="bm-words" maxlength="500"></label>
    <div class="bm-pair">
      <label class="bw-field bm-length"><span>Seconds to add</span>
        <input type="number" class="bm-more" min="0.2" max="{MAX_SECONDS}" step="0.2"></label>
      <button type="button" class="bw-button bw-main bm-do">Redraw</button></div></div>
  <div class="bm-row2"><span>Save as</span><div class="bm-save">{_SAVES}</div></div>
</div>"""

CSS = """
.bm-wish { flex: 5 1 0; min-width: 0; display: flex; flex-direction: column; gap: 18px; }
.bm-side { flex: 6 1 0; min-width: 0; display: flex; flex-direction: column; }
.bm-parts { display: flex; flex-direction: column; gap: 8px; }
.bm-part { display: flex; gap: 8px; align-items: center; padding-left: 10px;
  border-left: 4px solid var(--bm-colour, #7aa5cc); border-radius: 4px; }
.bm-part .bm-text { flex: 1 1 auto; }
.bm .bm-part .bm-seconds { flex: 0 0 74px; width: 74px; padding-right: 6px; }
.bm-unit { color: var(--body-text-color-subdued); }
.bm .bm-drop { padding: 6px 11px; }
.bm-below { display: flex; justify-content: space-between; align-items: center; min-height: 30px;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.bm-add { border: 0; background: none; padding: 4px 2px; font-size: 14px; cursor: pointer;
  color: #38719a; }
.dark .bm-add { color: #93b8d0; }
.bm-examples { display: flex; flex-wrap: wrap; gap: 8px; }
.bm-examples button { padding: 4px 13px; border-radius: 999px; font-size: 13px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--input-background-fill);
  color: var(--block-title-text-color); }
.bm-details summary { cursor: pointer; font-size: 14px; color: var(--block-title-text-color); }
.bm-settings { display: flex; flex-direction: column; gap: 14px; padding-top: 14px; }
.bm-pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; align-items: end; }
.bm-screen { position: relative; border-radius: 16px; overflow: hidden; background: #e9edf2;
  border: 1px solid var(--border-color-primary); }
.dark .bm-screen { background: #191d23; }
.bm-canvas { display: block; width: 100%; height: 400px; cursor: grab; touch-action: pan-y;
  outline: none; }
.bm-canvas:active { cursor: grabbing; }
.bm-screen:has(.bm-canvas:focus-visible) { outline: 2px solid #93b8d0; outline-offset: 1px; }
.bm-views { position: absolute; top: 10px; right: 10px; display: flex; flex-direction: column;
  gap: 6px; }
.bm-views button { width: 34px; height: 34px; border-radius: 9px; font-size: 17px; line-height: 1;
  cursor: pointer; border: 1px solid rgba(120, 134, 154, 0.35); color: #44403c;
  background: rgba(255, 255, 255, 0.75); }
.dark .bm-views button { background: rgba(40, 45, 53, 0.8); color: #e7e5e4; }
.bm-legend { position: absolute; left: 14px; bottom: 10px; display: flex; gap: 14px;
  font-size: 12px; color: #57534e; pointer-events: none; }
.dark .bm-legend { color: #b8b2ad; }
.bm-legend span::before { content: ""; display: inline-block; width: 9px; height: 9px;
  border-radius: 50%; margin-right: 5px; background: #2670ba; }
.bm-legend .bm-r::before { background: #e27a20; }
.dark .bm-legend .bm-l::before { background: #60a5e8; }
.dark .bm-legend .bm-r::before { background: #fa9848; }
.bm-empty { position: absolute; inset: 0; display: flex; align-items: center;
  justify-content: center; font-size: 15px; pointer-events: none; padding: 0 24px;
  text-align: center; color: #57534e; }
.dark .bm-empty { color: #b8b2ad; }
.bm-screen:has(.bm-empty:not([hidden])) :is(.bm-views, .bm-legend) { visibility: hidden; }
.bm-time { display: block; width: 100%; height: 62px; margin-top: 8px; cursor: pointer;
  touch-action: none; border-radius: 6px; outline-offset: 2px; }
.bm-time:focus-visible { outline: 2px solid #93b8d0; }
.bm-hands { display: flex; gap: 10px; align-items: center; padding-top: 4px; }
.bm .bm-play { min-width: 54px; }
.bm-clock { flex: 1; font-size: 14px; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; }
.bm-speed { padding: 8px 10px; border-radius: 10px; font-size: 14px;
  border: 1px solid var(--input-border-color); background: var(--input-background-fill);
  color: var(--body-text-color); }
.bm .bw-button[aria-pressed=true] { border-color: #ffb02e; box-shadow: inset 0 0 0 1px #ffb02e; }
.bm-line { font-size: 14px; text-align: center; min-height: 1.5em;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.bm[data-kind=failed] .bm-line { color: #a3341f; }
.dark .bm[data-kind=failed] .bm-line { color: #ffb4a2; }
.bm[data-kind=idle] .bm-bar { visibility: hidden; }
.bm[data-kind=done] .bm-bar > div { background: #26547c; }
.bm-row2 { display: flex; gap: 12px; align-items: center; padding-top: 14px; font-size: 14px;
  color: var(--block-title-text-color); }
.bm-row2 > span { flex: 0 0 60px; white-space: nowrap; }
.bm-modes, .bm-save { display: flex; gap: 8px; flex-wrap: wrap; }
.bm-modes .bw-button, .bm-save .bw-button { padding: 7px 14px; font-size: 14px; }
.bm-task { margin-top: 12px; padding: 14px 16px; border-radius: 14px; display: flex;
  flex-direction: column; gap: 12px; background: var(--input-background-fill);
  border: 1px solid var(--border-color-primary); }
.bm-do { justify-self: start; min-width: 110px; }
.bm-what { margin: 0; font-size: 14px; color: var(--body-text-color); }
.bm-text::placeholder, .bm-seed::placeholder, .bm-guidance::placeholder,
.bm-temperature::placeholder { color: var(--input-placeholder-color); opacity: 1; }
@media (max-width: 700px) {
  .bm-wish, .bm-side { flex: none; width: 100%; }
  .bm-wish { display: contents; }
  .bm-wish > .bw-field { order: 0; }
  .bm-side { order: 2; }
  .bm-examples { order: 3; }
  .bm-details { order: 4; width: 100%; }
  .bm-wish > * { width: 100%; }
  .bm-wish > .bw-buttons { order: 1; }
  .bm-canvas { height: 320px; }
  .bm-modes .bw-button, .bm-save .bw-button { padding: 8px 11px; }
}
"""
