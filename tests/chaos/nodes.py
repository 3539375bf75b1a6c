"""A Ray cluster of several nodes on one machine, whose nodes and processes can be killed."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.services import free_port, kill_tree

_RAY = Path(sys.executable).with_name("ray")
_STORE = str(80 * 2**20)


class Nodes:
    """A head without CPUs for training, and nodes that come and go; each is a `ray start`."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        """Start the head; logs go to `folder`."""
        self._environment = dict(environment)
        self._folder = folder
        folder.mkdir()
        self._log = (folder / "log.txt").open("w")
        self._scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets have short paths
        self._gcs, dashboard = free_port(), free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        # What Ray Train leaves behind is cleaned up by an actor that looks its cluster up by this,
        # or by what the last `ray start` on the machine wrote: there may be other clusters on it.
        self._environment["RAY_ADDRESS"] = f"127.0.0.1:{self._gcs}"
        self._workers: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._stopping = threading.Event()
        self._redis = self._start_redis()
        self._head_words = [
            *("--head", "--port", str(self._gcs), "--num-cpus", "0", "--temp-dir", self._scratch),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--ray-client-server-port", str(free_port())),
        ]
        self._head = self._start_head()

    @property
    def keeps_state(self) -> bool:
        """Whether what the head knows outlives it (in Redis), so that the nodes do too."""
        return self._redis is not None

    def restart_head(self) -> int:
        """Kill the head and start it again; gives the number of nodes that were lost with it."""
        self.wait()  # a node that is starting would be lost with the head
        kill_tree(self._head)
        lost = 0
        if self._redis is None:  # a new cluster, of which the old nodes know nothing
            lost = len(self._workers)
            while self._workers:
                kill_tree(self._workers.pop())
        # On one machine Ray takes the living nodes for a head that is still there.
        Path(self._scratch, "ray_current_cluster").unlink(missing_ok=True)
        self._head = self._start_head()
        return lost

    def add(self, cpus: int) -> None:
        """Start a node; it comes some seconds later."""
        thread = threading.Thread(target=self._add, args=(cpus,))
        self._threads.append(thread)
        thread.start()

    def _add(self, cpus: int) -> None:
        words = ("--address", f"127.0.0.1:{self._gcs}", "--num-cpus", str(cpus))
        while not self._stopping.is_set():
            node = self._start(*words)
            if node is not None:
                self._workers.append(node)
                return

    def status(self) -> str:
        """Say which nodes there are, what of them is taken, and what waits for room."""
        command = [str(_RAY), "status", "--address", f"127.0.0.1:{self._gcs}"]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    def wait(self) -> None:
        """Wait until all nodes that were started have come."""
        for thread in self._threads:
            thread.join()

    def kill_node(self, which: int) -> int:
        """Kill every process of a node at once, as if its machine was gone; gives their number."""
        if not self._workers:
            return 0
        return kill_tree(self._workers.pop(which % len(self._workers)))

    def warn_node(self, seconds: int, *words: str) -> subprocess.Popen[bytes] | None:
        """Say to Ray that the node with such a process is taken away in some seconds."""
        for node in self._workers:
            titles = _titles(node)
            if any(all(word in title for word in words) for title in titles):
                found = next(re.search(r"--node_id=(\w+)", t) for t in titles if "--node_id=" in t)
                assert found is not None
                command = [str(_RAY), "drain-node", "--address", f"127.0.0.1:{self._gcs}"]
                command += ["--node-id", found[1], "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
                command += ["--reason-message", "spot"]
                command += ["--deadline-remaining-seconds", str(seconds)]
                subprocess.run(
                    command, env=self._environment, stdout=self._log, stderr=self._log, check=True
                )
                return node
        return None

    def take_away(self, node: subprocess.Popen[bytes]) -> None:
        """Kill the node that was warned."""
        self._workers.remove(node)
        kill_tree(node)

    def kill_process(self, *words: str) -> int | None:
        """Kill a process of the cluster whose title has all the words; gives its id."""
        for process in self._processes():
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if all(word in title for word in words):
                    process.kill()
                    return int(process.pid)
        return None

    def has_process(self, *words: str) -> bool:
        """Tell whether a process of the cluster has all the words in its title."""
        for process in self._processes():
            with suppress(psutil.Error):
                if all(word in " ".join(process.cmdline()) for word in words):
                    return True
        return False

    def stop(self) -> None:
        """Stop everything."""
        self._stopping.set()
        self.wait()
        for node in (*self._workers, self._head):
            with suppress(psutil.Error):
                node.send_signal(signal.SIGTERM)
        for node in (*self._workers, self._head):
            with suppress(subprocess.TimeoutExpired):
                node.wait(10)
            kill_tree(node)
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait()
        self._log.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _start_redis(self) -> subprocess.Popen[bytes] | None:
        """Start Redis, for what the head knows, if this machine has it."""
        program = shutil.which("redis-server")
        if program is None:
            return None
        port = str(free_port())
        self._environment["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{port}"
        words = [program, "--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no"]
        return subprocess.Popen(words, stdout=self._log, stderr=self._log)

    def _start_head(self) -> subprocess.Popen[bytes]:
        tries = (self._start(*self._head_words) for _ in range(3))
        head = next((head for head in tries if head is not None), None)
        assert head is not None, f"the head did not start: see the logs in {self._folder}"
        deadline, port = time.monotonic() + 120, int(self.dashboard.rpartition(":")[2])
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert head.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        return head

    def _start(self, *words: str) -> subprocess.Popen[bytes] | None:
        """Start a node and wait until it has come; None when it did not, on a busy machine.

        One at a time: two that start at once on one machine take the same names of sockets.
        """
        command = [str(_RAY), "start", "--block", *words, "--object-store-memory", _STORE]
        with self._starting:
            command += ["--dashboard-agent-listen-port", str(free_port())]
            log = self._folder / f"node-{len(list(self._folder.glob('node-*')))}.log"
            with log.open("w") as file:
                node = subprocess.Popen(command, env=self._environment, stdout=file, stderr=file)
            while "Ray runtime started" not in log.read_text():
                if node.poll() is not None:
                    return None
                time.sleep(0.2)
            return node

    def _processes(self) -> list[psutil.Process]:
        found = []
        for node in (self._head, *self._workers):
            with suppress(psutil.Error):
                found += psutil.Process(node.pid).children(recursive=True)
        return found


def _titles(node: subprocess.Popen[bytes]) -> list[str]:
    titles = []
    with suppress(psutil.Error):
        for process in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.Error):
                titles.append(" ".join(process.cmdline()))
    return titles
