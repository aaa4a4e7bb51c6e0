import os

# One thread for each test: the runner starts as many tests at once as there are cores, and threads that wait for a
# busy core by spinning cost more than they bring. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
