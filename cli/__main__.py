"""Entry point of `python -m cli` and `torchrun -m cli`."""

from cli.app import main

if __name__ == "__main__":
    main()
