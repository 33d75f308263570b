BIN := .venv/bin
INSTALLED := .venv/.installed
# Two processes of one thread each: the models of the tests are too small for two threads to help.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

.PHONY: demo test test-slow lint cards

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

# The environment is made once, and brought up to date when what it is made from changes.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[plots,baselines,test]'
	touch $@
