import torch

# One thread, as the replicas of the tests have: sums of floats depend on it.
torch.set_num_threads(1)
