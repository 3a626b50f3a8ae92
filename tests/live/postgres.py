"""A real PostgreSQL on loopback: a cluster of its own in a temporary folder, ended by its own pid."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

from live.servers import eventually, free_port, process, program


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The address of a new database, as `//user@host:port/name`; skips, or fails, where PostgreSQL is not installed."""
    # Debian does not put these programs on the path.
    path = os.pathsep.join([os.defpath, *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)])
    initdb, server = program("initdb", path), program("postgres", path)
    # PostgreSQL refuses to run as root, and another user cannot enter pytest's folders.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="aftertask-postgres-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        data, port = folder / "data", free_port()
        command = [initdb, "--no-sync", "--auth=trust", "--username=shop", "--no-locale", "-E", "UTF8", str(data)]
        subprocess.run(command, check=True, capture_output=True, user=user, cwd=folder)
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"port={port}", "-c", "fsync=off"]
        options += ["-c", "unix_socket_directories="]
        with process(server, "-D", str(data), *options, log=folder / "log", user=user):
            address = f"//shop@127.0.0.1:{port}/postgres"

            def answers() -> bool:
                with contextlib.suppress(psycopg.OperationalError):
                    psycopg.connect(f"postgresql:{address}").close()
                    return True
                return False

            eventually(answers, seconds=60, what="PostgreSQL answering")
            yield address
    finally:
        shutil.rmtree(folder)
