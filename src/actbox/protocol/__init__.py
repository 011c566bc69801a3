"""The wire between a host and a kernel: bytes in, typed values out, no I/O."""
