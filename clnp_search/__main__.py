"""`python -m clnp_search`: the command line."""

from clnp_search.cli import main

if __name__ == "__main__":
    main()
