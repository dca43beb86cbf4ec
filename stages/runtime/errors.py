"""Errors of the machine that a user can act on."""

from __future__ import annotations

import errno
import re

REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOMEM}
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory")  # torch on a CPU, on CUDA


def resource_error(error: Exception) -> str | None:
    """Return one line for a lack of disk space, permission or memory, None for any other error."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return f"{error.filename or 'writing'}: {error.strerror}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return "out of memory; a training with a smaller batch_size and a larger grad_accum_steps needs less"
    return None
