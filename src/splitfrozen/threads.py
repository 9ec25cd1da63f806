"""One thread for NumPy's linear algebra.

Codecs multiply small matrices beside other work: a device's front, other requests of a server,
training. OpenBLAS would take all cores for each and its threads spin for a while after it, so where
cores are shared a few milliseconds become seconds (docs/log.md). torch has a BLAS of its own.
"""

from __future__ import annotations

from threadpoolctl import ThreadpoolController

_NUMPYS = "libscipy_openblas"
"""How the library that comes with NumPy's wheels is called, on every system."""


def one_for_numpy() -> None:
    """From now on; NumPy is loaded."""
    ThreadpoolController().select(prefix=_NUMPYS).limit(limits=1)
