"""Starts uvicorn from code: `serve_workers.py PORT WORKERS`."""

import sys

import uvicorn

if __name__ == "__main__":
    uvicorn.run("workers:app", port=int(sys.argv[1]), log_level="warning", workers=int(sys.argv[2]))
