# Everything runs in .venv, which the first command creates. All you need is a system Python, 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
SLIDE ?=
OUT ?= demo-output
JOBS ?= 3

.PHONY: help venv browser demo test test-s3 coverage check docs dist wheel lowest pythons format proofs clean

help:
	@echo "make demo [SLIDE=file]  explain a slide and show where the results are"
	@echo "make test [JOBS=n]      run the tests, in n processes"
	@echo "make test-s3 [JOBS=n]   run the suites of runs with all results in a local S3 server"
	@echo "make coverage           the tests, and which lines they reach (at least 90 %)"
	@echo "make check              format, lint, types, tests (what CI runs)"
	@echo "make docs               the site of the documentation, into site/; fails where a link leads nowhere"
	@echo "make dist               sdist and wheel, into dist/, and a look at their metadata"
	@echo "make wheel              the demo of that wheel in an empty environment (6 GB)"
	@echo "make lowest             some tests with the lowest versions of packages that are allowed (6 GB)"
	@echo "make pythons            some tests under each other Python from 3.12 on that is installed (6 GB)"
	@echo "make proofs             the long proofs: gigapixel memory, repeated kills, the image, ten thousand"
	@echo "                        damaged slides, and how often the audit tells planted truths"

venv: .venv/installed

# Quantus, an oracle in tests, requires opencv-python. This and pytorch-grad-cam's opencv-python-headless install the same
# files, and only the latter works without display libraries, so Quantus is installed without opencv-python.
# CLIENTS are the programs that exports are for; what they depend on in addition are servers.
CLIENTS := girder-large-image-annotation large-image large-image-source-tifffile large-image-source-openslide palettable \
  tifftools histomicstk tissuumaps pyvips pyvips-binary
.venv/installed: pyproject.toml constraints.txt hatch_build.py
	@command -v npm >/dev/null || { apt-get update && apt-get install -y --no-install-recommends npm; } || \
		echo "npm is missing: wsi-gradcam view will lack its page"
	$(PYTHON) -m venv .venv || { apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt --no-deps quantus $(CLIENTS)
	@touch $@

# Tests of the viewer's page need Debian's Chromium; elsewhere install it by hand.
browser:
	@command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; } || \
		echo "chromium is missing: the page's tests are skipped"

# Tests of the SLURM recipe start SLURM with two nodes from Debian's packages (4 MB); elsewhere install it by hand. The
# packages' services do not start, as there is no /etc/slurm/slurm.conf.
SLURM := slurmctld slurmd slurm-client
.PHONY: slurm
slurm:
	@PATH="$$PATH:/usr/sbin" && command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends $(SLURM); } || \
		echo "SLURM is missing: the tests of its recipe are skipped"

# Tests of exports check DICOM objects with dciodvfy, from Debian's dicom3tools; elsewhere install it by hand.
.PHONY: dicom
dicom:
	@command -v dciodvfy >/dev/null || { apt-get update && apt-get install -y --no-install-recommends dicom3tools; } || \
		echo "dicom3tools is missing: one test of DICOM is skipped"

# The image is built by one of the proofs, with Debian's tools, which need root and 40 GB of disk.
.PHONY: image-tools
image-tools:
	@PATH="$$PATH:/usr/sbin" && command -v buildah >/dev/null && command -v debootstrap >/dev/null || \
		{ apt-get update && apt-get install -y --no-install-recommends buildah debootstrap; } || \
		echo "buildah or debootstrap is missing: the image is not built"

# napari brings pytest plugins and other versions of packages, so it has an environment of its own, for two tests, which
# finds everything else in .venv.
PURELIB := python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
.venv-napari/installed: constraints-napari.txt | venv
	$(PYTHON) -m venv .venv-napari
	.venv-napari/bin/python -m pip install --disable-pip-version-check --quiet -c constraints-napari.txt \
		'napari[pyqt6]' napari-ome-zarr
	$(BIN)/$(PURELIB) > "$$(.venv-napari/bin/$(PURELIB))/beside.pth"
	@touch $@

demo: venv
	$(BIN)/wsi-gradcam demo $(SLIDE) --out $(OUT)

# Waiting threads of PyTorch should not take cores from other processes: this halves the time.
test coverage test-s3: export OMP_WAIT_POLICY := PASSIVE

test: venv browser slurm dicom .venv-napari/installed
	NAPARI_PYTHON=.venv-napari/bin/python $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Tracing every line takes a fifth of the tests' time.
coverage: venv browser slurm dicom .venv-napari/installed
	$(BIN)/python -m coverage erase
	NAPARI_PYTHON=.venv-napari/bin/python $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term

S3_SUITES := tests/test_end_to_end.py tests/test_end_to_end_damage.py tests/test_executors.py tests/test_executors_scheduling.py \
  tests/test_masked_run.py tests/test_stain_runs.py tests/test_remote_runs.py tests/test_resume.py tests/test_results_validation.py \
  tests/test_out_on_s3.py tests/test_io_paths.py

test-s3: venv
	WSI_GRADCAM_TEST_OUT=s3 $(BIN)/python -m pytest -n $(JOBS) --no-cov $(S3_SUITES)

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

docs: export NO_MKDOCS_2_WARNING := 1
docs: venv
	$(BIN)/mkdocs build --strict
	@echo "open site/index.html"

dist: venv
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# For a different Python: .venv/bin/nox --session wheel-3.13.
wheel: dist
	$(BIN)/python -m nox --session wheel-3.11; status=$$?; rm -rf .nox; exit $$status

lowest: venv
	$(BIN)/python -m nox --session lowest; status=$$?; rm -rf .nox; exit $$status

# One after the other, as an environment takes 6 GB. noxfile.py explains how those of pyenv are found.
OTHERS := 3.12 3.13 3.14
pythons: venv
	for python in $(OTHERS); do \
		command -v python$$python >/dev/null && python$$python --version >/dev/null 2>&1 || { echo "no Python $$python"; continue; }; \
		$(BIN)/python -m nox --session tests-$$python; status=$$?; rm -rf .nox; [ $$status = 0 ] || exit $$status; \
	done

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proofs: coverage image-tools
	$(BIN)/python -m pytest -m slow --no-cov --timeout=7200
	$(MAKE) wheel lowest pythons
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python -m tests.planted_evidence --seeds 50
	$(BIN)/python -m tests.fuzz --cases 10000
	$(BIN)/python -m tests.chaos --kills 30
	$(BIN)/python -m tests.chaos --kills 30 --store s3
	$(BIN)/python -m tests.slurm_chaos --kills 30
	for command in explain audit evidence export; do for store in disk s3; do \
		$(BIN)/python -m tests.chaos --kills 100 --command $$command --store $$store || exit 1; \
	done; done

clean:
	rm -rf .venv .venv-napari .nox demo-output dist site .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis
