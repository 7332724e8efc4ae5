"""Colours, letters and spacing of the page. Only fonts of the visitor's own system are used."""

import gradio as gr
from gradio.themes.utils.fonts import Font

BLUE, AMBER = "#26547c", "#ffb02e"
_BLUES = gr.themes.Color(
    name="blockloom", c50="#f1f6fa", c100="#dfeaf2", c200="#bfd5e4", c300="#93b8d0",
    c400="#5f93b5", c500="#38719a", c600=BLUE, c700="#1f4566", c800="#193751", c900="#142b40",
    c950="#0d1c2a",
)  # fmt: skip


def _fonts(*names: str) -> list[Font]:
    """Name fonts without asking the server for their files, as plain strings would."""
    return [Font(name) for name in names]


_SANS = _fonts("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_MONO = _fonts("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Build the theme: quiet greys, one blue, rounded boxes."""
    base = gr.themes.Default(
        primary_hue=_BLUES, secondary_hue=_BLUES, neutral_hue="stone", radius_size="lg",
        font=_SANS, font_mono=_MONO,
    )  # fmt: skip
    return base.set(
        body_background_fill="#fafaf7",
        body_text_color_subdued="#6b6560",
        block_title_text_color="#44403c",
        block_title_text_color_dark="#d6d3d1",
        input_border_width="1px",
        input_border_color="*neutral_200",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_border_color="*neutral_300",
        button_border_width="1px",
        button_primary_border_color="*primary_600",
        block_shadow="none",
        block_border_width="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_label_background_fill="transparent",
        input_background_fill="white",
        input_placeholder_color="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )


CSS = """
.gradio-container { width: 100%; max-width: 1080px !important; margin: 0 auto !important; }
#bl-title { padding: 20px 0 2px; }
#bl-title h1 { font-size: 30px; font-weight: 650; letter-spacing: -0.02em; margin: 0 0 6px; }
#bl-title p { font-size: 16px; color: var(--body-text-color-subdued); margin: 0; max-width: 46em; }
/* 384 pixels of picture, 8 of padding and 1 of border on each side: nothing is scaled twice. */
.bl-canvas { width: 100%; max-width: 402px; margin: 0 auto; }
.bl-grid { display: grid; grid-template-columns: repeat(var(--columns, 1), 1fr); gap: 4px;
  width: 100%; aspect-ratio: 1; padding: 8px; border-radius: 16px; background: white;
  border: 1px solid var(--border-color-primary); align-content: start; box-sizing: border-box; }
.bl-grid img { width: 100%; aspect-ratio: 1; border-radius: 8px; display: block; margin: 0; }
.bl-empty { background: repeating-conic-gradient(#f1f0ec 0% 25%, #fbfbf9 0% 50%) 50% / 48px 48px; }
.dark .bl-grid { background-color: #1c1917; }
.dark .bl-empty {
  background: repeating-conic-gradient(#1c1917 0% 25%, #24211f 0% 50%) 50% / 48px 48px; }
.bl-bar { height: 6px; margin: 14px 2px 8px; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary); }
.bl-bar > div { height: 100%; background: #ffb02e; border-radius: 3px; }
[data-kind=done] .bl-bar > div { background: #26547c; }
[data-kind=waiting] .bl-bar, [data-kind=loading] .bl-bar { opacity: 0.5; }
[data-kind=idle] .bl-bar { visibility: hidden; }
.bl-line { font-size: 14px; color: var(--body-text-color-subdued); text-align: center;
  min-height: 1.5em; font-variant-numeric: tabular-nums; }
.bl-notice { padding: 14px 18px; border-radius: 12px; border-left: 4px solid #ffb02e;
  background: #fff8e9; color: #3d3420; font-size: 15px; line-height: 1.5; }
.bl-text { font-size: 15px; line-height: 1.55; margin: 8px 0 4px; max-width: 62em; }
.bl-quiet { color: var(--body-text-color-subdued); font-size: 14px; }
.bl-picture { max-width: 100%; height: auto; border-radius: 12px; margin: 0;
  border: 1px solid var(--border-color-primary); }
.bl-view { gap: 10px !important; padding-top: 10px; }
.bl-view h3, .bl-heading h3 { margin: 0 !important; font-size: 17px; font-weight: 600; }
.bl-scroll { contain: inline-size; max-height: 340px; overflow: auto;
  border-radius: 12px; margin-top: 8px;
  border: 1px solid #e7e5e4; background: white; color: #1c1917; }
.bl-table, .bl-table tr, .bl-table thead { border: 0 !important; }
.bl-table { width: 100%; border-collapse: collapse; font-size: 14px; margin: 0;
  font-variant-numeric: tabular-nums; }
.bl-table th { position: sticky; top: 0; background: #f4f3ef; text-align: left; font-weight: 600;
  padding: 7px 14px; border: 0; }
.bl-table td { padding: 5px 14px; border: 0; border-top: 1px solid #eeede8; }
.bl-examples { gap: 8px !important; flex-wrap: wrap !important; }
.bl-examples button { flex: 0 0 auto !important; width: auto; min-width: 0 !important;
  padding: 4px 13px; border-radius: 999px; font-weight: 400; font-size: 13px;
  color: var(--block-title-text-color); }
.gradio-container .form { background: transparent; border: 0; box-shadow: none; gap: 14px; }
.gradio-container .form .block, .gradio-container .form > * { padding-left: 0; padding-right: 0; }
#bl-edit { background: var(--input-background-fill); padding: 18px; border-radius: 16px;
  border: 1px solid var(--border-color-primary); }
#bl-edit .block, #bl-edit .form { padding: 0; background: transparent; }
.gradio-container .html-container, .gradio-container .gr-accordion { padding: 0; }
#bl-gallery { padding: 0; }
#bl-gallery .grid-wrap { max-height: 640px; height: auto; min-height: 0 !important; }
#bl-gallery .thumbnail-item { aspect-ratio: 4 / 5; background: white; position: relative; }
#bl-gallery .thumbnail-item img { position: absolute; top: 0; left: 0; height: auto;
  aspect-ratio: 1; object-fit: contain; }
#bl-gallery .thumbnail-item .caption-label { left: 0; right: 0; bottom: 0; height: 20%;
  max-width: none; padding: 1px 8px; border: 0; border-radius: 0; background: white;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  font-size: 12px; line-height: 1.3; white-space: normal; color: #44403c; }
.bl-chosen { display: flex; gap: 14px; align-items: center; font-size: 14px; }
.bl-chosen img { width: 72px; height: 72px; border-radius: 10px; margin: 0;
  border: 1px solid var(--border-color-primary); background: white; }
#bl-dice { min-width: 48px !important; max-width: 56px; align-self: end; height: 40px;
  margin-bottom: 10px; }
#bl-style input { height: 18px; }
/* The place in the queue; Gradio would lay it over the block it belongs to. */
#bl-turn { min-height: 22px; position: relative; }
#bl-turn .wrap { background: none; border: 0; }
#bl-turn .progress-text { position: static; margin: auto; transform: none; padding: 0;
  background: none; font-size: 14px; font-family: inherit; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; }
#bl-turn .error, #bl-turn .clear-status { display: none; } /* the line above says what it was */
[data-kind=failed] .bl-line { color: #a3341f; }
.dark [data-kind=failed] .bl-line { color: #ffb4a2; }
/* On a phone the picture stands right below the button that starts it. */
@media (max-width: 700px) {
  #bl-title { padding-top: 8px; }
  .tab-container button { padding: 0 9px !important; font-size: 14px !important; }
  #bl-main { flex-direction: column; }
  #bl-main > .column { display: contents; }
  #bl-canvas, #bl-turn { order: 1; }
  .bl-examples { order: 2; }
  #bl-more { order: 3; }
  #bl-gallery .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  .bl-table td, .bl-table th { padding-left: 8px; padding-right: 8px; }
}
/* Room for all tabs; those that have none stand behind a button. */
@media (max-width: 480px) { .tab-container button { padding: 0 4px !important; } }
"""
