# Every target is a task of tasks.py: `make` lists them, `make forge ARGS="…"` passes arguments on.
# Without make: python tasks.py. Side by side: python tasks.py --jobs 2
PYTHON ?= python3

help: ; @$(PYTHON) tasks.py --help
always Makefile: ;
%: always ; @$(PYTHON) tasks.py $@ -- $(ARGS)
.NOTPARALLEL:
