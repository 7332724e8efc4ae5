"""The page of the demo: `blockloom demo`, `blockloom-demo` or `python app.py`.

It lays out the tabs and connects them; what a click does stands in `demo/`. Every visitor's
pictures and stop flag live in their own session; models are loaded once and only read.
"""

import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
# Nobody reads the table of past jobs (monitoring is off); each job would compute it anew, twice.
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from blockloom import __version__, cli
from blockloom.commands.demo import is_local
from blockloom.demo import (
    handlers,
    inside,
    look,
    motion_page,
    motion_routes,
    video_page,
    video_routes,
    views,
    wishes,
    world_page,
    world_routes,
)
from blockloom.demo.gate import Doors, Gate
from blockloom.demo.motions import Motions
from blockloom.demo.session import Session
from blockloom.demo.shelf import Shelf
from blockloom.demo.videos import Videos
from blockloom.demo.worlds import Worlds

MAX_WAITING = 32
TURN = {"concurrency_id": "gpu", "concurrency_limit": 1}
NO_MODEL = (
    "No model is installed, so nothing can be drawn here yet. Train one with "
    "“blockloom train image/block_masked --data FOLDER --out FOLDER” and start the demo with "
    "“--model FOLDER”. The tab “Look inside” works without one."
)


def build(shelf: Shelf) -> gr.Blocks:
    """Lay out the page.

    Args:
        shelf: Models on offer; may be empty.
    """
    does, worlds, videos = handlers.Handlers(shelf), Worlds(shelf), Videos(shelf)
    motions = Motions(shelf)
    with gr.Blocks(title="Blockloom", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(
            "<h1>Blockloom</h1><p>Type a few words and watch a small model draw them, "
            "block by block, on this machine.</p>",
            elem_id="bl-title",
        )
        with gr.Tab("Image", id="image"):
            if not shelf.names:
                gr.HTML(views.notice(NO_MODEL), elem_id="bl-no-model")
            _image_tab(does, shelf)
        with gr.Tab("Video", id="video"):
            _played_tab("video", video_page, videos.offers())
        with gr.Tab("Motion", id="motion"):
            _played_tab("motion", motion_page, motions.offers())
        with gr.Tab("World", id="world"):
            _played_tab("world", world_page, worlds.offers())
        with gr.Tab("Look inside", id="inside"):
            _inside_tab(does, page)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=4, api_open=False)
    page.played = [
        *video_routes.VideoRoutes(videos).routes(), *motion_routes.MotionRoutes(motions).routes(),
        *world_routes.WorldRoutes(worlds).routes(),
    ]  # fmt: skip
    return page


def _image_tab(does: handlers.Handlers, shelf: Shelf) -> None:
    session = gr.State(Session(), delete_callback=Session.clear)
    with gr.Row(equal_height=False, elem_id="bl-main"):
        with gr.Column(scale=5, min_width=320):
            box = _wish_boxes(does, shelf)
        with gr.Column(scale=5, min_width=320):
            idle = views.placeholder("idle", handlers.IDLE if shelf.names else "")
            box.canvas = gr.HTML(idle, elem_id="bl-canvas")
            box.turn = gr.HTML(elem_id="bl-turn")
    with gr.Row(equal_height=False, visible=False) as box.results:
        _result_boxes(box)
    _connect(does, session, box)


def _wish_boxes(does: handlers.Handlers, shelf: Shelf) -> SimpleNamespace:
    """Lay out what a visitor fills in."""
    box, names = SimpleNamespace(), shelf.names
    steps, guidance = does.recipe_defaults(names[0]) if names else (8, 1.0)
    box.prompt = gr.Textbox(
        label="What to draw", placeholder=wishes.EXAMPLES[0][0], lines=1, max_lines=1,
        max_length=2000, autofocus=True, elem_id="bl-prompt",
    )  # fmt: skip
    with gr.Row():
        box.style = gr.Dropdown(
            list(wishes.STYLES), value=wishes.STYLES[0], label="Style", min_width=130,
            elem_id="bl-style",
        )  # fmt: skip
        box.seed = gr.Textbox(
            label="Seed", placeholder="random", max_length=20, min_width=110, elem_id="bl-seed"
        )
        box.dice = gr.Button("↻", elem_id="bl-dice", scale=0)
    with gr.Row():
        can_draw = bool(names)
        box.draw = gr.Button(
            "Draw", variant="primary", interactive=can_draw, min_width=120, elem_id="bl-draw"
        )
        box.stop = gr.Button("Stop", min_width=120, elem_id="bl-stop")
    with gr.Row(elem_classes="bl-examples"):
        box.examples = [
            (gr.Button(f"{words}, {kind}", size="sm", interactive=can_draw), words, kind)
            for words, kind in wishes.EXAMPLES
        ]
    with gr.Accordion("More settings", open=False, elem_id="bl-more"):
        box.number = gr.Slider(1, wishes.MAX_PICTURES, 1, step=1, label="Pictures")
        box.rows = gr.Slider(1, wishes.MAX_STEPS, steps, step=1, label="Steps per block")
        box.weight = gr.Slider(
            0, wishes.MAX_GUIDANCE, guidance, step=0.1,
            label="Guidance: how strictly to follow the words; 1 is off",
        )  # fmt: skip
        box.model = gr.Dropdown(
            [(shelf.label(name), name) for name in names], value=names[0] if names else None,
            label="Model and its recipe", elem_id="bl-model",
        )  # fmt: skip
    return box


