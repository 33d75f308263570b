BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-slow lint cards

demo: $(INSTALLED)
	$(BIN)/hf-iai demo

test: lint
	$(BIN)/pytest -q -m "not slow" tests hf_iai

test-slow: $(INSTALLED)
	$(BIN)/pytest -q -m slow tests hf_iai

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

cards: $(INSTALLED)
	$(BIN)/python examples/render_cards.py

# The environment is made once, and brought up to date when what it is made from changes.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv .venv
	$(BIN)/pip install -c constraints.txt torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e '.[plots,baselines,test]'
	touch $@
