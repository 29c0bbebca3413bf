"""What a confined process can't do: each tried by a real one, with both mechanisms and with either alone."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sora.core import sandbox
from sora.operations import doctor
from sora.operations.checks import machine

pytestmark = pytest.mark.skipif(bool(sandbox.lacking()), reason=f"this machine lacks {', '.join(sandbox.lacking())}")

# Imports and everything that is tried are ready before the sandbox, as in a decoder.
TRIES = """
import ctypes, errno, json, os, signal, socket, sys, threading
from pathlib import Path
from sora.core import sandbox

file, port, without = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
libc = ctypes.CDLL(None, use_errno=True)
inet, unix = socket.socket(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
other = socket.socket()

def call(*arguments):
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")

def fork():
    if os.fork() == 0:
        os._exit(0)

tries = {
    "read the parent's environment": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    "look into its own": lambda: Path("/proc/self/environ").read_bytes(),
    "read a file": file.read_bytes,
    "list a folder": lambda: os.listdir(file.parent),
    "remove a file": file.unlink,
    "rename a file": lambda: file.rename(file.with_name("else")),
    "write a file": lambda: file.write_bytes(b"x"),
    "make a file": lambda: file.with_name("new").touch(),
    "make a folder": file.with_name("folder").mkdir,
    "cut a file": lambda: os.truncate(file, 0),
    "connect": lambda: inet.connect(("127.0.0.1", port)),
    "bind": lambda: other.bind(("127.0.0.1", 0)),
    "abstract socket": lambda: unix.sendto(b"x", "\\0sora-test-" + str(port)),
    "signal the parent": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "start a shell": lambda: os.execv("/bin/sh", ["sh", "-c", "exit 0"]),
}
of_seccomp = {
    "make a socket": lambda: socket.socket(),
    "fork": fork,
    "look at a file": file.stat,
    "change its mode": lambda: file.chmod(0o777),
    "change the folder": lambda: os.chdir("/"),
    "trace the parent": lambda: call({"x86_64": 101, "aarch64": 117}[os.uname().machine], 16, os.getppid(), 0, 0),
    "read the parent's memory": lambda: call(
        {"x86_64": 310, "aarch64": 270}[os.uname().machine], os.getppid(), None, 0, None, 0, 0
    ),
    "clone as a process": lambda: call({"x86_64": 56, "aarch64": 220}[os.uname().machine], 17, 0, 0, 0, 0),
    "another's limits": lambda: call({"x86_64": 302, "aarch64": 261}[os.uname().machine], os.getppid(), 7, None, None),
    "lift it": lambda: call({"x86_64": 157, "aarch64": 167}[os.uname().machine], 8, 1, 0, 0, 0),
    "executable memory": lambda: call(
        {"x86_64": 9, "aarch64": 222}[os.uname().machine], None, 4096, 7, 0x22, -1, 0
    ),
    "ioctl": lambda: call({"x86_64": 16, "aarch64": 29}[os.uname().machine], 0, 0x5412, b"x"),
}
if without == "landlock":
    sandbox._landlock_abi = lambda libc: 0
if without == "seccomp":
    sandbox._MACHINES.clear()
else:
    tries |= of_seccomp
lacks = sandbox.confine()
found = {}
for name, attempt in tries.items():
    try:
        attempt()
        found[name] = "worked"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
thread = threading.Thread(target=lambda: found.setdefault("thread", "worked"))
thread.start()
thread.join()
print(json.dumps([list(lacks), found]))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("without", ["nothing", "landlock", "seccomp"])
def test_each_thing_that_it_tries_is_refused(without: str, tmp_path: Path) -> None:
    file = tmp_path / "the users.txt"
    file.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local:
        port = listener.getsockname()[1]
        local.bind(f"\0sora-test-{port}")
        command = [sys.executable, "-c", TRIES, str(file), str(port), without]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lacks, found = json.loads(done.stdout)
    assert found.pop("thread") == "worked"
    refused = {"EPERM", "EACCES"} if without == "seccomp" else {"EPERM"}
    assert {name: how for name, how in found.items() if how not in refused} == {}
    assert file.read_text() == "kept" and os.listdir(tmp_path) == [file.name]
    assert [what.split()[0] for what in lacks] == {"nothing": [], "landlock": ["Landlock"]}.get(without, ["seccomp"])


def test_it_can_be_done_for_threads_that_run_already() -> None:
    code = """
import os, sys, threading
from sora.core import sandbox
go, found = threading.Event(), []
def late():
    go.wait()
    try:
        os.open("/etc/hostname", os.O_RDONLY)
    except OSError as error:
        found.append(error.errno)
thread = threading.Thread(target=late)
thread.start()
assert sandbox.confine() == ()
go.set()
thread.join()
print(found)
sys.stdout.flush()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"[{errno.EPERM}]", done.stderr


def test_abort_still_ends_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import os; from sora.core import sandbox; sandbox.confine(); os.abort()"], timeout=60
    )
    assert done.returncode == -6


def test_memory_is_hidden_from_processes_of_the_same_user() -> None:
    """With root's rights it would be seen all the same, so root's test becomes another user first."""
    code = """
import ctypes, os
from pathlib import Path
from sora.core import sandbox
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # changing the user has switched it off
def look():
    if os.fork() == 0:
        try:
            Path(f"/proc/{os.getppid()}/environ").read_bytes()
        except PermissionError:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.wait()[1])
before = look()
sandbox.hide_memory()
print(before, look())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0", "7"], done.stderr


def test_the_command_line_and_stages_hide_their_memory() -> None:
    for code in (
        "from sora.cli import main\ntry:\n    main(['--version'])\nexcept SystemExit:\n    pass",
        "import sys\nfrom sora.dataset.versioning import stages\nstages.main(['none'])",
    ):
        seen = f"{code}\nimport ctypes\nprint(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
        done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, timeout=60)
        assert done.stdout.split()[-1] == "0", done.stderr


def test_doctor_says_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, Any]:
        check: dict[str, Any]
        (check,) = (check for check in doctor.doctor(None)["checks"] if check["name"] == "sandbox")
        return check

    monkeypatch.setattr(doctor, "MACHINE", (machine.sandbox,))
    whole = found()
    assert whole["ok"] and "Landlock ABI" in whole["detail"] and "seccomp" in whole["detail"]
    monkeypatch.setattr(sandbox, "_landlock_abi", lambda libc: 3)
    assert not found()["ok"] and "TCP and signals" in found()["detail"]
    monkeypatch.setattr(sandbox, "_landlock_abi", lambda libc: 0)
    monkeypatch.setattr(sandbox, "_MACHINES", {})
    bare = found()
    assert "Landlock (" in bare["detail"] and "seccomp (" in bare["detail"] and "by none" in bare["detail"]


def test_threads_are_few_before_it() -> None:
    """Landlock binds the calling thread and those it starts; nothing that Sora imports has started others."""
    code = "import os\nfrom sora.media.video import ffmpeg; from sora.media.video import spans\nffmpeg.import_all()\n"
    code += "print(len(os.listdir('/proc/self/task')))"
    from sora.media import pool

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=pool.bare_environment()
    )
    assert done.stdout.strip() == "1", done.stderr
