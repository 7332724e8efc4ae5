"""The World tab as HTML, with its style; `world.js` beside it makes it move.

Invariant: every text is escaped, and nothing comes from another host.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any


def joined(*names: str) -> str:
    """Read scripts that lie here and join them into one; each may use those before it."""
    here = Path(__file__).parent
    return "\n".join((here / name).read_text(encoding="utf-8") for name in names)


SCRIPT = joined("wire.js", "world.js")

NOTHING = (
    "No world to play is installed. Train a video model that takes actions and start the demo "
    "with “--model FOLDER”."
)


def markup(offers: Sequence[dict[str, Any]]) -> str:
    """Write the tab.

    Args:
        offers: From `Worlds.offers`; at least one.
    """
    told = escape(json.dumps(list(offers)), quote=True)
    return f'<div class="bw" data-kind="idle" data-offers="{told}">{_LEFT}{_RIGHT}</div>'


_LEFT = """
<div class="bw-left">
  <div class="bw-screen"><canvas width="96" height="64" aria-label="the world"></canvas>
    <div class="bw-hint">Press a key or Play</div></div>
  <div class="bw-below"><span class="bw-line" aria-live="polite"></span>
    <span class="bw-fps"></span></div>
  <div class="bw-hands">
    <div class="bw-pad"><div class="bw-arrows"></div><div class="bw-others"></div></div>
    <div class="bw-buttons">
      <button type="button" class="bw-button bw-play bw-main">Play</button>
      <button type="button" class="bw-button bw-reset">Reset</button>
      <button type="button" class="bw-button bw-fork">Fork</button>
      <button type="button" class="bw-button bw-save">Save</button>
      <button type="button" class="bw-button bw-load">Load</button>
      <input type="file" class="bw-file" accept=".safetensors" hidden>
    </div>
  </div>
</div>"""

_RIGHT = """
<div class="bw-right">
  <h3 class="bw-title"></h3>
  <label class="bw-field"><span>World</span><select class="bw-model"></select></label>
  <div class="bw-field"><span>Where to start</span><div class="bw-starts"></div></div>
  <label class="bw-field"><span>Seed</span><span class="bw-row">
    <input type="text" class="bw-seed" placeholder="random" maxlength="20" inputmode="numeric">
    <button type="button" class="bw-button bw-dice" aria-label="new seed">↻</button></span></label>
  <div class="bw-branches" hidden></div>
  <p class="bw-help">A small model dreams every frame while you steer it. Hold the keys shown below
  the picture, on the keyboard or with a finger. <b>Fork</b> keeps this moment and goes on in a
  second world; <b>Save</b> gives you a file to load later.</p>
