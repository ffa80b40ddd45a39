"""A real Slurm on this machine: munge, slurmctld and a slurmd a node, each node with its own network and host name.

The daemons are children of this process and end with it. Needs root, network namespaces, and Debian's packages
`slurm-wlm`, `munge`, `iproute2` and `util-linux`; `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.cluster.lab.slurm_conf import write_conf

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "nsenter", "unshare")
PACKAGES = ("slurm-wlm", "munge", "iproute2", "util-linux")


def install() -> None:
    """Install Debian's packages where a command is missing; failures are left for `why_not` to tell."""
    if os.geteuid() or not shutil.which("apt-get") or all(shutil.which(name) for name in COMMANDS):
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    for command in (get, ["apt-get", "update"], get):
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        if done.returncode == 0 and command is get:
            return


def why_not() -> str | None:
    """Why there can be no lab here, or None."""
    if os.geteuid():
        return "a Slurm lab needs root, for network namespaces"
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install {' '.join(PACKAGES)})"
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False).returncode:
        return "network namespaces are not allowed here"
    return None


class Lab:
    """`with Lab() as lab: lab.run(["sinfo"])`. Nodes are n1, n2, ...; commands run on `head` unless told otherwise."""

    def __init__(self, *, num_nodes: int = 2, cpus: int = 8, gpus: int = 0, grace_s: int = 15,
                 daemons: bool = True) -> None:
        """A cluster of `num_nodes` that claim `cpus` and `gpus`; without `daemons` only slurmctld runs."""
        self.names = [f"n{i + 1}" for i in range(num_nodes)]
        self.sizes = {"cpus": cpus, "gpus": gpus, "grace_s": grace_s}
        self.daemons = daemons
        self.tag = f"mt{os.getpid() % 100000}{secrets.token_hex(1)}"
        self.net = "10.217.0"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Lab:
        self.root = Path(tempfile.mkdtemp(prefix="minitron-lab-", dir="/tmp"))
        try:
            self._prepare()
            self._start("munged", ["munged", "--foreground", "--force", f"--key-file={self.root}/munge/key",
                                   f"--socket={self.root}/munge/socket", f"--pid-file={self.root}/munge/pid",
                                   f"--log-file={self.root}/log/munged.log", f"--seed-file={self.root}/munge/seed"])
            self._wait(lambda: (self.root / "munge/socket").exists(), 20, "munged")
            self._start("slurmctld", self.inside("head", ["slurmctld", "-D"]))
            if self.daemons:
                for name in self.names:
                    self.start_node(name)
                self._wait(lambda: self.states().count("idle") == len(self.names), 60, "all nodes idle")
            else:
                self._wait(lambda: bool(self.states()), 30, "slurmctld")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.processes and self.processes["slurmctld"].poll() is None and self.daemons:
            with contextlib.suppress(subprocess.SubprocessError):
                self.run(["scancel", "--user=root"], check=False)
                self._wait(lambda: not self.run(["squeue", "-h"]).strip(), 20, "jobs to end")
        for name in ("slurmctld", *self.names, "munged"):
            self.stop(name, signal.SIGTERM)
        self._end_steps()
        for host in ("head", *self.names):
            subprocess.run(["ip", "netns", "del", f"{self.tag}-{host}"], capture_output=True, check=False)
        if "MINITRON_LAB_KEEP" in os.environ:
            print(f"lab kept in {self.root}")
        else:
            shutil.rmtree(self.root, ignore_errors=True)

    def _prepare(self) -> None:
        """Folders, the munge key, host names, and a bridge that the nodes hang on."""
        for folder in ("munge", "log", "state", *(f"spool-{name}" for name in self.names)):
            (self.root / folder).mkdir(mode=0o755)
        (self.root / "munge/key").write_bytes(secrets.token_bytes(1024))
        (self.root / "munge/key").chmod(0o600)
        write_conf(self.root, net=self.net, names=self.names, powered_off=not self.daemons,
                   **self.sizes)
        addresses = {"head": f"{self.net}.1", **{name: f"{self.net}.{11 + i}" for i, name in enumerate(self.names)}}
        (self.root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"{address} {name}\n" for name, address in addresses.items()))
        head = f"{self.tag}-head"
        ip = [["netns", "add", head], ["-n", head, "link", "set", "lo", "up"],
              ["-n", head, "link", "add", "br0", "type", "bridge"], ["-n", head, "link", "set", "br0", "up"],
              ["-n", head, "addr", "add", f"{addresses['head']}/24", "dev", "br0"]]
        for name in self.names if self.daemons else []:
            space = f"{self.tag}-{name}"
            ip += [["netns", "add", space], ["-n", space, "link", "set", "lo", "up"],
                   ["-n", head, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", space],
                   ["-n", head, "link", "set", f"to-{name}", "master", "br0", "up"],
                   ["-n", space, "addr", "add", f"{addresses[name]}/24", "dev", "eth0"],
                   ["-n", space, "link", "set", "eth0", "up"]]
        for arguments in ip:
            subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def inside(self, host: str, command: list[str]) -> list[str]:
        """`command` as it is started on `host`: its network, its name, the lab's hosts file."""
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        return ["nsenter", f"--net=/run/netns/{self.tag}-{host}", "unshare", "--uts", "--mount",
                "sh", "-c", script, "sh", host, str(self.root / "hosts"), *command]

    @property
    def environment(self) -> dict[str, str]:
        """For commands of Slurm."""
        return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {
            "SLURM_CONF": str(self.root / "slurm.conf")}

    def run(self, command: list[str], *, host: str = "head", check: bool = True, timeout: float = 60.0,
            cwd: Path | None = None, **environment: str) -> str:
        """Run a command to its end and return what it printed, both streams together."""
        done = subprocess.run(self.inside(host, command), env=self.environment | environment, check=False, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, cwd=cwd,
                              stdin=subprocess.DEVNULL)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    def start(self, command: list[str], *, host: str = "head", **arguments: object) -> subprocess.Popen[str]:
        """Start a command and return its process."""
        return subprocess.Popen(self.inside(host, command), env=self.environment, text=True,  # type: ignore[call-overload]
                                stdin=subprocess.DEVNULL, **arguments)

    def states(self) -> list[str]:
        """State of each node in short form: idle, alloc, mix, down."""
        shown = subprocess.run(self.inside("head", ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"]), text=True,
                               env=self.environment, capture_output=True, check=False, timeout=30)
        return shown.stdout.split()

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._start(name, self.inside(name, ["slurmd", "-D", "-N", name]))

    def stop(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a daemon: `munged`, `slurmctld` or a node's slurmd."""
        process = self.processes.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def link(self, name: str, state: str) -> None:
        """Set a node's network `up` or `down`."""
        subprocess.run(["ip", "-n", f"{self.tag}-head", "link", "set", f"to-{name}", state], check=True)

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        shown = self.run(["scontrol", "--oneliner", "show", "job", number])
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self.processes[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log,
                                                    stdin=subprocess.DEVNULL, start_new_session=True)

    def _wait(self, condition, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-600:]}"
                                 for path in sorted((self.root / "log").iterdir()))
                raise TimeoutError(f"the lab waited {seconds:.0f} s for {what}\n{logs}")
            time.sleep(0.1)

    def _end_steps(self) -> None:
        """Kill what outlived its slurmd: processes of this lab's jobs, known by their SLURM_CONF."""
        mark = f"SLURM_CONF={self.root}/slurm.conf".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        os.kill(int(folder.name), signal.SIGKILL)
