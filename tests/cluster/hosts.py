"""Several hosts on this machine: each has its own network, processes, hostname, IPC, mounts, /dev/shm and sshd.

    with cluster(2, folder) as hosts:
        process = hosts.start("node0", ["ssh", "node1", "hostname"])

A host is the first process of unnamed namespaces, so nothing has a name that two runs could share, and the kernel
takes all of it away when that process ends: at the block's end, or when the process that entered it dies. The hosts'
cables end in a bridge that has namespaces of its own. They share this machine's files, /tmp included, as a cluster
shares its network disk, except /dev/shm, /run, /etc/hosts and the settings of ssh.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ISOLATED = ["--net", "--pid", "--fork", "--kill-child=KILL", "--mount", "--mount-proc", "--uts", "--ipc"]

SSHD = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
"""
SSH = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
BOOT = """\
set -e
hostname {name}
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
exec {sshd} -D -e -f {folder}/sshd_config
"""


def why_not() -> str:
    """Why this machine cannot have such hosts; empty where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are made of Linux namespaces, which needs root"
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=PATH) is None})
    if missing:
        return f"hosts need the Debian packages {', '.join(missing)}"
    try:
        check = (
            "mount -t tmpfs tmpfs /run && ip link add port0 type veth peer name port1 && ip link add br0 type bridge"
        )
        tried = subprocess.run(
            ["unshare", *ISOLATED, "sh", "-c", check], capture_output=True, text=True, timeout=20, env={"PATH": PATH}
        )
    except subprocess.TimeoutExpired:
        return "namespaces cannot be made here: no answer in 20 s"
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Hosts node0, node1, ... that run."""

    inits: dict[str, int]
    """By name, the host's first process."""
    addresses: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.Popen[str]:
        """A command on a host, as from its console; what it starts there dies with the host."""
        inside = shlex.join(["cd", str(folder or "/")]) + " && exec " + shlex.join(command)
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--target={self.inits[name]}", "--all", "sh", "-c", inside],
            env={"PATH": PATH, "HOME": os.environ.get("HOME", "/root"), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def processes(self, name: str) -> dict[int, dict[str, str]]:
        """By process id on this machine, the environment of each process of a host that runs Python."""
        own = os.readlink(f"/proc/{self.inits[name]}/ns/pid")
        found = {}
        for process in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(f"/proc/{process}/ns/pid") == own and "python" in os.readlink(f"/proc/{process}/exe"):
                    words = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
                    found[int(process)] = dict(word.split("=", 1) for word in words if "=" in word)
        return found

    def ranks(self) -> dict[int, dict[str, str]]:
        """The environment of each rank of a distributed run at this moment, and its host as ``HOST``."""
        return {
            int(environment["RANK"]): {**environment, "HOST": name}
            for name in self.inits
            for environment in self.processes(name).values()
            if "RANK" in environment
        }

    def kill_ranks(self, name: str) -> None:
        """Ends a host's training processes, and leaves the launcher's."""
        for process, environment in self.processes(name).items():
            if "RANK" in environment:
                os.kill(process, signal.SIGKILL)

    def end_all(self) -> None:
        """Ends what runs on the hosts, except their first processes, which are their sshd."""
        for init in self.inits.values():
            own = os.readlink(f"/proc/{init}/ns/pid")
            for process in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    if int(process) != init and os.readlink(f"/proc/{process}/ns/pid") == own:
                        os.kill(int(process), signal.SIGKILL)

    def cut(self, name: str) -> None:
        """Takes a host off the network; its processes go on."""
        command = ["nsenter", f"--target={self.inits[name]}", "--net", "ip", "link", "set", "eth0", "down"]
        subprocess.run(command, check=True, env={"PATH": PATH}, timeout=20)


@contextlib.contextmanager
def cluster(count: int, folder: Path) -> Iterator[Hosts]:
    """``count`` hosts, whose ssh finds all of them by name. Their keys and logs go into ``folder``."""
    names = [f"node{i}" for i in range(count)]
    addresses = {name: f"10.77.0.{10 + i}" for i, name in enumerate(names)}
    _write_settings(folder, addresses)
    spaces: list[subprocess.Popen[bytes]] = []
    hosts = Hosts(inits={}, addresses=addresses)
    try:
        bridge = "ip link add br0 type bridge && ip link set br0 up && exec sleep infinity"
        spaces.append(_isolated(bridge, folder / "bridge.log"))
        switch = _init_of(spaces[-1])
        for name in names:
            sshd = shutil.which("sshd", path=PATH)
            boot = BOOT.format(name=name, folder=folder, address=addresses[name], sshd=sshd)
            spaces.append(_isolated(boot, folder / f"{name}.log"))
            hosts.inits[name] = _init_of(spaces[-1])
            _plug_in(name, hosts.inits[name], switch)
        for name in names:
            _wait_for_ssh(hosts, name, folder / f"{name}.log")
        yield hosts
    finally:
        for process in [*hosts.started, *spaces]:
            process.kill()
        for process in [*hosts.started, *spaces]:
            process.wait(timeout=20)
            if process.stdout is not None:
                process.stdout.close()


def _write_settings(folder: Path, addresses: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
    subprocess.run(command, check=True, timeout=20, stdin=subprocess.DEVNULL)
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("".join(f"{line}\n" for line in lines))
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in addresses))


def _isolated(script: str, log: Path) -> subprocess.Popen[bytes]:
    """A shell script in namespaces of its own, which ends with this process."""
    with log.open("wb") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *ISOLATED, "sh", "-c", script],
            env={"PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _init_of(space: subprocess.Popen[bytes]) -> int:
    """The first process in the namespaces: the one child of unshare."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        children = Path(f"/proc/{space.pid}/task/{space.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text() != "unshare\n":
            return int(children[0])
        time.sleep(0.01)
    raise TimeoutError("namespaces were not made in 20 s")


def _plug_in(name: str, host: int, switch: int) -> None:
    """A cable from the host to the bridge."""
    inside = ["nsenter", f"--target={switch}", "--net", "ip", "link"]
    add = ["ip", "link", "add", name, "netns", str(switch), "type", "veth", "peer", "name", "eth0", "netns", str(host)]
    for command in (add, [*inside, "set", name, "master", "br0", "up"]):
        subprocess.run(command, check=True, env={"PATH": PATH}, timeout=20)


def _wait_for_ssh(hosts: Hosts, name: str, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        asked = hosts.start("node0", ["ssh", "-o", "ConnectTimeout=2", name, "hostname"])
        if asked.communicate(timeout=20)[0].strip() == name:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{name} does not answer\n{log.read_text()}")
