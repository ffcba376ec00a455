"""`python -m p2pmesh` is the same program as `p2pmesh`."""

from p2pmesh.cli import main

if __name__ == "__main__":
    main()
