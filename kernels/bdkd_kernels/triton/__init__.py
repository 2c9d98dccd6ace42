"""The Triton backend: device code, launch table and host code."""
