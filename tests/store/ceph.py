"""A real S3 service on loopback for tests: Ceph's radosgw with one monitor and one storage daemon in a folder.

Needs the programs radosgw, ceph-mon and ceph-osd (Debian: apt-get install radosgw ceph-mon ceph-osd). No root, no
system service; about 20 s to start, a gigabyte of memory. Every process is ended by its id.
"""

import ctypes
import shutil
import signal
import socket
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import free_port

ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
HOST = "s3.test"
"""The service's name, which no name server knows: a request to BUCKET.s3.test names its bucket there."""
PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph-authtool", "monmaptool")

_CONFIG = """
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}/0
mon_initial_members = a
public_network = 127.0.0.0/8
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = {root}/keyring
run_dir = {root}/run
admin_socket = {root}/run/$name.asok
pid_file = {root}/run/$name.pid
log_file = {root}/log/$name.log
crash_dir = {root}/log
log_to_stderr = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data_avail_crit = 1
mon_data_avail_warn = 2
[mon.a]
mon_data = {root}/mon
[osd]
osd_data = {root}/osd
osd_objectstore = bluestore
bluestore_block_create = true
bluestore_block_size = {size_bytes}
bluestore_cache_autotune = false
bluestore_cache_size = 134217728
osd_memory_target = 939524096
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 2
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
rgw_run_sync_thread = false
rgw_dynamic_resharding = false
rgw_override_bucket_index_max_shards = 1
rgw_enable_apis = s3, admin
rgw_dns_name = {host}
"""


class CephError(RuntimeError):
    """The service could not be started; the message says at which step."""


def missing_programs() -> list[str]:
    """The programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _end_with_parent() -> None:
    """In a daemon: get SIGTERM when the process that started it dies, also by SIGKILL (prctl, PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@dataclass
class Ceph:
    """The daemons below a folder. `start` it, `stop` it."""

    root: Path
    size_bytes: int = 8 << 30  # sparse: the disk holds what is written
    port: int = field(default_factory=free_port)
    _daemons: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the S3 service."""
        return "127.0.0.1", self.port

    def start(self) -> None:
        """Make the cluster and wait until it answers. Raises CephError, and leaves nothing running."""
        try:
            self._start()
        except (CephError, subprocess.SubprocessError, OSError) as error:
            self.stop()
            raise CephError(f"{error}; logs in {self.root}/log") from error

    def stop(self) -> None:
        """End the daemons, the last first."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _start(self) -> None:
        for name in ("mon", "osd", "log", "run"):
            (self.root / name).mkdir(parents=True)
        values = {
            "host": HOST,
            "root": self.root,
            "port": self.port,
            "mon_port": free_port(),
            "size_bytes": self.size_bytes,
        }
        self._config.write_text(_CONFIG.format(fsid=uuid.uuid4(), **values))
        self._make_monitor(values["mon_port"])
        self._daemon("ceph-mon", "-i", "a")
        self._until("mon", lambda: self._ceph("mon", "stat") is not None)
        self._make_storage()
        self._daemon("ceph-osd", "-i", "0", "--keyring", str(self.root / "osd" / "keyring"))
        self._until("osd", lambda: "1 up" in (self._ceph("osd", "stat") or ""))
        self._daemon("radosgw", "-n", "client.rgw.a")
        self._until("radosgw", self._answers)
        names = ["--uid=test", "--display-name=test", f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"]
        self._run("radosgw-admin", "-c", self._config, "-n", "client.rgw.a", "user", "create", *names)

    @property
    def _config(self) -> Path:
        return self.root / "ceph.conf"

    def _make_monitor(self, port: int) -> None:
        keyring, monmap = self.root / "keyring", self.root / "monmap"
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *everything)
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.rgw.a", *everything)
        fsid = self._config.read_text().split("fsid = ")[1].split()[0]
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{port}]", monmap)
        self._run("ceph-mon", "-c", self._config, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)

    def _make_storage(self) -> None:
        fsid, keyring = str(uuid.uuid4()), self.root / "osd" / "keyring"
        self._must("osd", "new", fsid)
        caps = ["mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd"]
        keyring.write_text(self._must("auth", "get-or-create", "osd.0", *caps))
        make = ["-i", "0", "--mkfs", "--osd-uuid", fsid, "--keyring", keyring]
        self._run("ceph-osd", "-c", self._config, *make)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(self.address, 1.0):
                return True
        except OSError:
            return False

    def _ceph(self, *command: str) -> str | None:
        """The output of a `ceph` command; None if it failed."""
        full = ["ceph", "-c", str(self._config), "--connect-timeout", "5", *command]
        done = subprocess.run(full, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout if done.returncode == 0 else None

    def _must(self, *command: str) -> str:
        answer = self._ceph(*command)
        if answer is None:
            raise CephError(f"ceph {' '.join(command)} failed")
        return answer

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise CephError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")

    def _daemon(self, program: str, *options: str) -> None:
        output = (self.root / "log" / f"{program}.out").open("wb")
        command = [program, "-c", str(self._config), "-f", *options]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        self._daemons.append(subprocess.Popen(command, preexec_fn=_end_with_parent, **pipes))
        output.close()

    def _until(self, what: str, ready) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            if self._daemons[-1].poll() is not None:
                raise CephError(f"{what} ended with code {self._daemons[-1].returncode}")
            if time.monotonic() > deadline:
                raise CephError(f"{what} did not come up in 60 s")
            time.sleep(0.1)
