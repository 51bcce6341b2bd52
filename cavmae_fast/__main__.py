"""`python -m cavmae_fast`: the command line, as torchrun starts it (`torchrun ... -m cavmae_fast pretrain ...`)."""

from cavmae_fast.cli import main

if __name__ == "__main__":
    main()
