"""The C library's memory, which training takes and frees the same amount of in each step."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory() -> bool:
    """Have the C library keep what this process frees, for the rest of its life; False where it cannot.

    Each step frees the blocks that the next one takes. glibc gives large ones back to the system, which then
    clears every page anew. ``ssd train`` calls this; a process that does more than training may want its
    memory back instead.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
