"""The heavy libraries: imported when first needed, by one thread at a time.

The page's two tabs work in two threads. Two first imports of diffusers at once break both, because
its modules import each other in a circle.
"""

import threading

LOCK = threading.Lock()


def load() -> None:
    """Import what drawing and looking inside need; later calls return at once."""
    with LOCK:
        from ..core import inspection, sampling  # noqa: F401
        from ..pipelines import image, motion, world  # noqa: F401
