# A newcomer needs two of these: `make quickstart` and `make test`. README.md has the plain pip way.
VENV ?= .venv
EXTRAS ?= test
WORKERS ?= 2
CONFIG ?= configs/quickstart.py
comma := ,
python := $(VENV)/bin/python
# RESULTS=FOLDER keeps each tier's results as JUnit XML there.
xml = $(if $(RESULTS),--junitxml=$(RESULTS)/$1.xml)
installed := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: quickstart test lint environment clean

# Trains on the standard library's own source, then compares itself with gzip.
quickstart: $(installed)
	@$(python) -m effjax.train --config=$(CONFIG)

# The fast tests: one device in two processes, then 8 simulated devices in each. Says what it left out.
test: $(installed)
	@status=0; \
	$(python) -m pytest --tier=single -n $(WORKERS) --dist=loadfile $(call xml,single) || status=1; \
	$(python) -m pytest --tier=mesh -n $(WORKERS) --dist=loadfile $(call xml,mesh) || status=1; \
	exit $$status

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

environment: $(installed)

$(installed): pyproject.toml constraints.txt setup.py
	@tools/environment $(VENV) $(EXTRAS)
	@touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build effjax.egg-info
