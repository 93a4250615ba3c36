"""Several machines on one: each a set of Linux namespaces with an own network, own processes, own /tmp and home, and sshd.

What belongs to them is gone when their first processes are: nothing of it has a name in the machine's own network or files.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "unshare": "util-linux"}
"""Needed programs and the Debian packages that they come in."""
HOME = Path("~").expanduser()
BUCKET = ["burst", "32kbit", "latency", "400ms"]
"""Of a slow connection: bytes that pass at once, and how long others wait before they are dropped."""
SWITCH, CLIENT = "10.87.0.1", "10.87.0.2"


def why_not() -> str | None:
    """Why hosts are not made here; None if they are to be, and can."""
    if os.environ.get("PERCEIVER_TEST_HOSTS") != "1":
        return "makes hosts of namespaces and starts sshd in them: set PERCEIVER_TEST_HOSTS=1 to run it"
    missing = sorted({package for program, package in PROGRAMS.items() if not find(program)})
    if missing:
        return f"needs the Debian packages {' '.join(missing)}"
    made = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "bash", "-c", TRIAL, find("ip")],
        capture_output=True, text=True,
    )  # fmt: skip
    if os.getuid() != 0 or made.returncode:
        return f"may not make namespaces with networks here (root may): {made.stderr.strip()}"
    return None


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Host:
    """One machine. Its first process is a shell that keeps sshd; the machine dies with it."""

    def __init__(self, name: str, folder: Path, shared: Path) -> None:
        self.name, self.home, self.tmp = name, folder / name / "home", folder / name / "tmp"
        for path in (self.home / ".ssh", self.tmp):
            path.mkdir(parents=True)
        (self.home / ".ssh").chmod(0o700)
        names = folder / "names"
        # As Debian has it: a host's own name is an address of its loopback.
        (folder / name / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{names.read_text()}")
        (folder / name / "resolv.conf").touch()  # nobody to ask
        self._outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child",
             "--mount-proc", "bash", "-c", INIT, name, str(folder / name), str(shared), str(HOME), visible(shared), find("sshd")],
            stdout=open(folder / name / "init.txt", "w"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.pid = self._first_process()

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if self._outer.poll() is None and (found := children.read_text().split()):
                return int(found[0])
            time.sleep(0.02)
        raise AssertionError(f"{self.name} does not start")

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command on this machine, in the folder of this repository."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--uts"]
        return [*enter, "bash", "-c", 'cd "$0" && exec "$@"', str(ROOT), *command]

    def processes(self) -> list[str]:
        """Command lines of what runs on this machine, but for its first process and sshd."""
        return [line for _, line in self._listed()]

    def _listed(self) -> list[tuple[int, str]]:
        found, own = [], os.stat(f"/proc/{self.pid}/ns/pid").st_ino if self.alive else None
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_text().replace("\0", " ").strip()
                if os.stat(folder / "ns/pid").st_ino == own and int(folder.name) != self.pid and line:
                    found.append((int(folder.name), line))
            except OSError:
                continue  # it has ended
        return [(pid, line) for pid, line in found if "sshd" not in line.split()[0]]

    def pids(self) -> list[int]:
        """Ids, in the machine's own numbers, of what `processes` lists."""
        return [pid for pid, _ in self._listed()]

    @property
    def alive(self) -> bool:
        return self._outer.poll() is None

    def kill(self) -> None:
        """As a machine goes that loses its power."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
        self._outer.wait(30)


class Hosts:
    """Machines on a switch of their own, and a client outside the cluster beside them. All see one folder as /mnt/perceiver
    (but the client) and can be reached by ssh with the client's key."""

    def __init__(self, folder: Path, number: int) -> None:
        self.shared = folder / "shared"
        self.shared.mkdir()
        addresses = {f"host{i}": f"10.87.0.{10 + i}" for i in range(number)}
        self.addresses = list(addresses.values())
        (folder / "names").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        self._switch = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"])
        self.client = Host("client", folder, self.shared)
        self.hosts = [Host(name, folder, self.shared) for name in addresses]
        self._connect()
        self._share_keys()

    def _connect(self) -> None:
        self._ip(self._switch.pid, "link add switch type bridge", "link set switch up", f"address add {SWITCH}/24 dev switch")
        for number, (host, address) in enumerate(zip([self.client, *self.hosts], [CLIENT, *self.addresses], strict=True)):
            self._ip(
                self._switch.pid, f"link add port{number} type veth peer name eth0 netns {host.pid}",
                f"link set port{number} master switch", f"link set port{number} up",
            )  # fmt: skip
            self._ip(
                host.pid, "link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up",
                f"route add default via {SWITCH}",
            )  # fmt: skip

    def _share_keys(self) -> None:
        """The client's key opens all hosts."""
        key = self.client.home / ".ssh" / "perceiver-ray"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        for host in self.hosts:
            shutil.copy(key.with_suffix(".pub"), host.home / ".ssh" / "authorized_keys")

    @staticmethod
    def _ip(pid: int, *commands: str) -> None:
        for command in commands:
            subprocess.run(["nsenter", "--target", str(pid), "--net", find("ip"), *command.split()], check=True)

    def run(self, *command: str, timeout: float = 300, check: bool = True, **environment: str) -> str:
        """What a command of the client's prints."""
        done = subprocess.run(
            self.client.inside(*command), env=self.environment | environment, capture_output=True, text=True,
            timeout=timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self, *command: str, log: Path) -> subprocess.Popen:
        """A command of the client's that keeps running."""
        output = open(log, "w")
        return subprocess.Popen(
            self.client.inside(*command), env=self.environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """Of the client's commands: that of the tests, without what they set for Ray."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PERCEIVER_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        return kept | {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}

    def cut(self, number: int) -> None:
        """Pulls the plug of a host's network."""
        self._ip(self._switch.pid, f"link set port{number + 1} down")

    def join(self, number: int) -> None:
        self._ip(self._switch.pid, f"link set port{number + 1} up")

    def slow(self, number: int, rate: str) -> None:
        """Lets no more than so much (`2mbit`) through to a host and from it in a second; `0`: all again."""
        tc, ends = find("tc"), [(self._switch.pid, f"port{number + 1}"), (self.hosts[number].pid, "eth0")]
        for pid, end in ends:
            words = ["del", "dev", end, "root"] if rate == "0" else ["add", "dev", end, "root", "tbf", "rate", rate, *BUCKET]
            subprocess.run(["nsenter", "--target", str(pid), "--net", tc, "qdisc", *words], check=True)

    def close(self) -> None:
        for host in [self.client, *self.hosts]:
            host.kill()
        self._switch.kill()
        self._switch.wait(30)


def visible(shared: Path) -> str:
    """Folders that a host must see although its own /tmp or home may hide them: Python, this repository, and what it shares."""
    folders = sorted({sys.prefix, sys.base_prefix, str(ROOT), str(shared)})
    return ":".join(f for f in folders if any(Path(f).is_relative_to(place) for place in ("/tmp", HOME, "/mnt")))


TRIAL = """
set -e
"$0" link add switch type bridge
"$0" link add port type veth peer name eth0
mount -t tmpfs mnt /mnt
"""
"""What only some machines let root do in namespaces."""

INIT = """
set -e
folder=$1 shared=$2 home=$3 visible=$4 sshd=$5
hostname "$0"
mount -t tmpfs kept /run && mkdir -p /run/sshd /run/kept
IFS=:
for path in $visible; do mkdir -p "/run/kept$path"; mount --bind "$path" "/run/kept$path"; done
mkdir -p /run/shared && mount --bind "$shared" /run/shared
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/resolv.conf" "$(readlink -f /etc/resolv.conf)"
mount --bind "$folder/home" "$home"
mount --bind "$folder/tmp" /tmp && chmod 1777 /tmp
mount -t tmpfs mnt /mnt
for path in $visible; do mkdir -p "$path"; mount --bind "/run/kept$path" "$path"; done
if [ "$0" = client ]; then sleep infinity; exit; fi
mkdir /mnt/perceiver && mount --bind /run/shared /mnt/perceiver
ssh-keygen -q -t ed25519 -N '' -f "$home/.ssh/host_key"
"$sshd" -D -e -f /dev/null -o UsePAM=no -o PidFile=none -o StrictModes=no -o PermitRootLogin=prohibit-password \
    -o HostKey="$home/.ssh/host_key" -o AuthorizedKeysFile="$home/.ssh/authorized_keys" -o UseDNS=no &
wait
"""
"""A host's first process. Its name is the shell's $0."""
