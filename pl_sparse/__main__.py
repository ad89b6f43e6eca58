"""`python -m pl_sparse` is `pl-sparse`."""

from pl_sparse.app.cli import main

if __name__ == "__main__":
    main()
