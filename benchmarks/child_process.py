"""A function in, its result from a process of its own out."""

from __future__ import annotations

import concurrent.futures
import multiprocessing


def in_child(function, *arguments):
    """A function's result, from a process whose memory goes with it."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
