"""The demo in a browser: what it draws, what it shows, and what each visitor keeps.

`app.py` lays out the page; the files here do the work and, but for `look.py`, `handlers.py`
and `gate.py`, do not know that a browser is involved.
"""
