"""Makes `python -m impl.pretrain` the command."""

from impl.pretrain.command import main

if __name__ == "__main__":
    main()
