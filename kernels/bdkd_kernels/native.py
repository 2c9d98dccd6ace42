"""The C++ CPU kernel, loaded through ctypes."""

from .types import Availability

AVAILABILITY = Availability(False, "not built yet")
