"""The journal: one SQLite file for all workers of a machine, in which accepted runs outlive their process."""
