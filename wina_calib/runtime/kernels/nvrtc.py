"""CUDA code compiled as it is needed, by the compiler that comes with torch (NVRTC), and started through the driver."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from wina_calib.runtime.patches.triton_launch import raw_stream

# From the driver's header: attributes of a function and of a launch, and the errors of a thread without a context.
MAX_SHARED_ATTRIBUTE = 8
LARGE_CLUSTER_ATTRIBUTE = 14
OVERLAP_ATTRIBUTE = 6
NO_CONTEXT = (3, 201)
# Shared memory of a block that needs no asking.
PLAIN_SHARED_BYTES = 48 << 10


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class Launch:
    """A kernel with its launch shape, started again and again with other addresses.

    With `overlap` it may start while the kernel before drains, and has to wait for that itself (`griddepcontrol.wait`).

    Args:
        function: from `load`, of the card that is current whenever this is called.
        grid: blocks.
        threads: of a block.
        shared: bytes of shared memory of a block.
        addresses: how many addresses the kernel takes first.
        sizes: whole numbers that it takes after them.
        overlap: for cards that have it, Hopper and later.
    """

    def __init__(
        self,
        function: ctypes.c_void_p,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        addresses: int,
        sizes: Sequence[int],
        *,
        overlap: bool = True,
    ) -> None:
        self.function = function
        if shared > PLAIN_SHARED_BYTES:
            call(_driver().cuFuncSetAttribute, function, MAX_SHARED_ATTRIBUTE, shared)
        self.attribute = _Attribute(id=OVERLAP_ATTRIBUTE, value=1)
        self.launch = _Launch(grid, (threads, 1, 1), shared, None, ctypes.pointer(self.attribute), int(overlap))
        self.at = ctypes.addressof(self.launch)
        self.addresses, self.sizes = (ctypes.c_uint64 * addresses)(), (ctypes.c_int * len(sizes))(*sizes)
        places = [ctypes.addressof(self.addresses) + 8 * i for i in range(addresses)]
        places += [ctypes.addressof(self.sizes) + 4 * i for i in range(len(sizes))]
        self.arguments = (ctypes.c_void_p * len(places))(*places)
        self.start = _driver().cuLaunchKernelEx
        self.lock = threading.Lock()

    def __call__(self, *addresses: int) -> None:
        """Enqueue it on the current stream; an address of 0 is none."""
        stream = raw_stream()
        with self.lock:
            self.addresses[:] = list(addresses)
            self.launch.stream = stream
            call(self.start, self.at, self.function, self.arguments, None)


@cache
def _driver() -> Any:
    """The driver's functions."""
    library = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.c_void_p
    library.cuModuleLoadData.argtypes = [ctypes.POINTER(pointer), pointer]
    library.cuModuleGetFunction.argtypes = [ctypes.POINTER(pointer), pointer, ctypes.c_char_p]
    library.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    library.cuLaunchKernelEx.argtypes = [pointer] * 4
    return library


def call(function: Callable[..., int], *arguments: Any) -> None:
    """Call the driver, again where the thread has not used the card yet. Raises RuntimeError for another error."""
    error = function(*arguments)
    if error in NO_CONTEXT:
        torch.cuda.current_stream().query()
        error = function(*arguments)
    if error:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(error, ctypes.byref(name))
        raise RuntimeError(f"the CUDA driver answers with {(name.value or b'an unknown error').decode()} ({error})")


def load(code: bytes, name: str) -> ctypes.c_void_p:
    """The kernel of this name in machine code, on the current card.

    Raises:
        OSError: there is no driver.
        RuntimeError: the card does not take it.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call(_driver().cuModuleLoadData, ctypes.byref(module), code)
    call(_driver().cuModuleGetFunction, ctypes.byref(function), module, name.encode())
    return function


def allow_large_clusters(function: ctypes.c_void_p) -> None:
    """Let a kernel have clusters of more than 8 blocks. Raises RuntimeError where the card has none."""
    call(_driver().cuFuncSetAttribute, function, LARGE_CLUSTER_ATTRIBUTE, 1)


@cache
def compiler() -> ctypes.CDLL:
    """NVRTC, of torch's own version of CUDA. Raises OSError where it is not."""
    if torch.version.cuda is None:
        raise OSError("this torch is built without CUDA")
    return ctypes.CDLL(f"libnvrtc.so.{torch.version.cuda.split('.')[0]}")


def build(source: Path, architecture: str, constants: Mapping[str, int]) -> bytes:
    """Machine code for an architecture such as `sm_90`, of a file that may include the headers beside it.

    Raises:
        OSError: there is no NVRTC.
        RuntimeError: it does not compile.
    """
    nvrtc, program, size = compiler(), ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture={architecture}", *(f"-D{name}={value}" for name, value in constants.items())]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    files = sorted(source.parent.glob("*.cuh"))
    texts = (ctypes.c_char_p * len(files))(*(file.read_bytes() for file in files))
    names = (ctypes.c_char_p * len(files))(*(file.name.encode() for file in files))
    text, name = source.read_bytes(), source.name.encode()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, len(files), texts, names):
        raise RuntimeError("NVRTC takes no program")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(
                f"{source.name} does not compile for {architecture}: {log.value.decode(errors='replace')[:500]}"
            )
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
