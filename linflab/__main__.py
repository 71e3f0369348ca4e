"""Entry point of `python -m linflab`: the `linflab` command of this interpreter."""

from linflab.platform.__main__ import main

if __name__ == "__main__":
    main()
