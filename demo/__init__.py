"""The demo in a browser: what it draws, what it shows, and what each visitor keeps.

`app.py` lays out the page; the files here do the work. Pictures go through Gradio's queue
(`handlers.py`); videos, motions and worlds go through addresses of their own (`video_routes.py`,
`motion_routes.py`, `world_routes.py`), because an event of the page per frame would cost more than
the frame. But for these, `streams.py`, `look.py`, `gate.py`, `answers.py` and the pages with their
scripts, no file knows that a browser is involved.
"""