def _result_boxes(box: SimpleNamespace) -> None:
    """Lay out the gallery and what can be done with a picture of it."""
    with gr.Column(scale=6, min_width=320):
        gr.HTML("<h3>Your pictures, newest first</h3>", elem_classes="bl-heading")
        box.gallery = gr.Gallery(
            label="Your pictures", show_label=False, columns=3, fit_columns=False,
            object_fit="contain", height="auto", format="png", interactive=False,
            buttons=["download", "fullscreen"], elem_id="bl-gallery",
        )  # fmt: skip
    with gr.Column(scale=4, min_width=280, elem_id="bl-edit"):
        gr.HTML("<h3>Save or redraw</h3>", elem_classes="bl-heading")
        box.chosen = gr.HTML(elem_id="bl-chosen")
        box.download = gr.DownloadButton(handlers.SAVE, interactive=False, elem_id="bl-download")
        box.region = gr.Radio(
            ["left", "right", "top", "bottom"], value="right",
            label="Half to redraw from the words above", elem_id="bl-region",
        )  # fmt: skip
        box.redraw = gr.Button("Redraw", elem_id="bl-redraw")


def _connect(does: handlers.Handlers, session: gr.State, box: SimpleNamespace) -> None:
    """Say what happens on every click."""
    run = gr.Number(visible=False, precision=0)
    waits = [session, box.canvas, run]
    shown = [box.canvas, box.results, box.gallery, box.download, box.chosen, box.redraw]
    settings = [box.rows, box.weight, box.model]
    wish = [session, run, box.prompt, box.style, box.seed, box.number, *settings]
    change = [session, run, box.prompt, box.style, box.seed, box.region, *settings]
    # Values go to the handlers as they came: they check them all, in one form of words.
    quiet: dict[str, Any] = {"show_progress": "hidden", "preprocess": False}
    turn = TURN | quiet | {"show_progress": "minimal", "show_progress_on": box.turn}
    hidden = quiet | {"api_visibility": "private", "queue": False}
    gr.on([box.prompt.submit, box.draw.click], does.ask, session, waits, **hidden).then(
        does.draw, wish, shown, api_name="draw", **turn
    )
    box.redraw.click(does.ask, session, waits, **hidden).then(
        does.redraw, change, shown, api_name="redraw", **turn
    )
    for button, words, kind in box.examples:
        button.click(lambda w=words, k=kind: (w, k), None, [box.prompt, box.style], **hidden).then(
            does.ask, session, waits, **hidden
        ).then(does.draw, wish, shown, api_visibility="private", **turn)
    box.stop.click(does.stop, session, None, **hidden)
    box.dice.click(wishes.new_seed, None, box.seed, **hidden)
    box.model.input(does.recipe_defaults, box.model, [box.rows, box.weight], **hidden)
    box.gallery.select(does.choose, session, [box.download, box.chosen, box.redraw], **hidden)


def _played_tab(name: str, tab: Any, offers: list[dict[str, Any]]) -> None:
    """Lay out a tab whose script gets its frames past the queue.

    Args:
        name: Of the tab.
        tab: The room with its HTML and script.
        offers: The models it can use.
    """
    if offers:
        html, script = tab.markup(offers), tab.SCRIPT
        gr.HTML(html, js_on_load=script, apply_default_css=False, elem_id=f"bl-{name}")
    else:
        gr.HTML(views.notice(tab.NOTHING), elem_id=f"bl-no-{name}")


