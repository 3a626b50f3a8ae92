# Every command makes its own virtual environment first; nothing has to be installed by hand but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
EXAMPLES := $(VENV)/.examples

.PHONY: test check long crash docs demo demo-celery screenshots bench upstream realworld versions grafana dashboards format clean

PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

$(EXAMPLES): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) -e ".[all]" --group examples
	touch $(EXAMPLES)

$(STAMP): $(EXAMPLES)
	$(PIP) --group dev
	touch $(STAMP)

test: check ## lint, types and the tests
	$(BIN)/python -m pytest -q -rs -n auto --dist worksteal

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

long: upstream docs ## what takes minutes: upstream suites, real servers, the documentation, slow tests
	$(BIN)/python -m pytest -q -m "long and not alone" -n auto --dist loadfile
	$(BIN)/python -m pytest -q -m "long and alone"

docs: $(STAMP) ## the documentation as a website in site/; a broken link is an error
	$(BIN)/zensical build --clean --strict

crash: $(STAMP) ## kill real servers 2 000 times, and compare what their tasks did with the journal; takes over an hour
	$(BIN)/python tests/crash.py

demo: $(EXAMPLES) ## a small shop under uvicorn with its own traffic; `make demo SECONDS=20` stops by itself
	$(BIN)/python examples/shop/demo.py $(if $(SECONDS),--seconds $(SECONDS))

demo-celery: $(EXAMPLES) ## a web app, two Celery workers and Redis, with traffic; needs redis-server
	$(BIN)/python examples/celery_offload/run.py $(if $(SECONDS),--seconds $(SECONDS))

screenshots: $(STAMP) ## the pictures of the README and the docs, from the running demo, with Debian's Chromium
	$(BIN)/python docs/screenshots.py

bench: $(STAMP) ## what observing a task costs, beside the same signals written by hand
	$(BIN)/python tests/bench/overhead.py
	$(BIN)/python tests/bench/history.py
	$(BIN)/python tests/bench/hazards.py
	$(BIN)/python tests/bench/journal.py
	$(BIN)/python tests/bench/run_after.py
	$(BIN)/python tests/bench/offload.py
	$(BIN)/python tests/bench/celery_worker.py

upstream: $(STAMP) ## Starlette's and FastAPI's own suites, bare and with the middleware in every app
	$(BIN)/python tests/upstream/run.py
	$(BIN)/python tests/upstream/run.py --run-after request

realworld: $(STAMP) ## the suites of tracers, libraries and an application, with an empty middleware and with ours
	$(BIN)/python tests/upstream/run.py --realworld

versions: $(STAMP) ## the tests on all declared minimums, other FastAPI and Starlette versions, newer Python
	$(BIN)/python tests/versions.py

grafana: ## Grafana with the dashboards, and all that they show, where Docker is: http://localhost:3000
	@docker compose version >/dev/null 2>&1 || { echo "make grafana needs Docker with its compose plugin; \
	without it see docs/dashboards.md" >&2; exit 1; }
	docker compose -f grafana/compose.yaml up --build

dashboards: $(STAMP) ## write the dashboards and alert rules anew
	$(BIN)/python dashboards/generate

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
