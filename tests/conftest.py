import os

# One thread for each test: the runner starts as many tests at once as there are cores, and threads that wait for a
# busy core by spinning cost more than they bring. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests compare bits, and start more processes than a machine has GPUs: they compute on the CPU, unless a GPU is named.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
