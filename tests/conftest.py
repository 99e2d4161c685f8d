"""Settings of every test: one thread a process, as many processes run beside each other."""

import torch

torch.set_num_threads(1)
