"""What an error says of the process and its device, rather than of the video that was worked on."""

from __future__ import annotations


def out_of_memory(error: BaseException) -> bool:
    """True for the ways in which torch and Python say it."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED"))
    )


def device_is_broken(error: BaseException) -> bool:
    """True if the process cannot use its GPU any more: after such an error every later call fails as well."""
    return not out_of_memory(error) and (
        type(error).__name__ == "AcceleratorError"
        or any(words in str(error) for words in ("CUDA error", "CUDNN_STATUS_EXECUTION_FAILED"))
    )
