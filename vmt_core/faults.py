"""What an error says of the process and its device, rather than of the video that was worked on."""

from __future__ import annotations

#: How allocators say it, and libraries that found no room for their handle or their workspace.
_MEMORY = (
    "can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", "STATUS_NOT_INITIALIZED",
    "unable to find an engine to execute",
)  # fmt: skip
#: Errors of the context; others of the same libraries, such as wrong arguments, leave it whole.
_BROKEN = ("CUDA error", "CUDA driver error", "CUDNN_STATUS_EXECUTION_FAILED")
_HARMLESS = ("STATUS_NOT_SUPPORTED", "STATUS_INVALID_VALUE")


def out_of_memory(error: BaseException) -> bool:
    """True for the ways in which torch and Python say it."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY)
    )


def device_is_broken(error: BaseException) -> bool:
    """True if the process cannot use its GPU any more: after such an error every later call fails as well."""
    if out_of_memory(error) or any(words in str(error) for words in _HARMLESS):
        return False
    return type(error).__name__ == "AcceleratorError" or any(words in str(error) for words in _BROKEN)
