# make demo | make test | make test-all; with PY=python3 they run in the environment one is in (a CUDA machine with its own torch).
VENV := .venv
ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/ready
endif

.PHONY: demo test test-all lint types gate bench gpu-evidence

demo: $(READY)
	PYTHONPATH=. $(PY) examples/demo.py

# The kernels run in Triton's interpreter where there is no GPU, so a test process each core is what takes the time.
test: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) -m pytest -q -n auto -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) -m pytest -q -n auto

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m mypy -p fused_losses

gate: $(READY)
	PYTHONPATH=. $(PY) tests/compile_gate.py

bench: $(READY)
	PYTHONPATH=. $(PY) -m fused_losses.bench bench all --quick

gpu-evidence:
	bash bench/gpu_evidence.sh $(PY)

$(VENV)/ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt -e '.[test,lint]'
	touch $@
