"""A process that may read and write only what it is given, and reach nobody by TCP: Landlock, where the Linux kernel has it.

Landlock (kernel 5.13; TCP 6.7; signals, abstract sockets 6.12) needs no privilege, holds in containers, binds every thread
and child that is started afterwards, and cannot be undone. The system calls are in `man 7 landlock`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_VERSION_FLAG = 1
_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc", "/opt", "/sys", "/run/nvidia-persistenced")
# Not all of /proc: it has the environments of other processes, and root may read those whatever Landlock says of tracing.
_PROC = tuple(f"/proc/{name}" for name in ("self", "cpuinfo", "meminfo", "stat", "filesystems", "devices", "driver", "sys"))

# Bits of an access right on files, in the order of the kernel's header.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_DEVICES = _READ_FILE | _READ_DIR | _WRITE_FILE
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15}  # how many rights a kernel knows; later ones add nothing that we handle
_ALL_TCP = 0b11  # bind, connect; from ABI 4
_ALL_SCOPES = 0b11  # abstract sockets, signals; from ABI 6


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _Rule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def confine(*, readable: Iterable[Path], writable: Iterable[Path]) -> str | None:
    """Leave this process these folders, the system's programs and the devices; call it before threads start.

    Returns None if all of it holds, otherwise a sentence that says what does not. Folders that do not exist are passed over.
    Raises OSError if the kernel knows Landlock and refuses it all the same.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG) if sys.platform == "linux" else -1
    if abi < 1:
        return "This kernel has no Landlock: the process that opens model files is not confined."
    everything = (1 << _RIGHTS_BY_ABI.get(abi, 15)) - 1
    wanted = _Ruleset(everything, _ALL_TCP if abi >= 4 else 0, _ALL_SCOPES if abi >= 6 else 0)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, ctypes.byref(wanted), _size(abi), 0))
    try:
        for folders, allowed in ((_system(), _READ), (readable, _READ), ((Path("/dev"),), _DEVICES), (writable, everything)):
            for folder in folders:
                _allow(libc, ruleset, folder, allowed & everything)
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return None if abi >= 4 else "This kernel confines files only: the process that opens model files has the network."


def _size(abi: int) -> int:
    """How much of `_Ruleset` a kernel of that age reads."""
    fields = 3 if abi >= 6 else 2 if abi >= 4 else 1
    return fields * ctypes.sizeof(ctypes.c_uint64)


def _system() -> list[Path]:
    """Where programs and libraries are: the system's, Python's, and our own packages.

    The folder that our packages lie in is left out: an installation's state, and with it the keyring, is often below it.
    """
    ours = Path(__file__).resolve().parent.parent
    libraries = [entry for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    imported = [Path(entry).resolve() for entry in sys.path if entry]
    folders = [*map(Path, (*_SYSTEM, *_PROC, sys.prefix, sys.base_prefix, *libraries)), *imported]
    return [*(folder for folder in folders if not ours.is_relative_to(folder)), ours / "secateur", ours / "workers"]


def _allow(libc: ctypes.CDLL, ruleset: int, folder: Path, allowed: int) -> None:
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not folder.is_dir():
            allowed &= _EXECUTE | _READ_FILE
        rule = _Rule(allowed, descriptor)
        _checked(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0))
    finally:
        os.close(descriptor)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result
