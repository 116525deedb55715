"""`python -m hf_efcp`: the command `hf-efcp`, also for torchrun."""

from .cli import main

if __name__ == "__main__":
    main()
