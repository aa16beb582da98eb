"""The C library's memory, of which work that repeats itself takes and frees the same amount every time."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8  # of glibc's malloc.h


def keep_memory(most: int | None = None) -> bool:
    """Have the C library keep what this process frees, for the rest of its life; False where it cannot.

    Each step of training, and each batch of detection, frees the blocks that the next one takes. glibc gives
    large ones back to the system, which then clears every page anew. ``ssd train`` and the verbs that detect
    call this; a process that does more may want its memory back instead.

    Args:
        most: bytes that are kept at the end of the heap, of which threads that begin later all have one;
            those of their own would be given back whole. Where glibc allows it, blocks of more than a quarter
            of it, as of a very large photo, go back at once. By default all is kept.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    if most is None:
        return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
    # Earlier versions of glibc take no more than 32 MiB for the first.
    in_heap = mallopt(_M_MMAP_THRESHOLD, most // 4) or mallopt(_M_MMAP_MAX, 0)
    return bool(in_heap and mallopt(_M_TRIM_THRESHOLD, most) and mallopt(_M_ARENA_MAX, 1))
