"""A session's model in, a page to write with in the notebook out."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from .. import session
from ..common.checks import check_whole
from ..common.report import in_notebook, say
from .engine import Engine
from .launch import import_extra

# An address of this machine alone.
_HOST = "127.0.0.1"

_MAX_BATCH, _MAX_QUEUE = 32, 64
_TIMEOUT_SECONDS = 600.0
_GRACE_SECONDS = 2


class Page:
    """A page to write with, and its server in this process.

    Attributes:
        address: to open in a browser of this machine.
    """

    def __init__(self, sess: tf.compat.v1.Session, on_close: Callable[[], object]) -> None:
        """Starts the server; play() is the way to make one."""
        self._on_close = on_close
        api, servers = import_extra("api"), import_extra("server")
        self._engine = Engine(sess, _MAX_BATCH, _MAX_QUEUE)
        self._engine.start()
        try:
            self._start(sess, api, servers)
        except BaseException:
            self._engine.close()
            raise
        atexit.register(self.close)

    def _start(self, sess: tf.compat.v1.Session, api: Any, servers: Any) -> None:
        state = session.graph_state(sess)
        name = os.path.basename(state.loaded_folder or "") or "model"
        in_colab = "google.colab" in sys.modules
        limits = api.Limits(
            # Colab's proxy gives the page another origin, and the server another name.
            allow_origin=("*",) if in_colab else (),
            hosts=() if in_colab else (_HOST, "localhost"),
            timeout=_TIMEOUT_SECONDS,
            in_frames=True,
        )
        self._server = servers.Server(api.make_app({name: self._engine}, limits), _GRACE_SECONDS)
        self._engine.on_death = lambda _: self._server.stop()
        started, self.address = threading.Event(), ""

        def on_start(address: str) -> None:
            self.address = address
            started.set()

        def work() -> None:
            try:
                with servers.bound_socket(_HOST, 0) as listener:
                    self._server.serve_until_stopped(listener, on_start)
            except RuntimeError:
                # At Python's end asyncio cannot start the thread that ends its helpers.
                if threading.main_thread().is_alive():
                    raise
            finally:
                started.set()

        self._thread = threading.Thread(target=work, name="gpt_2_simple page", daemon=True)
        self._thread.start()
        started.wait()
        if not self.address:
            raise RuntimeError("the page's server could not start; see the error above")

    @property
    def is_open(self) -> bool:
        """Whether the page can write."""
        return self._thread.is_alive() and self._engine.error is None

    def close(self) -> None:
        """Ends the server; the page can write no more. The session stays."""
        atexit.unregister(self.close)
        self._server.stop()
        self._thread.join(2 * _GRACE_SECONDS + 5)
        self._engine.close()
        self._on_close()

    def __repr__(self) -> str:
        return f"Page({self.address!r}{'' if self.is_open else ', closed'})"


_pages: dict[tf.compat.v1.Session, Page] = {}  # those that are open
_opening = threading.Lock()


def play(sess: tf.compat.v1.Session, height: int = 760) -> Page:
    """Opens a page to write with, together with the session's model: below a notebook's cell.

    It is the page of `gpt_2_simple serve`. Needs `pip install "gpt_2_simple[serve]"`. A second call
    shows the same page again. In a script, open `address` in a browser while the script runs.

    Args:
        sess: a session that holds a model.
        height: of the page in the notebook, in pixels.

    Returns:
        The page: `address`, and close(), which ends its server. The process's end does so too.

    Raises:
        ImportError: an extra package is missing.
        RuntimeError: the session is closed or holds no model, or its weights are not finite.
        ValueError: `height` is below 1.
    """
    height = check_whole("height", height, 1)
    session.graph_state(sess).hparams  # noqa: B018 - raises if there is no model
    with _opening:
        page = _pages.get(sess)
        if page is None or not page.is_open:
            page = _pages[sess] = Page(sess, lambda: _pages.pop(sess, None))
    _show(page.address, height)
    return page


def _show(address: str, height: int) -> None:
    if "google.colab" in sys.modules:
        from google.colab import output

        output.serve_kernel_port_as_iframe(int(address.rpartition(":")[2]), height=str(height))
        return
    if in_notebook():
        with contextlib.suppress(ImportError):
            from IPython.display import IFrame, display

            display(IFrame(f"{address}/", width="100%", height=height))
    say(f"The page is at {address}/")
