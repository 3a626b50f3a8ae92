"""Functions and methods of libraries that wait, so that a coroutine which calls them blocks the event loop."""

from __future__ import annotations

from collections.abc import Collection

_THREAD = "run it in a thread"
_HTTP = "use httpx.AsyncClient"
_DATABASE = "use the driver's async side"
_PROCESS = "use anyio.run_process"
_VERBS = frozenset({"get", "post", "put", "patch", "delete", "head", "options", "request"})
_QUERIES = frozenset({"execute", "scalars", "scalar", "get", "query", "commit", "flush", "refresh", "rollback", "exec"})
_MAIL = frozenset({"connect", "login", "starttls", "sendmail", "send_message", "quit"})
_MONGO = frozenset({"insert_one", "insert_many", "find_one", "update_one", "update_many", "delete_one", "delete_many"})
_REDIS = frozenset({"get", "set", "setex", "delete", "incr", "expire", "publish", "lpush", "rpush", "hget", "hset"})

#: Functions as they are imported, and what to use instead.
FUNCTIONS = {
    "time.sleep": "use anyio.sleep or asyncio.sleep",
    **{f"{module}.{verb}": _HTTP for module in ("requests", "httpx") for verb in _VERBS},
    "httpx.stream": _HTTP,
    "urllib.request.urlopen": _HTTP,
    "urllib.request.urlretrieve": _HTTP,
    "urllib3.request": _HTTP,
    **{f"subprocess.{name}": _PROCESS for name in ("run", "call", "check_call", "check_output", "getoutput", "Popen")},
    **{f"os.{name}": _PROCESS for name in ("system", "popen", "wait", "waitpid")},
    **{f"{name}.connect": _DATABASE for name in ("sqlite3", "psycopg", "psycopg2", "pymysql", "MySQLdb", "cx_Oracle")},
    "mysql.connector.connect": _DATABASE,
    "psycopg.Connection.connect": _DATABASE,
    **{f"boto3.{name}": "use aioboto3" for name in ("client", "resource")},  # may ask for credentials over HTTP
    **{f"smtplib.{name}": "use aiosmtplib" for name in ("SMTP", "SMTP_SSL", "LMTP")},
    **{f"ftplib.{name}": _THREAD for name in ("FTP", "FTP_TLS")},
    "socket.create_connection": "use anyio.connect_tcp",
    "socket.getaddrinfo": "use anyio.getaddrinfo",
    "socket.gethostbyname": "use anyio.getaddrinfo",
    "shutil.copytree": _THREAD,
    "shutil.make_archive": _THREAD,
    "builtins.input": _THREAD,
}

#: Methods by the full name of their class or of one of its bases, and what to use instead.
METHODS: dict[str, tuple[Collection[str], str]] = {
    "requests.sessions.Session": (_VERBS | {"send"}, _HTTP),
    "httpx.Client": (_VERBS | {"send", "stream"}, _HTTP),
    "urllib3.poolmanager.PoolManager": ({"request", "urlopen"}, _HTTP),
    "http.client.HTTPConnection": ({"connect", "request", "getresponse"}, _HTTP),
    "smtplib.SMTP": (_MAIL, "use aiosmtplib"),
    "paramiko.client.SSHClient": ({"connect", "exec_command"}, _THREAD),
    "redis.client.Redis": (_REDIS, "use redis.asyncio"),
    "pymongo.synchronous.collection.Collection": (_MONGO, _DATABASE),
    "sqlalchemy.orm.session.Session": (_QUERIES, _DATABASE),
    "sqlalchemy.engine.base.Connection": (_QUERIES, _DATABASE),
    "sqlite3.Connection": (_QUERIES, _DATABASE),
    "psycopg.Connection": (_QUERIES, _DATABASE),
    "psycopg2.extensions.connection": (_QUERIES, _DATABASE),
}
