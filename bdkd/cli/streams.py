"""Replace standard streams that the caller closed (``2>&-``)."""

import errno
import os
import sys


def open_closed_streams() -> None:
    """Open the null device for each of the descriptors 0, 1 and 2 that is closed, and for each of
    ``sys.stdin``, ``sys.stdout`` and ``sys.stderr`` that is None.

    Python sets a stream to None if its descriptor is closed at startup. The next file that is
    opened then gets that descriptor, so that messages of C libraries would be written into it.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, closefd=False, errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, stream)
