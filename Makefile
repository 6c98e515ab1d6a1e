# One command a task. `make demo` and `make test` install what they need into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := src training exporters service tests benchmarks examples
# Two test processes with one thread each use two cores better than one process with two threads.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

.DEFAULT_GOAL := check
.PHONY: check cycle-demo demo test test-slow gpu format lint types spell quick proto bench crash lock clean help

help:  ## Show what can be made.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV): one to three minutes, most of it torch ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,train,export,ingest,cycle,dev]'
	@touch $@

demo: $(INSTALLED)  ## Adapt to a drawn site, export, serve and search. SITE= INIT= JSON= as `resight demo`.
	@$(BIN)/resight demo $(if $(SITE),--site "$(SITE)") $(if $(INIT),--init "$(INIT)") $(if $(JSON),--json "$(JSON)")

cycle-demo: $(INSTALLED)  ## Four simulated nights: film, the cycle against a service, poison, a rollback. JSON= SEED=
	@$(BIN)/resight cycle demo $(if $(JSON),--json "$(JSON)") $(if $(SEED),--seed "$(SEED)")

test: $(INSTALLED)  ## The tests, in under 10 minutes on 2 cores; what is skipped is listed with its reason.
	$(TEST) -m "not slow"

test-slow: $(INSTALLED)  ## Kills, nights and whole runs, in under an hour; what is skipped is listed with its reason.
	$(TEST) -m slow

# onnxruntime and faiss come in two builds each, which overwrite one another: the GPU's are put in last.
gpu:  ## With an NVIDIA GPU: the tests and benchmarks that need one, figures to docs/gpu.md.
	@if ! nvidia-smi -L >/dev/null 2>&1; then echo "make gpu: no NVIDIA GPU on this machine, nothing was run"; exit 0; fi; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || exit 1; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gpu,train,export,ingest,cycle,dev]' && \
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime faiss-cpu && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --force-reinstall --no-deps \
	  onnxruntime-gpu faiss-gpu-cuvs && \
	rm -f $(INSTALLED) && $(BIN)/python benchmarks/bench_gpu.py --tests

check: lint types spell quick  ## Format, lint, types, spelling and the quick tests.

format: $(INSTALLED)  ## Format the code.
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

lint: $(INSTALLED)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

# On an installed copy: mypy cannot see through the package-dir mapping of an editable install.
types: $(INSTALLED)
	@rm -rf build  # setuptools would pack what an earlier build left there
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p resight

spell: $(INSTALLED)
	$(BIN)/codespell $(CODE) docs README.md CONTRIBUTING.md CHANGELOG.md

quick: $(INSTALLED)
	$(TEST) -m "not slow and not long and not real"

proto: $(INSTALLED)  ## Generate the Python stubs from proto/resight/v1/*.proto.
	$(BIN)/python proto/generate.py

bench: $(INSTALLED)  ## Ratios against named peers, each within one run.
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

crash: $(INSTALLED)  ## Kill a storm of writes, and a server in a storm of calls, 200 times each (ROUNDS=).
	ROUNDS=$(or $(ROUNDS),200) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/service/test_crash.py tests/service/test_server_crash.py

lock: $(INSTALLED)  ## Write the versions now in .venv to constraints.txt.
	@{ echo "# The versions resight was tested with; \`make\` installs these. Made by \`make lock\`."; \
	   $(BIN)/pip freeze --exclude-editable | grep -v -iE '^(resight|pip|setuptools)\b' | sort -f; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

clean:  ## Remove what was built, not what was installed.
	rm -rf build dist *.egg-info demo cycle-demo
