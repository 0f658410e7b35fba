"""`python -m muonwire` is `muonwire`; so `torchrun -m muonwire train ...` works."""

from muonwire.cli.main import main

if __name__ == "__main__":
    main()