def _inside_tab(does: handlers.Handlers, page: gr.Blocks) -> None:
    names = inside.recipes()
    with gr.Row():
        recipe = gr.Dropdown(names, value="image/block_masked", label="Recipe", elem_id="bl-recipe")
        length = gr.Slider(
            inside.MIN_LENGTH, inside.MAX_LENGTH, 16, step=1, label="Tokens of the picture",
            elem_id="bl-length",
        )  # fmt: skip
        block = gr.Dropdown(
            list(inside.BLOCKS), value=inside.OWN_BLOCK, label="Block", elem_id="bl-block"
        )
    about = gr.HTML(elem_id="bl-about")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320, elem_classes="bl-view"):
            gr.HTML("<h3>Who may look at whom</h3>")
            mask = gr.HTML(elem_id="bl-mask")
        with gr.Column(min_width=320, elem_classes="bl-view"):
            gr.HTML("<h3>In which order it is drawn</h3>")
            order = gr.HTML(elem_id="bl-order")
    with gr.Column(elem_classes="bl-view"):
        gr.HTML("<h3>What is remembered</h3>")
        kept = gr.HTML(elem_id="bl-log")
    gr.on(
        [page.load, recipe.input, length.release, block.input], does.look,
        [recipe, length, block], [about, mask, order, kept], show_progress="hidden",
        preprocess=False, trigger_mode="always_last", api_name="look_inside",
        concurrency_limit=2,
    )  # fmt: skip


def doors(page: gr.Blocks) -> Doors:
    """List the page's functions with how many values each takes; sessions are not sent."""
    by_number, by_name = {}, {}
    for number, function in page.fns.items():
        total = len(function.inputs)
        sent = sum(not block.skip_api for block in function.inputs)
        by_number[number] = (total,)
        if function.api_name and function.api_visibility != "private":
            by_name[str(function.api_name)] = tuple(sorted({sent, total}))
    return Doors(by_number, by_name)


def server_settings(page: gr.Blocks, *, listen: str) -> dict[str, Any]:
    """List what the server under the page is built with: its guards and /healthz.

    Args:
        page: The page.
        listen: Address; on one of this machine's own, requests must name this machine, or a
            foreign name that resolves here (DNS rebinding) would make its page ours.
    """
    guards = [Middleware(Gate, doors=doors(page), large=world_routes.LARGE | motion_routes.LARGE)]
    if is_local(listen):
        names = sorted({"localhost", "127.0.0.1", "::1", "[::1]", listen})
        guards.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False))

    async def health(_: Request) -> JSONResponse:
        waiting = len(page._queue)  # the public number is only for those who are logged in
        return JSONResponse(
            {"status": "ok", "version": __version__, "waiting": waiting, "limit": MAX_WAITING}
        )

    return {"middleware": guards, "routes": [Route("/healthz", health), *page.played]}


def launch_settings(shelf: Shelf, *, listen: str, port: int, auth: Any) -> dict[str, Any]:
    """List what the server is started with; nothing here opens more than one address.

    Args:
        shelf: Its folders are not served.
        listen: Address.
        port: Port, 1..65535.
        auth: (user, password), or None.
    """
    temporary = Path(tempfile.gettempdir()).resolve()
    private = [Path.cwd().resolve(), Path.home().resolve(), *map(Path, shelf.folders)]
    return {
        "server_name": listen, "server_port": port, "auth": auth, "share": False,
        "show_error": False, "max_file_size": "20mb", "max_threads": 16, "allowed_paths": [],
        # A folder around the temporary one cannot be blocked: pictures are served from there.
        "blocked_paths": [str(p) for p in private if not temporary.is_relative_to(p)],
        "state_session_capacity": 200, "strict_cors": True, "run_history": False,
        "enable_monitoring": False, "mcp_server": False, "pwa": False, "ssr_mode": False,
        "footer_links": [], "theme": look.theme(), "quiet": True,
        "css": look.CSS + world_page.CSS + video_page.CSS + motion_page.CSS,
    }  # fmt: skip


def start(named: Sequence[str], *, listen: str, port: int, auth: Any = None) -> gr.Blocks:
    """Start serving and return at once.

    Args:
        named: Model folders or names beside the bundled ones.
        listen: Address.
        port: Port.
        auth: (user, password), or None.
    """
    shelf = Shelf(named)
    page = build(shelf)
    settings = launch_settings(shelf, listen=listen, port=port, auth=auth)
    server = server_settings(page, listen=listen)
    page.launch(prevent_thread_lock=True, inbrowser=False, app_kwargs=server, **settings)
    return page


def serve(named: Sequence[str], *, listen: str, port: int, auth: Any, ready: Any) -> None:
    """Serve until interrupted; `ready` is called with the address once it answers."""
    page = start(named, listen=listen, port=port, auth=auth)
    try:
        ready(page.local_url)
        threading.Event().wait()
    finally:
        page.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the demo with the flags of `blockloom demo`; returns the exit code."""
    return cli.main(["demo", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
