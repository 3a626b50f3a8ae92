"""The journal: one SQLite file that keeps what was accepted beyond the process, for all workers of a machine."""
