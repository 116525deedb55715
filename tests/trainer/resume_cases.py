"""Runs that are killed, and folders of checkpoints."""

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


SETTINGS = {"optim": "sparse_mfac", "optim_args": "num_grads=3,density=0.1,block_size=1024", "max_steps": 8}
