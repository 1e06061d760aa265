"""`python -m cli`, and so `torchrun -m cli`."""

from cli.app import main

if __name__ == "__main__":
    main()
