"""How fast, and with how much memory: `run.py` measures rows and systems, `micro.py` the kernels, `chart.py` draws."""