</div>"""

CSS = """
.bw { display: flex; gap: 28px; padding-top: 14px; align-items: flex-start; }
.bw [hidden] { display: none !important; }
.bw-left { flex: 1 1 620px; min-width: 0; }
.bw-right { flex: 0 1 300px; min-width: 0; display: flex; flex-direction: column; gap: 18px; }
.bw-screen { position: relative; display: flex; justify-content: center; border-radius: 16px;
  padding: 10px; background: #1c1917; min-height: 120px; align-items: center; }
.bw-screen canvas { image-rendering: pixelated; display: block; border-radius: 8px;
  max-width: 100%; height: auto; background: #292524; }
.bw-hint { position: absolute; color: #f5f5f4; font-size: 15px; pointer-events: none; }
.bw-below { display: flex; justify-content: space-between; gap: 12px; padding: 8px 4px 14px;
  min-height: 44px; font-size: 14px; line-height: 1.5; box-sizing: border-box;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.bw-fps { white-space: nowrap; }
.bw[data-kind=failed] .bw-line { color: #a3341f; }
.dark .bw[data-kind=failed] .bw-line { color: #ffb4a2; }
.bw-hands { display: flex; gap: 24px; align-items: center; justify-content: space-between;
  flex-wrap: wrap; }
.bw-pad { display: flex; gap: 12px; align-items: center; flex-wrap: wrap; }
.bw-arrows { display: grid; grid-template-columns: repeat(3, 52px); grid-auto-rows: 44px;
  gap: 6px; }
.bw-arrows:empty, .bw-others:empty { display: none; }
.bw-others { display: flex; gap: 6px; flex-wrap: wrap; }
.bw-key { min-width: 52px; height: 44px; border-radius: 10px; font-size: 18px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--input-background-fill);
  color: var(--body-text-color); touch-action: none; user-select: none;
  -webkit-user-select: none; }
.bw-arrows .bw-key { height: auto; }
.bw-key[data-key=ArrowUp] { grid-area: 1 / 2; }
.bw-key[data-key=ArrowLeft] { grid-area: 2 / 1; }
.bw-key[data-key=ArrowDown] { grid-area: 2 / 2; }
.bw-key[data-key=ArrowRight] { grid-area: 2 / 3; }
.bw-key.bw-on { background: #ffb02e; border-color: #ffb02e; color: #1c1917; }
.bw-buttons, .bw-row { display: flex; gap: 8px; flex-wrap: wrap; }
.bw-row { flex-wrap: nowrap; }
.bw-button { padding: 9px 16px; border-radius: 10px; font-size: 15px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--input-background-fill);
  color: var(--body-text-color); }
.bw-button:hover:not(:disabled) { border-color: var(--body-text-color-subdued); }
.bw-button:disabled { opacity: 0.45; cursor: default; }
.bw-button.bw-main { background: #26547c; border-color: #26547c; color: white; }
.bw-play { min-width: 76px; }
.bw-dice { padding: 6px 12px; }
.bw-field { display: flex; flex-direction: column; gap: 6px; font-size: 14px; min-width: 0;
  color: var(--block-title-text-color); }
.bw-field select, .bw-field input { padding: 9px 12px; border-radius: 10px; font-size: 15px;
  border: 1px solid var(--input-border-color); background: var(--input-background-fill);
  color: var(--body-text-color); min-width: 0; width: 100%; box-sizing: border-box; }
.bw-seed::placeholder { color: var(--input-placeholder-color); opacity: 1; }
.bw-title { font-size: 19px; font-weight: 600; margin: 0; }
.bw-starts { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 8px;
  max-height: 236px; overflow-y: auto; padding: 3px; margin: -3px; }
.bw-start { padding: 0; border: 0; border-radius: 8px; overflow: hidden; cursor: pointer;
  background: none; line-height: 0; outline-offset: 1px; }
.bw-start img { width: 100%; image-rendering: pixelated; margin: 0; border-radius: 8px; }
.bw-start[aria-pressed=true] { outline: 2px solid #ffb02e; }
.bw-branches { display: flex; flex-direction: column; gap: 6px; }
.bw-chip { display: flex; align-items: stretch; border-radius: 10px; overflow: hidden;
  border: 1px solid var(--border-color-primary); }
.bw-chip.bw-on { border-color: #ffb02e; box-shadow: inset 3px 0 #ffb02e; }
.bw-pick, .bw-cross { border: 0; background: none; cursor: pointer; font-size: 14px;
  padding: 8px 12px; color: var(--body-text-color); text-align: left; }
.bw-pick { flex: 1; font-variant-numeric: tabular-nums; }
.bw-help { font-size: 14px; line-height: 1.55; margin: 0;
  color: var(--body-text-color-subdued); }
.bw-field { position: relative; }
.bw-field select { appearance: none; padding-right: 34px; }
.bw-field:has(select)::after { content: "▾"; position: absolute; right: 14px; bottom: 9px;
  font-size: 15px; color: var(--body-text-color-subdued); pointer-events: none; }
.bw-field input:focus, .bw-field select:focus { outline: 2px solid #93b8d0;
  outline-offset: -1px; box-shadow: none; }
.bw button:focus-visible { outline: 2px solid #38719a; outline-offset: 2px; }
@media (max-width: 700px) {
  .bw { flex-direction: column; gap: 18px; }
  .bw-left, .bw-right { flex: none; width: 100%; }
  .bw-screen { padding: 6px; }
  .bw-hands { flex-direction: column; align-items: stretch; gap: 14px; }
  .bw-pad { justify-content: center; }
  .bw-arrows { grid-template-columns: repeat(3, 84px); grid-auto-rows: 52px; }
  .bw-buttons { flex-wrap: nowrap; gap: 6px; }
  .bw-buttons .bw-button { padding: 9px 4px; flex: 1 1 0; min-width: 0; font-size: 14px; }
  .bw-starts { display: flex; overflow-x: auto; }
  .bw-start { flex: 0 0 84px; }
}
"""
