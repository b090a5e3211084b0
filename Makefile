# make demo    set up, train the demo detector (minutes on a CPU), evaluate it, draw its detections
# make test    set up, run the tests
# make docs    set up, build the site into site/
# make setup   set up only: make setup PYTHON=/path/to/python3 VENV=.venv
VENV ?= .venv
PYTHON ?=
OUTPUT ?= output
RUN = $(VENV)/bin/python
READY = $(VENV)/.fpn_ext_ready
DEMO = configs/demo/faster_rcnn_efficientnet_lite0_FPN.yaml


.PHONY: demo exporters test test-slow test-lowest test-avx2 test-avx2-short test-export test-detectron2 test-main fuzz fuzz-million long-run at-scale figures gpu setup lint format docs lock
.DELETE_ON_ERROR:

demo: $(OUTPUT)/demo/contact_sheet.png
	@echo
	@echo "Scores:    $(OUTPUT)/demo/inference/demo_multiscale_val/results.json"
	@echo "Pictures:  $(OUTPUT)/demo/contact_sheet.png (ground truth and detections)"
	@echo "           $(OUTPUT)/demo/curves.png (loss and AP)"

# A file of tests at a time to each process, of one thread: two such are faster than one of two.
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not slow" -n auto --maxprocesses 4 --dist loadfile

# The others, which .ci/run runs as well.
test-slow: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m slow -n auto --maxprocesses 4 --dist loadfile

setup: $(READY)

# The tests with the oldest versions that pyproject.toml allows.
test-lowest:
	LOWEST=1 $(MAKE) test test-slow VENV=.venv-lowest

# On any processor, as on one without AVX-512: all tests, into results/matrix.
AVX2 = ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1
test-avx2: setup
	$(AVX2) $(RUN) tests/matrix.py run --name avx2-emulated

# Whole detectors in every format, and the pyramids by torch.onnx.export(dynamo=True): minutes each.
test-export: setup
	EXPORT_ALL=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/test_export.py \
	    tests/test_exporters_alike.py

# What computes, of test-avx2, for .ci/run.
test-avx2-short: setup
	$(AVX2) $(RUN) -m pytest -q -n auto --maxprocesses 4 tests/test_optimize.py \
	    tests/test_compiled_kernels.py tests/test_choose.py tests/test_winograd_training.py \
	    tests/test_winograd.py tests/test_pooler.py tests/test_numerics.py \
	    tests/test_pyramid_variants.py tests/test_tta.py tests/test_steps.py

# Detectron2's own tests with our classes: make test-detectron2 SRC=/path/to/detectron2
test-detectron2: setup
	OMP_NUM_THREADS=1 $(RUN) tests/detectron2_suite.py "$(SRC)"

# A checkout of Detectron2, main or any other, built in an environment of its own: all tests, and its
# own with our classes, into results/matrix: make test-main SRC=/path/to/detectron2
test-main:
	@sh tests/detectron2_source.sh "$(SRC)" .venv-main --check
	$(MAKE) setup VENV=.venv-main
	sh tests/detectron2_source.sh "$(SRC)" .venv-main
	OMP_NUM_THREADS=1 .venv-main/bin/python tests/matrix.py run --name main --detectron2 "$(SRC)"

# Thousands of inputs nobody foresaw for each reader of files; docs/evidence/reliability.md has the counts.
fuzz: setup
	FUZZ_EXAMPLES=5000 OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests -k fuzz -n auto \
	    --maxprocesses 4

# The same to a million inputs, and sequences of commands; stop it at any time, and start it again.
fuzz-million: setup
	OMP_NUM_THREADS=1 $(RUN) tests/fuzz_long.py --json results/fuzz/fuzz.json

# What annotation tools write, and what is read of it: installs them in .venv-exporters.
exporters: setup
	OMP_NUM_THREADS=1 $(RUN) benchmarks/exporters/run.py --json results/exporters/exporters.json
	$(RUN) docs/generate.py

# Memory over 2000 training iterations and 5000 predictions, into results/long_run.
long-run: setup
	OMP_NUM_THREADS=1 $(RUN) benchmarks/long_run.py --output results/long_run

# CPU time and memory with 200 000 images of 2 000 000 boxes, and other large inputs.
at-scale: setup
	$(RUN) benchmarks/at_scale.py --images 200000 --json results/at_scale/at_scale.json

# Every table, number and figure of the README and the documents, from results/; changes nothing that
# is current.
figures: setup
	$(RUN) docs/generate.py
	$(RUN) benchmarks/gain.py --report-only

# What needs a GPU: its tests, then its figures into results/speed-gpu.
gpu: setup
	$(RUN) -m pytest -q tests/test_cuda.py tests/test_fused_roi_align.py
	$(RUN) benchmarks/roi_pooling.py --device cuda --json results/speed-gpu/roi_pooling.json
	$(RUN) benchmarks/whole_model.py --device cuda --dtype float32 bfloat16 \
	    --output results/speed-gpu

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Strict: a dead link or anchor, or a page that the navigation lacks, fails. Nothing is downloaded.
docs: setup
	$(RUN) docs/generate.py
	$(RUN) -m sphinx -q -W --keep-going -d $(OUTPUT)/doctrees -c docs . site

# Pins again, from requirements/tested.in, for every Python that pyproject.toml allows.
OLDEST_PYTHON = $(shell sed -n 's/^requires-python = ">=\([0-9.]*\),.*/\1/p' pyproject.toml)
lock: setup
	$(VENV)/.uv/bin/uv pip compile -q --universal --upgrade --python-version $(OLDEST_PYTHON) \
	    --no-header --no-annotate requirements/tested.in -o requirements/tested.txt

$(READY): pyproject.toml $(wildcard requirements/*)
	PYTHON="$(PYTHON)" sh requirements/install.sh "$(VENV)"
	-@$(RUN) -m fpn_ext.kernels.compiled
	@touch "$@"
	@echo "Ready: $(VENV)/bin/fpn-ext lists the commands; . $(VENV)/bin/activate puts it on the path"

# Not `: setup`, which is always out of date: a second `make demo` has nothing left to do.
$(OUTPUT)/demo/model_final.pth: $(DEMO) configs/demo/faster_rcnn_R_18_FPN.yaml \
    configs/Base-FPN.yaml | $(READY)
	@# One of an older config is kept; one that was interrupted is resumed.
	test ! -f $@ || mv $(OUTPUT)/demo $(OUTPUT)/demo-$$(date +%Y%m%d-%H%M%S)
	$(RUN) -m fpn_ext train --config-file $(DEMO) --resume OUTPUT_DIR $(OUTPUT)/demo

$(OUTPUT)/demo/contact_sheet.png: $(OUTPUT)/demo/model_final.pth
	$(RUN) -m fpn_ext contact-sheet --config-file $(DEMO) --output $(OUTPUT)/demo \
	    MODEL.WEIGHTS $(OUTPUT)/demo/model_final.pth OUTPUT_DIR $(OUTPUT)/demo
