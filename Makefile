# make demo | make test | make test-all; with PY=python3 they run in the current environment (a CUDA machine with its own torch).
VENV := .venv
ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: demo test test-all integrations lint types gate bench report gpu-wheels gpu-evidence

# One thread: on shared cores each of the chunked path's many small operations would wait for the slowest of several threads.
demo: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) examples/demo.py

# Without a GPU the kernels run in Triton's interpreter, which takes most of the time: hence one test process per core.
test: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) -m pytest -q -n auto --dist loadgroup -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) -m pytest -q -n auto --dist loadgroup

# The trainers themselves, in the versions the integrations are tested with.
integrations: $(READY)
	$(PY) -m pip install -q -c constraints.txt -e '.[test,integrations]'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) -m pytest -q -n auto -m "not slow" tests/test_integration_*.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m mypy -p fused_losses
	$(PY) -m mypy tests/test_types.py

gate: $(READY)
	PYTHONPATH=. $(PY) tests/compile_gate.py

bench: $(READY)
	PYTHONPATH=. $(PY) -m pytest tests/test_benchmarks.py --benchmark-only --benchmark-columns=median
	PYTHONPATH=. $(PY) -m fused_losses.bench all --quick

report: $(READY)
	PYTHONPATH=. $(PY) -m fused_losses.bench report bench/results --into README.md

# On a machine with a network, before gpu-evidence on one without: the peers' wheels.
gpu-wheels: $(READY)
	$(PY) -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d .wheels -r bench/peers.txt

# Each step runs under eight minutes and continues where it stopped; STEPS="check tests" chooses.
gpu-evidence:
	PY=$(PY) bench/gpu_evidence.sh $(STEPS)

$(VENV)/ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt -e '.[test,lint]'
	touch $@
